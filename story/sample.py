"""Sentences in, a strip of frames out: visualise, continue, fill in and edit stories with a trained model.

    python -m story.sample "Pip the red star walks in the snow." "It meets Mo." "They jump." "It stands on the left."
    python -m story.sample "..." "..." "..." "..." --given 2=frame.png            # complete around what is known
    python -m story.sample --story story.json --edit "3=Mo walks on the right."   # redraw one frame of an earlier strip
    python -m story.sample --row 0                                                # a held-out story of the data set

Frames count from 1. Fewer sentences than the model's frames make a shorter strip. More of them slide the board: every later
frame is drawn beside the ones before it. An empty sentence ("") leaves a frame to its neighbours.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from data import safe
from data.batches import seed_from
from data.options import from_plain, options_of, run, words_first
from data.parts import squeeze, to_tensor
from data.pictures import gif, panels, strip, to_pil
from data.weights import load_checkpoint, load_parts
from kernels.attribution import show, word_maps
from story.storyimager import FrameStoryAttention
from story.task import Config, Task, outlined


@dataclass
class Options:
    """Draw a story from its sentences."""

    given: tuple = ()        # frames that are known, such as 2=frame.png or 1=a.png,4=b.png; frames count from 1
    story: str = ""          # the .json of an earlier strip: its sentences and frames
    edit: str = ""           # with --story: "3=It jumps." redraws frame 3 from this sentence beside the others
    row: int = -1            # sentences of this held-out story of the data set, instead of your own
    steps: int = 0           # denoising steps; 0: as the model was judged
    guidance: float = -1.0   # classifier-free guidance, 1: none; -1: as the model was judged
    eta: float = 0.0         # 0: DDIM; 1: ancestral sampling
    seed: int = 0            # another seed, another story
    words: bool = False      # also OUT-words.png: where each word of a frame looks, and which frames the story branch reads
    ckpt: str = "runs/storyimager-default/best.pt"    # a checkpoint that train.py wrote
    root: str = ""           # folder of the real data, if it is not where it was in training
    out: str = "story.png"   # the strip; beside it OUT.gif, OUT.json and a file a frame, OUT-1.png, ...


def restore(ckpt, root=""):
    """The task a checkpoint describes, with its averaged weights.   raises ValueError or FileNotFoundError, one sentence"""
    checkpoint = load_checkpoint(ckpt)
    config = checkpoint.get("config", {})
    if "base_steps" not in config or "autoregressive" not in config:
        raise ValueError(f"{ckpt} holds '{checkpoint.get('name')}', not a model of story; point --ckpt at a run of storyimager")
    task = Task(from_plain(Config, config | {"base": "", "base_steps": 0 if config["base"] else config["base_steps"]}
                           | ({"root": root} if root else {})), torch.device("cpu"))
    where = f"{ckpt} does not fit the data in --root={task.cfg.root or 'builtin'}"
    load_parts({"average": task.average}, checkpoint["state"], where)
    return task


def numbered(text, option, count):
    """"2=frame.png" -> (1, "frame.png").   raises ValueError for what is not a frame of the story"""
    number, equals, value = text.partition("=")
    if not equals or not number.strip().isdigit() or not value:
        what, such = ("file", "frame.png") if option == "given" else ("sentence", "It jumps.")
        raise ValueError(f"--{option} {text}: write the frame's number, =, and the {what}, such as --{option} 2={such}")
    if not 1 <= int(number) <= count:
        raise ValueError(f"--{option} {text}: this story has frames 1 to {count}")
    return int(number) - 1, value


def known_frame(path, size):
    """A picture of any size as a frame.   -> (3, size, size) in [-1, 1]"""
    image = safe.open_image(Path(path))
    if image.size != (size, size):
        print(f"{path} is {image.width} x {image.height}: squeezed to the model's {size} x {size}")
    return to_tensor([squeeze(image, size)])[0]


def draw_story(task, told, given=(), seed=0, **settings):
    """N sentences and known frames {index: (3, H, W)} -> (N, 3, H, W), the known ones as they came.

    The board holds F frames. Missing sentences at the end are drawn blank and dropped; beyond F the board slides on by one
    frame at a time, and the F - 1 frames before the new one are given.
    raises   ValueError if there is no sentence or nothing left to draw
    """
    given, board, count = dict(given), task.frames, len(told)
    if not told:
        raise ValueError('there is no sentence: write one a frame, such as  python -m story.sample "Pip walks." "It jumps."')
    if len(given) == len(told):
        raise ValueError(f"all {len(told)} frames are given, so there is nothing to draw: leave one out of --given")
    size = task.cfg.size
    frames, known = torch.zeros(max(len(told), board), 3, size, size), torch.zeros(max(len(told), board), dtype=torch.bool)
    for n, picture in given.items():
        frames[n], known[n] = picture, True
    told = [*told, *[""] * (board - len(told))]
    for stop in range(board, len(told) + 1):
        window = slice(stop - board, stop)
        if not known[window].all():
            seed_here = seed if stop == board else seed_from(seed, stop)
            drawn = task.draw(frames[None, window], [told[window]], (~known[None, window]).float(), seed_here, **settings)
            frames[window] = drawn[0]
            known[window] = True
    return frames[:count]


@torch.no_grad()
def looks(task, pictures, told, time=500):
    """Where words and story tokens are looked for while a finished strip is drawn again.

    -> words (F, L, h, w): attention of a frame's own pixels to its words; story (F, F, h, w) or None: to the story tokens of
    each frame. Summed over heads, averaged over the layers of the finest board that has attention.
    """
    net, seen = task.average.eval(), []
    (words, keep), z0 = task.read([told], net), task.latents(pictures[None])
    layers = [m for m in net["story"].unet.modules() if isinstance(m, FrameStoryAttention)]
    hooks = [m.register_forward_hook(lambda m, x, y: seen.append((m, *x))) for m in layers]
    story, a = net["story"], net["story"].alpha_bar[time]
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    mask = task.mask(torch.ones(1, task.frames))
    story.denoise(a.sqrt() * z0 + (1 - a).sqrt() * noise, torch.tensor([time]), words, keep, mask)
    for hook in hooks:
        hook.remove()
    finest = max(size[0] * size[1] for _, _, _, size in seen)
    maps, story_maps = [], []
    for layer, x, story, size in seen:
        if size[0] * size[1] == finest:
            cells = Cells(layer, x, story, size)
            maps.append(cells.words())
            if layer.mode == "both":
                story_maps.append(cells.story(task.cfg.tokens))
    order = task.board.frames().argsort()[: task.frames] if not task.cfg.independent else torch.arange(task.frames)
    mean = [torch.stack(group).mean(0)[order] for group in (maps, story_maps) if group]
    return mean[0], (mean[1][:, : task.frames] if len(mean) > 1 else None)


class Cells:
    """Attention of one layer, cell by cell in the board's order; independent frames are boards of one cell."""

    def __init__(self, layer, x, story, size):
        rows, cols = story.cells
        self.size = size[0] // rows, size[1] // cols
        self.q, self.k, _ = layer.project(x, story.words, layer.frame)
        self.qs, self.ks, _ = layer.project(x, story.context, layer.story)
        self.cells = rows, self.size[0], cols, self.size[1]

    def cut(self, q):
        """Pixels of the board -> pixels of each cell.   (B, H W, heads, d) -> (B r c, h w, heads, d)"""
        return q.unflatten(1, self.cells).transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def words(self):
        return word_maps(self.cut(self.q), self.k.flatten(0, 1), self.size)

    def story(self, tokens):
        """Tokens of one frame added up.   -> (cells, frames, h, w)"""
        q = self.cut(self.qs)
        k = self.ks.repeat_interleave(len(q) // len(self.ks), 0)
        return word_maps(q, k, self.size).unflatten(1, (-1, tokens)).sum(2)


def draw_looks(path, task, pictures, told):
    """A row a frame: the frame, each word's region over it, and how much the story branch reads of every frame."""
    if task.cfg.mode == "story":
        raise ValueError("--words: this model has no frame branch, so no pixel looks at a word")
    maps, story = looks(task, pictures, told)
    pieces, rows = task.net["words"].pieces, []
    for f, text in enumerate(told):
        row = [(pictures[f], text)]
        for n, piece in enumerate(pieces(text)[: maps.shape[1]]):
            row.append((show(maps[f, n][None], pictures[f][None])[1][0], piece))
        rows.append(row)
        if story is not None:
            share = story[f].sum((1, 2)) / story[f].sum()
            rows.append([(pictures[f], f"story branch of frame {f + 1}")] + [
                (show(story[f, g][None], pictures[f][None])[1][0], f"reads frame {g + 1}: {100 * share[g]:.0f} %")
                for g in range(len(share))])
    panels(path, rows, 96, "where the pixels of a frame look: its own words (frame branch), the story's frames (story branch)")


def earlier(path):
    """Sentences and frames of a strip that this command wrote.   -> told, (F, 3, H, W) list"""
    saved = safe.read_json(Path(path), dict, "the .json beside an earlier strip")
    if not isinstance(saved.get("sentences"), list) or not isinstance(saved.get("frames"), list):
        raise ValueError(f"{path} is not the .json of a strip: it needs sentences and frames")
    return saved["sentences"], [Path(path).parent / name for name in saved["frames"]]


def write(options, told, pictures, given):
    """The strip, the GIF, each frame, and a .json from which --story goes on."""
    out = Path(options.out).with_suffix(".png")
    out.parent.mkdir(parents=True, exist_ok=True)
    captions = [f"{n + 1}. {text or '(no sentence)'}{' (given)' if n in given else ''}" for n, text in enumerate(told)]
    strip(out, [outlined(x) if n in given else x for n, x in enumerate(pictures)], captions, size=144)
    gif(out.with_suffix(".gif"), pictures, ms=900)
    names = [f"{out.stem}-{n + 1}.png" for n in range(len(told))]
    for name, picture in zip(names, pictures, strict=True):
        to_pil(picture).save(out.with_name(name))
    out.with_suffix(".json").write_text(json.dumps({"sentences": told, "frames": names, "seed": options.seed}, indent=1))
    print(f"{len(told)} frames, {len(told) - len(given)} of them drawn -> {out}, {out.with_suffix('.gif').name}, {names[0]} ...")
    return out


def main(argv):
    told, rest = words_first(argv)
    options = options_of(rest, Options, 'python -m story.sample "sentence" "sentence" ...')
    if options.edit and not options.story:
        raise ValueError("--edit changes an existing story: name its .json with --story")
    task = restore(options.ckpt, options.root)
    given = {}
    if options.story:
        told, files = earlier(options.story)
        if options.edit:
            n, sentence = numbered(options.edit, "edit", len(told))
            told = [*told[:n], sentence, *told[n + 1:]]
            given = {k: known_frame(file, task.cfg.size) for k, file in enumerate(files) if k != n}
    elif options.row >= 0:
        data = task.data["test"]
        if options.row >= len(data):
            raise ValueError(f"--row {options.row}: the held-out part has stories 0 to {len(data) - 1}")
        told = list(data.captions[options.row])
    given |= {n: known_frame(file, task.cfg.size) for n, file in (numbered(text, "given", len(told)) for text in options.given)}
    for text in told:
        task.net["words"].check(text)
    settings = {"eta": options.eta} | ({"steps": options.steps} if options.steps else {})
    settings |= {"guidance": options.guidance} if options.guidance >= 0 else {}
    pictures = draw_story(task, told, given, options.seed, **settings)
    out = write(options, told, pictures, given)
    if options.words:
        whole = pictures[: task.frames]
        if len(whole) < task.frames:
            raise ValueError(f"--words shows whole boards: write {task.frames} sentences")
        draw_looks(out.with_name(out.stem + "-words.png"), task, whole, told[: task.frames])
        print(f"-> {out.with_name(out.stem + '-words.png')}")


if __name__ == "__main__":
    run(main)
