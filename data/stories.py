"""Frames with sentences, in order: the input of StoryImager.

    data = load("codraw", root="codraw", split="train", size=64)
    data.frames([3, 5], seed=7)      (2, F, 3, 64, 64) in [-1, 1]; the frame drawn from a strip depends on
                                     (seed, row)
    data.captions[3]                 its F sentences

NAMES says which layouts are read; `python -m data.prepare NAME` says where each data set comes from.
"""
import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import safe, views, world
from data.batches import seed_from
from data.parts import BUILTIN, Lazy, check_split, to_tensor, two_parts

NAMES = ("builtin", "codraw", "clevr", "pororo", "flintstones", "hdf5")
PORORO = ("Pororo", "Loopy", "Crong", "Eddy", "Poby", "Petty", "Tongtong", "Rody",
          "Harry")      # UNVERIFIED order
FLINTSTONES = ("Wilma", "Fred", "Betty", "Barney", "Dino", "Pebbles", "Mr Slate")
CLEVR = {"shape": ("cube", "sphere", "cylinder"),
                                                        # columns 0..14 of a block
         "colour": ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow"),
         "material": ("rubber", "metal"), "size": ("large", "small")}


@dataclass
class Stories:
    """Stories of F frames, a sentence each. Files are decoded when asked for."""
    name: str
    size: int                         # pixels of a side
    captions: Sequence                # N lists of F sentences
    names: Sequence                   # N ids
    pictures: Callable                # (rows, seed) -> (B, F, 3, size, size)
    extra: dict = field(default_factory=dict)     # more of each story: objects, characters, attributes, ...

    def __len__(self):
        return len(self.names)

    def frames(self, rows, seed=None):
        """(B, F, 3, size, size) float32 in [-1, 1].   seed: which frame of each strip, with (row, f); None:
        the middle
        """
        return self.pictures([int(row) for row in rows], seed)

    def select(self, rows):
        """The same data set, only these rows."""
        rows = [int(row) for row in rows]
        return Stories(self.name, self.size, [self.captions[row] for row in rows], [self.names[row]
                                                                                    for row in rows],
                       lambda picked, seed: self.pictures([rows[p] for p in picked], seed),
                       {key: [values[row] for row in rows] for key, values in self.extra.items()})


def load(name="builtin", root="", split="train", size=64, seed=0, holdout=0.1, frames=4, looks="fixed"):
    """Open a data set by name.   -> Stories

    root      its folder; for "hdf5" AR-LDM's file
    frames, looks    builtin: frames of a story; whether a name's looks are "fixed" or dealt anew in each
                     "story"
    split     train, valid, test. codraw and clevr have two parts here: the second is test, valid is `holdout`
              of train
    raises    FileNotFoundError or ValueError: one sentence with the file, the row and what was expected
    """
    check_split(split)
    if name not in NAMES:
        raise ValueError(f"stories {name!r} are unknown; there are {', '.join(NAMES)}")
    if name == "builtin":
        return builtin(split, size, seed, frames, looks)
    if not root or not Path(root).exists():
        raise safe.missing(root or f"--root for {name}", f"type  python -m data.prepare {name}  to see "
                                                         f"where it comes from")
    root = Path(root)
    if name == "codraw" or (name == "clevr" and not (root / "images").is_dir()):
        return two_parts(lambda part: pack(name, root, part, size), ("train", "val"), split, holdout,
                         lambda d: d.names)
    if name == "clevr":
        return two_parts(lambda part: clevr(root, part, size), ("train", "val"), split, holdout,
                         lambda d: d.names)
    return {"pororo": pororo, "flintstones": flintstones, "hdf5": hdf5}[name](root, split, size)


def builtin(split, size, seed, frames, looks):
    """Stories of the world's eight characters (data/views.py); extra["view"][row] holds who, where and which
    pronouns.
    """
    n = BUILTIN[split]
    def view(rows):
        return views.stories(rows, seed, split, frames, looks)

    def draw(rows, _):
        return world.render(view(rows)["scene"], size)[0].view(-1, frames, 3, size, size)

    return Stories("builtin", size, Lazy(n, lambda row: view([row])["sentences"][0]), range(n), draw,
                   {"view": Lazy(n, lambda row: view([row]))})


# -- packs and CLEVR-SV --------------------------------------------------------------------------------------


