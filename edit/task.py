"""Training and judging DE-Net: pictures and sentences, never an edited picture.

    python train.py denet                                                  # the built-in edits, 64 x 64
    python train.py denet --data=noto --root=FOLDER --spoil=false --alone=0 --fool=1 --keep=1 --own=4     # emoji
    python train.py denet --data=birds --root=FOLDER --text=lstm           # CUB, a picture with another's sentence
    python train.py denet --ablate --seeds=3

The paper's losses were not published with its code and its text could not be read: this objective is a reconstruction
(UNVERIFIED), built from the code base it shares with DF-GAN and from what the released training script passes around.
"""
import copy
import math
from dataclasses import dataclass
from itertools import islice

import torch
from torch.nn import functional as F

from data import clip, edits, parallel
from data.batches import batch_rows, generator
from data.metrics import roc_auc
from data.options import check_words
from data.pictures import curves, panels
from data.reader import reader
from data.text import BytePairs, Vocabulary, read_merges, words_of
from edit.judge import measure, summarise
from edit.model import Critic, Generator, SentenceLSTM
from edit.spoil import ADDED, HUE, HUES, PASTED, THING, WAYS, most_hurt, restored, spoil
from kernels.attribution import show

KINDS = ("recolour", "background", "add", "remove", "retexture", "reshape")         # as tables and pictures list them
JUDGED = 300                            # edits of the validation split that are looked at; twice as many of test


@dataclass
class Config:
    """DE-Net on built-in edits (defaults: 64 x 64 pictures; the paper's sizes by --paper=birds or coco)."""

    data: str = "builtin"           # builtin, noto, emojitwo, birds, birds64, coco, codraw, folder, npz, ...
    root: str = ""                  # folder of the real data
    pairs: float = 0.0              # share of built-in pictures with a second thing (add, remove: always two)
    seed: int = 0                   # random seed
    steps: int = 4000               # optimiser steps
    eval_every: int = 800           # steps between evaluations
    batch: int = 16                 # pictures edited in a step before the critic, B (the paper: 32)
    lessons: int = 48               # spoilt pictures restored in a step
    alone: int = 3600               # steps with lessons only, before the critic is heard (ours; the paper: 0)
    size: int = 64                  # pixels of a side: 4 x a power of two (the paper: 256)
    base: int = 8                   # channels of the editor at full size, n (the paper: 32)
    critic_base: int = 24           # channels of the critic after its first halving (the paper: n)
    code_width: int = 64            # width of the vectors in Comp-Pred; its code t is four times as wide (256)
    kernels: int = 8                # kernels of a dynamic convolution
    composition: str = "dynamic"    # dynamic (the paper), fixed, channel, spatial
    dynamic: bool = True            # text writes convolution kernels; off: static kernels
    semantic: bool = True           # queries read the semantic decoder; off: the encoder's skips
    text: str = "auto"              # clip: frozen; lstm: DAMSM's encoder, learnt with the critic; auto: clip on built-in data
    clip: str = ""                  # file of OpenAI's CLIP; empty: the small one of the built-in world
    merges: str = ""                # CLIP's vocabulary file, for --clip
    lr: float = 2e-3                # Adam step size of the editor (the paper: 1e-4)
    anneal: int = 4000              # steps over which it falls to a tenth along a cosine; 0: it stays (the paper)
    beta1: float = 0.9              # Adam's decay of the editor's mean gradient (the paper: 0)
    beta2: float = 0.99             # ... and of its square (the paper: 0.9)
    critic_lr: float = 1e-3         # Adam step size of the critic (the paper: 4e-4)
    fool: float = 0.3               # weight of the critic's opinion of an edit (the paper: 1)
    similar: float = 0.0            # weight of CLIP's agreement with the sentence against the true one that it replaces
    own: float = 8.0                # weight of what a true sentence must give back: edit/spoil.py, restored (plain: L1)
    spoil: bool = True              # ... from a spoilt copy of it (ours, edit/spoil.py); off: from the picture itself
    keep: float = 0.3               # weight of the share of pixels that an edit changes (ours)
    penalty: float = 2.0            # weight k of the matching-aware gradient penalty
    penalty_every: int = 4          # steps between penalties, each weighted by as much (DF-GAN: 1)
    more: int = 3                   # further true and false sentences the critic hears about a picture
    near: bool = True               # wrong sentences differ in one thing; off: another picture's sentence
    average: float = 0.995          # decay of the running mean of the editor that is judged and saved; 0: none (the paper)
    copy_start: bool = True         # the untrained editor copies its input (needs --base of 6 or more)
    oracle: float = 0.0             # weight of L1 to the known result: 0, or training is no longer unpaired

    def __post_init__(self):
        check_words(self, composition=("dynamic", "fixed", "channel", "spatial"), text=("auto", "clip", "lstm"))
        if self.copy_start and self.base < 6:
            raise ValueError(f"--base={self.base} is too narrow to hand a picture through; pass --copy_start=false or 6 and more")


