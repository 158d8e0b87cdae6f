"""Pictures with sentences, and pairs of pictures with an instruction: the input of GALIP and DE-Net.

    data = load("birds", root="data/birds", split="train", size=64)
    data.images([3, 5], seed=7)      (2, 3, 64, 64) in [-1, 1]; crop and flip depend on (seed, row) alone
    data.captions[3]                 its sentences;  data.sentences([3, 5], seed=7) draws one for each

    edits = load_edits("noto", root="emoji", split="test", size=64)
    edits.source([0]), edits.instructions[0], edits.target([0])

NAMES says which layouts are read; `python -m data.prepare NAME` says where each data set comes from.
"""
import csv
import io
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.batches import seed_from
from data.safe import PICTURES, load_pickle, missing, open_image, read_arrays, read_jsonl, read_text

MARGIN = 76 / 64                      # AttnGAN: the short side is resized to int(size * 76 / 64), then size is cropped
CACHE = 512 * 2**20                   # bytes of decoded pictures kept in memory
PACKS = {                             # name: pictures, sentences, the two parts, may pictures be mirrored?
    "noto": ("noto_{}.npz", "noto_{}.jsonl", ("train", "test"), False),              # left arrow, letters, clocks
    "emojitwo": ("emojitwo_{}.npz", "emojitwo_{}.jsonl", ("train", "test"), False),
    "birds64": ("birds64_{}.npz", "birds64_{}.jsonl", ("train", "test"), True),
    "codraw": ("scenes64_{}.npz", "scenes_{}.jsonl", ("train", "val"), False),       # "big sun on left corner"
    "cifar10": ("cifar10_{}.npz", None, ("train", "test"), True)}
LISTED = {                            # name: where a key's picture may lie; {key}, and {set} = its second "_" field
    "birds": ("CUB_200_2011/images/{key}.jpg",),
    "coco": ("images/{set}/{key}.jpg", "images/{set}/jpg/{key}.jpg", "images/{key}.jpg"),
    "flowers": ("oxford-102-flowers/images/{key}.jpg", "images/{key}.jpg"),
    "cc3m": ("images/{key}.jpg",), "cc12m": ("images/{key}.jpg",)}
NAMES = ("builtin", *LISTED, *PACKS, "folder", "npz")


@dataclass
class Captions:
    """Pictures with sentences. Files are decoded when asked for; what is kept in memory is uint8."""
    name: str
    size: int                         # pixels of a side of what images() returns
    captions: list                    # N lists of sentences
    names: list                       # N file names or ids
    fetch: Callable                   # row -> uint8 (h, w, 3) with h, w >= size
    flip: bool = False                # mirroring keeps the sentences true
    extra: dict = field(default_factory=dict)     # more of each row: {"class_id": [...], ...}, N entries each

    def __len__(self):
        return len(self.names)

    def images(self, rows, seed=None):
        """(B, 3, size, size) float32 in [-1, 1].   seed: random crop and flip, a function of (seed, row); None: centre"""
        return to_tensor([crop(self.fetch(int(row)), self.size, self.flip, seed, int(row)) for row in rows])

    def sentences(self, rows, seed=0):
        """One sentence a row, a function of (seed, row)."""
        return [self.captions[row][seed_from(seed, row, 1) % len(self.captions[row])] for row in map(int, rows)]

    def select(self, rows):
        """The same data set, only these rows."""
        rows = [int(row) for row in rows]
        pick = lambda values: [values[row] for row in rows]  # noqa: E731
        return Captions(self.name, self.size, pick(self.captions), pick(self.names), lambda r: self.fetch(rows[r]),
                        self.flip, {key: pick(values) for key, values in self.extra.items()})