def pack(name, root, part, size):
    """stories64_PART.npz with `images` uint8 (N, F, h, w, 3); stories_PART.jsonl with F `captions` a line."""
    file, texts = root / f"stories64_{part}.npz", root / f"stories_{part}.jsonl"
    arrays = safe.read_arrays(file, hint="images, uint8 (N, F, h, w, 3)")
    images = arrays.get("images") if isinstance(arrays, dict) else None
    if images is None or images.dtype != np.uint8 or images.ndim != 5 or images.shape[-1] != 3:
        raise ValueError(f"{file} must hold `images`, uint8 (N, F, h, w, 3)")
    rows = safe.read_jsonl(texts, {"captions": list}, "one line a story, with its captions")
    if len(rows) != len(images):
        raise ValueError(f"{texts} has {len(rows)} lines, {file} has {len(images)} stories; they must "
                         f"match row by row")
    for n, row in enumerate(rows):
        check_captions(row["captions"], images.shape[1], f"{texts}, line {n + 1}")
        if row.get("index", n) != n:
            raise ValueError(f"{texts}, line {n + 1} has index {row['index']}, expected {n}: its rows must "
                             f"be in order")
    extra = {key: [row[key] for row in rows] for key in ("objects",) if all(key in row for row in rows)}
    if "attributes" in arrays:
        extra["attributes"] = list(arrays["attributes"])
    names = [str(row.get("id", row.get("story", n))) for n, row in enumerate(rows)]
    def frames(row, seed):
        return [square(Image.fromarray(frame), size) for frame in images[row]]

    return Stories(name, size, [row["captions"] for row in rows], names, stacked(frames), extra)


def check_captions(found, frames, where):
    """Raises ValueError unless there is a sentence for every frame."""
    if len(found) != frames or not all(isinstance(text, str) and text.strip() for text in found):
        raise ValueError(f"{where} needs {frames} captions, one a frame and none empty; it has {len(found)}")


def square(image, size):
    """Any RGB picture squeezed to size x size.   -> uint8 (size, size, 3)"""
    return np.asarray(image if image.size == (size, size) else image.resize((size, size), Image.BILINEAR))


def stacked(frames):
    """frames(row, seed) -> F uint8 pictures, as the `pictures` of a data set."""
    return lambda rows, seed: torch.stack([to_tensor(frames(row, seed)) for row in rows])


def clevr(root, part, size):
    """StoryGAN's folder: images/CLEVR_new_<number>_<1-4>.png and CLEVR_dict.npy, sentences written from the
    attributes.

    The published sample names no parts; stories are taken in order, the last fifth being the second part
    [ours].
    """
    table = safe.load_object_array(root / "CLEVR_dict.npy", "the attributes of CLEVR-SV: picture name -> "
                                                            "75 numbers")
    table = {Path(str(key)).stem: np.asarray(value, dtype=np.float32).reshape(-1) for key,
             value in table.items()}
    numbers = sorted({key.rsplit("_", 1)[0] for key in table})
    cut = len(numbers) * 4 // 5
    numbers = numbers[:cut] if part == "train" else numbers[cut:]
    files = [[root / "images" / f"{number}_{t}.png" for t in (1, 2, 3, 4)] for number in numbers]
    for file in (file for story in files for file in story):
        if file.stem not in table or len(table[file.stem]) != 75:
            raise ValueError(f"{root / 'CLEVR_dict.npy'}: {file.stem} needs 75 numbers")
        if not file.is_file():
            raise safe.missing(file, "CLEVR_dict.npy lists it")
    attributes = [np.stack([table[file.stem] for file in story]) for story in files]
    def frames(row, seed):
        return [square(safe.open_image(file), size) for file in files[row]]

    return Stories("clevr", size, [clevr_captions(a) for a in attributes], numbers, stacked(frames),
                   {"attributes": attributes})


def clevr_captions(attributes):
    """(4, 75) -> four sentences: frame t adds the object of block t, 18 numbers: one-hots, then x, y, z."""
    told = []
    for t, block in enumerate(attributes[-1][:72].reshape(4, 18)):
        words, start = {}, 0
        for name, values in CLEVR.items():
            hot = block[start : start + len(values)]
            if sorted(hot.tolist()) != [0] * (len(values) - 1) + [1]:
                raise ValueError(f"CLEVR-SV attributes, block {t}: {name} is {hot.tolist()}, expected a "
                                 f"single 1")
            words[name], start = values[int(hot.argmax())], start + len(values)
        told.append(f"a {words['size']} {words['colour']} {words['material']} {words['shape']} is added at "
                    f"position "
                    f"{block[15]:.1f} , {block[16]:.1f} .")
    return told


# -- PororoSV ------------------------------------------------------------------------------------------------


