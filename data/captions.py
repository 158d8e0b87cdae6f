"""Pictures with sentences, and pairs of pictures with an instruction: the input of GALIP and DE-Net.

    data = load("birds", root="data/birds", split="train", size=64)
    data.images([3, 5], seed=7)      (2, 3, 64, 64) in [-1, 1]; crop and flip depend on (seed, row) alone
    data.captions[3]                 its sentences;  data.sentences([3, 5], seed=7) draws one for each

    edits = load_edits("noto", root="emoji", split="test", size=64)
    edits.source([0]), edits.instructions[0], edits.target([0])

NAMES says which layouts are read; `python -m data.prepare NAME` says where each data set comes from.
"""
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from data import views, world
from data.batches import seed_from
from data.parts import BUILTIN, Lazy, by_name, cached, check_split, cropped, set_aside, shrink, two_parts
from data.safe import PICTURES, load_pickle, missing, open_image, read_arrays, read_jsonl, read_text
from data.stories import load as load_stories

PACKS = {                             # name: pictures, sentences, the two parts, may pictures be mirrored?
    "noto": ("noto_{}.npz", "noto_{}.jsonl", ("train", "test"), False),
                 # left arrow, letters, clocks
    "emojitwo": ("emojitwo_{}.npz", "emojitwo_{}.jsonl", ("train", "test"), False),
    "birds64": ("birds64_{}.npz", "birds64_{}.jsonl", ("train", "test"), True),
    "codraw": ("scenes64_{}.npz", "scenes_{}.jsonl", ("train", "val"), False),
          # "big sun on left corner"
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
    size: int                         # pixels of a side
    captions: Sequence                # N lists of sentences
    names: Sequence                   # N file names or ids
    pictures: Callable                # (rows, seed) -> (B, 3, size, size)
    extra: dict = field(default_factory=dict)     # more of each row: {"class_id": [...], ...}, N entries each
    said: Callable | None = None      # (rows, seed) -> B sentences, where drawing one by one is slow

    def __len__(self):
        return len(self.names)

    def images(self, rows, seed=None):
        """(B, 3, size, size) float32 in [-1, 1].   seed: random crop and flip, a function of (seed, row);
        None: centre
        """
        return self.pictures([int(row) for row in rows], seed)

    def sentences(self, rows, seed=0):
        """One sentence a row, a function of (seed, row)."""
        rows = [int(row) for row in rows]
        if self.said:
            return self.said(rows, seed)
        return [self.captions[row][seed_from(seed, row, 1) % len(self.captions[row])] for row in rows]

    def select(self, rows):
        """The same data set, only these rows."""
        rows = [int(row) for row in rows]
        return Captions(self.name, self.size, [self.captions[row] for row in rows], [self.names[row]
                                                                                     for row in rows],
                        lambda picked, seed: self.pictures([rows[p] for p in picked], seed),
                        {key: [values[row] for row in rows] for key, values in self.extra.items()})


# -- layouts -------------------------------------------------------------------------------------------------


def load(name="builtin", root="", split="train", size=64, seed=0, holdout=0.1, objects=(1, 1)):
    """Open a data set by name.   -> Captions

    root      its folder (builtin: none); for "npz" the file X.npz, with X.jsonl beside it
    objects   builtin: least and most things in a picture
    split     train, valid, test. Where only two parts exist, valid is `holdout` of train (0: train is the
              whole file)
    raises    FileNotFoundError or ValueError: one sentence with the file, the row and what was expected
    """
    name = {"cub": "birds"}.get(name, name)
    check_split(split)
    if name not in NAMES:
        raise ValueError(f"captions {name!r} are unknown; there are {', '.join(NAMES)}")
    if name == "builtin":
        return builtin(split, size, seed, objects)
    if not root or not Path(root).exists():
        raise missing(root or f"--root for {name}", f"type  python -m data.prepare {name}  to see where it "
                                                    f"comes from")
    root = Path(root)
    if name in LISTED:
        return two_parts(lambda part: listed(name, root, part, size), ("train", "test"), split, holdout,
                         lambda d: d.names)
    if name in PACKS:
        pictures, texts, parts, flip = PACKS[name]
        def read(part):
            return pack(name, root / pictures.format(part), texts and root / texts.format(part), size, flip)

        return two_parts(read, parts, split, holdout, concepts)
    if name == "npz":
        return by_name(pack(root.stem, root, root.with_suffix(".jsonl"), size, False), split)
    return folder(root / split, size) if (root / split).is_dir() else by_name(folder(root, size), split)


def builtin(split, size, seed, objects):
    """The world of data/world.py: rendered when asked for, ten sentences a picture, facts in
    extra["facts"].
    """
    n = BUILTIN[split]
    def scene(rows):
        return world.scenes(rows, seed, split, objects)


    def said(rows, draw):
        drawn, which, found = scene(rows), [seed_from(draw, row, 1) % 10 for row in rows], [""] * len(rows)
        for k in set(which):
            mine = [b for b, other in enumerate(which) if other == k]
            for b, text in zip(mine, world.captions(world.pick(drawn, mine), k), strict=True):
                found[b] = text
        return found

    return Captions("builtin", size, Lazy(n, lambda row: Lazy(10, lambda k: world.captions(scene([row]),
                                                                                           k)[0])),
                    range(n), lambda rows, _: world.render(scene(rows), size)[0],
                    {"facts": Lazy(n, lambda row: world.facts(scene([row]))[0])}, said)


def listed(name, root, part, size):
    """AttnGAN's packaging: lists of keys, text/<key>.txt, pictures by key; birds are cut to 1.5 times their
    box.
    """
    keys = read_keys(root / part)
    patterns = LISTED[name]
    def at(pattern, key):
        return root / pattern.format(key=key, set=(key.split("_") + [""])[1])

    pattern = next((p for p in patterns if at(p, keys[0]).is_file()), patterns[0])
    files = [at(pattern, key) for key in keys]
    for file in files:
        if not file.is_file():
            raise missing(file, f"{root / part} lists it; take it out of the list, or copy the picture there")
    texts = [read_captions(root, key) for key in keys]
    boxes = read_boxes(root / "CUB_200_2011") if name == "birds" else {}
    for key in keys if boxes else ():
        if key not in boxes:
            raise ValueError(f"{root / 'CUB_200_2011'}: {key} has no line in images.txt and "
                             f"bounding_boxes.txt")

    def decode(row):
        image = open_image(files[row])
        return shrink(cut_to_box(image, boxes[keys[row]]) if boxes else image, size)

    extra = {"class_id": [int(key[:3]) for key in keys]} if name == "birds" else {}
    return Captions(name, size, texts, keys, cropped(cached(decode), size, True), extra)


def read_keys(part):
    """The keys of one part: filenames.txt, one a line, or the official filenames.pickle."""
    if (part / "filenames.txt").is_file():
        keys = read_text(part / "filenames.txt").split()
    else:
        keys = load_pickle(part / "filenames.pickle", hint="the list of <class>/<name> keys, or "
                                                           "filenames.txt, one a line")
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"{part}: filenames must be a list of keys such as "
                         f"001.Black_footed_Albatross/Black_Footed_0046_18")
    if bad := [key for key in keys if ".." in key.split("/") or key.startswith("/")]:
        raise ValueError(f"{part}: key {bad[0]!r} leads outside the folder")
    return keys


