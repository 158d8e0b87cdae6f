"""Pictures with sentences: the input of GALIP, and of DE-Net through data/edits.py.

    data = load("birds", root="data/birds", split="train", size=64)
    data.images([3, 5], seed=7)      (2, 3, 64, 64) in [-1, 1]; crop and flip depend on (seed, row) alone
    data.captions[3]                 its sentences;  data.sentences([3, 5], seed=7) draws one for each

NAMES says which layouts are read; `python -m data.prepare NAME` says where each data set comes from.
"""
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from data import safe, world
from data.batches import seed_from
from data.parts import BUILTIN, Lazy, by_name, cached, check_name, cropped, read_pack, shrink, two_parts

PACKS = {                             # name: pictures, sentences, the two parts, may pictures be mirrored?
    "noto": ("noto_{}.npz", "noto_{}.jsonl", ("train", "test"), False),          # arrows, letters, clocks
    "emojitwo": ("emojitwo_{}.npz", "emojitwo_{}.jsonl", ("train", "test"), False),
    "birds64": ("birds64_{}.npz", "birds64_{}.jsonl", ("train", "test"), True),
    "codraw": ("scenes64_{}.npz", "scenes_{}.jsonl", ("train", "val"), False),   # "big sun on left corner"
    "cifar10": ("cifar10_{}.npz", None, ("train", "test"), True)}
LISTED = {                            # name: where the picture of a key lies; {set}: the key's second field
    "birds": ("CUB_200_2011/images/{key}.jpg",),
    "coco": ("images/{set}/{key}.jpg", "images/{set}/jpg/{key}.jpg", "images/{key}.jpg"),
    "flowers": ("oxford-102-flowers/images/{key}.jpg", "images/{key}.jpg"),
    "cc3m": ("images/{key}.jpg",), "cc12m": ("images/{key}.jpg",)}
NAMES = ("builtin", *LISTED, *PACKS, "folder", "npz")
ALIASES = {"cub": "birds"}


@dataclass
class Captions:
    """Pictures with sentences. Files are decoded when asked for; what is kept in memory is uint8."""
    name: str
    size: int                         # pixels of a side
    captions: Sequence                # N lists of sentences
    names: Sequence                   # N file names or ids
    pictures: Callable                # (rows, seed) -> (B, 3, size, size)
    extra: dict = field(default_factory=dict)     # {"class_id": N entries, ...}: what else is known
    said: Callable | None = None      # (rows, seed) -> B sentences, where drawing one by one is slow

    def __len__(self):
        return len(self.names)

    def images(self, rows, seed=None):
        """(B, 3, size, size) float32 in [-1, 1]; crop and flip drawn from (seed, row), None: the centre."""
        return self.pictures([int(row) for row in rows], seed)

    def sentences(self, rows, seed=0):
        """One sentence a row, a function of (seed, row)."""
        rows = [int(row) for row in rows]
        if self.said:
            return self.said(rows, seed)
        return [self.captions[row][seed_from(seed, row, 1) % len(self.captions[row])] for row in rows]


def load(name="builtin", root="", split="train", size=64, seed=0, holdout=0.1, objects=(1, 1)):
    """Open a data set by name.   -> Captions

    root      its folder (builtin: none); for "npz" the file X.npz, with X.jsonl beside it
    split     train, valid, test. Where there are only two parts, valid is `holdout` of train (0: none)
    objects   builtin: least and most things in a picture
    raises    FileNotFoundError or ValueError: one sentence with the file, the row and what was expected
    """
    name = ALIASES.get(name, name)
    check_name(name, NAMES, root, split, "captions")
    root = Path(root)
    if name == "builtin":
        return builtin(split, size, seed, objects)
    if name in LISTED or name in PACKS:
        parts = ("train", "test") if name in LISTED else PACKS[name][2]
        read = listed if name in LISTED else pack
        return two_parts(lambda part: read(name, root, part, size), parts, split, holdout, concepts)
    if name == "npz":
        return by_name(open_pack(root.stem, root, root.with_suffix(".jsonl"), size, False), split)
    return folder(root / split, size) if (root / split).is_dir() else by_name(folder(root, size), split)