def to_tensor(pictures):
    """uint8 (h, w, 3) pictures of one size -> (B, 3, h, w) float32 in [-1, 1]"""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def crop(picture, size, flip, seed, row):
    """A size x size window of a uint8 picture: at random, and mirrored half of the time, or from the centre."""
    high, wide = picture.shape[0] - size, picture.shape[1] - size
    if seed is None:
        top, left, mirror = high // 2, wide // 2, False
    else:
        draw = seed_from(seed, row)
        top, left, mirror = draw % (high + 1), (draw >> 16) % (wide + 1), flip and draw >> 32 & 1
    window = picture[top : top + size, left : left + size]
    return window[:, ::-1] if mirror else window


def shrink(image, size, margin=MARGIN):
    """RGB Pillow image -> uint8 array whose short side is int(size * margin); bilinear over the covered area."""
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


# -- splits ---------------------------------------------------------------------------------------------------------


def set_aside(groups, share):
    """Rows of whole groups that hold about `share` of all rows; which ones depends on the groups' names alone."""
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


def two_parts(read, parts, split, holdout, group):
    """Sets that come as two files: the second is "test", and `holdout` of the first becomes "valid".

    read(part) -> data set; group(data set) -> N keys that stay on one side, so that near copies do not leak.
    """
    if split == "test" or (split == parts[1] and split != "valid"):
        return read(parts[1])
    data = read(parts[0])
    valid = set_aside(group(data), holdout)
    rows = valid if split == "valid" else sorted(set(range(len(data))) - set(valid))
    if not rows:
        raise ValueError(f"the {split} part of {data.name} is empty: {len(data)} rows with holdout={holdout}")
    return data.select(rows)


def by_name(data, split):
    """80 / 10 / 10 by a hash of each name, so that new files never move old ones to another part."""
    bucket = [zlib.crc32(str(name).encode()) % 10 for name in data.names]
    wanted = {"train": range(8), "valid": (8,), "test": (9,)}[split]
    rows = [row for row, b in enumerate(bucket) if b in wanted]
    if not rows:
        raise ValueError(f"{data.name}: none of its {len(data)} pictures fell into the {split} part; add pictures or "
                         "make folders train/, valid/ and test/")
    return data.select(rows)


def check_split(split):
    if split not in ("train", "valid", "val", "test"):
        raise ValueError(f"split {split!r} is unknown; it is train, valid or test")


# -- layouts --------------------------------------------------------------------------------------------------------


def load(name="builtin", root="", split="train", size=64, seed=0, holdout=0.1):
    """Open a data set by name.   -> Captions

    root      its folder (builtin: none); for "npz" the file X.npz, with X.jsonl beside it
    split     train, valid, test. Where only two parts exist, valid is `holdout` of train (0: train is the whole file)
    raises    FileNotFoundError or ValueError: one sentence with the file, the row and what was expected
    """
    name = {"cub": "birds"}.get(name, name)
    check_split(split)
    if name not in NAMES:
        raise ValueError(f"captions {name!r} are unknown; there are {', '.join(NAMES)}")
    if name == "builtin":
        return builtin(split, size, seed)
    if not root or not Path(root).exists():
        raise missing(root or f"--root for {name}", f"type  python -m data.prepare {name}  to see where it comes from")
    root = Path(root)
    if name in LISTED:
        return two_parts(lambda part: listed(name, root, part, size), ("train", "test"), split, holdout, lambda d: d.names)
    if name in PACKS:
        pictures, texts, parts, flip = PACKS[name]
        read = lambda part: pack(name, root / pictures.format(part), texts and root / texts.format(part), size, flip)  # noqa: E731
        return two_parts(read, parts, split, holdout, concepts)
    split = "valid" if split == "val" else split
    if name == "npz":
        return by_name(pack(root.stem, root, root.with_suffix(".jsonl"), size, False), split)
    return folder(root / split, size) if (root / split).is_dir() else by_name(folder(root, size), split)


def builtin(split, size, seed):
    raise NotImplementedError