def read_captions(root, key):
    """text/<key>.txt, one sentence a line; blank lines are skipped.   (CC3M, CC12M: the key before its
    "_")
    """
    file = root / "text" / f"{key}.txt"
    if not file.is_file() and (short := root / "text" / f"{key.split('_')[0]}.txt").is_file():
        file = short
    found = [line.strip() for line in read_text(file, f"the sentences of {key}, one a line").splitlines()
             if line.strip()]
    if not found:
        raise ValueError(f"{file} holds no sentence; write at least one, or take {key} out of filenames")
    return found


def read_boxes(cub):
    """{key: (x, y, w, h)} from images.txt and bounding_boxes.txt, joined on the id; floats are cut to whole
    pixels.
    """
    names = dict(line.split() for line in read_text(cub / "images.txt").splitlines() if line.strip())
    boxes = {}
    for number, line in enumerate(read_text(cub / "bounding_boxes.txt").splitlines(), 1):
        try:
            id_, *box = line.split()
            x, y, w, h = (int(float(value)) for value in box)
            boxes[names[id_].removesuffix(".jpg")] = (x, y, w, h)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{cub / 'bounding_boxes.txt'}, line {number}: {line!r} is not '<id> x y w h' "
                             f"with an id "
                             "of images.txt") from error
    return boxes