def builtin(split, size, seed, objects):
    """The world of data/world.py, rendered when asked for: ten sentences a picture, extra["facts"]."""
    def scene(rows):
        return world.scenes(rows, seed, split, objects)

    def said(rows, draw):
        drawn, which, found = scene(rows), [seed_from(draw, row, 1) % 10 for row in rows], [""] * len(rows)
        for k in set(which):                       # sentence k of many scenes at once is ten times as fast
            mine = [b for b, other in enumerate(which) if other == k]
            for b, text in zip(mine, world.captions(world.pick(drawn, mine), k), strict=True):
                found[b] = text
        return found

    def ten(row):
        return Lazy(10, lambda k: world.captions(scene([row]), k)[0])

    n = BUILTIN[split]
    facts = Lazy(n, lambda row: world.facts(scene([row]))[0])
    return Captions("builtin", size, Lazy(n, ten), range(n),
                    lambda rows, _: world.render(scene(rows), size)[0], {"facts": facts}, said)


# -- AttnGAN's packaging: lists of keys, text/<key>.txt, pictures by key -------------------------------------


def listed(name, root, part, size):
    """CUB, COCO, Flowers, CC3M, CC12M. Birds are cut to 1.5 times their box; all may be mirrored."""
    keys = read_keys(root / part)
    files = find_pictures(root, LISTED[name], keys, part)
    texts = [read_captions(root, key) for key in keys]
    boxes, extra = {}, {}
    if name == "birds":
        boxes = read_boxes(root / "CUB_200_2011")
        if lost := [key for key in keys if key not in boxes]:
            raise ValueError(f"{root / 'CUB_200_2011'}: {lost[0]} has no line in images.txt and bounding_boxes.txt")
        if odd := [key for key in keys if not key[:3].isdecimal()]:
            raise ValueError(f"{root / part}: key {odd[0]!r:.60} does not start with the number of its class")
        extra = {"class_id": [int(key[:3]) for key in keys]}

    def decode(row):
        image = safe.open_image(files[row])
        return shrink(cut_to_box(image, boxes[keys[row]], files[row]) if boxes else image, size)

    return Captions(name, size, texts, keys, cropped(cached(decode), size, True), extra)


def find_pictures(root, patterns, keys, part):
    """The picture of every key, by the first pattern under which the first key has one."""
    tables = [[root / pattern.format(key=key, set=(key.split("_") + [""])[1]) for key in keys] for pattern in patterns]
    files = next((table for table in tables if table[0].is_file()), tables[0])
    return [safe.there(file, f"{root / part} lists it; take it out of the list, or copy it there") for file in files]


def read_keys(part):
    """The keys of one part: filenames.txt, one a line, or the official filenames.pickle."""
    if (part / "filenames.txt").is_file():
        keys = safe.read_lines(part / "filenames.txt")
    else:
        keys = safe.load_pickle(part / "filenames.pickle", hint="a list of keys; or filenames.txt")
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"{part}: filenames must be a list of keys such as 002.Laysan_Albatross/Laysan_0002")
    if bad := [key for key in keys if safe.outside(key)]:
        raise ValueError(f"{part}: key {bad[0]!r:.60} leads outside the folder")
    return keys


def read_captions(root, key):
    """text/<key>.txt, one sentence a line, blank lines skipped. CC3M, CC12M: the key before its "_"."""
    file = root / "text" / f"{key}.txt"
    if not file.is_file() and (short := root / "text" / f"{key.split('_')[0]}.txt").is_file():
        file = short
    return sentences_of(file, key)


def sentences_of(file, picture):
    found = safe.read_lines(file, f"the sentences of {picture}, one a line")
    if not found:
        raise ValueError(f"{file} holds no sentence; write at least one, or leave {picture} out")
    return found


