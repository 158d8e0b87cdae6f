"""Training and judging GALIP and its rivals: one step of the paper, pictures judged by a net that no loss has seen.

    python train.py galip                                                         # captions of the built-in world
    python train.py galip --data=noto --root=FOLDER                               # emoji, or any pictures with sentences
    python train.py galip --paper=birds --root=FOLDER --clip=ViT-B-32.pt          # the published sizes, OpenAI's CLIP
    python train.py galip --ablate --seeds=3                                      # every switch and the plain critic
"""
import copy
from dataclasses import dataclass

import torch

from data import captions, parallel, world
from data.batches import batch_rows, generator, seed_from
from data.clip import galip_compat, standard
from data.metrics import frechet_distance, r_precision
from data.options import check_ranges, check_words
from data.pictures import grid
from data.reader import accuracy, reader
from gan.model import Critic, Generator, PlainCritic, clip_similarity, gradient_penalty, hinge_d
from gan.words import Sentences, fit, table

JUDGED = {"valid": 256, "test": 1024}      # pictures of one evaluation
CANDIDATES = 100                           # sentences of one retrieval: chance is 1 / 100
CHUNK = 64                                 # pictures made at once when judging
SHOWN = ("a large red heart on a plain blue background", "a small yellow star on a plain black background",
         "a large striped purple circle on a plain white background", "a large green cross on a checkered grey background",
         "a large dotted orange square on a plain green background", "a small cyan ring on a shaded white background",
         "a large pink triangle on a plain black background", "a large blue moon on a cloudy yellow background")


@dataclass
class Config:
    """GALIP on captioned pictures (defaults: the built-in world at 64 px; the paper's sizes by --paper=birds, coco)."""

    data: str = "builtin"            # builtin, noto, emojitwo, birds64, birds, coco, folder, ... (data/captions.py)
    root: str = ""                   # folder of the real data
    clip: str = ""                   # file of CLIP's weights, such as ViT-B-32.pt; empty: the small CLIP shipped here
    vocabulary: str = ""             # OpenAI's bpe_simple_vocab_16e6.txt.gz; empty: beside --clip
    objects: int = 1                 # builtin: most things in a picture, 1 to 3
    stray: float = 0.0               # builtin: how far an object lies from the middle; 1: as far as the world has it
    full: float = 0.75               # builtin: share of captions that tell every attribute; the others leave things out
    seed: int = 0                    # random seed
    steps: int = 2400                # optimiser steps
    eval_every: int = 300            # steps between evaluations
    patience: int = 0                # evaluations without improvement before stopping; 0: never
    batch: int = 16                  # pictures in a step, B (official: 64 on each of 8 GPUs)
    noise: int = 32                  # width of z (official: 100)
    base: int = 8                    # channels at the picture's side, nf (official: 64)
    bridge: tuple = (32, 16, 2)      # bridge predictor: channels, hidden channels, blocks (official: 64, 32, 4)
    fusion: int = 96                 # least hidden width of the text's scales and shifts (official: 0, that of their channels)
    canvas: float = 1.0              # spread of the constant map that the noise is added to (official: 0, torch's default)
    prompt_layers: tuple = (1, 2)    # CLIP blocks, from 0, that see a prompt (official: 1 to 8)
    taps: tuple = (0, 1, 2)          # CLIP blocks, from 0, whose output the critic sees (official: 1, 4, 8)
    channels: int = 64               # of the critic's features (official: 512)
    hidden: int = 64                 # channels of the quality assessor (official: 128)
    lr_g: float = 1e-3               # Adam step size of the generator (official: 1e-4)
    lr_d: float = 2e-3               # Adam step size of the critic (official: 4e-4)
    clip_weight: float = 4.0         # of the CLIP similarity, lambda (official: 4)
    penalty: float = 2.0             # of the gradient penalty, k; its power is 6
    penalty_form: str = "code"       # code: one norm of both gradients; paper: the sum of two norms
    ema: float = 0.995               # decay of the averaged generator that draws and is judged (official: none, 0)
    critic: str = "clip"             # clip: the paper's; plain: DF-GAN's on pixels
    mapper: bool = True              # frozen CLIP inside the generator
    prompts: bool = True             # prompts inside the mapper
    compat: bool = False             # show CLIP pictures as the official code does: nearest, squeezed into [0.5, 1]
    words_steps: int = 600           # steps of fitting the small CLIP to other data than the built-in world

    def __post_init__(self):
        check_words(self, critic=("clip", "plain"), penalty_form=("code", "paper"))
        check_ranges(self, objects=(1, 3))
        if self.batch < 2:
            raise ValueError(f"--batch={self.batch}: a mismatched pair needs another sentence, so at least 2 pictures")
        if self.objects > 1 and self.stray != 1:
            raise ValueError(f"--objects={self.objects} keep apart only where the world puts them: add --stray=1")


