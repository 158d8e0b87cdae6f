"""Training and judging DualVGR, its ablations and its rivals.

    python train.py dualvgr                                                         # the built-in clips
    python train.py dualvgr --paper=msvd --root=FOLDER --features=a.h5,m.h5         # HCRN's feature files
    python train.py dualvgr --data=codraw --root=FOLDER --clips=5 --frames=2        # real pictures, no feature files
"""
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from data import clip as clips
from data import parallel, quiz
from data.batches import batch_rows, seed_from
from data.frames import Features, load_features, open_frames, read_glove
from data.metrics import accuracy_by_type
from data.videos import Question, build_vocabulary, encode, load_questions, question_words
from videoqa.explain import draw, without_each_clip
from videoqa.features import RECIPE, Standard, cached, captions, digest, extract, looked
from videoqa.model import DualVGR, QuestionOnly

STREAMS = ("appearance", "motion")


@dataclass
class Config:
    """DualVGR on clips and questions (defaults: the built-in clips; published sizes by --paper=msvd, msrvtt, svqa)."""

    data: str = "builtin"            # builtin, msvd, msrvtt, svqa, tgif, activitynet, codraw or video_clips
    root: str = ""                   # folder of the question files
    kind: str = "frameqa"            # of TGIF-QA: frameqa or count
    films: str = ""                  # frames: a folder, zip or npz of videos; empty: in --root
    features: tuple = ()             # instead of frames: HCRN's two .h5 files, appearance first, or one .npz
    glove: str = ""                  # glove.840B.300d.txt for the word vectors (then --word_width=300)
    cache: str = "runs/features"     # extracted features are kept here by the hash of what they came from; none: nowhere
    data_seed: int = 0               # seed of the built-in videos
    videos: int = 2000               # built-in training videos; a tenth as many are for validation, a fifth for the test
    questions: int = 16              # about each built-in training video; eight about the others
    clips: int = 8                   # clips of a video, N
    frames: int = 4                  # frames of a clip
    look: int = 2                    # of which CLIP looks at, F; motion features see all
    seed: int = 0                    # random seed
    steps: int = 1500                # optimiser steps
    eval_every: int = 250            # steps between evaluations
    patience: int = 0                # evaluations without improvement before stopping; 0: never
    batch: int = 64                  # questions a step, B (official code: 256)
    per_video: int = 4               # of these, about the same video, which is then encoded once (official code: 1)
    width: int = 64                  # module width, d (official code: 768)
    word_width: int = 128            # word vectors, w (official code: 300); with 32 the query stays mute for long
    heads: int = 4                   # of each graph attention
    cycles: int = 2                  # reasoning cycles, T
    mfb: int = 256                   # width of the bilinear fusion
    dropout: float = 0.0             # factor on every dropout rate (the paper: 1)
    lr: float = 3e-3                 # Adam step size (official code: 1e-4)
    schedule: str = "cosine"         # cosine to 0 after 100 steps of warm-up, or halve: after 10 and 20 of 25 epochs
    alpha: float = 1.0               # weight of the consistency loss (official code's default)
    beta: float = 6.4e-7             # weight of the disparity loss, a sample (official code's default: 1e-8 x batch)
    punish: str = "learnt"           # query punishment: learnt, off, or oracle (the planted evidence as its scores)
    evidence_loss: float = 0.0       # weight of cross-entropy of the scores on the planted evidence; not in the paper
    views: int = 2                   # graphs of a stream: a common and an own one, or 1
    streams: str = "both"            # both, appearance, motion, or none: a question-only model
    graph: str = "gat"               # gat, or attention: plain self-attention

    def __post_init__(self):
        choices = {"punish": ("learnt", "off", "oracle"), "views": (1, 2), "graph": ("gat", "attention"),
                   "streams": ("both", *STREAMS, "none"), "schedule": ("cosine", "halve"), "kind": ("frameqa", "count")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"--{name}={getattr(self, name)} is unknown; choose {', '.join(map(str, known))}")
        if self.per_video < 1 or self.batch % self.per_video:
            raise ValueError(f"--batch={self.batch} must be a multiple of --per_video={self.per_video}")
        if self.data != "builtin" and (self.punish == "oracle" or self.evidence_loss):
            raise ValueError("evidence is known only in the built-in clips; leave --punish=oracle and --evidence_loss out")


