"""Frames and features of videos: folders of pictures, zips, GIFs, .npz; HCRN's feature files; GloVe vectors.

    frames = open_frames("frames.zip")
    frames.names                                              the videos
    frames["msrvtt_video7010"]                                its pictures, decoded one by one when asked for
    frames.clips("msrvtt_video7010", clips=8, frames=16, size=224)        (8, 16, 3, 224, 224) in [-1, 1]
"""
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence

from data import quiz, safe
from data.parts import FILMS, Lazy, check_pixels, squeeze, to_tensor

LARGEST = 64 * 2**20                      # bytes of one packed picture: more is not a frame
VIDEO_FILES = {".mp4", ".avi", ".webm", ".mkv", ".mov"}
HOW_TO_CUT = "cut films into pictures first, as in  ffmpeg -i video7.mp4 -vf fps=5 frames/video7/%04d.jpg"


class Frames:
    """Videos by name; each is a sequence of RGB Pillow images."""

    def __init__(self, where, openers, rows=None):
        self.where, self.openers, self.rows = where, openers, rows or clip_rows

    @property
    def names(self):
        return list(self.openers)

    def __getitem__(self, name):
        if name not in self.openers:
            raise ValueError(f"{self.where} has no video {name!r}; it has {len(self.openers)}, such as "
                             f"{', '.join(self.names[:3])}")
        return self.openers[name]()

    def clips(self, name, clips=8, frames=16, size=224):
        """`frames` pictures around each of `clips` centres, squeezed.   -> (S, F, 3, size, size) in [-1, 1]"""
        video = self[name]
        rows = self.rows(len(video), clips, frames)
        kept = {int(n): squeeze(video[int(n)], size, Image.BICUBIC) for n in np.unique(rows)}
        return to_tensor([kept[int(n)] for n in rows.ravel()]).view(clips, frames, 3, size, size)


def clip_rows(total, clips, frames):
    """Which frames make the clips.   -> (S, F) int64

    HCRN: centres c = linspace(0, total, S + 2)[1:-1] in whole numbers, frames c - F/2 .. c + F/2 - 1; before the first and
    after the last frame that frame is repeated.
    """
    centres = np.linspace(0, total, clips + 2, dtype=int)[1:-1]
    return np.clip(centres[:, None] - frames // 2 + np.arange(frames), 0, total - 1)


def blocks(total, clips, frames):
    """The built-in world's own clips, one after the other, where that is what is asked for."""
    if total != clips * frames:
        return clip_rows(total, clips, frames)
    return np.arange(total).reshape(clips, frames)


# -- where frames come from ----------------------------------------------------------------------------------


def open_frames(root, split="train", seed=0):
    """A folder of folders of pictures, of GIFs or of .npy / .npz files; or one .zip, .gif or .npz.   -> Frames

    root    "builtin": the moving shapes of data/quiz.py for this split and seed
    raises  FileNotFoundError or ValueError, when opened or when the damaged video is asked for
    """
    if root == "builtin":
        films = {str(n): lambda n=n: film(n, split, seed) for n in range(FILMS[split])}
        return Frames("the built-in world", films, blocks)
    root = Path(root)
    if root.is_file():
        kinds = {".zip": from_zip, ".gif": lambda file: {file.stem: lambda: gif(file)}, ".npz": from_npz}
        if root.suffix.lower() not in kinds:
            raise ValueError(f"{root} is not a .zip, .gif or .npz; {HOW_TO_CUT}")
        return Frames(root, kinds[root.suffix.lower()](root))
    if not root.is_dir():
        raise safe.missing(root, "a folder with a folder of pictures for each video, a .zip, GIFs or .npz")
    openers = {}
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and (files := pictures_of(entry)):
            openers[entry.name] = lambda files=files: Lazy(len(files), lambda n: safe.open_image(files[n]))
        elif entry.suffix.lower() == ".gif":
            openers[entry.stem] = lambda entry=entry: gif(entry)
        elif entry.suffix.lower() == ".npy":
            openers[entry.stem] = lambda entry=entry: from_array(safe.read_arrays(entry), entry)
    if not openers and any(entry.suffix.lower() in VIDEO_FILES for entry in root.iterdir()):
        raise ValueError(f"{root} holds video files; {HOW_TO_CUT}")
    if not openers:
        raise ValueError(f"{root} holds no video: expected a folder of pictures for each, GIFs or .npy files")
    return Frames(root, openers)


def pictures_of(folder):
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in safe.PICTURES - {".gif"})


def film(n, split, seed):
    """Video n of the built-in world, 32 frames of 64 x 64."""
    shown = quiz.film(quiz.clips([n], seed, split, questions=1), [0], size=64)[0]
    levels = shown.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).contiguous()
    return [Image.fromarray(frame) for frame in levels.numpy()]