def paper(name):
    """Published sizes as overrides: birds (CUB), coco. They want OpenAI's ViT-B/32 (--clip) and pictures of 224 px."""
    pictures = {"birds": 8_855, "coco": 82_783}
    if name not in pictures:
        raise ValueError(f"--paper={name} is unknown; there are {', '.join(pictures)}")
    epoch = max(1, pictures[name] // 512)                     # about 1000 epochs for coco, by the author's word
    return {"data": name, "steps": 1000 * epoch, "eval_every": 10 * epoch, "batch": 512, "noise": 100, "base": 64,
            "bridge": (64, 32, 4), "fusion": 0, "canvas": 0.0, "prompt_layers": tuple(range(1, 9)), "taps": (1, 4, 8),
            "channels": 512, "hidden": 128, "lr_g": 1e-4, "lr_d": 4e-4, "ema": 0.0}


def candidates(texts):
    """How many sentences a picture's own one is told from: 100, or what a small set has besides its equals."""
    return min(CANDIDATES, len(texts) - max(map(texts.count, set(texts))) + 1)


def networks(cfg, clip):
    """Generator and critic of a configuration, around any CLIP.   raises ValueError for blocks that CLIP lacks"""
    depth = len(clip.visual.transformer.resblocks)
    for name in ("taps", "prompt_layers"):
        if not getattr(cfg, name) or max(getattr(cfg, name)) >= depth:
            raise ValueError(f"--{name}={getattr(cfg, name)}: this CLIP has blocks 0 to {depth - 1}, name at least one")
    painter = Generator(clip.width, clip.grid, clip.visual.patch, clip.embed, cfg.noise, cfg.base, cfg.bridge, cfg.prompt_layers,
                        cfg.mapper, cfg.prompts, cfg.fusion, cfg.canvas)
    if cfg.critic == "plain":
        return painter, PlainCritic(clip.size, clip.embed, cfg.base)
    return painter, Critic(clip.width, clip.grid, clip.embed, cfg.taps, cfg.channels, cfg.hidden)


@torch.no_grad()
def paint(net, noise, told, clip):
    """Pictures in [-1, 1] of noise (N, Z) and sentence vectors (N, E), CHUNK at once.   -> (N, 3, S, S)"""
    return torch.cat([net(z, e, clip).clamp(-1, 1).float() for z, e in zip(noise.split(CHUNK), told.split(CHUNK), strict=True)])


class Task:
    """GALIP on one data set; see the contract in train.py."""

    headline, better = "attributes", "higher"
    table = ("attributes", "shape", "colour", "background", "R-precision", "Frechet", "CLIP score")
    ablations = {
        "full": {}, "plain discriminator": {"critic": "plain"}, "w/o mapper": {"mapper": False},
        "w/o prompts": {"prompts": False}, "w/o CLIP loss": {"clip_weight": 0.0}, "first tap only": {"taps": (0,)},
        "deepest tap only": {"taps": (3,)}, "narrow fusion": {"fusion": 0}, "w/o canvas": {"canvas": 0.0},
        "w/o penalty": {"penalty": 0.0}, "DF-GAN": {"critic": "plain", "mapper": False, "clip_weight": 0.0},
    }

    def __init__(self, cfg, device):
        self.cfg, self.device = cfg, device
        self.words = Sentences(cfg.clip, cfg.vocabulary).to(device)
        self.clip = self.words.clip                                               # frozen; a part of nothing
        self.builtin = cfg.data == "builtin"
        self.data = {split: captions.load(cfg.data, cfg.root, split, self.clip.size, objects=(1, cfg.objects))
                     for split in ("train", "valid", "test")}
        if not self.builtin:
            self.headline, self.better = "Frechet", "lower"                       # nobody can read its attributes
            if small := [split for split in ("valid", "test") if len(self.data[split]) < 2]:
                raise ValueError(f"the {small[0]} part of {self.data[small[0]].name} holds {len(self.data[small[0]])} picture; "
                                 "judging needs at least 2: add pictures")
            if not cfg.clip:
                self.words.adopt(table(self.data["train"]))
        self.generator, self.critic = (net.to(device) for net in networks(cfg, self.clip))
        if device.type == "cpu":
            self.generator.to(memory_format=torch.channels_last)                  # half the time in convolutions
        self.average = copy.deepcopy(self.generator).requires_grad_(False)        # draws and is judged
        self.g_optimiser = torch.optim.Adam(self.generator.parameters(), cfg.lr_g, (0.0, 0.9), fused=True)
        self.d_optimiser = torch.optim.Adam(self.critic.parameters(), cfg.lr_d, (0.0, 0.9), fused=True)
        self.saved = {"words": self.words, "generator": self.generator, "critic": self.critic, "average": self.average,
                      "g_optimiser": self.g_optimiser, "d_optimiser": self.d_optimiser}
        self.reader = reader().to(device)                                         # the judge: in no loss
        self.chance = {"R-precision": 1 / candidates(self.asked("test", JUDGED["test"])[0])}
        if self.builtin:
            single = {name: 1 / len(values) for name, values in world.VALUES.items()}
            self.chance |= single | {"attributes": sum(single.values()) / len(single)}
        self.next = f'python -m gan.sample "{SHOWN[0] if self.builtin else self.data["test"].captions[0][0]}" --n 16'

    # -- data ------------------------------------------------------------------------------------------------------------

    def batches(self, seed, start, stop):
        """This rank's pictures (B / world, 3, S, S) and the sentences of the whole batch, B strings."""
        data, cfg = self.data["train"], self.cfg
        for t in range(start, stop):
            rows, draw = batch_rows(len(data), cfg.batch, seed, t), seed_from(seed, t)
            if self.builtin:
                scene, told = self.scenes(rows), round(cfg.full * cfg.batch)
                texts = world.captions(world.pick(scene, slice(told)))
                texts += world.captions(world.pick(scene, slice(told, None)), 1 + t % 9)
                pictures = world.render({name: parallel.shard(of) for name, of in scene.items()}, data.size)[0]
            else:
                texts, pictures = data.sentences(rows, draw), data.images(parallel.shard(rows), draw)
            yield pictures.to(self.device), texts

    def scenes(self, rows, split="train"):
        """Scenes of the built-in world. The object is moved to the middle (official code: cuts birds around their box)."""
        scene = world.scenes(rows, split=split, objects=(1, self.cfg.objects))
        return scene | {"centre": scene["centre"] * self.cfg.stray}

    def prepare(self, pictures):
        """Pictures in [-1, 1] as CLIP wants them."""
        return (galip_compat if self.cfg.compat else standard)(pictures, self.clip.size)

    # -- one step of the paper (spec. 7) -----------------------------------------------------------------------------------

    def update(self, batch, step):
        """Critic, then generator, on one batch of fakes; then the running average of the generator."""
        cfg, clip = self.cfg, self.clip
        if step == 0 and self.words.fitted:
            fit(self.words, self.data["train"], cfg.words_steps, cfg.seed)
        pictures, texts = batch
        told = self.words(texts)                                                        # (global B, E)
        sentence, wrong = parallel.shard(told), parallel.shard(told.roll(-1, 0))        # picture i with sentence i + 1
        noise = parallel.shard(torch.randn(cfg.batch, cfg.noise, device=self.device))

        # Official code: lets the critic's loss run back through the tower to the real pixels, for nothing.
        with torch.no_grad():
            evidence, _ = self.critic.look(self.prepare(pictures), clip, embed=False)
        fake = self.generator(noise, sentence, clip)
        seen, embedding = self.critic.look(self.prepare(fake), clip, embed=cfg.clip_weight > 0)

        # critic: real pairs up, fake pairs and mismatched pairs down; flat around real pairs. float32 also under --amp
        with torch.autocast(self.device.type, enabled=False):
            evidence, pair = evidence.float().requires_grad_(), sentence.float().requires_grad_()
            real = self.critic.extract(evidence)
            score = self.critic.assess(real, pair)
            fooled = self.critic.score(seen.detach().float(), sentence.float())
            d_loss = hinge_d(score, fooled, self.critic.assess(real, wrong.float()))
            penalty = d_loss.new_zeros(())
            if cfg.penalty:
                penalty = gradient_penalty(score, evidence, pair, cfg.penalty, form=cfg.penalty_form)
            parallel.descend(self.d_optimiser, d_loss + penalty)

        # generator: fool the critic, and agree with CLIP about the sentence; the same fakes, no second forward pass
        self.critic.requires_grad_(False)
        g_loss = -self.critic.score(seen, sentence).mean()
        similarity = clip_similarity(embedding, sentence) if cfg.clip_weight else g_loss.new_zeros(())
        parallel.descend(self.g_optimiser, g_loss - cfg.clip_weight * similarity)
        self.critic.requires_grad_(True)
        self.follow(step)
        return {"d": d_loss.detach(), "penalty": penalty.detach(), "g": g_loss.detach(), "clip": similarity.detach()}

    def follow(self, step):
        """Exponential moving average of the generator; the first steps count less, so that its random start is soon gone."""
        decay = min(self.cfg.ema, (1 + step) / (10 + step)) if self.cfg.ema else 0.0
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.generator.parameters()), 1 - decay)

    # -- judging -----------------------------------------------------------------------------------------------------------

    def paint(self, texts, seed):
        """One picture a sentence by the averaged generator; noise from the seed.   -> (N, 3, S, S)"""
        noise = torch.randn(len(texts), self.cfg.noise, generator=generator(seed)).to(self.device)
        return paint(self.average, noise, self.words(texts), self.clip)

    def asked(self, split, count):
        """Sentences, real pictures and, in the built-in world, scenes to judge a split by; sentences there tell everything."""
        if not self.builtin:
            data = self.data[split]
            count = min(count, len(data))
            rows = [n * len(data) // count for n in range(count)]                 # from all over it: files are sorted by kind
            return data.sentences(rows), data.images(rows), None
        scene = self.scenes(range(count), split)
        return world.captions(scene), world.render(scene, self.clip.size)[0], scene

    def evaluate(self, split):
        """What the reader reads in generated pictures, R-precision, Frechet distance, CLIP score; on test also variety.

        variety   by how much a pixel of one sentence's pictures varies over six noises (standard deviation)
        """
        texts, _, scene = self.asked(split, JUDGED[split])
        metrics = self.judge(self.paint(texts, seed=1), texts, scene, split)
        if split == "test":
            metrics["variety"] = float(torch.stack([self.paint(texts[:16], seed) for seed in range(6)]).std(0).mean())
        if self.builtin and split == "test":                                      # combinations never trained on
            texts, _, scene = self.asked("unseen", JUDGED["valid"])
            metrics |= {f"unseen {k}": v for k, v in self.read(self.paint(texts, seed=2), scene).items()
                        if k in ("attributes", "shape", "colour")}
        return metrics

    @torch.no_grad()
    def judge(self, pictures, texts, scene, split):
        """Metrics of pictures that should show `texts`. The CLIP score, and R-precision by the same CLIP, are trained on.

        Frechet compares the reader's features with those of as many other real pictures of the data set.
        """
        metrics = self.read(pictures, scene) if scene else {}
        told = self.words(texts)
        shown = torch.cat([self.clip.encode_image(self.prepare(x))[1] for x in pictures.split(CHUNK)])
        same, k = {text: i for i, text in enumerate(texts)}, candidates(texts)
        groups = torch.tensor([same[text] for text in texts])
        metrics["R-precision"] = r_precision(shown, told, k, generator(3), groups) if k > 1 else 1.0
        others = self.features(self.others(split, len(texts)))
        metrics["Frechet"] = float(frechet_distance(self.features(pictures), others, "reader"))
        metrics["CLIP score"] = float(clip_similarity(shown, told))
        return metrics

    def read(self, pictures, scene):
        """{attribute: share of objects or pictures as asked for}, "attributes": their mean."""
        readings = [self.reader(part) for part in pictures.split(CHUNK)]
        reading = {name: torch.cat([r[name] for r in readings]).cpu() for name in readings[0]}
        right = accuracy(reading, scene, where=False)
        right = {name: right[name] for name in world.VALUES}
        return {"attributes": sum(right.values()) / len(right)} | right

    def features(self, pictures):
        return torch.cat([self.reader.features(part.to(self.device)) for part in pictures.split(CHUNK)])

    def others(self, split, count):
        """Real pictures that no judged sentence belongs to: later rows of the world's split; elsewhere, training pictures."""
        if self.builtin:
            return world.render(self.scenes(range(count, 2 * count), split), self.clip.size)[0]
        return self.data["train"].images(batch_rows(len(self.data["train"]), count, 0, 0))

    def rivals(self):
        """The same metrics of real pictures of the same sentences: what a perfect generator would get."""
        texts, pictures, scene = self.asked("test", JUDGED["test"])
        return {"real pictures, the ceiling": self.judge(pictures.to(self.device), texts, scene, "test")}

    # -- what a person looks at ----------------------------------------------------------------------------------------------

    def watch(self, folder, step):
        """samples-STEP.png while training: always the same noise and sentences."""
        self.sheet(folder / f"samples-{step:06d}.png", f"{step} steps: a sentence a column, the same noise as always")

    def sheet(self, path, title, rows=4):
        """Eight sentences (or as many as there are) that no training picture belongs to."""
        texts = list(SHOWN) if self.builtin else self.asked("test", 8)[0]
        pictures = self.paint(texts * rows, seed=4).cpu()
        grid(path, pictures, [""] * len(texts) * (rows - 1) + texts, len(texts), title)

    def sample(self, folder):
        """samples.png: eight sentences, four pictures each; beside.png: test sentences, the real picture over the generated."""
        self.sheet(folder / "samples.png", "a sentence a column, four noises")
        texts, pictures, _ = self.asked("test", 12)
        made = self.paint(texts, seed=5).cpu()
        grid(folder / "beside.png", torch.cat([pictures, made]), [""] * len(texts) + texts, len(texts),
             "test sentences: a real picture above, a generated one below")