def cut_to_box(image, box):
    """A square of half-side int(0.75 * longer side) around the box's centre, cut off at the picture's
    border.
    """
    x, y, w, h = box
    r, cx, cy = int(max(w, h) * 0.75), (2 * x + w) // 2, (2 * y + h) // 2
    left, top = max(0, cx - r), max(0, cy - r)
    right, bottom = min(image.width, cx + r), min(image.height, cy + r)
    if right <= left or bottom <= top:
        raise ValueError(f"box {box} lies outside a picture of {image.width} x {image.height} pixels")
    return image.crop((left, top, right, bottom))


def pack(name, pictures, texts, size, flip):
    """X.npz with `images` uint8 (N, h, w, 3), X.jsonl with `captions` in row order; no jsonl: sentences from
    class names.
    """
    arrays = read_arrays(pictures, hint="images, uint8 (N, h, w, 3)")
    images = arrays.get("images") if isinstance(arrays, dict) else None
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"{pictures} must hold `images`, uint8 (N, h, w, 3)")
    if texts is None:
        classes, labels = (arrays[key] for key in ("classes", "labels"))
        rows = [{"index": n, "label": str(classes[k]), "captions": [a_photo_of(str(classes[k]))]} for n,
                k in enumerate(labels)]
    else:
        rows = read_jsonl(texts, {"captions": list}, "one line a picture, with its captions")
    if len(rows) != len(images):
        raise ValueError(f"{texts} has {len(rows)} lines, {pictures} has {len(images)} pictures; they must "
                         f"match row by row")
    for n, row in enumerate(rows):
        if row.get("index", n) != n:
            raise ValueError(f"{texts}, line {n + 1} has index {row['index']}, expected {n}: its rows must "
                             f"be in order")
        row["captions"] = [c.strip() for c in row["captions"] if isinstance(c, str) and c.strip()]
        if not row["captions"]:
            raise ValueError(f"{texts}, line {n + 1} has no caption; write at least one")
    keys = sorted(set.intersection(*(set(row) for row in rows)) - {"captions", "index"})
    extra = {key: [row[key] for row in rows] for key in keys}
    names = next((extra[key] for key in ("name", "code", "id") if key in extra), range(len(rows)))
    def fetch(row):
        return shrink(Image.fromarray(images[row]), size, 1)

    return Captions(name, size, [row["captions"] for row in rows], [str(n) for n in names],
                    cropped(fetch, size, flip), extra)


def a_photo_of(label):
    return f"a photo of {'an' if label[0] in 'aeiou' else 'a'} {label}"


def concepts(data):
    """What must not be split over train and valid: an emoji in all its skin tones and genders; else each
    picture.
    """
    labels = data.extra.get("base_label")
    people = r"\b(person|people|man|men|woman|women|boy|girl|mr|mrs|mx)\b\W*"
    return [re.sub(people, "", label.lower()).strip() or label for label in labels] if labels else data.names


def folder(root, size):
    """Pictures with a .txt of the same name beside each, one sentence a line, at any depth."""
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise missing(root / "*.png", "a folder of pictures (png, jpg, webp, bmp, gif), each with a .txt "
                                      "of its name")
    names = [file.relative_to(root).with_suffix("").as_posix() for file in files]
    texts = []
    for file in files:
        lines = read_text(file.with_suffix(".txt"), f"the sentences of {file.name}, one a line").splitlines()
        texts.append([line.strip() for line in lines if line.strip()])
        if not texts[-1]:
            raise ValueError(f"{file.with_suffix('.txt')} holds no sentence; write at least one line")
    decode = cached(lambda row: shrink(open_image(files[row], upright=True), size))
    return Captions(str(root), size, texts, names, cropped(decode, size, False))


# -- edits ---------------------------------------------------------------------------------------------------