def paper(name):
    """Published sizes as overrides; epochs, losses and text encoder behind the tables are UNVERIFIED."""
    if name not in ("birds", "coco"):
        raise ValueError(f"--paper={name} is unknown; there are birds, coco")
    epoch = {"birds": 8855, "coco": 82783}[name] // 32
    return {"data": name, "size": 256, "base": 32, "critic_base": 32, "code_width": 256, "batch": 32, "lr": 1e-4,
            "critic_lr": 4e-4, "text": "lstm", "penalty_every": 1, "average": 0.0, "fool": 1.0, "keep": 1.0, "own": 4.0,
            "spoil": False, "anneal": 0, "alone": 0, "beta1": 0.0, "beta2": 0.9, "copy_start": False, "near": False,
            "more": 0, "eval_every": 5 * epoch, "steps": 300 * epoch}


# -- sentences ----------------------------------------------------------------------------------------------------------


class Sentences(torch.nn.Module):
    """Strings -> sentence vectors (B, E): a frozen CLIP, or the bidirectional LSTM over the training set's words.

    raises  ValueError for words that the small CLIP does not know, or for a sentence longer than its tower reads
    """

    def __init__(self, cfg, captions, device):
        super().__init__()
        self.device, self.table, self.named = device, {}, bool(cfg.clip)
        recurrent = cfg.text == "lstm" or cfg.text == "auto" and cfg.data != "builtin" and not cfg.clip
        self.clip = None
        if cfg.clip or not recurrent or cfg.data == "builtin":
            tower = clip.load(cfg.clip) if cfg.clip else clip.small()
            self.clip = (tower.to(device),)                  # a tuple hides it: frozen weights stay out of checkpoints
            self.ids = BytePairs(read_merges(cfg.merges)) if cfg.clip else clip.small_tokeniser()
        self.lstm = None
        if recurrent:
            self.words = Vocabulary(captions, split=words_of)
            self.lstm = SentenceLSTM(len(self.words), 256 if cfg.size >= 256 else 64)
        else:
            said = [self.by_clip([text]) for text in islice(captions, 2048)] or [torch.zeros(1, self.clip[0].embed)]
            mean, scale = whitening(torch.cat(said))         # without sentences they come from a checkpoint
            self.register_buffer("mean", mean)
            self.register_buffer("scale", scale)
        self.width = self.lstm.rnn.hidden_size * 2 if recurrent else self.clip[0].embed

    def forward(self, texts):
        """What conditions editor and critic. Official code: 18 words at most, drawn at random from longer captions."""
        if self.lstm is None:
            return (self.by_clip(texts) - self.mean) @ self.scale
        tokens, lengths = self.words(texts)                  # Paper: unknown; here the first 18 words, so nothing is random
        return self.lstm(tokens[:, :18].to(self.device), lengths.clamp(max=18))[0]

    def by_clip(self, texts):
        """CLIP's sentence vectors, scaled to unit variance; frozen, so each distinct sentence is read once, by itself:
        its bits must not depend on what else was in the batch, or resuming would not be exact."""
        for text in dict.fromkeys(texts):
            if text not in self.table:
                tokens = self.ids([text])
                with torch.no_grad():
                    found = self.clip[0].encode_text(tokens[:, : int(tokens.argmax()) + 1].to(self.device))[0][0]
                self.table[text] = F.normalize(found, dim=0) * len(found) ** 0.5
        return torch.stack([self.table[text] for text in texts])

    def agreement(self, pictures, *texts):
        """CLIP's cosine of pictures with one or more sentences each, differentiable in the pictures.   -> (T, B)"""
        embedding = self.clip[0].encode_image(clip.standard(pictures, self.clip[0].size))[1]
        return torch.stack([F.cosine_similarity(embedding, self.by_clip(some)) for some in texts])

    def logits(self, pictures, said):
        """CLIP's logits of pairs of true and false sentences.   -> (T, 2, B)"""
        found = self.agreement(pictures, *(texts for pair in said for texts in pair))
        return self.clip[0].logit_scale.exp() * found.unflatten(0, (len(said), 2))


