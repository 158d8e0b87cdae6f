"""Why an answer: what the model used, whether the punishment finds the evidence, and one question on one sheet."""
import torch
from PIL import Image, ImageDraw

from data.charts import GREY, INK, PALE, PALETTE, PAPER, SHARP, font, save, wrap
from data.pictures import heat, to_pil

STREAMS = ("appearance", "motion")
LEFT, CELL, LINE = 170, 66, 18             # points: the column of labels, a clip, a line of text
PICTURE, GRAPH = CELL - 6, 96              # a frame, an attention map


@torch.no_grad()
def without_each_clip(model, tokens, appearance, motion, answer):
    """How much the answer's probability falls when a clip is replaced by features of zero.   -> (N,)

    tokens (1, S), standardised appearance (1, N, F, D), motion (1, N, D). Unlike a score, whose sign nothing in the loss ties to
    relevance, this says what the model used.
    """
    n = motion.shape[1]
    kept = 1 - torch.eye(n + 1, n, device=motion.device)                              # the last row keeps all
    lengths = torch.full((n + 1,), tokens.shape[1], device=motion.device)
    logits = model(tokens.expand(n + 1, -1), lengths, appearance * kept[..., None, None], motion * kept[..., None]).logits
    p = logits.softmax(1)[:, answer]
    return p[-1] - p[:-1]


def probabilities(logits):
    """Of every answer but the two entries that stand for unknown ones.   (A,) -> (A,)"""
    return logits.index_fill(0, torch.arange(2, device=logits.device), -torch.inf).softmax(0)


def best_answers(p, answers, top=3):
    """The most probable answers.   p (A,), A words -> [(answer, probability), ...]"""
    best = p.topk(min(top, len(p) - 2))
    return [(answers[i], float(x)) for x, i in zip(*best, strict=True)]


# -- does the punishment find the evidence? -----------------------------------------------------------------------------------


def evidence_auc(scores, evidence):
    """Chance that a clip of the evidence scores above another clip of the same video.   (Q, N), (Q, N) bool -> (Q,)

    Ties count half. Not a number where a question has no evidence, or where every clip is evidence.
    """
    higher = (scores[:, :, None] > scores[:, None]).float() + (scores[:, :, None] == scores[:, None]).float() / 2
    pairs = evidence[:, :, None] & ~evidence[:, None]
    return (higher * pairs).sum((1, 2)) / pairs.sum((1, 2))


def by_cycle(scores):
    """Scores (T, 2, ..) -> {"appearance 1": (..), "motion 1": (..), ...}"""
    return {f"{name} {t}": s for t, cycle in enumerate(scores, 1) for name, s in zip(STREAMS, cycle, strict=True)}


def evidence_table(scores, evidence, types):
    """AUC of every stream and cycle by question type, as lines.   scores (T, 2, Q, N)"""
    columns = {name: evidence_auc(s, evidence) for name, s in by_cycle(scores).items()}
    lines = ["Does the punishment score the clips that hold the evidence above the others of the video? Area under the curve,",
             "mean over test questions; chance 0.5. Below 0.5 the evidence gets the lower score.", "",
             f"{'type':18} questions  " + "  ".join(columns)]
    for kind in [*sorted(set(types)), "all"]:
        rows = torch.tensor([kind in (t, "all") for t in types]) & ~evidence_auc(evidence.float(), evidence).isnan()
        cells = [f"{float(x[rows].mean()):{len(name)}.3f}" for name, x in columns.items()]
        lines.append(f"{kind:18} {int(rows.sum()):9}  " + "  ".join(cells))
    return lines


# -- the sheet of one question ------------------------------------------------------------------------------------------------


def shade(share):
    """A number in [0, 1] as a colour of the scale that data.pictures draws heat with."""
    return tuple(int(x) for x in ((heat(torch.tensor([[share]]))[:, 0, 0] + 1) * 127.5).round())


