"""Fuzz: damaged, lying and hostile input for every loader, importer and command line.

A case is a small valid folder, one to three mutations drawn from (target, number), and everything its loader can do
with it. What may come out is success, or a ValueError or FileNotFoundError of one line that names a file. Meanwhile no
file changes, nothing lands outside, no code inside a file runs, and time and memory stay small.

    python -m pytest tests/test_fuzz.py             441 cases
    python -m pytest tests/test_fuzz.py --slow      3,048 more
"""
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import socket
import struct
import tarfile
import threading
import time
import zipfile
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import archives, captions, clip, edits, frames, interactions, options, prepare, safe, stories, text, videos, weights
from tests import test_clip, test_data_captions, test_data_interactions, test_data_stories, test_data_videos
from tests.test_data_interactions import TEST, TRAIN, VALID

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")     # the error follows
QUICK, ALL = 6, 52                # cases of a target: by default, with --slow
SECONDS, MIB = 4, 400             # what one case may use


# -- targets: write a small valid folder; read all of it -------------------------------------------------------------


def picture(file, size=(20, 16), seed=0, **kwargs):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, **kwargs)


def lines(file, *rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{row}\n" for row in rows))


def look(data):
    """Every picture and sentence of a data set."""
    rows = range(len(data))
    if isinstance(data, stories.Stories):
        return data.frames(rows, 1), [list(told) for told in data.captions]
    if isinstance(data, edits.Edits):
        return data.source(rows), data.target(rows), data.said(rows), list(data.instructions)
    return data.images(rows, 1), data.images(rows), data.sentences(rows, 1)


def pickled_birds(root):
    test_data_captions.attngan(root)
    for part in ("train", "test"):
        keys = (root / part / "filenames.txt").read_text().split()
        (root / part / "filenames.txt").unlink()
        (root / part / "filenames.pickle").write_bytes(pickle.dumps(keys, 2))


def coco(root):
    for part, key in (("train", "COCO_train2014_000000000009"), ("test", "COCO_val2014_000000000042")):
        picture(root / "images" / key.split("_")[1] / f"{key}.jpg")
        lines(root / "text" / f"{key}.txt", "a red picture", "", "another sentence")
        lines(root / part / "filenames.txt", key)


def folder(root):
    for n, end in enumerate(("png", "jpg", "webp", "gif", "bmp")):
        picture(root / "train" / f"{n}.{end}", (20, 14 + n), n)
        lines(root / "train" / f"{n}.txt", f"number {n}", "a picture")
    Image.fromarray(np.arange(0, 60000, 1000, dtype=np.uint16).reshape(6, 10)).save(root / "train" / "deep.png")
    lines(root / "train" / "deep.txt", "sixteen bits")


def cifar(root):
    for part in ("train", "test"):
        np.savez(root / f"cifar10_{part}.npz", images=np.zeros((3, 8, 8, 3), np.uint8), labels=np.array([0, 1, 1]),
                 classes=np.array(["ant", "bee"]))


def emoji(root):
    for part in ("train", "test"):
        np.savez(root / f"noto_{part}.npz", images=np.arange(768, dtype=np.uint8).reshape(4, 8, 8, 3))
        lines(root / f"noto_{part}.jsonl", *(json.dumps({
            "index": n, "captions": [f"face {n}", "a face"], "base_label": f"face {n // 2}", "code": f"U{n}"}) for n in range(4)))
        lines(root / f"noto_{part}_edits.tsv", "source\ttarget\tkind\tinstruction", "0\t1\ttone\tmake it dark",
              "3\t2\tgender\ta man")


def codraw(root):
    for part in ("train", "val"):
        np.savez(root / f"stories64_{part}.npz", images=np.zeros((2, 3, 8, 8, 3), np.uint8))
        lines(root / f"stories_{part}.jsonl", *(json.dumps({
            "index": n, "id": n, "captions": [f"step {t}" for t in range(3)], "objects": ["sun"]}) for n in range(2)))


def clevr(root):
    block = np.zeros(18)
    block[[0, 3, 11, 13]] = 1
    table = {f"CLEVR_new_00000{s}_{t}.png": np.r_[np.tile(block, 4), 0, 0, 0] for s in range(3) for t in (1, 2, 3, 4)}
    for name in table:
        picture(root / "images" / name, (8, 6))
    np.save(root / "CLEVR_dict.npy", np.array(table, dtype=object))


def flintstones(root):
    shots = test_data_stories.flintstones(root)
    later = {shot: shots[n + 1 : n + 5] for n, shot in enumerate(shots) if n < 3}
    (root / "following_cache4.pkl").write_bytes(pickle.dumps(later, 2))
    (root / "labels.pkl").write_bytes(pickle.dumps({shot: np.arange(7) for shot in shots}, 2))


GOOD = {"answer": "cat", "id": 0, "question": "who sleeps?", "video_id": 3}


def msvd(root):
    for part in ("train", "val", "test"):
        (root / f"{part}_qa.json").write_text(json.dumps([GOOD, {**GOOD, "id": 1, "question": "what is it?"}]))


def tgif(root):
    head = ["gif_name", "question", "a1", "a2", "a3", "a4", "a5", "answer", "vid_id", "key"]
    lines(root / "Train_action_question.csv", "\t".join(head),
          *(f"g{n}\twhat is it ?\ta\tb\tc\td\te\t{n}\tA1\t5" for n in range(4)))
    for kind, answer in (("count", 3), ("transition", 1), ("frameqa", "dog")):
        middle = head[2:7] if kind == "transition" else ["type"]
        lines(root / f"Train_{kind}_question.csv", "\t".join([*head[:2], *middle, *head[7:]]),
              "\t".join(map(str, ["g", "how many ?", *range(len(middle)), answer, "F1", 7])))
    lines(root / "hqga_frameqa_train.csv", "video,question,answer,qid", '7,"what, then",cat,1')


def activitynet(root):
    (root / "train_q.json").write_text(json.dumps([{"video_name": "v", "question": "is it", "question_id": "1"}]))
    (root / "train_a.json").write_text(json.dumps([{"answer": "yes", "type": 3, "question_id": "1"}]))


def other_questions(root):
    row = {"qid": 1, "question": "why?", "correct_idx": 2, "video_name": "e1", **{f"answer{k}": f"a{k}" for k in range(5)}}
    (root / "qa.json").write_text(json.dumps({"PororoQA": [{**row, "video_name": f"e{n}"} for n in range(4)]}))
    qa = {"question": "who?", "answer": "cat", "type": "who", "question_id": 3, "choices": ["cat", "dog"]}
    (root / "clips.json").write_text(json.dumps([{"clip": "a", "qa": [qa, {**qa, "choices": []}]}]))
    for part in ("train", "val"):
        (root / f"qa_{part}.json").write_text(json.dumps([{**GOOD, "type": "count"}]))


def ask(name, **kwargs):
    """Read the questions of a set and encode them."""
    def read(root):
        found = videos.load_questions(name, root, holdout=0, **kwargs)
        videos.encode(found, videos.build_vocabulary(found))
    return read


def films(root):
    for n in range(3):
        picture(root / "all" / "a" / f"{n}.png", (8, 8), n)
    picture(root / "all" / "b.gif", (8, 8), save_all=True, append_images=[Image.new("RGB", (8, 8), "red")] * 2)
    np.save(root / "all" / "c.npy", np.zeros((3, 8, 8, 3), np.uint8))
    np.savez(root / "n.npz", images=np.zeros((2, 3, 8, 8, 3), np.uint8))
    np.savez(root / "m.npz", x=np.zeros((3, 8, 8, 3), np.uint8))
    with zipfile.ZipFile(root / "f.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for n in range(3):
            archive.write(root / "all" / "a" / f"{n}.png", f"clips/a/{n}.png")


def watch(name):
    def read(root):
        found = frames.open_frames(root / name)
        for video in found.names:
            found.clips(video, 2, 2, 8)
    return read


def features(root):
    np.savez(root / "x.npz", ids=np.array([7, 3]), appearance=np.zeros((2, 2, 4, 5), np.float32),
             motion=np.ones((2, 2, 5), np.float32))
    lines(root / "glove.txt", "cat 0.1 0.2 0.3", "dog 1 2 3")


def read_features(root):
    frames.load_features(root / "x.npz").take([3, 7])
    frames.read_glove(root / "glove.txt", {"<NULL>": 0, "cat": 1, "dog": 2})


def mmssl(root):
    for name, part in (("train", TRAIN), ("val", VALID), ("test", TEST)):
        (root / f"{name}.json").write_text(json.dumps({str(u): [i for v, i in part if v == u] for u in range(3)}))
    test_data_interactions.features(root)


def inter(root):
    test_data_interactions.inter(root)
    test_data_interactions.features(root, dtype=np.float16)


def table(root):
    test_data_interactions.inter(root, "inter.csv", ",")


def pack(root):
    np.savez(root / "toy.npz", n_users=3, n_items=4, train=np.array(TRAIN), val=np.array(VALID), test=np.array(TEST))


def diffmm(root):
    with pytest.MonkeyPatch.context() as patch:
        for name, kind, part in (("trn", "coo", TRAIN), ("val", "csr", VALID), ("tst", "coo", TEST)):
            raw = test_data_interactions.pickled(part, kind, f"scipy.sparse._{kind}", 2, monkeypatch=patch)
            (root / f"{name}Mat.pkl").write_bytes(raw)


def bought(root):
    for repair in (False, True):
        try:
            interactions.load("toy", root, repair=repair).sampler().batch(0, 0, 4)
        except ValueError:
            if repair:
                raise


def vocabulary(root):
    told = "\n".join(['"version"', *(f"x{n} y{n}" for n in range(60)), ""])
    (root / "bpe.txt.gz").write_bytes(gzip.compress(told.encode()))
    (root / "merges.txt").write_text(told)


def read_vocabulary(root):
    with mock.patch.object(text, "MERGES", 50):
        for name in ("bpe.txt.gz", "merges.txt"):
            text.BytePairs(text.read_merges(root / name))("x1y1 x2")


def state(root):
    tensors = {"weight": torch.randn(3, 2), "bias": torch.zeros(3)}
    weights.write_safetensors(root / "a.safetensors", tensors, {"words": "red blue"})
    torch.save({"state_dict": tensors}, root / "b.pt")
    weights.save_checkpoint(root / "c.pt", {"name": "x", "config": {"lr": 0.1, "taps": [1]}, "state": tensors})
    torch.save(tensors, root / "old.pth", _use_new_zipfile_serialization=False)


def read_weights(name):
    def read(root):
        if name == "c.pt":
            return weights.load_checkpoint(root / name)
        weights.load_checked(torch.nn.Linear(2, 3), weights.read_state(root / name)[0], root / name)
    return read


def small_clip(root):
    tiny = test_clip.tiny(width=16, depth=1)
    (root / "hf").mkdir()
    weights.write_safetensors(root / "hf" / "model.safetensors", test_clip.hugging_face(tiny))
    torch.save(clip.official_names(tiny), root / "clip.pt")


def archive(root):
    with zipfile.ZipFile(root / "x.zip", "w", zipfile.ZIP_DEFLATED) as made:
        for name in ("a/b.txt", "a/c.bin", "top.txt"):
            made.writestr(name, name * 40)
    with tarfile.open(root / "x.tar.gz", "w:gz") as made:
        for name in ("a/b.txt", "top.txt"):
            info = tarfile.TarInfo(name)
            info.size = 7
            made.addfile(info, io.BytesIO(b"content"))


def unpack(name):
    def read(root):
        out = root / f"{name}-out"
        try:
            archives.unpack(root / name, out, limit=2**20)
        except (ValueError, FileNotFoundError):
            assert not out.exists() or not list(out.iterdir()), "an archive that was refused left something behind"
            raise
    return read


def check(name):
    return lambda root: prepare.check(name, root)


def picture_set(name, *where, load=captions.load):
    return lambda root: look(load(name, root.joinpath(*where), "train", 16, holdout=0))


def npz_pack(root):
    test_data_captions.pack(root)


TARGETS = {
    "birds": (test_data_captions.attngan, picture_set("birds")), "birds, pickled lists": (pickled_birds, picture_set("birds")),
    "coco": (coco, picture_set("coco")), "folder": (folder, picture_set("folder")),
    "npz": (npz_pack, picture_set("npz", "x.npz")), "cifar10": (cifar, picture_set("cifar10")),
    "emoji edits": (emoji, picture_set("noto", load=edits.load)),
    "codraw": (codraw, picture_set("codraw", load=stories.load)), "clevr": (clevr, picture_set("clevr", load=stories.load)),
    "codraw edits": (codraw, picture_set("codraw", load=edits.load)),
    "pororo": (test_data_stories.pororo, picture_set("pororo", load=stories.load)),
    "flintstones": (flintstones, picture_set("flintstones", load=stories.load)),
    "msvd": (msvd, ask("msvd")), **{f"tgif {kind}": (tgif, ask("tgif", kind=kind)) for kind in videos.KINDS},
    "svqa": (lambda root: test_data_videos.svqa(root) and None, ask("svqa")), "activitynet": (activitynet, ask("activitynet")),
    **{f"{name} questions": (other_questions, ask(name)) for name in ("pororo", "video_clips", "codraw")},
    **{f"frames {name}": (films, watch(name)) for name in ("all", "f.zip", "n.npz", "m.npz")},
    "features": (features, read_features), "vocabulary": (vocabulary, read_vocabulary),
    **{f"shop {make.__name__}": (make, bought) for make in (inter, table, pack, mmssl, diffmm)},
    **{f"weights {name}": (state, read_weights(name)) for name in ("a.safetensors", "b.pt", "c.pt", "old.pth")},
    "clip": (small_clip, lambda root: clip.load(root / "clip.pt", (2, 2))),
    "clip of hugging face": (small_clip, lambda root: clip.load(root / "hf", (2, 2))),
    **{f"archive {name}": (archive, unpack(name)) for name in ("x.zip", "x.tar.gz")},
    **{f"check {name}": (make, check(name)) for name, make in (("birds", test_data_captions.attngan), ("tgif", tgif))}}


# -- mutations -------------------------------------------------------------------------------------------------------


class Hostile:
    """A pickle that makes a folder when it is read."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (self.canary,)


ODD = [None, True, -1, 0, 3, 2**31, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", " ", "\0", "?", "a", "../../x", "/x",
       "na\u00efve \u2603 \U0001f600", "9" * 5000, "x" * 140_000, [], {}, [[]], [None], {"a": 1}, ["a"] * 5, [[0, 1]]]
JUNK = [b"", b"\0" * 64, b"\xff\xfe\0\xd8", b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", b"\x93NUMPY\x01\0", b"GIF89a", b"\x1f\x8b\x08",
        b"[" * 50_000, b'{"a":' * 50_000, b"\x80\x04.", b"\x80\x04" + b"]" * 9000 + b"a" * 8999 + b".",
        b"\x80\x02]r\xff\xff\xff\x7f.",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", b"[]", b"{}", b"null", b"7", b"NaN", b'"text"', b"\n\n\n", b"a,b\n",
        b"\xef\xbb\xbf"]


def spoil_bytes(rng, raw):
    """Bit flips, a cut, a block twice, away, or of zeros, of chance or of something else; CR LF."""
    a, b = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
    b = min(b, a + rng.choice((1, 4, 16, 4096)))
    if (what := rng.randrange(9)) == 0:
        out = bytearray(raw)
        for _ in range(rng.choice((1, 1, 3, 20)) if raw else 0):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        return bytes(out)
    return [raw[:a], raw[:b] + raw[a:], raw[:a] + raw[b:], raw[:a] + b"\0" * (b - a) + raw[b:],
            raw[:a] + rng.randbytes(b - a) + raw[b:], rng.choice(JUNK), raw[:a] + rng.choice(JUNK) + raw[b:],
            raw.replace(b"\n", b"\r\n")][what - 1]


def spoil_tree(rng, value):
    """One node of a JSON value, at random, becomes something else; or its children are swapped, doubled, lost."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    children = list(pairs)
    if children and rng.random() < 0.75:
        key, child = rng.choice(children)
        if isinstance(value, tuple):
            return tuple(spoil_tree(rng, x) if n == key else x for n, x in children)
        out = dict(value) if isinstance(value, dict) else list(value)
        if (what := rng.random()) < 0.1:
            del out[key]
        elif what < 0.2 and isinstance(out, dict):
            out[rng.choice(["", "a", "index", "\0"])] = out.pop(key)
        else:
            out[key] = spoil_tree(rng, child)
        return out
    return rng.choice(ODD)


def spoil_json(rng, raw):
    told = raw.decode()
    if "\n" in told.strip():                                                             # JSON lines
        rows = told.splitlines()
        at = rng.randrange(len(rows))
        rows[at] = json.dumps(spoil_tree(rng, json.loads(rows[at])))
        return "\n".join(rows).encode()
    return json.dumps(spoil_tree(rng, json.loads(told))).encode()


def spoil_array(rng, x):
    x = np.asarray(x)
    way = rng.randrange(9)
    if way == 0:
        return x.astype(rng.choice(["f4", "f8", "c8", "U5", "S3", "?", "u1", "i8", "i1"])) if x.dtype != object else x[..., None]
    if way == 1:
        return x.reshape(-1)
    if way == 2:
        return x[..., None]
    if way == 3:
        return x[:0] if x.ndim else x[None][:0]
    if way == 4:
        return x[:-1] if x.ndim else np.array(-5)
    if way == 5:
        return np.concatenate([x, x]) if x.ndim else np.array(2**62)
    if way == 6:
        return np.full(x.shape, rng.choice([-7, 0, 250, 2**40, np.nan, np.inf]))
    if way == 7:
        return np.zeros(x.shape, dtype=[("a", "i4"), ("b", "f4")])
    return np.array(rng.choice([None, "text", {"a": [1]}, [[1], [2, 3]]]), dtype=object)


def npy(x, **claim):
    """Bytes of an .npy, perhaps with a header that claims another shape."""
    out = io.BytesIO()
    np.save(out, x)
    raw = out.getvalue()
    if claim:
        raw = raw.replace(f"{x.shape}, ".encode().ljust(40), f"{claim['shape']}, ".encode().ljust(40))
        start = raw.index(b"'shape'")
        head = raw[:start] + f"'shape': {claim['shape']}, }}".encode()
        size = 128 if len(head) < 120 else 256
        raw = head[:8] + struct.pack("<H", size - 10) + head[10:].ljust(size - 11) + b"\n" + raw[raw.index(b"\n") + 1 :]
    return raw


def spoil_arrays(rng, raw, canary):
    """An .npy or .npz: one array of another type, shape or content, without its own, with a pickle, with a lie."""
    found = np.load(io.BytesIO(raw), **{"allow_" + "pickle": b"'|O'" in raw[:120] and b"mkdir" not in raw})
    arrays = {"": found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    name, way = rng.choice(sorted(arrays)), rng.random()
    if way < 0.1:
        arrays.pop(name)
        arrays |= {"other": np.arange(3)}
    x = arrays.get(name, np.arange(3))
    if way < 0.25:
        new = npy(np.array([Hostile(canary)], dtype=object))
    elif way < 0.4 and x.dtype != object:
        new = npy(x, shape=rng.choice([(10**12,), (2**40, 2**30), (-3,), (2**62, 4), (0, 0), (3, "x"), 7]))
    elif way < 0.55 and x.dtype == object and x.ndim == 0:
        table = {k: list(v) if isinstance(v, np.ndarray) else v for k, v in x.item().items()}
        new = npy(np.array(spoil_tree(rng, table), dtype=object))
    else:
        new = npy(spoil_array(rng, x))
    if isinstance(found, np.ndarray):
        return new
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        for key in arrays:
            made.writestr(f"{key}.npy", new if key == name else npy(arrays[key]))
        if name not in arrays:
            made.writestr("more.npy", new)
    return out.getvalue()


def spoil_pickle(rng, raw, canary):
    try:
        value = safe.load_pickle(raw)
    except ValueError:
        return spoil_bytes(rng, raw)
    laughs, loop = [], []
    for _ in range(40):
        laughs = [laughs, laughs]
    loop.append(loop)
    evil = Hostile(canary)
    new = rng.choice([evil, [evil], {"a": evil}, value, value, value, laughs, loop, range(9), b"x",
                      np.array([evil], dtype=object), np.zeros((2, 2)), np.datetime64("2020"), {1: 2}])
    if new is value:
        new = spoil_tree(rng, value) if not (isinstance(value, dict) and "format" in value) else spoil_tree(rng, {
            k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in value.items()})
    return pickle.dumps(new, rng.choice((0, 2, 4, 5)))


def spoil_picture(rng, end):
    """A whole picture, but not one that was expected."""
    size = rng.choice([(1, 1), (1, 3000), (12_000, 1), (7, 5), (400, 300), (12_000, 9000)])
    mode = rng.choice(["1", "L", "P", "RGB", "CMYK", "RGBA", "LA", "I;16", "F"]) if size[1] < 9000 else "1"
    out = io.BytesIO()
    kind = rng.choice(["PNG", "GIF", "JPEG", "TIFF", "BMP"]) if mode in ("L", "RGB", "P") and size[1] < 9000 else "PNG"
    image = Image.new(mode, size, 1)
    image.save(out, "TIFF" if mode in ("CMYK", "F") else "PNG" if kind == "JPEG" and mode == "P" else kind)
    return out.getvalue()


def spoil_zip(rng, raw):
    """Members that climb out, links, lies about sizes, a member twice, a bomb."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        members = [(info.filename, old.read(info)) for info in old.infolist()]
        at, way = rng.randrange(len(members)), rng.randrange(4)
        if way == 0:
            names = ["../evil.png", "/evil.png", "C:/evil.png", "a/../../evil.png", "..\\evil.png", "", "a/", "\u2603.png"]
            members[at] = (rng.choice(names), members[at][1])
        if way == 1:
            members[at] = (members[at][0], bytes(3 * 2**20))
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if way == 2 and name == members[at][0]:
                info.external_attr = 0o120777 << 16
            made.writestr(info, content)
    new = bytearray(out.getvalue())
    if way == 3:                                                      # the size that the directory claims
        start = new.index(b"PK\x01\x02")
        new[start + 24 : start + 28] = struct.pack("<I", rng.choice([0, 1, 2**26, 2**32 - 2]))
    return bytes(new)


def spoil_text(rng, raw):
    """One cell of one line, or a whole line."""
    rows = raw.decode("utf-8").split("\n")
    at = rng.randrange(len(rows))
    comma = next((c for c in "\t, " if c in rows[at]), " ")
    cells = rows[at].split(comma)
    odd = str(rng.choice([x for x in ODD if not isinstance(x, int) or x < 2**64]))
    way = rng.randrange(5)
    if way == 0:
        rows[at] = odd
    elif way == 1:
        rows.insert(at, rows[at])
    elif way == 2:
        del rows[at]
    elif way == 3:
        cells.insert(rng.randrange(len(cells) + 1), odd)
        rows[at] = comma.join(cells)
    else:
        cells[rng.randrange(len(cells))] = odd
        rows[at] = comma.join(cells)
    return "\n".join(rows).encode()


def spoil_safetensors(rng, raw):
    size = int.from_bytes(raw[:8], "little")
    head = json.dumps(spoil_tree(rng, json.loads(raw[8 : 8 + size]))).encode()
    claim = len(head) if rng.random() < 0.8 else rng.choice([0, 1, 2**40, 2**63])
    return struct.pack("<Q", claim) + head + raw[8 + size :]


def spoil(rng, file, canary):
    """Change one file in one way."""
    if (what := rng.random()) < 0.04:
        return file.unlink()
    if what < 0.06:
        file.unlink()
        return file.mkdir()
    raw, end = file.read_bytes(), file.suffix
    try:
        if what < 0.6:
            if end in (".json", ".jsonl"):
                return file.write_bytes(spoil_json(rng, raw))
            if end in (".npy", ".npz"):
                return file.write_bytes(spoil_arrays(rng, raw, canary))
            if end in (".pkl", ".pickle"):
                return file.write_bytes(spoil_pickle(rng, raw, canary))
            if end == ".zip":
                return file.write_bytes(spoil_zip(rng, raw))
            if end in (".txt", ".csv", ".tsv", ".inter"):
                return file.write_bytes(spoil_text(rng, raw))
            if end in (".png", ".jpg", ".gif", ".webp", ".bmp"):
                return file.write_bytes(spoil_picture(rng, end))
            if end == ".safetensors":
                return file.write_bytes(spoil_safetensors(rng, raw))
            if end in (".pt", ".pth"):
                evil, odd = Hostile(canary), spoil_tree(rng, {"state": {"weight": 1}, "b": [1]})
                return torch.save(rng.choice([evil, {"weight": evil}, odd]), file)
    except (*safe.DAMAGED, TypeError, IndexError):
        pass                                     # spoilt before, or nonsense that cannot even be written: bytes will do
    file.write_bytes(spoil_bytes(rng, raw))


# -- the oracle ------------------------------------------------------------------------------------------------------


def contents(root):
    """{path: what is there} of a folder."""
    return {file.relative_to(root): hashlib.sha256(file.read_bytes()).digest() if file.is_file() else None
            for file in root.rglob("*")}


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def sentence(error, names):
    """Raises AssertionError unless an error is one clear line with one of the names."""
    if type(error) not in (ValueError, FileNotFoundError):
        raise AssertionError(f"{type(error).__name__}: {error}") from error
    assert str(error) and "\n" not in str(error) and len(str(error)) < 700, f"not one sentence: {str(error)[:1000]!r}"
    assert any(name in str(error) for name in names), f"names no file: {error}"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """target -> its valid folder, made once."""
    made = {}

    def make(target):
        if target not in made:
            made[target] = tmp_path_factory.mktemp("whole") / "set"
            made[target].mkdir()
            TARGETS[target][0](made[target])
        return made[target]

    return make


def attempt(target, number, whole, tmp_path):
    """One case.   -> the error's sentence, or None"""
    rng = random.Random(f"{target} {number}")
    root, canary = tmp_path / "set", str(tmp_path / "canary")
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root)
    names = [str(root), *(name for file in root.rglob("*") for name in (file.name, file.stem) if len(name) > 2)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        if files := sorted(file for file in root.rglob("*") if file.is_file()):
            spoil(rng, rng.choice(files), canary)
    before, memory, began, error = contents(root), peak(), time.process_time(), None
    try:
        TARGETS[target][1](root)
    except Exception as caught:  # noqa: BLE001
        error = caught
    seconds, grown = time.process_time() - began, peak() - memory
    after = {path: what for path, what in contents(root).items() if "-out" not in path.parts[0]}
    assert after == before, "reading changed a file"
    assert {path.name for path in tmp_path.iterdir()} == {"set"}, f"something landed outside: {list(tmp_path.iterdir())}"
    assert seconds < SECONDS and grown < MIB, f"{seconds:.1f} s, {grown:.0f} MiB"
    if error:
        sentence(error, names)
    return error and str(error)


def cases(target, numbers, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "case").mkdir()
    told = []
    for number in numbers:
        try:
            told.append(attempt(target, number, whole, tmp_path / "case"))
        except AssertionError as error:
            error.add_note(f"case {number} of {target!r}")
            raise
    return told


@pytest.mark.parametrize("target", TARGETS)
def test_the_unspoilt_folder_is_read(target, template, tmp_path):
    shutil.copytree(template(target), tmp_path / "set")
    TARGETS[target][1](tmp_path / "set")


BAD = {"names no file": lambda root: int("x"), "KeyError": lambda root: {}["x"],
       "reading changed a file": lambda root: next(root.glob("*.csv")).unlink(missing_ok=True),
       "landed outside": lambda root: (root.parent / "canary").mkdir()}


@pytest.mark.parametrize("complaint", BAD)
def test_the_oracle_notices_a_bad_loader(complaint, template, tmp_path, monkeypatch):
    whole = template("shop table")
    monkeypatch.setitem(TARGETS, "shop table", (table, BAD[complaint]))
    with pytest.raises(AssertionError, match=complaint):
        cases("shop table", [1], whole, tmp_path, monkeypatch)


@pytest.mark.parametrize("target", TARGETS)
def test_spoilt_files_end_in_a_sentence_and_nothing_else(target, template, tmp_path, monkeypatch):
    cases(target, range(QUICK), template(target), tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_many_spoilt_files_end_in_a_sentence_and_nothing_else(target, template, tmp_path, monkeypatch):
    told = cases(target, range(QUICK, ALL), template(target), tmp_path, monkeypatch)
    assert sum(map(bool, told)) >= len(told) // 8, "the mutations of this target hardly do anything"


# -- downloads -------------------------------------------------------------------------------------------------------


def download(rng, tmp_path):
    """A server that sends a spoilt answer, perhaps to somebody who has a spoilt part already."""
    body, file = rng.randbytes(3000), tmp_path / "x.bin"
    if rng.random() < 0.5:
        (tmp_path / "x.bin.part").write_bytes(rng.choice([body[:700], body[:700], body, rng.randbytes(50), body + b"x"]))
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n" + body
    if rng.random() < 0.3:
        answer = b"HTTP/1.1 206 OK\r\nContent-Range: bytes 700-2999/3000\r\nContent-Length: 2300\r\n\r\n" + body[700:]
    if (way := rng.random()) < 0.4:
        answer = spoil_bytes(rng, answer[:90]) + answer[90:]
    elif way < 0.6:
        head, _, rest = answer.partition(b"\r\n")
        more = ["Content-Length: -1", "Content-Length: x", "Transfer-Encoding: chunked", "Content-Range: bytes -5-x/9",
                "Location: file:///", "a" * 70_000]
        head = head.replace(b"200", rng.choice([b"200", b"302", b"404", b"999", b"0"]))
        answer = b"\r\n".join([head, rng.choice(more).encode(), rest])
    elif way < 0.8:
        answer = spoil_bytes(rng, answer)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)

        def serve():
            try:
                with server.accept()[0] as client:
                    client.recv(4096)
                    client.sendall(answer)
            except OSError:
                pass                                     # nobody asked, or hung up

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.bin"
        try:
            prepare.fetch(url, file, len(body), hashlib.sha256(body).hexdigest(), timeout=2)
        except Exception as error:
            sentence(error, [url, str(file)])
    assert not file.exists() or file.read_bytes() == body, "the final name holds something else"
    assert {path.name for path in tmp_path.iterdir()} <= {"x.bin", "x.bin.part"}


def downloads(numbers, tmp_path):
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        download(random.Random(f"download {number}"), folder)


def test_a_spoilt_download_never_gets_the_final_name(tmp_path):
    downloads(range(20), tmp_path)


@pytest.mark.slow
def test_many_spoilt_downloads_never_get_the_final_name(tmp_path):
    downloads(range(20, 150), tmp_path)


# -- command lines ---------------------------------------------------------------------------------------------------

WORDS = ["", "-", "--", "---", "=", "--=", "a", "--x", "--lr", "lr=1", "--steps=", "--no-fresh", "-h=1", "--\u2603=1", "\udcff",
         "--seed\0=1", "--" + "a" * 9000]
VALUES = ["", "0", "-1", "1e999", "nan", "-inf", "1_000", "\u0663", "0x10", "9" * 5000, "1e-400", "true", "maybe", "None",
          "a,b", ",", "1,,2", "1,x", "\u2603", "\udcff", "..", "a\0b", " 7 ", "{}", "builtin", "x" * 9000]


def command_line(rng, module):
    """Words for one model: known options, misspelt ones, odd values, odd words."""
    names = [*options.fields(module.Config), *options.fields(train.Run)]
    typed = []
    for _ in range(rng.choice((1, 2, 3, 8))):
        name, value = rng.choice(names), rng.choice([rng.choice(VALUES), str(rng.randrange(-10, 10**6))])
        if rng.random() < 0.15:
            name = "".join(rng.sample(name, len(name)))
        name = name.replace("_", rng.choice("_-"))
        typed += rng.choice([[f"--{name}={value}"], [f"--{name}", value], [f"--{name}"], [rng.choice(WORDS)]])
    return [word for word in typed if word not in ("-h", "--help")]


def command_lines(numbers, monkeypatch):
    """Everything that happens before a task is built: parsing, presets, the configuration's own checks."""
    monkeypatch.setattr(train, "MODELS", {**train.MODELS, **train.HELPERS})
    for name in ("fit", "ablate", "evaluate_checkpoint"):
        monkeypatch.setattr(train, name, lambda *_: None)
    monkeypatch.setattr(train, "build", lambda *_: [None])
    monkeypatch.setattr(train, "report", mock.Mock())
    models = [name for name, about in train.MODELS.items() if train.module_file(about[0]).exists()]
    wrong = 0
    for number in numbers:
        rng = random.Random(f"command {number}")
        model = rng.choice(models)
        argv = command_line(rng, train.find_model(model)[1])
        model = model if rng.random() < 0.9 else rng.choice(["", "mgvcn", "galpi", "\u2603", "--", "../data", "\udcff", "x" * 90])
        try:
            train.main([model, *argv])
        except Exception as error:
            wrong += 1
            if type(error) is not ValueError or "\n" in str(error) or len(str(error)) > 400:
                raise AssertionError(f"case {number}: {model} {argv}: {type(error).__name__}: {error}"[:2000]) from error
    return wrong


def test_odd_command_lines_end_in_a_sentence(monkeypatch):
    assert command_lines(range(60), monkeypatch) > 30


@pytest.mark.slow
def test_many_odd_command_lines_end_in_a_sentence(monkeypatch):
    command_lines(range(60, 1000), monkeypatch)


def test_odd_command_lines_of_prepare_end_in_a_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    for _ in range(60):
        name = rng.choice([*prepare.PLACES, *WORDS])
        more = [f"{rng.choice(['--root', '--unpack', '--mirror', '--check', '--x', '--mi'])}={rng.choice(VALUES)}"]
        argv = [name, "--mirror=ftp://x", *more, *rng.choice([["--check"], []])]
        try:
            prepare.main([word for word in argv if word not in ("-h", "--help")])
        except SystemExit as stop:
            assert stop.code == 2, "argparse's own sentence"
        except Exception as error:
            if not isinstance(error, ValueError | OSError) or "\n" in str(error):          # the others are not shown as a line
                raise AssertionError(f"{argv}: {type(error).__name__}: {error}"[:2000]) from error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing may be written"