def pororo_descriptions(file):
    """descriptions.csv: rows `episode,scene,description` without a header.   -> {"episode/scene":
    [sentences]}
    """
    found = {}
    rows = csv.reader(io.StringIO(safe.read_text(file, "the descriptions of PororoSV: "
                                                       "episode,scene,description")))
    for number, row in enumerate(rows, 1):
        if len(row) != 3 or not row[2].strip():
            raise ValueError(f"{file}, row {number}: {','.join(row)!r:.60} is not "
                             f"'episode,scene,description'")
        found.setdefault(f"{row[0]}/{row[1]}", []).append(" ".join(row[2].split()))
    return found


def pororo(root, split, size):
    """The StoryGAN folder: five scenes a story, each a vertical strip of frames; the lists are three .npy
    files.
    """
    first, later = (safe.load_object_array(root / name, "the list of stories")
                    for name in ("img_cache4.npy", "following_cache4.npy"))
    ids = safe.load_object_array(root / "train_seen_unseen_ids.npy", "the stories of train, valid and test")
    if len(first) != len(later) or len(ids) != 3:
        raise ValueError(f"{root}: img_cache4.npy has {len(first)} stories, following_cache4.npy "
                         f"{len(later)} and "
                         f"train_seen_unseen_ids.npy {len(ids)} parts; the first two must agree, the last "
                         f"must be 3")
    scenes = [[plain_path(first[n]), *map(plain_path, later[n])] for n in ids[("train", "valid",
                                                                               "test").index(split)]]
    table = (pororo_descriptions(root / "descriptions.csv") if (root / "descriptions.csv").is_file()
             else safe.load_object_array(root / "descriptions.npy", "or descriptions.csv"))
    keys = [["/".join(Path(scene).with_suffix("").parts[-2:]) for scene in story] for story in scenes]
    for key in (key for story in keys for key in story):
        if not table.get(key):
            raise ValueError(f"{root}: the scene {key} is part of a story and has no description")
    for scene in (scene for story in scenes for scene in story):
        if not (root / scene).is_file():
            raise safe.missing(root / scene, "img_cache4.npy and following_cache4.npy list it")
    extra = {"descriptions": [[list(table[key]) for key in story] for story in keys]}
    if (root / "labels.npy").is_file():
        extra["characters"] = flags_of(safe.load_object_array(root / "labels.npy"), keys, root / "labels.npy")
    def frames(row, seed):
        return [square(one_of_strip(safe.open_image(root / scene), root / scene, seed, row, f), size)

                                for f, scene in enumerate(scenes[row])]
    return Stories("pororo", size, [[texts[0] for texts in story] for story in extra["descriptions"]],
                   [story[0] for story in keys], stacked(frames), extra)


def flags_of(table, stories, file):
    """Which characters are in each frame.   table: {key: 0/1 flags} -> per story F arrays"""
    for key in (key for story in stories for key in story):
        if not isinstance(table, dict) or key not in table:
            raise ValueError(f"{file} has no character flags of {key}, which is part of a story")
    return [[np.asarray(table[key]) for key in story] for story in stories]


def plain_path(entry):
    """An entry of the cache files, bytes or the text "b'ep/1.png'", as a relative path."""
    text = entry.decode() if isinstance(entry, bytes) else str(entry)
    text = re.sub(r"^b(['\"])(.*)\1$", r"\2", text)
    if text.startswith("/") or ".." in text.split("/"):
        raise ValueError(f"the list of stories names {text!r}, which leads outside the folder")
    return text


def one_of_strip(strip, where, seed, row, f):
    """One square of a vertical strip: drawn from (seed, row, f), or the middle one."""
    side, count = strip.width, strip.height // strip.width
    if not count or strip.height % side:
        raise ValueError(f"{where} is {strip.width} x {strip.height} pixels; a strip's height is a "
                         f"multiple of its width")
    n = count // 2 if seed is None else seed_from(seed, row, f) % count
    return strip.crop((0, n * side, side, (n + 1) * side))


# -- FlintstonesSV -------------------------------------------------------------------------------------------


def following(shots, frames=5):
    """Stories of consecutive shots: {shot: the next frames - 1 of its episode}; shots near an episode's end
    start none.
    """
    episodes = {}
    for shot in sorted(shots):
        match = re.fullmatch(r"(s_\d+_e_\d+)_shot_(\d+)_(\d+)", shot)
        if not match:
            raise ValueError(f"{shot!r} is not the id of a shot such as s_01_e_26_shot_000055_000129")
        episodes.setdefault(match[1], []).append(shot)
    return {shot: list(row[n + 1 : n + frames]) for row in episodes.values() for n,
            shot in enumerate(row[: 1 - frames or None])}