def from_zip(file):
    """<video>/<000..>.jpg inside a zip; nothing is unpacked."""
    with safe.damage(file, "is not a zip, or it is cut"):
        archive = zipfile.ZipFile(file)
    videos = {}
    for info in sorted(archive.infolist(), key=lambda info: info.filename):
        parts = info.filename.rsplit("/", 2)
        if Path(info.filename).suffix.lower() in safe.PICTURES and len(parts) > 1:
            videos.setdefault(parts[-2], []).append(info)
    if not videos:
        raise ValueError(f"{file} holds no pictures in folders; expected <video>/000.jpg, <video>/001.jpg, ...")

    def read(info):
        if info.file_size > LARGEST:
            raise ValueError(f"{file}: {info.filename} claims {info.file_size:,} bytes, which no frame has")
        with safe.damage(f"{file}: {info.filename}"):
            raw = archive.read(info)
        return safe.open_image(raw, f"{file}: {info.filename}")

    return {name: lambda infos=infos: Lazy(len(infos), lambda n: read(infos[n]))
            for name, infos in videos.items()}


def gif(file):
    """All frames of a GIF, each composed over the ones before it, on white."""
    frames = []
    with safe.damage(file, "is not a GIF that can be read, or it is cut"), Image.open(file) as image:
        for frame in ImageSequence.Iterator(image):
            safe.check_size(frame, len(frames) + 1)
            frames.append(safe.on_white(frame.copy()))
    if len(frames) < 2:
        raise ValueError(f"{file} has a single frame, so nothing in it moves; a video needs at least two")
    return frames


def from_npz(file):
    """`images` uint8 (N, F, h, w, 3), videos named 0, 1, ...; or an array (F, h, w, 3) for each, by name."""
    arrays = safe.read_arrays(file)
    if (images := arrays.get("images")) is not None and images.ndim == 5:
        arrays = {str(n): clip for n, clip in enumerate(images)}
    return {name: lambda clip=clip, name=name: from_array(clip, f"{file}, {name}")
            for name, clip in arrays.items()}


def from_array(clip, where):
    check_pixels(clip, "(F, h, w, 3)", where, least=2)
    return Lazy(len(clip), lambda n: Image.fromarray(clip[n]))


# -- features ------------------------------------------------------------------------------------------------


class Features:
    """Appearance (V, S, F, D) and motion (V, S, D) of V videos in float16, found by the video's number."""

    def __init__(self, ids, appearance, motion, where):
        self.row = {int(number): row for row, number in enumerate(ids)}
        self.appearance, self.motion, self.where = appearance, motion, where

    def take(self, numbers):
        """(B, S, F, D), (B, S, D) float32 of the videos with these numbers."""
        if lost := [int(n) for n in numbers if int(n) not in self.row]:
            raise ValueError(f"{self.where} has no features of video {lost[0]} ({len(lost)} of {len(numbers)} are absent)")
        rows = [self.row[int(n)] for n in numbers]
        return tuple(torch.from_numpy(x[rows].astype(np.float32)) for x in (self.appearance, self.motion))


def load_features(appearance, motion=None):
    """HCRN's two HDF5 files (needs h5py), or one .npz with ids, appearance and motion.   -> Features

    ids (V,), appearance (V, S, F, D), motion (V, S, D). The two HDF5 files list the videos in different orders,
    so their rows are matched by their ids.
    """
    if motion is None:
        found = safe.read_arrays(appearance, ("ids", "appearance", "motion"))
        ids, look, move = found["ids"], found["appearance"], found["motion"]
    else:
        ids, look = read_hdf5(appearance, "resnet_features")
        other, move = read_hdf5(motion, "resnext_features")
        row = {int(number): n for n, number in enumerate(other)}
        if set(row) != {int(number) for number in ids}:
            raise ValueError(f"{appearance} and {motion} are not about the same videos: {len(ids)} and {len(other)} ids")
        move = move[[row[int(number)] for number in ids]]
    fits = (look.ndim, move.ndim) == (4, 3) and look.shape[:2] == move.shape[:2] and ids.shape == look.shape[:1]
    if not fits or ids.dtype.kind + look.dtype.kind + move.dtype.kind not in ("iff", "uff"):
        raise ValueError(f"{appearance}: features are {look.shape} and {move.shape} for {ids.size} ids; expected floats "
                         "(V, clips, frames, D), (V, clips, D) and V whole numbers")
    return Features(ids, look.astype(np.float16, copy=False), move.astype(np.float16, copy=False), appearance)


def read_hdf5(file, name):
    """-> ids, float16 array; in blocks, so that float32 never lies in memory whole."""
    with safe.open_hdf5(file, f"HCRN's features: ids and {name}") as opened:
        if "ids" not in opened or name not in opened:
            raise ValueError(f"{file} has no {name} with ids; it has {', '.join(opened) or 'nothing'}")
        source = opened[name]
        out = np.empty(source.shape, np.float16)
        for start in range(0, len(source), 64):
            out[start : start + 64] = source[start : start + 64]
        return opened["ids"][:], out


def read_glove(file, table):
    """Word vectors of a table {token: row} from glove.*.txt; words without one stay zero.   -> (V, D) float32"""
    vectors, file = None, safe.there(file, "glove.840B.300d.txt, one word and its numbers a line")
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            word, *values = line.rstrip().split(" ")
            vectors = np.zeros((len(table), len(values)), np.float32) if vectors is None else vectors
            if word in table and len(values) == vectors.shape[1]:
                try:
                    vectors[table[word]] = [float(value) for value in values]
                except ValueError as error:
                    raise ValueError(f"{file}, line {number}: {line!r:.40} is not a word and numbers") from error
    if vectors is None:
        raise ValueError(f"{file} is empty")
    return torch.from_numpy(vectors)