def paper(name):
    """Published sizes as overrides, from the official code; its alpha, beta and cycles for each set are UNVERIFIED."""
    sets = {"msvd": (30_933, 8), "msrvtt": (158_581, 16), "svqa": (83_160, 20)}
    if name not in sets:
        raise ValueError(f"--paper={name} is unknown; there are {', '.join(sets)}")
    questions, n = sets[name]
    epoch = round(questions / 256)
    return {"data": name, "clips": n, "frames": 16, "look": 16, "batch": 256, "per_video": 1, "width": 768, "word_width": 300,
            "mfb": 256, "dropout": 1.0, "lr": 1e-4, "schedule": "halve", "alpha": 1.0, "beta": 1e-8 * 256,
            "eval_every": epoch, "steps": 25 * epoch}


# -- data ---------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """The questions of one split as tensors; evidence (Q, N) and stream (Q,) only where they are planted."""

    tokens: torch.Tensor          # (Q, S) 0 = padding
    lengths: torch.Tensor         # (Q,)
    answers: torch.Tensor         # (Q,)
    row: torch.Tensor             # (Q,) place of the video in appearance and motion
    types: list                   # Q names
    questions: list               # Q Question
    appearance: torch.Tensor      # (V, N, F, D) float16
    motion: torch.Tensor          # (V, N, D) float16
    evidence: torch.Tensor | None = None


class Words:
    """The two vocabularies as part of a checkpoint, so that it answers questions without its training data."""

    def __init__(self, vocabulary=None):
        self.tables = {key: list(vocabulary[f"{key}_token_to_idx"]) for key in ("question", "answer")} if vocabulary else {}

    def state_dict(self):
        return self.tables

    def load_state_dict(self, tables):
        self.tables = {key: list(tables[key]) for key in ("question", "answer")}


