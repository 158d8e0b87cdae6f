"""Draw pictures of sentences with a trained GALIP, one forward pass each.

    python -m gan.sample "a large red heart on a blue background" --n 16 --seed 3 --out hearts.png
    python -m gan.sample "a red star on a black background" --to "a blue ring on a white background"     # a film strip
    python -m gan.sample "a green cross on a white background" --attribute green                         # where it shows
    python -m gan.sample "a herd of zebras" --ckpt pre_coco.pth --clip ViT-B-32.pt                       # the authors' weights
"""
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from data.clip import galip_compat, standard
from data.options import from_plain, options_of, run, words_first
from data.pictures import grid, panels, strip
from data.weights import load_checkpoint, load_parts, open_run
from gan.model import generator_from_official
from gan.task import Config, networks, paint
from gan.words import Sentences
from kernels.attribution import show


@dataclass
class Options:
    """Draw one or more sentences:  python -m gan.sample "SENTENCE" ["SENTENCE" ...] [--option=value ...]"""

    n: int = 16                                 # pictures of each sentence
    seed: int = 0                               # of the noise
    truncation: float = 0.0                     # keep noise within this many standard deviations; 0: leave it as drawn
    to: str = ""                                # a second sentence: a film strip from the first to it, noise unchanged
    to_seed: int = -1                           # a second noise: a film strip from --seed to it
    frames: int = 8                             # pictures of a film strip
    attribute: str = ""                         # a word of the sentence: where in the pictures CLIP sees it
    ckpt: str = "runs/galip-default/best.pt"    # a checkpoint of train.py, or the authors' (netG)
    clip: str = ""                              # CLIP's weights, if the model was trained with other than the small one
    vocabulary: str = ""                        # OpenAI's bpe_simple_vocab_16e6.txt.gz; empty: beside --clip
    out: str = "sample.png"                     # where to write the picture


class Painter:
    """A trained generator, its CLIP and nothing else: no data set is opened."""

    def __init__(self, ckpt, clip="", vocabulary=""):
        checkpoint = load_checkpoint(ckpt)
        if "netG" in checkpoint.get("model", {}):                      # Official code: {"model": {"netG", "netD", "netC"}, ...}
            self.words = self.sentences(clip, vocabulary, ckpt)
            self.generator, tower = generator_from_official(checkpoint["model"]["netG"], self.words.clip.visual.patch)
            self.words.clip.visual.load_state_dict({k: v.float() for k, v in tower.items()}, strict=False)
            self.prepare = galip_compat
        else:
            config, state = open_run(ckpt, "galip")
            cfg = from_plain(Config, config)
            self.words = self.sentences(clip or cfg.clip, vocabulary or cfg.vocabulary, ckpt)
            self.generator = networks(cfg, self.words.clip)[0]
            load_parts({"words": self.words, "average": self.generator}, state, f"{ckpt} does not fit")
            self.prepare = galip_compat if cfg.compat else standard
        self.generator.eval().requires_grad_(False)

    def sentences(self, clip, vocabulary, ckpt):
        if clip and not Path(clip).is_file():
            raise FileNotFoundError(f"{clip} is missing: {ckpt} was trained with that CLIP; pass its place with --clip")
        return Sentences(clip, vocabulary).to(torch.device("cpu"))

    def read(self, texts):
        """Sentence vectors (N, E).   raises ValueError for an empty, too long or unreadable sentence"""
        for text in texts:
            if not text.strip():
                raise ValueError('an empty sentence says nothing to draw; try  python -m gan.sample "a red star"')
        return self.words(texts, strict=True)

    def noise(self, count, seed, truncation=0.0):
        """Standard normal (N, Z), or cut off at +-truncation: fewer surprises, less variety (DF-GAN cuts, GALIP does not)."""
        if truncation < 0:
            raise ValueError(f"--truncation={truncation} must not be negative; 0 leaves the noise as it is")
        rng, z = torch.Generator().manual_seed(seed), torch.empty(count, self.generator.noise)
        if truncation:
            return torch.nn.init.trunc_normal_(z, a=-truncation, b=truncation, generator=rng)
        return z.normal_(generator=rng)

    def paint(self, noise, told):
        """Noise (N, Z) and sentence vectors (N, E) of `read` -> (N, 3, S, S) in [-1, 1]"""
        return paint(self.generator, noise, told, self.words.clip)

    def attribute(self, pictures, sentence, word):
        """Where CLIP sees a word: what each patch adds to the word's score.   -> map (N, S, S) in [0, 1], pictures under it

        The score is cos(picture, sentence) - cos(picture, sentence without the word); a patch adds activation times gradient,
        taken where the tokens enter CLIP's last block, the last place from which they still reach the class token. Grad-CAM,
        which averages gradients over patches first, points off the object there: position is in the tokens themselves.
        """
        kept = [w for w in sentence.split() if w.strip(".,").lower() != word.lower()]
        if len(kept) == len(sentence.split()):
            raise ValueError(f"--attribute={word}: '{sentence}' does not hold that word")
        whole, rest = self.read([sentence, " ".join(kept)])
        clip, caught = self.words.clip, []
        hook = clip.visual.transformer.resblocks[-2].register_forward_hook(
            lambda block, inputs, tokens: caught.append(tokens.requires_grad_()) or tokens)
        with torch.enable_grad():
            image = clip.encode_image(self.prepare(pictures, clip.size).requires_grad_())[1]
            hook.remove()
            score = F.cosine_similarity(image, whole[None]) - F.cosine_similarity(image, rest[None])
            slope = torch.autograd.grad(score.sum(), caught[0])[0]
        return show(clip.visual.as_map((caught[0] * slope).detach()).sum(1).relu(), pictures, normalise="max")