def listed(name, root, part, size):
    """AttnGAN's packaging: lists of keys, text/<key>.txt, pictures by key; birds are cut to 1.5 times their box."""
    keys = read_keys(root / part)
    patterns = LISTED[name]
    at = lambda pattern, key: root / pattern.format(key=key, set=(key.split("_") + [""])[1])  # noqa: E731
    pattern = next((p for p in patterns if at(p, keys[0]).is_file()), patterns[0])
    files = [at(pattern, key) for key in keys]
    for file in files:
        if not file.is_file():
            raise missing(file, f"{root / part} lists it; take it out of the list, or copy the picture there")
    texts = [read_captions(root, key) for key in keys]
    boxes = read_boxes(root / "CUB_200_2011") if name == "birds" else {}
    for key in keys if boxes else ():
        if key not in boxes:
            raise ValueError(f"{root / 'CUB_200_2011'}: {key} has no line in images.txt and bounding_boxes.txt")

    def decode(row):
        image = open_image(files[row])
        return shrink(cut_to_box(image, boxes[keys[row]]) if boxes else image, size)

    extra = {"class_id": [int(key[:3]) for key in keys]} if name == "birds" else {}
    return Captions(name, size, texts, keys, cached(decode), True, extra)


def read_keys(part):
    """The keys of one part: filenames.txt, one a line, or the official filenames.pickle."""
    if (part / "filenames.txt").is_file():
        keys = read_text(part / "filenames.txt").split()
    else:
        keys = load_pickle(part / "filenames.pickle", hint="the list of <class>/<name> keys, or filenames.txt, one a line")
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"{part}: filenames must be a list of keys such as 001.Black_footed_Albatross/Black_Footed_0046_18")
    if bad := [key for key in keys if ".." in key.split("/") or key.startswith("/")]:
        raise ValueError(f"{part}: key {bad[0]!r} leads outside the folder")
    return keys


def read_captions(root, key):
    """text/<key>.txt, one sentence a line; blank lines are skipped.   (CC3M, CC12M: the key before its "_")"""
    file = root / "text" / f"{key}.txt"
    if not file.is_file() and (short := root / "text" / f"{key.split('_')[0]}.txt").is_file():
        file = short
    found = [line.strip() for line in read_text(file, f"the sentences of {key}, one a line").splitlines() if line.strip()]
    if not found:
        raise ValueError(f"{file} holds no sentence; write at least one, or take {key} out of filenames")
    return found


def read_boxes(cub):
    """{key: (x, y, w, h)} from images.txt and bounding_boxes.txt, joined on the id; floats are cut to whole pixels."""
    names = dict(line.split() for line in read_text(cub / "images.txt").splitlines() if line.strip())
    boxes = {}
    for number, line in enumerate(read_text(cub / "bounding_boxes.txt").splitlines(), 1):
        try:
            id_, *box = line.split()
            x, y, w, h = (int(float(value)) for value in box)
            boxes[names[id_].removesuffix(".jpg")] = (x, y, w, h)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{cub / 'bounding_boxes.txt'}, line {number}: {line!r} is not '<id> x y w h' with an id "
                             "of images.txt") from error
    return boxes


def cut_to_box(image, box):
    """A square of half-side int(0.75 * longer side) around the box's centre, cut off at the picture's border."""
    x, y, w, h = box
    r, cx, cy = int(max(w, h) * 0.75), (2 * x + w) // 2, (2 * y + h) // 2
    left, top = max(0, cx - r), max(0, cy - r)
    right, bottom = min(image.width, cx + r), min(image.height, cy + r)
    if right <= left or bottom <= top:
        raise ValueError(f"box {box} lies outside a picture of {image.width} x {image.height} pixels")
    return image.crop((left, top, right, bottom))