@dataclass
class Edits:
    """Source pictures with an instruction; a target where one is known, a mask of what must change in the
    built-in world.
    """
    name: str
    size: int
    instructions: Sequence            # E sentences
    kinds: Sequence                   # E of tone, gender, recolour, ...
    source: Callable                  # rows -> (B, 3, size, size) in [-1, 1]
    target: Callable | None = None    # rows -> (B, 3, size, size), the known result
    mask: Callable | None = None      # rows -> (B, 1, size, size) in [0, 1]
    captions: Sequence | None = None  # E lists of sentences that are true of the source

    def __len__(self):
        return len(self.instructions)


def load_edits(name="builtin", root="", split="test", size=64, seed=0, holdout=0.1, kinds=views.EDITS):
    """Pictures to edit.   -> Edits

    name   builtin: the six kinds of data/views.py with result and mask; noto, emojitwo: the same emoji in
           another tone or gender; codraw: frame t of a story to frame t + 1; any other
           name of `load`: the instruction is a sentence of another picture, and no target is known
    """
    check_split(split)
    if name == "builtin":
        return builtin_edits(split, size, seed, kinds)
    if name == "codraw":
        return frame_edits(load_stories(name, root, split, size, holdout))
    if name in ("noto", "emojitwo"):
        return emoji_edits(name, Path(root), split, size, holdout)
    data = load(name, root, split, size, seed, holdout)
    def other(row):
        return (row + 1 + seed_from(seed, row) % max(1, len(data) - 1)) % len(data)

    return Edits(name, size, Lazy(len(data), lambda row: data.sentences([other(row)], seed)[0]),
                 Lazy(len(data), lambda row: "other"), data.images, captions=data.captions)


def builtin_edits(split, size, seed, kinds):
    """Edits of the world with the picture that should come out and the pixels that may change."""
    def view(rows):
        return views.edits([int(row) for row in rows], seed, split, kinds)

    def shown(rows):
        return views.edit_pictures(view(rows), size)

    def told(make):
        return Lazy(BUILTIN[split], make)

    return Edits("builtin", size, told(lambda row: view([row])["sentence"][0]),
                 told(lambda row: views.EDITS[int(view([row])["kind"][0])]), lambda rows: shown(rows)[0],
                 lambda rows: shown(rows)[1], lambda rows: shown(rows)[2][:, None].float(),
                 told(lambda row: [view([row])["caption_before"][0]]))


def emoji_edits(name, root, split, size, holdout):
    """X_edits.tsv: `source target kind instruction`, rows of X.npz. Both ends of a pair are of one concept,
    so of one split.
    """
    part = "test" if split == "test" else "train"
    data = load(name, root, part, size, holdout=0)
    valid = set(set_aside(concepts(data), holdout)) if part == "train" else set()
    pairs, said, kinds = [], [], []
    file = root / f"{name}_{part}_edits.tsv"
    for number, line in enumerate(read_text(file, "source, target, kind, instruction").splitlines()[1:], 2):
        try:
            source, target, kind, instruction = line.split("\t")
            pair = int(source), int(target)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {line!r:.60} is not 'source target kind instruction' "
                             f"with tabs "
                             "between and two row numbers") from error
        if not 0 <= min(pair) <= max(pair) < len(data):
            raise ValueError(f"{file}, line {number}: rows {pair} are not both among the {len(data)} "
                             f"pictures")
        if (pair[0] in valid) == (pair[1] in valid) == (split == "valid"):
            pairs.append(pair)
            said.append(instruction)
            kinds.append(kind)
    def at(side):
        return lambda rows: data.images([pairs[int(row)][side] for row in rows])

    return Edits(name, size, said, kinds, at(0), at(1), captions=[data.captions[source] for source,
                                                                  _ in pairs])


def frame_edits(stories):
    """Frame t of a story, the sentence of frame t + 1, frame t + 1."""
    steps = [(story, t) for story, told in enumerate(stories.captions) for t in range(len(told) - 1)]

    def frames(rows, later):
        picked = [steps[int(row)] for row in rows]
        found = stories.frames([story for story, _ in picked])
        return found[range(len(picked)), [t + later for _, t in picked]]

    return Edits(stories.name, stories.size, [stories.captions[s][t + 1] for s, t in steps],
                 ["draw"] * len(steps),
                 lambda rows: frames(rows, 0), lambda rows: frames(rows, 1),
                 captions=[[stories.captions[s][t]] for s, t in steps])