def whitening(x, least=0.01):
    """Mean and symmetric scale that make vectors uncorrelated with unit variance; ours.   (N, E) -> (E,), (E, E)

    CLIP's sentence vectors point in nearly one direction ("the star is plain" and "... striped": cosine 0.97), which a
    small critic needs very long to tell apart. Directions of variance far below `least` are not blown up.
    """
    values, vectors = torch.linalg.eigh(torch.cov(x.double().T, correction=0))
    return x.mean(0), (vectors * (values.clamp(min=0) + least).rsqrt() @ vectors.T).to(x)


def open_editor(cfg, device, train=None):
    """Text encoder and editor, untrained. A learnt encoder takes its words from the training set (opened if not given)."""
    def words():                                             # drawn only if they are needed
        if train is None and cfg.text != "lstm" and (cfg.clip or cfg.data == "builtin"):
            return
        data = train or edits.load(cfg.data, cfg.root, "train", cfg.size, pairs=cfg.pairs)
        for rows in torch.arange(min(len(data), 4096 if cfg.data == "builtin" else 2**20)).split(256):
            yield from (text for pair in data.said(rows.tolist()) for texts in pair for text in texts)

    read = Sentences(cfg, words(), device).to(device)
    return read, Generator(cfg.size, read.width, cfg.base, cfg.code_width, cfg.kernels, cfg.composition, cfg.dynamic,
                           cfg.semantic).to(device)


@torch.no_grad()
def start_as_copy(editor, quiet=0.1):
    """First and last layer hand the picture through as x - b and -x - b (ours): no step is spent on learning to copy.

    With slope 0.2 and b = 0.65, 2.7 (l(x - b) - l(-x - b)) is 1.1 x in the middle and three times as steep outside: a broken
    line near atanh(x), so that tanh gives x back (mean error 0.015; 0.035 without b). The finest DEBlock starts quiet.
    """
    for weight in (editor.encoder.first.weight, editor.encoder.first.bias, editor.to_rgb.weight, editor.to_rgb.bias):
        weight[:6].zero_()
    editor.encoder.first.bias[:6] = -0.65
    for c in range(3):
        for row, sign in ((c, 1.0), (c + 3, -1.0)):
            editor.encoder.first.weight[row, c, 1, 1] = sign
            editor.to_rgb.weight[c, row, 1, 1] = 2.7 * sign
    for part in (editor.blocks[-1].conv.weight, editor.blocks[-1].conv.bias, editor.blocks[-1].query.to_shift.weight):
        part.mul_(quiet)


# -- losses -------------------------------------------------------------------------------------------------------------


def hinge(matched, wrong, fake):
    """DF-GAN's matching-aware hinge: real pictures with true sentences up, false sentences and edits down.   -> scalar"""
    return F.relu(1 - matched).mean() + 0.5 * F.relu(1 + wrong).mean() + 0.5 * F.relu(1 + fake).mean()