def read_boxes(cub):
    """{key: (x, y, w, h)} from images.txt and bounding_boxes.txt, joined on the id, cut to whole pixels."""
    names = dict(line.partition(" ")[::2] for line in safe.read_lines(cub / "images.txt"))
    boxes, file = {}, cub / "bounding_boxes.txt"
    for number, line in enumerate(safe.read_text(file).splitlines(), 1):
        try:
            id_, *box = line.split()
            x, y, w, h = (int(float(value)) for value in box)
            boxes[names[id_].removesuffix(".jpg")] = (x, y, w, h)
        except (ValueError, KeyError, OverflowError) as error:
            raise ValueError(f"{file}, line {number}: {line!r:.60} is not '<id> x y w h' with an id of images.txt") from error
    return boxes


def cut_to_box(image, box, where="the picture"):
    """A square of half-side int(0.75 * longer side) around the box's centre, cut off at the border."""
    x, y, w, h = box
    r, cx, cy = int(max(w, h) * 0.75), (2 * x + w) // 2, (2 * y + h) // 2
    left, top = max(0, cx - r), max(0, cy - r)
    right, bottom = min(image.width, cx + r), min(image.height, cy + r)
    if right <= left or bottom <= top:
        raise ValueError(f"{where}: box {box} lies outside its {image.width} x {image.height} pixels")
    return image.crop((left, top, right, bottom))


# -- packs and folders ---------------------------------------------------------------------------------------


def pack(name, root, part, size):
    """One part of a set in PACKS."""
    pictures, texts, _, flip = PACKS[name]
    return open_pack(name, root / pictures.format(part), texts and root / texts.format(part), size, flip)


def open_pack(name, pictures, texts, size, flip):
    """X.npz with `images` uint8 (N, h, w, 3) and X.jsonl; without a jsonl sentences come from class names.

    Pictures of the stored size are returned as they are: no margin, no crop, at most mirrored.
    """
    images, rows, arrays = read_pack(pictures, texts, "(N, h, w, 3)")
    if rows is None:
        labels = labels_of(arrays, pictures, len(images))
        rows = [{"label": label, "captions": [f"a photo of {world.article(label)}"]} for label in labels]
    if empty := [n for n, row in enumerate(rows) if not any(row["captions"])]:
        raise ValueError(f"{texts}, line {empty[0] + 1} has no caption; write at least one")
    keys = sorted(set.intersection(*map(set, rows)) - {"captions", "index"})
    extra = {key: [row[key] for row in rows] for key in keys}
    names = next((extra[key] for key in ("name", "code", "id") if key in extra), range(len(rows)))
    told = [[text for text in row["captions"] if text] for row in rows]

    def fetch(row):
        return shrink(Image.fromarray(images[row]), size, 1)

    return Captions(name, size, told, [str(name) for name in names], cropped(fetch, size, flip), extra)


def labels_of(arrays, file, count):
    """The class name of each picture, from `labels` (N,) and `classes`."""
    try:
        found = arrays["classes"][arrays["labels"]].tolist()
    except (KeyError, IndexError):
        found = []
    if len(found) != count or not all(isinstance(label, str) and label for label in found):
        raise ValueError(f"{file} needs `classes`, the names, and `labels`, one a picture")
    return found


def concepts(data):
    """What must not be split over train and valid: an emoji in all its tones and genders; else a picture."""
    labels = data.extra.get("base_label")
    people = r"\b(person|people|man|men|woman|women|boy|girl|mr|mrs|mx)\b\W*"
    return [re.sub(people, "", str(label).lower()).strip() or label for label in labels] if labels else data.names


def folder(root, size):
    """Pictures with a .txt of the same name beside each, one sentence a line, at any depth."""
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in safe.PICTURES)
    if not files:
        raise safe.missing(root / "*.png", "pictures (png, jpg, webp, bmp), each with a .txt of its name")
    names = [file.relative_to(root).with_suffix("").as_posix() for file in files]
    texts = [sentences_of(file.with_suffix(".txt"), file.name) for file in files]
    decode = cached(lambda row: shrink(safe.open_image(files[row], upright=True), size))
    return Captions(str(root), size, texts, names, cropped(decode, size, False))