def between(a, b, frames):
    """From a to b along a straight line.   (D,), (D,) -> (frames, D)"""
    return torch.lerp(a, b, torch.linspace(0, 1, frames)[:, None])


def around(a, b, frames):
    """From a to b at the length that normal noise has: along a great circle (a straight line would pass near zero)."""
    angle = torch.arccos(F.cosine_similarity(a, b, dim=0).clamp(-1, 1))
    if angle < 1e-4:
        return a.expand(frames, -1)
    t = torch.linspace(0, 1, frames)[:, None]
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def film(painter, sentence, options):
    """From one sentence to another, from one noise to another, or both.   -> pictures (frames, 3, S, S), captions"""
    if options.frames < 2:
        raise ValueError(f"--frames={options.frames}: a film strip needs at least two")
    told = painter.read([sentence, options.to or sentence])
    seeds = options.seed, options.seed if options.to_seed < 0 else options.to_seed
    z = [painter.noise(1, seed, options.truncation)[0] for seed in seeds]
    pictures = painter.paint(around(*z, options.frames), between(*told, options.frames))
    captions = [""] * options.frames
    captions[0], captions[-1] = sentence, options.to or f"the same sentence, noise of seed {options.to_seed}"
    return pictures, captions


def main(argv):
    sentences, rest = words_first(argv)
    options = options_of(rest, Options, 'python -m gan.sample "SENTENCE"')
    if not sentences:
        raise ValueError('what shall be drawn? Type  python -m gan.sample "a red star on a black background"')
    if options.n < 1:
        raise ValueError(f"--n={options.n}: ask for at least one picture")
    painter = Painter(options.ckpt, options.clip, options.vocabulary)
    began = time.perf_counter()
    if options.to or options.to_seed >= 0:
        pictures, captions = film(painter, sentences[0], options)
        strip(options.out, pictures, captions, columns=options.frames)
    else:
        noise, told = painter.noise(options.n, options.seed, options.truncation), painter.read(sentences)
        pictures = painter.paint(noise.repeat(len(told), 1), told.repeat_interleave(options.n, 0))
        if options.attribute:
            seen = torch.cat([painter.attribute(part, text, options.attribute)[1]
                              for part, text in zip(pictures.split(options.n), sentences, strict=True)])
            rows = [row for pair in zip(pictures.split(8), seen.split(8), strict=True) for row in pair]
            panels(options.out, [[(picture, None) for picture in row] for row in rows],
                   title=f"where CLIP sees '{options.attribute}': {'; '.join(sentences)}")
        elif len(sentences) == 1:
            columns = next((c for c in range(math.ceil(options.n**0.5), 9) if options.n % c == 0), 8)    # whole rows if possible
            grid(options.out, pictures, columns=columns, title=sentences[0])
        else:
            captions = [text if i == 0 else "" for text in sentences for i in range(options.n)]
            grid(options.out, pictures, captions, columns=options.n)
    took = 1000 * (time.perf_counter() - began) / len(pictures)
    print(f"{len(pictures)} pictures, {took:.1f} ms each with its file -> {options.out}")


if __name__ == "__main__":
    run(main)
