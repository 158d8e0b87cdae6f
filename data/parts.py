"""Rows, parts and pixels that the loaders of captions, stories and videos share."""
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import safe
from data.batches import seed_from

MARGIN = 76 / 64                      # AttnGAN: resize the short side to int(size * 76 / 64), then crop size
BUILTIN = {"train": 2**20, "valid": 2048, "test": 4096}     # rows of the built-in world's parts
FILMS = {"train": 2000, "valid": 200, "test": 400}            # its videos
CACHE = 512 * 2**20                   # bytes of decoded pictures kept in memory


class Lazy(Sequence):
    """n values that are made when asked for."""

    def __init__(self, n, make):
        self.n, self.make = n, make

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if not -self.n <= i < self.n:
            raise IndexError(i)
        return self.make(i % self.n)


# -- pixels --------------------------------------------------------------------------------------------------


def to_tensor(pictures):
    """uint8 (h, w, 3) pictures of one size -> (B, 3, h, w) float32 in [-1, 1]"""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def cropped(fetch, size, flip):
    """fetch(row) -> uint8 (h, w, 3), h, w >= size, as the `pictures` of a data set."""
    return lambda rows, seed: to_tensor([crop(fetch(row), size, flip, seed, row) for row in rows])


def crop(picture, size, flip, seed, row):
    """A size x size window of a uint8 picture: drawn, and mirrored half of the time, or the centre."""
    high, wide = picture.shape[0] - size, picture.shape[1] - size
    if seed is None:
        top, left, mirror = high // 2, wide // 2, False
    else:
        draw = seed_from(seed, row)
        top, left, mirror = draw % (high + 1), (draw >> 16) % (wide + 1), flip and draw >> 32 & 1
    window = picture[top : top + size, left : left + size]
    return window[:, ::-1] if mirror else window


def squeeze(image, size, how=Image.BILINEAR):
    """Any RGB Pillow image squeezed to size x size.   -> uint8 (size, size, 3)"""
    return np.asarray(image if image.size == (size, size) else image.resize((size, size), how))


def shrink(image, size, margin=MARGIN):
    """RGB Pillow image -> uint8 array whose short side is int(size * margin); bilinear, averaging."""
    short = int(size * margin)
    scale = short / min(image.size)
    target = [short if side == min(image.size) else max(short, int(side * scale)) for side in image.size]
    return np.asarray(image if image.size == tuple(target) else image.resize(target, Image.BILINEAR))


def cached(decode, budget=CACHE):
    """decode(row) that keeps its results until they fill `budget` bytes."""
    kept, left = {}, [budget]

    def fetch(row):
        if row in kept:
            return kept[row]
        picture = decode(row)
        if left[0] >= picture.nbytes:
            kept[row], left[0] = picture, left[0] - picture.nbytes
        return picture

    return fetch


def check_pixels(x, axes, where, least=1):
    """raises ValueError unless an array holds uint8 RGB pictures.   axes: such as "(N, h, w, 3)"; least: its smallest length"""
    if x.dtype != np.uint8 or x.ndim != len(axes.split(",")) or x.shape[-1] != 3 or not x.size or len(x) < least:
        raise ValueError(f"{where} is {x.dtype} {x.shape}; it must be uint8 {axes}, {axes[1]} at least {least}")


def read_pack(pictures, texts, axes):
    """`images` of an .npz, uint8 with axes such as "(N, h, w, 3)", and the N rows of its .jsonl.

    -> images, rows (dicts with `captions`; None without texts), the other arrays by name
    raises ValueError if the two files do not match row by row
    """
    arrays = safe.read_arrays(pictures, hint="`images`, uint8 pictures in rows")
    if not isinstance(arrays, dict) or "images" not in arrays:
        raise ValueError(f"{pictures} must hold `images`, uint8 {axes}")
    images = arrays.pop("images")
    check_pixels(images, axes, f"{pictures}: `images`")
    if texts is None:
        return images, None, arrays
    rows = safe.read_jsonl(texts, {"captions": list}, "one JSON object a row, with its captions")
    if len(rows) != len(images):
        raise ValueError(f"{texts} has {len(rows)} lines, {pictures} has {len(images)} rows; they must match")
    for n, row in enumerate(rows):
        if row.get("index", n) != n:
            raise ValueError(f"{texts}, line {n + 1} has index {row['index']!r:.40}, expected {n}: rows in order")
        row["captions"] = [text.strip() for text in row["captions"] if isinstance(text, str)]
    return images, rows, arrays


# -- splits --------------------------------------------------------------------------------------------------


def set_aside(groups, share):
    """Rows of whole groups that hold about `share` of all rows; which ones depends on the groups' names."""
    order = sorted(set(groups), key=lambda g: (zlib.crc32(str(g).encode()), str(g)))
    rows_of = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)
    chosen = []
    for group in order:
        if len(chosen) >= share * len(groups):
            break
        chosen += rows_of[group]
    return sorted(chosen)


def select(data, rows, complaint):
    """The same Captions or Stories, only these rows.   raises ValueError with the complaint if there are none"""
    if not rows:
        raise ValueError(complaint)
    extra = {key: [values[row] for row in rows] for key, values in data.extra.items()}
    return replace(data, captions=[data.captions[row] for row in rows], names=[data.names[row] for row in rows], extra=extra,
                   pictures=lambda picked, seed: data.pictures([rows[p] for p in picked], seed))


def two_parts(read, parts, split, holdout, group):
    """Sets that come as two files: the second is "test", and `holdout` of the first becomes "valid".

    read(part) -> data set; group(data set) -> N keys that stay on one side, so that near copies do not leak.
    """
    if split == "test":
        return read(parts[1])
    data = read(parts[0])
    valid = set_aside(group(data), holdout)
    rows = valid if split == "valid" else sorted(set(range(len(data))) - set(valid))
    return select(data, rows, f"the {split} part of {data.name} is empty: {len(data)} rows with holdout={holdout}")


def part_of(name):
    """80 / 10 / 10 by a hash of a name, so that new files never move old ones to another part."""
    return (("train",) * 8 + ("valid", "test"))[zlib.crc32(str(name).encode()) % 10]


def by_name(data, split):
    """Sets without parts of their own: those whose name falls into this part."""
    rows = [row for row, name in enumerate(data.names) if part_of(name) == split]
    return select(data, rows, f"{data.name}: none of its {len(data)} pictures fell into the {split} part; add pictures or make "
                              "folders train/, valid/ and test/")


def check_name(name, names, root, split, what):
    """raises ValueError or FileNotFoundError unless the name is one of `names`, its folder and the split exist"""
    if split not in ("train", "valid", "test"):
        raise ValueError(f"split {split!r} is unknown; it is train, valid or test")
    if name not in names:
        raise ValueError(f"{what} {name!r} are unknown; there are {', '.join(names)}")
    if name != "builtin" and not (root and Path(root).exists()):
        raise safe.missing(root or f"--root for {name}", f"type  python -m data.prepare {name}  to see where it comes from")