def builtin(cfg, split, clip):
    """Questions, planted evidence and features of the built-in clips."""
    count = {"train": cfg.videos, "valid": max(1, cfg.videos // 10), "test": max(1, cfg.videos // 5)}[split]
    if cfg.clips != quiz.CLIPS:
        raise ValueError(f"the built-in videos have {quiz.CLIPS} clips; leave --clips out")
    view = quiz.clips(range(count), cfg.data_seed, split, cfg.questions if split == "train" else 8)
    rows = zip(view["question"], view["answer"], view["video"], view["type"], strict=True)
    asked = [Question(text, answer, str(video), video, kind) for text, answer, video, kind in rows]
    scenes = [f"{name} {x.tolist()}" for name, x in view["videos"].items()]

    def make():
        parts = [torch.arange(count)[i : i + 32] for i in range(0, count, 32)]
        films = (quiz.film(view, rows, 64, cfg.frames).unflatten(1, (quiz.CLIPS, cfg.frames)) for rows in parts)
        found = [extract(film, clip, cfg.look) for film in films]
        return dict(zip(STREAMS, map(torch.cat, zip(*found, strict=True)), strict=True))

    found = cached(cfg.cache, digest(RECIPE, clip.sha256, cfg.frames, cfg.look, *scenes), make)
    return asked, Features(range(count), *(found[name].numpy() for name in STREAMS), "the built-in world"), view["evidence"]


def films_of(cfg, split):
    """Where the frames of a split lie: --films, or what the sets at hand bring along."""
    if cfg.films:
        return Path(cfg.films)
    own = {"codraw": f"stories64_{'val' if split == 'test' else 'train'}.npz", "video_clips": "frames.zip"}
    if cfg.data not in own:
        raise ValueError(f"--data={cfg.data} needs pictures: --films=FOLDER with one folder of frames for each video, or "
                         "--features=appearance.h5,motion.h5 in HCRN's format")
    return Path(cfg.root) / own[cfg.data]


def from_frames(cfg, split, asked, clip):
    """Features of the videos that are asked about, extracted from their frames or found in the cache."""
    where = films_of(cfg, split)
    frames, names = open_frames(where), sorted({q.video for q in asked})
    files = [where] if where.is_file() else sorted(file for file in where.rglob("*") if file.is_file())
    key = digest(RECIPE, clip.sha256, cfg.clips, cfg.frames, cfg.look, names, *(file.read_bytes() for file in files))

    def make():
        found = [extract(frames.clips(name, cfg.clips, cfg.frames, clip.size)[None], clip, cfg.look) for name in names]
        return dict(zip(STREAMS, map(torch.cat, zip(*found, strict=True)), strict=True))

    found = cached(cfg.cache, key, make)
    row = {name: n for n, name in enumerate(names)}
    asked = [q._replace(number=row[q.video]) for q in asked]
    return asked, Features(range(len(names)), *(found[name].numpy() for name in STREAMS), where)


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


def groups_of(row, size):
    """Questions in groups of `size` about one video, so that a step encodes it once.   row (Q,) -> (G, size)

    A video whose questions do not fill its last group repeats some: with size 1 this is every question once.
    """
    by_video = {}
    for q, v in enumerate(row.tolist()):
        by_video.setdefault(v, []).append(q)
    return torch.tensor([[own[(i + k) % len(own)] for k in range(size)]
                         for own in by_video.values() for i in range(0, len(own), size)])


class Task:
    """DualVGR on one data set; see the contract in train.py."""

    headline, better = "accuracy", "higher"
    ablations = {
        "full": {}, "question only": {"streams": "none"}, "w/o punishment": {"punish": "off"},
        "appearance only": {"streams": "appearance"}, "motion only": {"streams": "motion"}, "single view": {"views": 1},
        "1 cycle": {"cycles": 1}, "3 cycles": {"cycles": 3}, "4 cycles": {"cycles": 4}, "w/o consistency": {"alpha": 0.0},
        "strong disparity": {"beta": 0.1}, "plain self-attention": {"graph": "attention"},
        "evidence taught": {"evidence_loss": 0.2}, "evidence given": {"punish": "oracle"},
    }
    published = {"full": {"MSVD-QA": 0.3903, "MSRVTT-QA": 0.3552, "SVQA": 0.5038}}    # its ablation numbers are UNVERIFIED

    def __init__(self, cfg, device):
        self.cfg, self.device = cfg, device
        self.parts, vocabulary = load(cfg, device)
        train = self.parts["train"]
        self.words, self.groups = Words(vocabulary), groups_of(train.row, cfg.per_video)
        self.standard = Standard(train.appearance.shape[-1], None if cfg.features else captions(clips.small())).to(device)
        self.standard.fit(train.appearance, train.motion)
        self.model = build(cfg, len(self.words.tables["question"]), len(self.words.tables["answer"]), self.standard.width).to(device)
        if cfg.glove:
            vectors = read_glove(cfg.glove, vocabulary["question_token_to_idx"])
            self.model.question.embed.weight.data.copy_(vectors)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=cfg.lr, fused=True)
        self.saved = {"model": self.model, "optimiser": self.optimiser, "standard": self.standard, "words": self.words}
        self.chance = self.majority("test")
        self.table = ["accuracy", *sorted({kind.split()[0] for kind in self.parts["test"].types})][:12]
        self.next = "python -m videoqa.answer clip.gif 'what colour is the square that moves left?'"

    def majority(self, split):
        """Accuracy of the most frequent training answer of each type."""
        part, train = self.parts[split], self.parts["train"]
        scores = accuracy_by_type(torch.zeros_like(part.answers), part.answers, part.types, train.answers, train.types)
        return {"accuracy" if kind == "all" else kind: guess for kind, (_, guess, _) in scores.items()}

    def batches(self, seed, start, stop):
        """Rows of the questions of global batch t, (B,); every rank draws the same."""
        for t in range(start, stop):
            yield self.groups[batch_rows(len(self.groups), self.cfg.batch // self.cfg.per_video, seed, t)].flatten()

    def run(self, part, rows, keep=None):
        """The model on some questions of a part; each of their videos is encoded once.   -> Output

        keep (B, N): clips with 0 are replaced by features of zero, for this question alone.
        """
        videos, which = part.row[rows].unique(return_inverse=True)
        tokens, lengths = part.tokens[rows], part.lengths[rows]
        evidence = part.evidence[rows].float().to(self.device) if self.cfg.punish == "oracle" else None
        appearance, motion = self.standard(part.appearance[videos].to(self.device), part.motion[videos].to(self.device))
        if keep is not None:
            appearance, motion = appearance[which] * keep[..., None, None], motion[which] * keep[..., None]
            which = torch.arange(len(rows))
        tokens, lengths, which = (x.to(self.device) for x in (tokens[:, : int(lengths.max())], lengths, which))
        return self.model(tokens, lengths, appearance, motion, which, evidence)

    def update(self, batch, step):
        """Cross-entropy, consistency and disparity (Sec. 5 of the specification), one step of Adam."""
        cfg, train, rows = self.cfg, self.parts["train"], parallel.shard(batch)
        for group in self.optimiser.param_groups:
            group["lr"] = cfg.lr * rate(step, cfg.steps, cfg.schedule)
        out = self.run(train, rows)
        answer = F.cross_entropy(out.logits, train.answers[rows].to(self.device))
        loss, losses = answer, {"answer": answer.detach()}
        if cfg.streams != "none":
            loss = loss + cfg.alpha * out.consistency + cfg.beta * out.disparity
            losses |= {"consistency": out.consistency.detach(), "disparity": out.disparity.detach()}
        if cfg.evidence_loss:
            known = train.evidence[rows].float().to(self.device).expand_as(out.scores)
            loss = loss + cfg.evidence_loss * F.binary_cross_entropy(out.scores, known)
        parallel.descend(self.optimiser, loss, clip=12.0)
        return losses

    @torch.no_grad()
    def answer(self, split):
        """The model in evaluation mode on every question of a split.   -> logits (Q, A), scores (T, 2, Q, N) or None"""
        part = self.parts[split]
        self.model.eval()
        found = [self.run(part, rows) for rows in torch.arange(len(part.answers)).split(512)]
        self.model.train()
        scores = None if found[0].scores is None else torch.cat([out.scores.cpu() for out in found], 2)
        return torch.cat([out.logits.float().cpu() for out in found]), scores

    def evaluate(self, split):
        """Top-1 accuracy over all questions, by type, and how well the punishment finds the planted evidence."""
        part, train = self.parts[split], self.parts["train"]
        logits, scores = self.answer(split)
        by_type = accuracy_by_type(logits.argmax(1), part.answers, part.types, train.answers, train.types)
        metrics = {"accuracy": by_type.pop("all")[0]} | {kind: right for kind, (right, _, _) in by_type.items()}
        if part.evidence is not None and scores is not None and self.cfg.punish == "learnt":
            for t, cycle in enumerate(scores, 1):
                for name, s in zip(STREAMS, cycle, strict=True):
                    metrics[f"AUC {name} {t}"] = float(evidence_auc(s, part.evidence).nanmean())
        return metrics

    # -- what a person looks at -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, folder):
        """evidence.txt: does the punishment find the planted evidence, and what does the model lose without it; four sheets."""
        part = self.parts["test"]
        if part.evidence is None or self.cfg.streams == "none":
            return
        logits, scores = self.answer("test")
        lines = evidence_table(scores, part.evidence, part.types) if self.cfg.punish == "learnt" else []
        (folder / "evidence.txt").write_text("\n".join([*lines, "", *self.deletion(logits, scores)]) + "\n")
        self.model.eval()
        view = quiz.clips(range(4), self.cfg.data_seed, "test", 8)
        for video in range(4):
            q = next(q for q in range(8 * video, 8 * video + 8) if part.evidence[q].any() and "that" in part.questions[q].text.split()
                     or q % 8 == 7)
            out, frames = self.run(part, torch.tensor([q])), quiz.film(view, [video], 64, self.cfg.frames)[0]
            tokens = part.tokens[q : q + 1, : int(part.lengths[q])].to(self.device)
            features = self.standard(*(x[part.row[q], None].to(self.device) for x in (part.appearance, part.motion)))
            best = out.logits[0].index_fill(0, torch.arange(2, device=self.device), -torch.inf).softmax(0).topk(3)
            told = ", ".join(f"{self.words.tables['answer'][i]} {x:.2f}" for x, i in zip(*best, strict=True))
            effect = without_each_clip(self.model, tokens, *features, int(best.indices[0]))
            chosen = frames.unflatten(0, (quiz.CLIPS, -1))[:, looked(self.cfg.frames, self.cfg.look)]
            draw(folder / f"clip-{video}.png", question_words(part.questions[q].text),
                 [f"answers: {told}", f"right: {part.questions[q].answer}"], chosen, out, effect, part.evidence[q])
        self.model.train()

    def deletion(self, logits, scores, count=1000, clips=2):
        """Accuracy after two clips are taken away: the arbiter that asks the model, whatever a score's sign means."""
        part, rows = self.parts["test"], torch.arange(min(count, len(logits)))
        known = rows[(part.evidence[rows].sum(1) > 0)]
        orders = {"random": torch.rand(len(known), scores.shape[3], generator=torch.Generator().manual_seed(0)),
                  "of the evidence": part.evidence[known].float()}
        if self.cfg.punish == "learnt":
            for t, cycle in enumerate(scores, 1):
                for name, s in zip(STREAMS, cycle[:, known], strict=True):
                    orders |= {f"with the highest score, {name} {t}": s, f"with the lowest score, {name} {t}": -s}
        lines = [f"accuracy on {len(known)} test questions that have evidence, {clips} clips replaced by zeros:",
                 f"  {'none':40} {float((logits[known].argmax(1) == part.answers[known]).float().mean()):.3f}"]
        self.model.eval()
        for name, order in orders.items():
            keep = torch.ones_like(order).scatter(1, order.topk(clips, 1).indices, 0.0)
            right = [self.run(part, known[i : i + 256], keep[i : i + 256].to(self.device)).logits.argmax(1).cpu()
                     for i in range(0, len(known), 256)]
            lines.append(f"  {name:40} {float((torch.cat(right) == part.answers[known]).float().mean()):.3f}")
        self.model.train()
        return lines

    def rivals(self):
        """Test metrics of the question-only model, trained as long, and of the majority answer of each type."""
        rivals = {"majority answer of the type": self.chance}
        if self.cfg.streams != "none" and parallel.world() == 1:
            rivals["question only"] = train_quietly(dataclasses.replace(self.cfg, streams="none", punish="off",
                                                                        evidence_loss=0.0), self.device)
        return rivals


def build(cfg, vocabulary, answers, width):
    """The network a configuration describes."""
    if cfg.streams == "none":
        return QuestionOnly(vocabulary, answers, cfg.width, cfg.word_width, cfg.dropout)
    return DualVGR(vocabulary, answers, width, cfg.width, cfg.word_width, cfg.heads, cfg.cycles, cfg.punish == "learnt",
                   cfg.views, cfg.streams, cfg.graph, cfg.mfb, cfg.dropout)


def rate(step, steps, schedule):
    """Factor on the step size."""
    if schedule == "halve":                       # Official code: after every tenth of 25 epochs
        return 0.5 ** (25 * step // (10 * steps))
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))


def evidence_auc(scores, evidence):
    """Chance that a clip of the evidence scores above another clip of the same video.   (Q, N), (Q, N) bool -> (Q,)

    Ties count half. Not a number where a question has no evidence, or where every clip is evidence.
    """
    higher = (scores[:, :, None] > scores[:, None]).float() + (scores[:, :, None] == scores[:, None]).float() / 2
    pairs = evidence[:, :, None] & ~evidence[:, None]
    return (higher * pairs).sum((1, 2)) / pairs.sum((1, 2))


def evidence_table(scores, evidence, types):
    """AUC of every stream and cycle by question type, as lines.   scores (T, 2, Q, N)"""
    columns = {f"{name} {t}": evidence_auc(s, evidence) for t, cycle in enumerate(scores, 1)
               for name, s in zip(STREAMS, cycle, strict=True)}
    lines = ["Does the punishment score the clips that hold the evidence above the others of the video? Area under the curve, mean",
             "over test questions; chance 0.5. Below 0.5 the evidence gets the lower score.", "",
             f"{'type':18} questions  " + "  ".join(columns)]
    for kind in [*sorted(set(types)), "all"]:
        rows = torch.tensor([kind in (t, "all") for t in types]) & ~evidence_auc(evidence.float(), evidence).isnan()
        cells = [f"{float(x[rows].mean()):{len(name)}.3f}" for name, x in columns.items()]
        lines.append(f"{kind:18} {int(rows.sum()):9}  " + "  ".join(cells))
    return lines


def train_quietly(cfg, device):
    """Train without files or a bar; test metrics at the best validation step.   -> metrics"""
    torch.manual_seed(seed_from(cfg.seed))
    task, best, state = Task(cfg, device), -1.0, {}
    for step, batch in enumerate(task.batches(cfg.seed, 0, cfg.steps), 1):
        task.update(batch, step - 1)
        if step % cfg.eval_every == 0 or step == cfg.steps:
            score = task.evaluate("valid")[Task.headline]
            if score > best:
                best, state = score, {name: x.clone() for name, x in task.model.state_dict().items()}
    task.model.load_state_dict(state)
    return task.evaluate("test")
