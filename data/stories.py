"""Frames with sentences, in order: the input of StoryImager.

    data = load("codraw", root="codraw", split="train", size=64)
    data.frames([3, 5], seed=7)      (2, F, 3, 64, 64) in [-1, 1]; (seed, row) picks one of a scene's pictures
    data.captions[3]                 its F sentences

NAMES says which layouts are read; `python -m data.prepare NAME` says where each data set comes from.
"""
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import safe, views, world
from data.batches import seed_from
from data.parts import BUILTIN, Lazy, check_name, check_pixels, read_pack, squeeze, to_tensor, two_parts

NAMES = ("builtin", "codraw", "clevr", "pororo", "flintstones", "hdf5")
CLEVR = {"shape": ("cube", "sphere", "cylinder"),                      # columns 0..14 of a block, one-hot
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
        """(B, F, 3, size, size) float32 in [-1, 1].   seed: picks one of each scene; None: the middle"""
        return self.pictures([int(row) for row in rows], seed)


def load(name="builtin", root="", split="train", size=64, seed=0, holdout=0.1, frames=4, looks="fixed"):
    """Open a data set by name.   -> Stories

    root      its folder; for "hdf5" AR-LDM's file
    split     train, valid, test. codraw and clevr have two parts: the second is test, valid is cut from train
    frames    builtin: how many; looks: a name's looks are "fixed", or dealt anew in each "story"
    raises    FileNotFoundError or ValueError: one sentence with the file, the row and what was expected
    """
    check_name(name, NAMES, root, split, "stories")
    root = Path(root)
    if name == "builtin":
        return builtin(split, size, seed, frames, looks)
    if name in ("codraw", "clevr"):
        read = clevr if (root / "images").is_dir() else pack
        return two_parts(lambda part: read(name, root, part, size), ("train", "val"), split, holdout,
                         lambda data: data.names)
    data = {"pororo": pororo, "flintstones": flintstones, "hdf5": hdf5}[name](root, split, size)
    if not len(data):
        raise ValueError(f"{root}: no story is in the {split} part")
    return data


def builtin(split, size, seed, frames, looks):
    """Stories of the world's eight characters; extra["view"][row] says who is where, and which pronouns."""
    def view(rows):
        return views.stories(rows, seed, split, frames, looks)

    kept = {}                        # with fixed looks and no jitter there are about 1,400 different frames: each is drawn once

    def draw(rows, _):
        seen = view(rows)
        if looks != "fixed" or size > 64:
            return world.render(seen["scene"], size)[0].view(-1, frames, 3, size, size)
        said = torch.cat([seen["character"], *(seen[name][..., None] for name in ("place", "pose", "where"))], 2)
        said = [tuple(row) for row in said.flatten(0, 1).tolist()]
        if new := {name: n for n, name in enumerate(said) if name not in kept}:
            which = torch.tensor(list(new.values()))
            kept.update(zip(new, world.render({key: x[which] for key, x in seen["scene"].items()}, size)[0], strict=True))
        return torch.stack([kept[name] for name in said]).unflatten(0, (-1, frames))

    n, one = BUILTIN[split], functools.lru_cache(256)(lambda row: view([row]))        # a row's captions, one view
    return Stories("builtin", size, Lazy(n, lambda row: one(row)["sentences"][0]), range(n), draw,
                   {"view": Lazy(n, lambda row: view([row])), "complete": Lazy(n, lambda row: complete(one(row), row)[0])})


def complete(view, way=0):
    """Captions that tell a frame without the frames before it: who, doing what, where, in which place.

    way   0, 1, 2, ...: by name and look, by name, or by look
    -> B lists of F sentences, such as "Pip the red star jumps on the left in the snow."
    """
    told = []
    for b, frames in enumerate(view["character"].tolist()):
        looks = [f"the {world.COLOUR[colour]} {world.SHAPES[shape]}" for shape, colour, _ in view["look"][b].tolist()]
        called = [list(zip(world.NAMES, looks, strict=True)), [(name,) for name in world.NAMES], [(look,) for look in looks]]
        story = []
        for f, who in enumerate(frames):
            pose, where = views.POSES[view["pose"][b, f]], views.WHERE[view["where"][b, f]]
            place = world.PLACES[world.BACKGROUND[view["place"][b, f]]]
            spot = " " + views.spot(where) if who[1] < 0 else ""               # two have their places
            does = pose[:-1] if who[1] >= 0 else pose                          # stands -> stand
            text = f"{' and '.join(' '.join(called[(way + f) % 3][n]) for n in who if n >= 0)} {does}{spot} in the {place}."
            story.append(text[0].upper() + text[1:])
        told.append(story)
    return told


# -- packs and CLEVR-SV --------------------------------------------------------------------------------------


def pack(name, root, part, size):
    """stories64_PART.npz with `images` uint8 (N, F, h, w, 3); stories_PART.jsonl with F `captions` a line."""
    texts = root / f"stories_{part}.jsonl"
    images, rows, arrays = read_pack(root / f"stories64_{part}.npz", texts, "(N, F, h, w, 3)")
    for n, row in enumerate(rows):
        check_captions(row["captions"], images.shape[1], f"{texts}, line {n + 1}")
    extra = {"objects": [row["objects"] for row in rows]} if all("objects" in row for row in rows) else {}
    if "attributes" in arrays:
        extra["attributes"] = list(arrays["attributes"])
    names = [str(row.get("id", row.get("story", n))) for n, row in enumerate(rows)]

    def frames(row, seed):
        return [squeeze(Image.fromarray(frame), size) for frame in images[row]]

    return Stories(name, size, [row["captions"] for row in rows], names, stacked(frames), extra)


def check_captions(found, frames, where):
    """raises ValueError unless there is a sentence for every frame"""
    if len(found) != frames or not all(isinstance(text, str) and text.strip() for text in found):
        raise ValueError(f"{where} needs {frames} captions, one a frame and none empty; it has {len(found)}")


def which(count, seed, row, f):
    """Which of a scene's pictures: drawn from (seed, row, f), or without a seed the middle one."""
    return count // 2 if seed is None else seed_from(seed, row, f) % count


def stacked(frames):
    """frames(row, seed) -> F uint8 pictures, as the `pictures` of a data set."""
    return lambda rows, seed: torch.stack([to_tensor(frames(row, seed)) for row in rows])


def clevr(name, root, part, size):
    """StoryGAN's folder: images/CLEVR_new_<number>_<1-4>.png, CLEVR_dict.npy; sentences from the attributes.

    The published sample names no parts: stories are taken in order, the last fifth is the second part [ours].
    """
    table = safe.load_object_array(root / "CLEVR_dict.npy", dict, "the 75 attributes of each picture by its name")
    with safe.damage(root / "CLEVR_dict.npy", "needs 75 numbers for each picture"):
        table = {Path(str(key)).stem: np.asarray(row, dtype=np.float32).reshape(-1) for key, row in table.items()}
    numbers = sorted({key.rsplit("_", 1)[0] for key in table})
    cut = len(numbers) * 4 // 5
    numbers = numbers[:cut] if part == "train" else numbers[cut:]
    files = [[root / "images" / f"{number}_{t}.png" for t in (1, 2, 3, 4)] for number in numbers]
    for file in chain(*files):
        if file.stem not in table or len(table[file.stem]) != 75:
            raise ValueError(f"{root / 'CLEVR_dict.npy'}: {file.stem} needs 75 numbers")
        safe.there(file, "CLEVR_dict.npy lists it")
    attributes = [np.stack([table[file.stem] for file in story]) for story in files]

    def frames(row, seed):
        return [squeeze(safe.open_image(file), size) for file in files[row]]

    told = [clevr_captions(blocks, root / "CLEVR_dict.npy") for blocks in attributes]
    return Stories(name, size, told, numbers, stacked(frames), {"attributes": attributes})


def clevr_captions(attributes, where="attributes"):
    """(4, 75) -> four sentences: frame t adds the object of block t, 18 numbers: one-hots, then x, y, z."""
    told = []
    for t, block in enumerate(attributes[-1][:72].reshape(4, 18)):
        words, start = {}, 0
        for name, values in CLEVR.items():
            hot = block[start : start + len(values)]
            if sorted(hot.tolist()) != [0] * (len(values) - 1) + [1]:
                raise ValueError(f"{where}, block {t}: {name} is {hot.tolist()}, expected one 1")
            words[name], start = values[int(hot.argmax())], start + len(values)
        thing = " ".join(words[name] for name in ("size", "colour", "material", "shape"))
        told.append(f"a {thing} is added at position {block[15]:.1f} , {block[16]:.1f} .")
    return told


# -- PororoSV ------------------------------------------------------------------------------------------------


def pororo_descriptions(file):
    """descriptions.csv: rows `episode,scene,description`, no header.   -> {"episode/scene": [sentences]}"""
    found = {}
    for number, row in safe.read_rows(file, "the descriptions of PororoSV: episode,scene,description"):
        if len(row) != 3 or not row[2].strip():
            raise ValueError(f"{file}, row {number}: {','.join(row)!r:.60} is not episode,scene,description")
        found.setdefault(f"{row[0]}/{row[1]}", []).append(" ".join(row[2].split()))
    return found


def pororo(root, split, size):
    """StoryGAN's folder: five scenes a story, each a vertical strip of frames; three .npy files list them."""
    scenes = pororo_scenes(root, ("train", "valid", "test").index(split))
    if (root / "descriptions.csv").is_file():
        table = pororo_descriptions(root / "descriptions.csv")
    else:
        table = safe.load_object_array(root / "descriptions.npy", dict, "or descriptions.csv")
    keys = [["/".join(Path(scene).with_suffix("").parts[-2:]) for scene in story] for story in scenes]
    for key in chain(*keys):
        if not table.get(key):
            raise ValueError(f"{root}: the scene {key} is part of a story and has no description")
    extra = {"descriptions": [[list(table[key]) for key in story] for story in keys]}
    if (root / "labels.npy").is_file():
        flags = safe.load_object_array(root / "labels.npy")
        extra["characters"] = flags_of(flags, keys, root / "labels.npy")

    def frames(row, seed):
        strips = [(safe.open_image(root / scene), root / scene) for scene in scenes[row]]
        return [squeeze(one_of_strip(*strip, seed, row, f), size) for f, strip in enumerate(strips)]

    told = [[texts[0] for texts in story] for story in extra["descriptions"]]
    return Stories("pororo", size, told, [story[0] for story in keys], stacked(frames), extra)


def pororo_scenes(root, part):
    """The five pictures of each story of a part (0, 1, 2: train, valid, test).   -> N lists of paths"""
    names = ("img_cache4.npy", "following_cache4.npy", "train_seen_unseen_ids.npy")
    first, later, ids = (safe.load_object_array(root / name, (list, np.ndarray), "one of the three lists of stories")
                         for name in names)
    if len(first) != len(later) or len(ids) != 3:
        raise ValueError(f"{root}: img_cache4.npy has {len(first)} stories, following_cache4.npy {len(later)} "
                         f"and train_seen_unseen_ids.npy {len(ids)} parts; expected as many, and 3 parts")
    try:
        scenes = [[plain_path(scene, root) for scene in (first[n], *later[n])] for n in ids[part]]
    except (IndexError, TypeError) as error:
        raise ValueError(f"{root}: train_seen_unseen_ids.npy names a story that is not there ({error})") from error
    for scene in chain(*scenes):
        safe.there(root / scene, "img_cache4.npy and following_cache4.npy list it")
    return scenes


def flags_of(table, stories, file):
    """Which characters are in each frame.   table: {key: 0/1 flags} -> per story F arrays"""
    for key in chain(*stories):
        if not isinstance(table, dict) or key not in table:
            raise ValueError(f"{file} has no character flags of {key}, which is part of a story")
    with safe.damage(file, "has character flags that are not rows of numbers"):
        return [[np.asarray(table[key]) for key in story] for story in stories]


def plain_path(entry, where):
    """An entry of the cache files, bytes or the text "b'ep/1.png'", as a relative path."""
    text = entry.decode() if isinstance(entry, bytes) else str(entry)
    text = re.sub(r"^b(['\"])(.*)\1$", r"\2", text)
    if safe.outside(text):
        raise ValueError(f"{where}: the list of stories names {text!r:.60}, which leads outside the folder")
    return text


def one_of_strip(strip, where, seed, row, f):
    """One square of a vertical strip."""
    side, count = strip.width, strip.height // strip.width
    if not count or strip.height % side:
        raise ValueError(f"{where} is {strip.width} x {strip.height} pixels; a strip's height is a multiple of its width")
    n = which(count, seed, row, f)
    return strip.crop((0, n * side, side, (n + 1) * side))


# -- FlintstonesSV -------------------------------------------------------------------------------------------


def following(shots, where="the shots"):
    """{shot: the next four shots of its episode}; the last ones of an episode start no story."""
    episodes = {}
    for shot in sorted(shots):
        match = re.fullmatch(r"(s_\d+_e_\d+)_shot_(\d+)_(\d+)", shot)
        if not match:
            raise ValueError(f"{where}: {shot!r:.60} is not the id of a shot such as s_01_e_26_shot_000055_000129")
        episodes.setdefault(match[1], []).append(shot)
    return {row[n]: row[n + 1 : n + 5] for row in episodes.values() for n in range(len(row) - 4)}


def flintstones(root, split, size):
    """Shots of flintstones_annotations_v1-0.json, their four followers, video_frames_sampled/<shot>.npy.

    The seven flags of labels.pkl are Wilma, Fred, Betty, Barney, Dino, Pebbles, Mr Slate.
    """
    told = flintstones_told(root / "flintstones_annotations_v1-0.json")
    part = safe.read_json(root / "train-val-test_split.json", dict).get({"valid": "val"}.get(split, split))
    if not isinstance(part, list):
        raise ValueError(f"{root / 'train-val-test_split.json'} needs lists under train, val and test")
    cache = root / "following_cache4.pkl"
    later = safe.load_pickle(cache, dict) if cache.is_file() else following(told, where=root)
    stories = [[shot, *later[shot]] for shot in part if len(later.get(shot, ())) == 4]
    files = {shot: root / "video_frames_sampled" / f"{shot}.npy" for story in stories for shot in story}
    for shot, file in files.items():
        if not told.get(shot):
            raise ValueError(f"{root}: the annotations do not describe shot {shot}, which is part of a story")
        safe.there(file, "uint8 (frames, 128, 128, 3)")
    extra = {}
    if (root / "labels.pkl").is_file():
        extra["characters"] = flags_of(safe.load_pickle(root / "labels.pkl"), stories, root / "labels.pkl")

    def frames(row, seed):
        return [one_of_clip(files[shot], size, seed, row, f) for f, shot in enumerate(stories[row])]

    sentences = [[told[shot] for shot in story] for story in stories]
    return Stories("flintstones", size, sentences, [story[0] for story in stories], stacked(frames), extra)


def flintstones_told(file):
    """{shot: description} of the annotations."""
    told = {}
    for n, row in enumerate(safe.read_json(file, list, "the annotations of FlintstonesSV")):
        safe.check_row(row, {"globalID": str, "description": str}, f"{file}, entry {n}")
        told[row["globalID"]] = row["description"].strip()
    return told


def one_of_clip(file, size, seed, row, f):
    """One frame of a shot."""
    clip = safe.read_arrays(file)
    check_pixels(clip, "(F, h, w, 3)", file)
    return squeeze(Image.fromarray(clip[which(len(clip), seed, row, f)]), size)


# -- AR-LDM's HDF5 -------------------------------------------------------------------------------------------


def hdf5(file, split, size):
    """Groups train, val, test: image0..image4 (PNG bytes of a strip), text (five captions joined by "|")."""
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
        places = [f"{file}, {part}/image{f} {row}" for f in range(5)]
        strips = [safe.open_image(bytes(group[f"image{f}"][row]), places[f]) for f in range(5)]
        return [squeeze(one_of_strip(strips[f], places[f], seed, row, f), size) for f in range(5)]

    return Stories("hdf5", size, captions, [str(n) for n in range(len(captions))], stacked(frames))