def gradient_penalty(critic, image, sentence, power=6):
    """E |gradient of D at real, matching pairs|^p, picture and sentence together (DF-GAN's Eq. 2, weight k outside).

    image (B, 3, S, S), sentence (B, E) -> scalar. It needs a critic that does not couple samples: no batch norm.
    """
    image, sentence = image.detach().requires_grad_(), sentence.detach().requires_grad_()
    slopes = torch.autograd.grad(critic(image, sentence).sum(), (image, sentence), create_graph=True)
    return torch.cat([g.flatten(1) for g in slopes], dim=1).square().sum(1).clamp(min=1e-12).pow(power / 2).mean()


def changed_share(edited, source, small=0.1):
    """How much of the picture was touched, mean of |d| / (|d| + small): ours.   -> scalar in [0, 1)

    Its slope is 10 where nothing changed yet and 0.1 after a change of 0.9 (of L1: always 1): a wholly new background costs
    little more than a half new one, and smears over what should stay cost most.
    """
    change = (edited - source).abs()
    return (change / (change + small)).mean()


class Task:
    """The editor, its critic and its judges; see STYLE of the contract in train.py."""

    headline, better = "success", "higher"
    table = ("success", "changed", *(f"{kind} changed" for kind in KINDS), "kept L1", "kept SSIM")
    ablations = {
        "full": {}, "fixed composition": {"composition": "fixed"}, "static convolution": {"dynamic": False},
        "spatial only": {"composition": "spatial"}, "channel only": {"composition": "channel"},
        "w/o semantic decoder": {"semantic": False}, "w/o spoilt pictures": {"spoil": False},
        "critic from the start": {"alone": 0}, "w/o critic": {"alone": 10**9}, "with CLIP's wish": {"similar": 0.3},
        "w/o own sentence": {"own": 0.0}, "w/o keep": {"keep": 0.0},
        "rolled sentences": {"near": False, "more": 0}, "w/o mean of weights": {"average": 0.0},
        "learnt text encoder": {"text": "lstm"},
    }

    def __init__(self, cfg, device):
        self.cfg, self.device = cfg, device
        self.data = {split: edits.load(cfg.data, cfg.root, split, cfg.size, pairs=cfg.pairs)
                     for split in ("train", "valid", "test")}
        self.read, self.editor = open_editor(cfg, device, self.data["train"])
        if cfg.copy_start:
            start_as_copy(self.editor)
        self.critic = Critic(cfg.size, self.read.width, cfg.critic_base).to(device)
        self.mean = copy.deepcopy(self.editor).requires_grad_(False).eval()        # what is judged, saved and used
        self.optimiser = torch.optim.Adam(self.editor.parameters(), cfg.lr, (cfg.beta1, cfg.beta2), fused=True)
        learnt = [*self.critic.parameters(), *(p for p in self.read.parameters())]
        self.critic_optimiser = torch.optim.Adam(learnt, cfg.critic_lr, (0.0, 0.9), fused=True)
        self.saved = {"editor": self.editor, "critic": self.critic, "mean": self.mean, "read": self.read,
                      "optimiser": self.optimiser, "critic_optimiser": self.critic_optimiser}
        self.judge = reader().to(device)
        self.known = cfg.data == "builtin"
        self.headline = Task.headline if self.known else "asked"
        self.chance = self.score("test", lambda part: part["source"]) if self.known else {}
        self.next = 'python -m edit.sample photo.png "the heart is green"'

    # -- one step -------------------------------------------------------------------------------------------------------

    def batches(self, seed, start, stop):
        """Sources (B, 3, S, S), pairs of true and false sentences about them, lessons; results are rendered for --oracle only."""
        train, cfg = self.data["train"], self.cfg
        for t in range(start, stop):
            rows = batch_rows(len(train), max(cfg.batch, cfg.lessons) if cfg.spoil else cfg.batch, seed, t).tolist()
            few, source = rows[: cfg.batch], train.source(rows)
            said = train.said(few, seed + t, cfg.more)
            if not cfg.near:                                 # rolled, as in DF-GAN: the next picture's true sentence
                said = [(true, true[1:] + true[:1]) for true, _ in said]
            lessons = self.lessons(train, rows, source, seed, t) if cfg.own and cfg.spoil else None
            yield source[: cfg.batch], said, lessons, train.target(few) if cfg.oracle else None

    def lessons(self, data, rows, source, seed, step):
        """Pictures as given and as wanted, pairs of sentences true and false of the wanted, (B, T) which suit which picture."""
        ways = WAYS if data.about else HUES
        given, wanted, donor = spoil(source, generator(seed, step), ways)
        if not data.about:                                   # any sentence may turn out to speak of the hue
            said = data.said(rows, seed + step, self.cfg.more)
            return given, wanted, said, torch.ones(len(rows), len(said), dtype=torch.bool)
        way = [ways[i % len(ways)] for i in range(len(rows))]

        def pair(what, true, false):                         # of the other picture's thing: here it is to come, or was not
            if what != "presence":
                return true, false
            told = [(true[d], false[d]) if w == ADDED else (false[d], true[d]) for w, d in zip(way, donor.tolist(), strict=True)]
            return tuple(map(list, zip(*told, strict=True)))

        about = data.about(rows, seed + step)
        suits = {HUE: "background", THING: "colour", PASTED: "presence", ADDED: "presence"}
        fits = torch.tensor([[what == suits[w] for what, _, _ in about] for w in way])
        return given, wanted, [pair(*told) for told in about], fits

    def update(self, batch, step):
        """Lessons first, later beside them: critic: real and true up, real and false or edited down. Editor: fool it, obey the
        sentence, keep the rest."""
        cfg, (source, said, lessons, target) = self.cfg, batch
        fall = 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / cfg.anneal)) if cfg.anneal else 1.0
        for group in self.optimiser.param_groups:
            group["lr"] = cfg.lr * fall * min(1.0, (step + 1) / 100)
        losses, terms = {}, {}
        if lessons:
            elsewhere = 2.0 if 0 < 3 * cfg.anneal <= 4 * step else 1.0           # first learn to change, then to keep
            terms["own"], losses["sure"] = self.lesson(*lessons, elsewhere)
        if not lessons or self.read.lstm or step >= cfg.alone:
            more, heard = self.contest(source, said, target, step, own=cfg.own if not lessons else 0)
            terms, losses = terms | more, losses | heard
        parallel.descend(self.optimiser, sum(terms.values()))
        self.follow(step)
        return losses | {name: term.detach() for name, term in terms.items()}

    def lesson(self, given, wanted, said, fits, elsewhere=1.0):
        """Error to the wanted pictures, each asked for by its sentence.   -> weighted loss, share of sure"""
        given, wanted, told, sure = self.asked(given, wanted, said, fits)
        error = restored(self.editor(given, self.read(told).detach()), wanted, given, elsewhere)
        some = len(parallel.shard(fits))
        return self.cfg.own * (error * sure).sum() / some, sure.sum() / some

    @torch.no_grad()
    def asked(self, given, wanted, said, fits):
        """This process's lessons, and by what sentence each is asked for: where several fit, by the one that CLIP misses most
        (without CLIP by the first).

        A picture of which hardly a hundredth was spoilt, or in which CLIP misses nothing, teaches nothing and is left out.
        -> given, wanted (B', 3, S, S), B' sentences, (B',) all true; a single false if nothing is to be learnt
        """
        given, wanted, fits = (parallel.shard(x).to(self.device).contiguous(memory_format=torch.channels_last) if x.dim() == 4
                               else parallel.shard(x) for x in (given, wanted, fits))
        said = [(parallel.shard(true), parallel.shard(false)) for true, false in said]
        options = [[said[p][0][row] for p in some.nonzero()[:, 0]] for row, some in enumerate(fits)]
        told, sure = [texts[0] for texts in options], ((given - wanted).abs().amax(1) > 0.2).float().mean((1, 2)) > 0.01
        rows = [row for row, texts in enumerate(options) if len(set(texts)) > 1]
        if rows and self.read.clip:
            some = [tuple([texts[row] for row in rows] for texts in pair) for pair in said]
            before, after = (self.read.logits(x[rows], some) for x in (wanted, given))
            pair, hurt = most_hurt(before, after, fits[rows].T.to(self.device))
            sure[rows] &= hurt
            for row, p in zip(rows, pair.tolist(), strict=True):
                told[row] = said[p][0][row]
        rows = sure.nonzero()[:, 0] if sure.any() else torch.arange(1)
        return given[rows], wanted[rows], [told[row] for row in rows.tolist()], sure[rows]

    def contest(self, source, said, target, step, own):
        """Editor against critic, and CLIP's opinion of edits that nobody knows the result of.   -> terms of the editor, losses"""
        cfg = self.cfg
        source = parallel.shard(source).to(self.device).contiguous(memory_format=torch.channels_last)
        said = [(parallel.shard(true), parallel.shard(false)) for true, false in said]
        vectors = self.read([text for pair in said for texts in pair for text in texts])
        vectors = vectors.unflatten(0, (len(said), 2, -1))                       # (1 + more, 2, B, E)
        true, asked = vectors[0].detach()
        encoded = self.editor.encode(source)
        edited = self.editor.edit(encoded, asked)

        self.critic.requires_grad_(True)
        seen = self.critic.look(source)
        matched, wrong = self.critic.judge(seen.repeat(2 * len(said), 1, 1, 1), vectors.flatten(0, 2)).view(
            len(said), 2, -1).unbind(1)
        fake = self.critic(edited.detach(), asked)
        d_loss = hinge(matched, wrong, fake)
        losses = {"critic": d_loss.detach()}
        if cfg.penalty and step % cfg.penalty_every == 0:
            with torch.autocast(self.device.type, enabled=False):
                d_loss = d_loss + cfg.penalty_every * cfg.penalty * gradient_penalty(self.critic, source, true)
        parallel.descend(self.critic_optimiser, d_loss)

        self.critic.requires_grad_(False)
        terms = {"fool": -cfg.fool * self.critic(edited, asked).mean(), "keep": cfg.keep * changed_share(edited, source)}
        if own:                                                                  # the usual way: from the picture itself
            terms["own"] = own * (self.editor.edit(encoded, true) - source).abs().mean()
        if cfg.similar and self.read.clip:
            true, false = self.read.logits(edited, said[:1])[0]                                # (B,) each
            terms["similar"] = -cfg.similar * F.logsigmoid(false - true).mean()                # the wish, not what was so
        if cfg.oracle:
            terms["oracle"] = cfg.oracle * (edited - parallel.shard(target).to(self.device)).abs().mean()
        return terms, losses

    @torch.no_grad()
    def follow(self, step):
        """Running mean of the editor's weights, over fewer steps at first; the statistics of its batch norms are copied."""
        decay = min(self.cfg.average, (1 + step) / (10 + step))
        for ours, theirs in zip(self.mean.parameters(), self.editor.parameters(), strict=True):
            ours.lerp_(theirs, 1 - decay)
        for ours, theirs in zip(self.mean.buffers(), self.editor.buffers(), strict=True):
            ours.copy_(theirs)

    # -- judging ---------------------------------------------------------------------------------------------------------

    def edit(self, source, sentences, explain=False):
        """Edits by the mean editor.   (B, 3, S, S), B strings -> (B, 3, S, S), with explain=True also weights and queries"""
        return self.mean(source.to(self.device), self.read(sentences), explain)

    def evaluate(self, split):
        return self.score(split, lambda part: self.edit(part["source"], part["asked"]))

    def rivals(self):
        """What copying the input and the known result would score."""
        if not self.known:
            return {}
        return {"copy the input": self.chance, "oracle": self.score("test", lambda part: part["target"])}

    @torch.no_grad()
    def score(self, split, editor):
        """Metrics of `editor`, a function of {"source", "asked", "target", ...}, over the first edits of a split."""
        data, parts = self.data[split], []
        n = min(len(data), JUDGED * (1 + (split == "test")))
        for first in range(0, n, 100):
            rows = range(first, min(first + 100, n))
            true, asked = data.said(rows)[0]
            part = {"source": data.source(rows).to(self.device), "true": true, "asked": asked}
            if data.target:
                part["target"] = data.target(rows).to(self.device)
            part["edited"] = editor(part)
            parts.append(measure(part, data, rows, self) | {"kind": [data.kinds[row] for row in rows]})
        return summarise(parts, self)

    # -- what a person looks at -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, folder):
        """edits.png: held-out edits, three of each kind. lessons.png: what was given, what was wanted and what came of
        it. weights.png: how the manipulations are composed, by kind."""
        data, shown = self.data["test"], []
        kinds = [data.kinds[row] for row in range(min(len(data), 2 * JUDGED))]
        for kind in dict.fromkeys(sorted(kinds, key=KINDS.index if self.known else None)):
            shown += [row for row, k in enumerate(kinds) if k == kind][: 3 if self.known else 9]
        source, asked = data.source(shown), data.said(shown)[0][1]
        edited = self.edit(source, asked).cpu()
        columns = [(source, asked), (edited, ["edited"] * len(shown)),
                   (show((edited - source).abs().mean(1), source, 0.7, "max")[1], ["where it changed"] * len(shown))]
        if data.target:
            columns.insert(2, (data.target(shown), ["known result"] * len(shown)))
        cells = [[(pictures[i], texts[i]) for pictures, texts in columns] for i in range(len(shown))]
        per_row = max(1, 12 // len(columns))
        panels(folder / "edits.png", [sum(cells[i : i + per_row], []) for i in range(0, len(cells), per_row)], size=72)
        if self.cfg.spoil:
            self.draw_lessons(folder / "lessons.png")
        self.draw_weights(folder / "weights.png", kinds)

    def draw_lessons(self, path):
        """What was given to the editor, what was wanted, and what it made of it, with the sentence that was asked."""
        data = self.data["test"]
        rows = range(min(len(data), 48))
        given, wanted, told, _ = self.asked(*self.lessons(data, rows, data.source(rows), 0, 0))
        back = self.edit(given, told)
        cells = [[(given[row], "given"), (wanted[row], "wanted"), (back[row], told[row])] for row in range(len(told))]
        panels(path, [sum(cells[first : first + 4], []) for first in range(0, min(len(cells), 16), 4)], size=72)

    def draw_weights(self, path, kinds):
        """Mean w of each DEBlock for each kind of edit, and how well w alone tells attribute edits from shape edits."""
        data, rows = self.data["test"], range(len(kinds))
        found = [self.edit(data.source(part), data.said(part)[0][1], explain=True)[1]
                 for part in torch.arange(len(rows)).split(100)]
        levels = torch.stack([torch.cat([w[k].mean(1) for w in found]) for k in range(len(found[0]))], 1).cpu()      # (N, levels)
        lines, xs = {}, list(range(1, levels.shape[1] + 1))
        for kind in dict.fromkeys(kinds):
            mean = levels[torch.tensor([k == kind for k in kinds])].mean(0)
            lines[kind] = (xs, mean.tolist())
        charts = [("share of the channel manipulation, mean w", lines, {"equal": 0.5})]
        if self.known:                                       # the paper's story: w is higher where only colour changes
            colour = torch.tensor([k in ("recolour", "background") for k in kinds])
            told = colour | torch.tensor([k in ("reshape", "add", "remove") for k in kinds])
            areas = [roc_auc(levels[told, k], colour[told]) for k in range(len(xs))]
            charts.append(("AUC of w: colour edits above shape edits", {"AUC": (xs, areas)}, {"chance": 0.5}))
        curves(path, charts, xlabel="DEBlock, coarse to fine")
