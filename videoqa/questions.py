"""The questions of a run and the features of its videos: built-in clips, question files, frames, feature files."""
from pathlib import Path
from typing import NamedTuple

import torch

from data import clip as clips
from data import quiz
from data.frames import Features, load_features, open_frames
from data.videos import Question, build_vocabulary, encode, load_questions
from videoqa.features import RECIPE, cached, digest, extract


class Part(NamedTuple):
    """The questions of one split as tensors."""

    tokens: torch.Tensor          # (Q, S) 0 = padding
    lengths: torch.Tensor         # (Q,)
    answers: torch.Tensor         # (Q,)
    row: torch.Tensor             # (Q,) place of the video in appearance and motion
    types: list                   # Q names
    questions: list               # Q Question
    appearance: torch.Tensor      # (V, N, F, D) float16
    motion: torch.Tensor          # (V, N, D) float16
    evidence: torch.Tensor | None = None        # (Q, N) bool, where it is planted


class Words:
    """The two vocabularies as part of a checkpoint, so that it answers questions without its training data."""

    def __init__(self, vocabulary=None):
        self.tables = {key: list(vocabulary[f"{key}_token_to_idx"]) for key in ("question", "answer")} if vocabulary else {}

    def state_dict(self):
        return self.tables

    def load_state_dict(self, tables):
        self.tables = {key: list(tables[key]) for key in ("question", "answer")}


def load(cfg, device):
    """Every split, and the vocabulary of the training questions.   -> {split: Part}, vocabulary"""
    found, vocabulary, clip = {}, None, None if cfg.features else clips.small().to(device)
    for split in ("train", "valid", "test"):
        evidence = None
        if cfg.data == "builtin":
            asked, features, evidence = builtin(cfg, split, clip)
        else:
            asked = [q._replace(choices=(), correct=-1) for q in load_questions(cfg.data, cfg.root, split, kind=cfg.kind)]
            if cfg.features:
                features = load_features(*cfg.features)
            else:
                asked, features = from_frames(cfg, split, asked, clip)
        vocabulary = vocabulary or build_vocabulary(asked)
        coded = encode(asked, vocabulary, split)
        if lost := {q.number for q in asked} - features.row.keys():
            features.take(lost)                              # names what is absent now, not in the middle of training
        found[split] = Part(*(torch.as_tensor(coded[key]).long() for key in ("questions", "questions_len", "answers")),
                            torch.tensor([features.row[q.number] for q in asked]), [q.type for q in asked], asked,
                            *(torch.as_tensor(x) for x in (features.appearance, features.motion)), evidence)
    return found, vocabulary


def builtin(cfg, split, clip):
    """Questions, features and planted evidence of the built-in clips."""
    count = {"train": cfg.videos, "valid": max(1, cfg.videos // 10), "test": max(1, cfg.videos // 5)}[split]
    if cfg.clips != quiz.CLIPS:
        raise ValueError(f"the built-in videos have {quiz.CLIPS} clips; leave --clips out")
    view = quiz.clips(range(count), cfg.data_seed, split, cfg.questions if split == "train" else 8)
    rows = zip(view["question"], view["answer"], view["video"], view["type"], strict=True)
    asked = [Question(text, answer, str(video), video, kind) for text, answer, video, kind in rows]
    films = (quiz.film(view, some, 64, cfg.frames).unflatten(1, (quiz.CLIPS, cfg.frames))
             for some in torch.arange(count).split(32))
    scenes = [f"{name} {x.tolist()}" for name, x in view["videos"].items()]
    found = extracted(cfg, films, clip, digest(RECIPE, clip.sha256, cfg.frames, cfg.look, *scenes))
    return asked, Features(range(count), *found, "the built-in world"), view["evidence"]


def from_frames(cfg, split, asked, clip):
    """Questions that are numbered by their videos, and features of these videos' frames."""
    where = films_of(cfg, split)
    frames, names = open_frames(where), sorted({q.video for q in asked})
    files = [where] if where.is_file() else sorted(file for file in where.rglob("*") if file.is_file())
    key = digest(RECIPE, clip.sha256, cfg.clips, cfg.frames, cfg.look, names, *(file.read_bytes() for file in files))
    films = (frames.clips(name, cfg.clips, cfg.frames, clip.size)[None] for name in names)
    row = {name: n for n, name in enumerate(names)}
    asked = [q._replace(number=row[q.video]) for q in asked]
    return asked, Features(range(len(names)), *extracted(cfg, films, clip, key), where)


def extracted(cfg, films, clip, key):
    """Features of some films (n, N, F, 3, H, W) one after the other, if the cache does not know them.   -> two arrays"""
    def make():
        parts = [extract(film, clip, cfg.look) for film in films]
        return {name: torch.cat(part) for name, part in zip(("appearance", "motion"), zip(*parts, strict=True), strict=True)}

    found = cached(cfg.cache, key, make)
    return found["appearance"].numpy(), found["motion"].numpy()


def films_of(cfg, split):
    """Where the frames of a split lie: --films, or what the sets at hand bring along."""
    if cfg.films:
        return Path(cfg.films)
    own = {"codraw": f"stories64_{'val' if split == 'test' else 'train'}.npz", "video_clips": "frames.zip"}
    if cfg.data not in own:
        raise ValueError(f"--data={cfg.data} needs pictures: --films=FOLDER with one folder of frames for each video, or "
                         "--features=appearance.h5,motion.h5 in HCRN's format")
    return Path(cfg.root) / own[cfg.data]


def groups_of(row, size):
    """Questions in groups of `size` about one video, so that a step encodes it once.   row (Q,) -> (G, size)

    A video whose questions do not fill its last group repeats some: with size 1 this is every question once.
    """
    by_video = {}
    for q, v in enumerate(row.tolist()):
        by_video.setdefault(v, []).append(q)
    return torch.tensor([[own[(i + k) % len(own)] for k in range(size)]
                         for own in by_video.values() for i in range(0, len(own), size)])