def flintstones_captions(file):
    """val.tsv: a header, then `shot <TAB> text`.   -> {shot: text}"""
    found = {}
    for number, line in enumerate(safe.read_text(file, "lines of a shot id, a tab and its "
                                                       "caption").splitlines()[1:], 2):
        shot, tab, text = line.partition("\t")
        if not tab or not text.strip():
            raise ValueError(f"{file}, line {number}: {line!r:.60} is not a shot id, a tab and its caption")
        found[shot] = text.strip()
    return found


def written_stories(file):
    """Stories without pictures, one JSON object a line.   -> [{"episode", "frames": [{"caption",
    "characters"}, ...]}, ...]
    """
    rows = safe.read_jsonl(file, {"episode": str, "frames": list}, "one line a story: episode and frames")
    for n, row in enumerate(rows, 1):
        for frame in row["frames"]:
            safe.check_row(frame, {"caption": str, "characters": list}, f"{file}, line {n}, frames")
    return rows


def flintstones(root, split, size):
    """Shots of flintstones_annotations_v1-0.json with their four followers; frames in
    video_frames_sampled/<shot>.npy.
    """
    file = root / "flintstones_annotations_v1-0.json"
    told = {}
    for n, row in enumerate(safe.read_json(file, list, "the annotations of FlintstonesSV")):
        safe.check_row(row, {"globalID": str, "description": str}, f"{file}, entry {n}")
        told[row["globalID"]] = row["description"].strip()
    parts = safe.read_json(root / "train-val-test_split.json", dict, "lists of shots under train, val and test")
    part = parts.get({"valid": "val"}.get(split, split))
    if not isinstance(part, list):
        raise ValueError(f"{root / 'train-val-test_split.json'} needs lists under train, val and test")
    cache = root / "following_cache4.pkl"
    later = safe.load_pickle(cache) if cache.is_file() else following(told)
    stories = [[shot, *later[shot]] for shot in part if len(later.get(shot, ())) == 4]
    for shot in (shot for story in stories for shot in story):
        if not told.get(shot):
            raise ValueError(f"{file} has no description of shot {shot}, which is part of a story")
        if not (root / "video_frames_sampled" / f"{shot}.npy").is_file():
            raise safe.missing(root / "video_frames_sampled" / f"{shot}.npy", "uint8 (frames, 128, 128, 3)")
    extra = {}
    if (root / "labels.pkl").is_file():
        extra["characters"] = flags_of(safe.load_pickle(root / "labels.pkl"), stories, root / "labels.pkl")

    def frame(shot, seed, row, f):
        clip = safe.read_arrays(root / "video_frames_sampled" / f"{shot}.npy")
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or not len(clip):
            raise ValueError(f"{shot}.npy is {clip.dtype} {clip.shape}; it must be uint8 (frames, height, "
                             f"width, 3)")
        return square(Image.fromarray(clip[len(clip) // 2 if seed is None else seed_from(seed, row,
                                                                                         f) % len(clip)]), size)

    def frames(row, seed):
        return [frame(shot, seed, row, f) for f, shot in enumerate(stories[row])]

    return Stories("flintstones", size, [[told[s] for s in story] for story in stories],
                   [s[0] for s in stories],
                   stacked(frames), extra)


# -- AR-LDM's HDF5 -------------------------------------------------------------------------------------------


def hdf5(file, split, size):
    """Groups train, val, test with image0..image4 (PNG bytes of a strip) and text (five captions joined by
    "|").
    """
    opened = safe.open_hdf5(file, "AR-LDM's pororo.h5 or flintstones.h5")
    part = {"valid": "val"}.get(split, split)
    wanted = [f"image{f}" for f in range(5)] + ["text"]
    if part not in opened or any(key not in opened[part] for key in wanted):
        raise ValueError(f"{file} has no group {part!r} with {', '.join(wanted)}")
    group = opened[part]
    texts = [t.decode() if isinstance(t, bytes) else str(t) for t in group["text"][:]]
    captions = [[text.strip() for text in row.split("|")] for row in texts]
    for n, row in enumerate(captions):
        check_captions(row, 5, f"{file}, {part}/text {n}")

    def frames(row, seed):
        return [square(one_of_strip(safe.open_image(bytes(group[f"image{f}"][row]),
                                                    f"{file}, {part}/image{f} {row}"),
                                    file, seed, row, f), size) for f in range(5)]

    return Stories("hdf5", size, captions, [str(n) for n in range(len(captions))], stacked(frames))