def pack(name, pictures, texts, size, flip):
    """X.npz with `images` uint8 (N, h, w, 3), X.jsonl with `captions` in row order; no jsonl: sentences from class names."""
    arrays = read_arrays(pictures, hint="images, uint8 (N, h, w, 3)")
    images = arrays.get("images") if isinstance(arrays, dict) else None
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"{pictures} must hold `images`, uint8 (N, h, w, 3)")
    if texts is None:
        classes, labels = (arrays[key] for key in ("classes", "labels"))
        rows = [{"index": n, "label": str(classes[k]), "captions": [a_photo_of(str(classes[k]))]} for n, k in enumerate(labels)]
    else:
        rows = read_jsonl(texts, {"captions": list}, "one line a picture, with its captions")
    if len(rows) != len(images):
        raise ValueError(f"{texts} has {len(rows)} lines, {pictures} has {len(images)} pictures; they must match row by row")
    for n, row in enumerate(rows):
        if row.get("index", n) != n:
            raise ValueError(f"{texts}, line {n + 1} has index {row['index']}, expected {n}: its rows must be in order")
        row["captions"] = [c.strip() for c in row["captions"] if isinstance(c, str) and c.strip()]
        if not row["captions"]:
            raise ValueError(f"{texts}, line {n + 1} has no caption; write at least one")
    keys = sorted(set.intersection(*(set(row) for row in rows)) - {"captions", "index"})
    extra = {key: [row[key] for row in rows] for key in keys}
    names = next((extra[key] for key in ("name", "code", "id") if key in extra), range(len(rows)))
    fetch = lambda row: shrink(Image.fromarray(images[row]), size, 1)  # noqa: E731
    return Captions(name, size, [row["captions"] for row in rows], [str(n) for n in names], fetch, flip, extra)


def a_photo_of(label):
    return f"a photo of {'an' if label[0] in 'aeiou' else 'a'} {label}"


def concepts(data):
    """What must not be split over train and valid: an emoji in all its skin tones and genders; else each picture."""
    labels = data.extra.get("base_label")
    people = r"\b(person|people|man|men|woman|women|boy|girl|mr|mrs|mx)\b\W*"
    return [re.sub(people, "", label.lower()).strip() or label for label in labels] if labels else data.names


def folder(root, size):
    """Pictures with a .txt of the same name beside each, one sentence a line, at any depth."""
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise missing(root / "*.png", "a folder of pictures (png, jpg, webp, bmp, gif), each with a .txt of its name")
    names = [file.relative_to(root).with_suffix("").as_posix() for file in files]
    texts = []
    for file in files:
        lines = read_text(file.with_suffix(".txt"), f"the sentences of {file.name}, one a line").splitlines()
        texts.append([line.strip() for line in lines if line.strip()])
        if not texts[-1]:
            raise ValueError(f"{file.with_suffix('.txt')} holds no sentence; write at least one line")
    return Captions(str(root), size, texts, names, cached(lambda row: shrink(open_image(files[row], upright=True), size)), False)


# -- edits ----------------------------------------------------------------------------------------------------------


@dataclass
class Edits:
    """Source pictures with an instruction; a target where one is known, a mask of what must change in the built-in world."""
    name: str
    size: int
    instructions: list                # E sentences
    kinds: list                       # E of tone, gender, recolour, ...
    source: Callable                  # rows -> (B, 3, size, size) in [-1, 1]
    target: Callable | None = None    # rows -> (B, 3, size, size), the oracle's result
    mask: Callable | None = None      # rows -> (B, 1, size, size) in [0, 1]
    captions: list | None = None      # E lists of sentences that are true of the source

    def __len__(self):
        return len(self.instructions)


def load_edits(name="builtin", root="", split="test", size=64, seed=0, holdout=0.1):
    """Pictures to edit, by name: builtin, noto, emojitwo (same emoji, other tone or gender), codraw (frame t to t + 1), or
    any other name of `load`: there the instruction is a sentence of another picture and no target is known."""
    if name == "builtin":
        return builtin_edits(split, size, seed)
    if name == "codraw":
        return frame_edits(root, split, size, holdout)
    data = load(name, root, split, size, seed, holdout)
    if name in ("noto", "emojitwo"):
        return emoji_edits(data, Path(root), PACKS[name][2][split == "test"])
    other = [(row + 1 + seed_from(seed, row) % max(1, len(data) - 1)) % len(data) for row in range(len(data))]
    said = [data.sentences([o], seed)[0] for o in other]
    return Edits(name, size, said, ["other"] * len(data), data.images, captions=data.captions)
