"""Edit a picture file by sentences: before | after | where it changed, and how the manipulations were composed.

    python -m edit.sample photo.png "the heart is green" "the background is black" [--strength=1 --out=edited.png]

The sentences act one after the other. The editor sees the picture at its own size (64 x 64 on the built-in data), padded
to a square by repeating the border; what it changes there is enlarged and added to the original, which keeps its size,
its mode, its alpha and, where nothing changed, every pixel but for rounding. The input file is only ever read.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from data import safe
from data.options import from_plain, options_of, run, words_first
from data.parts import to_tensor
from data.pictures import bars, panels
from data.text import words_of
from data.weights import load_parts, open_run
from data.world import BACKGROUND, COLOUR, SHAPES, TEXTURES
from edit.task import Config, open_editor
from kernels.attribution import show

MODES = ("RGB", "RGBA", "L", "LA", "P")


@dataclass
class Options:
    """Edit PICTURE by one or more sentences (words first, options after them)."""

    strength: float = 1.0                         # 0 leaves the picture, 1 is the edit, above 1 exaggerates it
    out: str = ""                                 # the edited picture; empty: PICTURE-edited.png in this folder
    colour: bool = False                          # write a grey picture's edit in colour
    ckpt: str = "runs/denet-default/best.pt"      # a checkpoint that train.py wrote
    root: str = ""                                # folder of the real data, if a learnt text encoder needs its words


def restore(ckpt, root=""):
    """-> editor and text encoder of a checkpoint.   raises ValueError or FileNotFoundError, one sentence"""
    config, state = open_run(ckpt, "denet")
    read, editor = open_editor(from_plain(Config, config | ({"root": root} if root else {})), torch.device("cpu"))
    load_parts({"mean": editor, "read": read}, state, f"{ckpt} does not fit")
    return editor.eval(), read.eval()


def check_sentence(text, read):
    """raises ValueError for a sentence that asks nothing, several things at once, or contradicts itself"""
    words = words_of(text)
    if not words:
        raise ValueError(f"'{text}' asks for nothing; write what should be true, such as \"the heart is green\"")
    if read.lstm is None and not read.named:
        if {"and", "or"} & set(words):
            raise ValueError(f"'{text}' asks for several things; write one sentence for each, they act in a row")
        told = words[words.index("is") + 1 :] if "is" in words else []
        for values in (COLOUR, BACKGROUND, SHAPES, TEXTURES):
            if len(found := sorted({word for word in told if word in values})) > 1 and "there" not in words:
                raise ValueError(f"'{text}' contradicts itself: {' and '.join(found)}; keep one of them")
    read([text])                                             # unknown words and too many of them are named here


def open_picture(path):
    """-> Pillow image as it is stored, upright: RGB, RGBA, L, LA or P.   raises ValueError for what cannot be read"""
    safe.open_image(path)                                    # all of its sentences about missing and damaged files
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        return image if image.mode in MODES else image.convert("RGB")


def to_square(picture, size):
    """Fit the long side, repeat the border on the short one.   (1, 3, H, W) -> (1, 3, size, size), (top, left, h, w)"""
    height, width = picture.shape[2:]
    scale = size / max(height, width)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    small = F.interpolate(picture, (h, w), mode="bilinear", antialias=True, align_corners=False)
    top, left = (size - h) // 2, (size - w) // 2
    return F.pad(small, (left, size - w - left, top, size - h - top), mode="replicate"), (top, left, h, w)


@torch.no_grad()
def edit_picture(editor, read, picture, sentences, strength=1.0):
    """Edits in a row.   picture (1, 3, H, W) in [-1, 1] -> [{"before", "after", "change", "weights"}, ...], finished picture

    before, after (3, S, S) at the editor's size, change (S, S) >= 0, weights: mean w of each DEBlock, coarse to fine
    """
    small, (top, left, h, w) = to_square(picture, editor.size)
    full, steps = picture, []
    for text in sentences:
        edited, weights, _ = editor(small, read([text]), explain=True)
        after = (small + strength * (edited - small)).clamp(-1, 1)
        change = (after - small)[:, :, top : top + h, left : left + w]
        full = full + F.interpolate(change, picture.shape[2:], mode="bicubic", align_corners=False)
        steps.append({"sentence": text, "before": small[0], "after": after[0], "change": (after - small).abs().mean(1)[0],
                      "weights": [float(x.mean()) for x in weights]})
        small = after
    return steps, full.clamp(-1, 1)


def to_mode(full, image, colour=False):
    """The finished picture in the mode of the original, with the original's alpha."""
    pixels = ((full[0] + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
    result, alpha = Image.fromarray(pixels), image.convert("RGBA").getchannel("A")
    clear = image.mode in ("RGBA", "LA") or "transparency" in image.info
    if image.mode in ("L", "LA") and not colour:
        result = result.convert("L")
    if clear:
        result.putalpha(alpha)
    if image.mode == "P":
        result = result.quantize(256, Image.Quantize.FASTOCTREE if clear else Image.Quantize.MEDIANCUT)
    return result


def draw(path, steps):
    """One row a sentence: before, after, where it changed; the sentence under the edit."""
    rows = []
    for step in steps:
        strongest = float(step["change"].max())
        where = show(step["change"][None], step["after"][None], 0.7, "max")[1][0]
        rows.append([(step["before"], "before"), (step["after"], step["sentence"]),
                     (where, f"where it changed (at most {strongest:.2f})")])
    panels(path, rows, size=144, title="before | after | where it changed")


def main(argv):
    words, rest = words_first(argv or ["--help"])
    options = options_of(rest, Options, 'python -m edit.sample PICTURE "SENTENCE" ["SENTENCE" ...]')
    if len(words) < 2:
        raise ValueError('needs a picture and at least one sentence: python -m edit.sample photo.png "the heart is green"')
    source, sentences = Path(words[0]), words[1:]
    if not 0 <= options.strength <= 3:
        raise ValueError(f"--strength={options.strength}: between 0 (nothing changes) and 3")
    out = Path(options.out or f"{source.stem}-edited.png")
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"--out={out} is the input itself, which is never overwritten; choose another name")
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out={out}: the result keeps alpha and palette, so its name must end in .png")
    image = open_picture(source)
    editor, read = restore(options.ckpt, options.root)
    for text in sentences:
        check_sentence(text, read)
    picture = to_tensor([safe.on_white(image)])
    steps, full = edit_picture(editor, read, picture, sentences, options.strength)
    if image.mode in ("L", "LA") and not options.colour:
        print(f"{source} is grey, and so is the result; --colour writes it in colour")
    to_mode(full, image, options.colour).save(out)
    draw(out.with_name(out.stem + "-steps.png"), steps)
    finest = len(editor.blocks) - 1
    bars(out.with_name(out.stem + "-weights.png"),
         {f"{step['sentence']}, {editor.size >> finest - k} px": w for step in steps for k, w in enumerate(step["weights"])},
         "share of the channel manipulation, w, at each level (the rest is spatial)", level=0.5, level_label="equal")
    for step in steps:
        weights = " ".join(f"{w:.2f}" for w in step["weights"])
        print(f"{step['sentence']}: mean change {float(step['change'].mean()):.4f}, w {weights}")
    print(f"-> {out}, {out.stem}-steps.png, {out.stem}-weights.png")


if __name__ == "__main__":
    run(main)