class Sheet:
    """A white sheet that is filled block by block; places are in points."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (width * SHARP, height * SHARP), PAPER)
        self.draw, self.width, self.y = ImageDraw.Draw(self.image), width, 12

    def text(self, x, y, string, size=9, colour=INK, anchor="lm"):
        self.draw.text((x * SHARP, y * SHARP), string, colour, font(size * SHARP), anchor)

    def label(self, below, string, size=9, colour=INK):
        """In the left column, `below` the line reached."""
        self.text(LEFT - 8, self.y + below, string, size, colour, "rm")

    def box(self, x, y, wide, high, colour):
        self.draw.rectangle([x * SHARP, y * SHARP, (x + wide) * SHARP - 1, (y + high) * SHARP - 1], colour)

    def paste(self, image, x, y, wide):
        image = to_pil(image).resize((wide * SHARP, wide * SHARP), Image.Resampling.NEAREST)
        self.image.paste(image, (round(x * SHARP), round(y * SHARP)))

    def lines(self, lines, size, high, colour=INK):
        for line in lines:
            self.text(12, self.y + 8, line, size, colour)
            self.y += high

    def film(self, frames, evidence):
        """The frames of each clip, evidence in a coloured frame.   frames (N, L, 3, H, W), evidence (N,) bool or None"""
        n, look = frames.shape[:2]
        for k in range(n):
            known = evidence is not None and bool(evidence[k])
            self.box(LEFT + k * CELL, self.y, CELL, look * PICTURE + 10, PALETTE[1] if known else INK)
            for f in range(look):
                self.paste(frames[k, f], LEFT + k * CELL + 3, self.y + 3 + f * (PICTURE + 2), PICTURE)
        self.label(16, f"{n} clips, {look} frames of each")
        if evidence is not None:
            self.label(32, "orange: the planted evidence", 8, PALETTE[1])
        self.y += look * PICTURE + 18

    def cells(self, label, values, high=1.0):
        """One number a clip, on a scale of colours from 0 to `high`."""
        self.label(9, label)
        for n, value in enumerate(values.tolist()):
            share = min(max(value / max(high, 1e-6), 0.0), 1.0)
            self.box(LEFT + n * CELL + 1, self.y + 1, CELL - 2, 16, shade(share))
            self.text(LEFT + n * CELL + CELL / 2, self.y + 9, f"{value:.2f}", 8, PAPER if share < 0.55 else INK, "mm")
        self.y += LINE

    def query(self, label, question, weights):
        """The words of the question, darker = more of the query."""
        self.label(9, label)
        x = LEFT
        for word, share in zip(question, (weights / weights.max().clamp(min=1e-6)).tolist(), strict=False):
            wide = font(9 * SHARP).getlength(word) / SHARP + 8
            if x + wide > self.width - 8:
                break
            self.box(x, self.y + 1, wide - 2, 16, shade(1 - 0.75 * share) if share > 0.15 else PALE)
            self.text(x + wide / 2 - 1, self.y + 9, word, 9, PAPER if share > 0.6 else INK, "mm")
            x += wide
        self.y += LINE

    def graphs(self, label, attention):
        """Who listens to whom, mean of the heads.   attention (2, V, H, N, N) of appearance, motion; common and own view"""
        n = attention.shape[-1]
        self.label(24, label)
        self.label(38, f"row listens to column, white: {4 / n:.2g}", 8, GREY)
        names = [f"{stream}, {view}" for stream in STREAMS for view in ("common", "own")[: attention.shape[1]]]
        for k, (name, shown) in enumerate(zip(names, attention.mean(2).flatten(0, 1), strict=True)):
            x = LEFT + k * (GRAPH + 22)
            self.text(x, self.y + 6, name, 8, GREY)
            self.paste(heat(shown * n / 4), x, self.y + 14, GRAPH)
        self.y += GRAPH + 26


def draw(path, question, told, frames, out, effect, evidence=None):
    """The sheet of one question.

    question  list of words; told: the lines about its answer
    frames    (N, L, 3, H, W) in [-1, 1]: the frames of each clip that CLIP looked at
    out       Output of a batch of one; effect (N,) from `without_each_clip`; evidence (N,) bool where it is known
    """
    (n, look), cycles = frames.shape[:2], range(len(out.words))
    width = max(LEFT + n * CELL + 16, LEFT + 4 * (GRAPH + 22))
    lines = wrap(" ".join(question) + "?", (width - 24) * SHARP, 12 * SHARP)
    height = 130 + 18 * len(lines) + 15 * len(told) + look * PICTURE + LINE * (3 * len(cycles) + 5) + len(cycles) * (GRAPH + 26)
    sheet = Sheet(width, height)
    sheet.lines(lines, 12, 18)
    sheet.lines(told, 10, 15, GREY)
    sheet.y += 8
    sheet.film(frames, evidence)
    for t in cycles:
        for name, score in zip(STREAMS, out.scores[t, :, 0], strict=True):
            sheet.cells(f"punishment {t + 1}, {name}", score)
    sheet.cells("weight of the frames", out.readout[0], float(out.readout.max()))
    sheet.cells("lost without this clip", effect, max(0.2, float(effect.max())))
    sheet.y += 10
    for t in cycles:
        sheet.query(f"words of query {t + 1}", question, out.words[t, 0])
    sheet.y += 12
    for t in cycles:
        sheet.graphs(f"graph attention {t + 1}", out.graph[t, :, 0])
    save(sheet.image.crop((0, 0, sheet.image.width, min(sheet.image.height, (sheet.y + 4) * SHARP))), path)
