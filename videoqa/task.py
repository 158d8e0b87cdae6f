"""Training and judging DualVGR, its ablations and its rivals.

    python train.py dualvgr                                                         # the built-in clips
    python train.py dualvgr --paper=msvd --root=FOLDER --features=a.h5,m.h5         # HCRN's feature files
    python train.py dualvgr --data=codraw --root=FOLDER --clips=5 --frames=2        # real pictures, no feature files
"""
import dataclasses
import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from data import clip as clips
from data import parallel, quiz
from data.batches import batch_rows, train_quietly
from data.frames import read_glove
from data.metrics import accuracy_by_type
from data.options import check_words
from data.videos import question_words
from videoqa import explain
from videoqa.features import Standard, captions, looked
from videoqa.model import DualVGR, QuestionOnly
from videoqa.questions import Words, groups_of, load

WORDS = {"punish": ("learnt", "off", "oracle"), "views": (1, 2), "graph": ("gat", "attention"), "schedule": ("cosine", "halve"),
         "streams": ("both", "appearance", "motion", "none"), "kind": ("frameqa", "count")}


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
    anneal: int = 1500               # steps that the schedule is laid over
    alpha: float = 1.0               # weight of the consistency loss (official code's default)
    beta: float = 6.4e-7             # weight of the disparity loss, a sample (official code's default: 1e-8 x batch)
    punish: str = "learnt"           # query punishment: learnt, off, or oracle (the planted evidence as its scores)
    evidence_loss: float = 0.0       # weight of cross-entropy of the scores on the planted evidence; not in the paper
    views: int = 2                   # graphs of a stream: a common and an own one, or 1
    streams: str = "both"            # both, appearance, motion, or none: a question-only model
    graph: str = "gat"               # gat, or attention: plain self-attention

    def __post_init__(self):
        check_words(self, **WORDS)
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
            "eval_every": epoch, "steps": 25 * epoch, "anneal": 25 * epoch}


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
        self.model = build(cfg, self.words, self.standard.width).to(device)
        if cfg.glove:
            vectors = read_glove(cfg.glove, vocabulary["question_token_to_idx"])
            self.model.question.embed.weight.data.copy_(vectors)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=cfg.lr, fused=True)
        self.saved = {"model": self.model, "optimiser": self.optimiser, "standard": self.standard, "words": self.words}
        part = self.parts["test"]                            # chance: the most frequent training answer of each type
        scores = accuracy_by_type(torch.zeros_like(part.answers), part.answers, part.types, train.answers, train.types)
        self.chance = {"accuracy": scores.pop("all")[1]} | {kind: guess for kind, (_, guess, _) in scores.items()}
        self.next = "python -m videoqa.answer clip.gif 'what colour is the square that moves left?'"

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
        self.optimiser.param_groups[0]["lr"] = cfg.lr * rate(step, cfg.anneal, cfg.schedule)
        self.model.train()
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
        scores = None if found[0].scores is None else torch.cat([out.scores.cpu() for out in found], 2)
        return torch.cat([out.logits.float().cpu() for out in found]), scores

    def evaluate(self, split):
        """Top-1 accuracy over all questions, by type, and how well the punishment finds the planted evidence."""
        part, train = self.parts[split], self.parts["train"]
        logits, scores = self.answer(split)
        by_type = accuracy_by_type(logits.argmax(1), part.answers, part.types, train.answers, train.types)
        metrics = {"accuracy": by_type.pop("all")[0]} | {kind: right for kind, (right, _, _) in by_type.items()}
        if part.evidence is not None and scores is not None and self.cfg.punish == "learnt":
            metrics |= {f"AUC {name}": float(explain.evidence_auc(s, part.evidence).nanmean())
                        for name, s in explain.by_cycle(scores).items()}
        return metrics

    # -- what a person looks at -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, folder):
        """evidence.txt: does the punishment find the planted evidence, and what does the model lose without it; four sheets."""
        part = self.parts["test"]
        if part.evidence is None or self.cfg.streams == "none":
            return
        logits, scores = self.answer("test")
        lines = explain.evidence_table(scores, part.evidence, part.types) if self.cfg.punish == "learnt" else []
        (folder / "evidence.txt").write_text("\n".join([*lines, "", *self.deletion(logits, scores)]) + "\n")
        view = quiz.clips(range(4), self.cfg.data_seed, "test", 8)
        for video in range(4):                               # of each, a question that refers to something, if there is one
            asked = range(8 * video, 8 * video + 8)
            q = next((q for q in asked if part.evidence[q].any() and "that" in part.questions[q].text.split()), asked[-1])
            frames = quiz.film(view, [video], 64, self.cfg.frames)[0].unflatten(0, (quiz.CLIPS, -1))
            self.draw(folder / f"clip-{video}.png", q, frames[:, looked(self.cfg.frames, self.cfg.look)])

    def draw(self, path, q, frames):
        """The sheet of test question q."""
        part, rows = self.parts["test"], torch.tensor([q])
        out = self.run(part, rows)
        p = explain.probabilities(out.logits[0])
        tokens = part.tokens[rows, : int(part.lengths[q])].to(self.device)
        features = self.standard(*(x[part.row[rows]].to(self.device) for x in (part.appearance, part.motion)))
        told = ", ".join(f"{answer} {x:.2f}" for answer, x in explain.best_answers(p, self.words.tables["answer"]))
        effect = explain.without_each_clip(self.model, tokens, *features, int(p.argmax()))
        question, lines = part.questions[q], [f"answers: {told}", f"right: {part.questions[q].answer}"]
        explain.draw(path, question_words(question.text), lines, frames, out, effect, part.evidence[q])

    def deletion(self, logits, scores, count=1000, clips=2):
        """Accuracy after two clips are taken away: the arbiter that asks the model, whatever a score's sign means."""
        part, rows = self.parts["test"], torch.arange(min(count, len(logits)))
        known = rows[part.evidence[rows].any(1)]
        orders = {"random": torch.rand(len(known), scores.shape[3], generator=torch.Generator().manual_seed(0)),
                  "of the evidence": part.evidence[known].float()}
        if self.cfg.punish == "learnt":
            for name, s in explain.by_cycle(scores[:, :, known]).items():
                orders |= {f"with the highest score, {name}": s, f"with the lowest score, {name}": -s}
        right = part.answers[known]
        lines = [f"accuracy on {len(known)} test questions that have evidence, {clips} clips replaced by zeros:",
                 f"  {'none':40} {float((logits[known].argmax(1) == right).float().mean()):.3f}"]
        for name, order in orders.items():
            keep = torch.ones_like(order).scatter(1, order.topk(clips, 1).indices, 0.0)
            found = torch.cat([self.run(part, rows, kept.to(self.device)).logits.argmax(1).cpu()
                               for rows, kept in zip(known.split(256), keep.split(256), strict=True)])
            lines.append(f"  {name:40} {float((found == right).float().mean()):.3f}")
        return lines

    def rivals(self):
        """Test metrics of the question-only model, trained as long, and of the majority answer of each type."""
        rivals = {"majority answer of the type": self.chance}
        if self.cfg.streams != "none" and parallel.world() == 1:
            blind = dataclasses.replace(self.cfg, streams="none", punish="off", evidence_loss=0.0)
            rivals["question only"] = train_quietly(lambda cfg: Task(cfg, self.device), blind).evaluate("test")
        return rivals


def build(cfg, words, features):
    """The network a configuration describes, for some vocabularies and a width of features."""
    sizes = [len(words.tables[name]) for name in ("question", "answer")]
    if cfg.streams == "none":
        return QuestionOnly(*sizes, cfg.width, cfg.word_width, cfg.dropout)
    return DualVGR(*sizes, features, cfg.width, cfg.word_width, cfg.heads, cfg.cycles, cfg.punish == "learnt", cfg.views,
                   cfg.streams, cfg.graph, cfg.mfb, cfg.dropout)


def rate(step, anneal, schedule):
    """Factor on the step size."""
    if schedule == "halve":                       # Official code: after every tenth of 25 epochs
        return 0.5 ** (25 * step // (10 * anneal))
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / anneal)))
