"""Why an answer: words, punishment, graph attention and frames of one question on one sheet."""
import torch
from PIL import Image, ImageDraw

from data.charts import GREY, INK, PALE, PALETTE, PAPER, SHARP, font, save, wrap
from data.pictures import heat, to_pil

LEFT, CELL, LINE = 170, 66, 18             # points: the column of labels, a clip, a line of text


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


class Sheet:
    """A white sheet that is filled line by line; places are in points."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (width * SHARP, height * SHARP), PAPER)
        self.draw, self.y = ImageDraw.Draw(self.image), 12

    def text(self, x, y, string, size=9, colour=INK, anchor="lm"):
        self.draw.text((x * SHARP, y * SHARP), string, colour, font(size * SHARP), anchor)

    def box(self, x, y, wide, high, colour):
        self.draw.rectangle([x * SHARP, y * SHARP, (x + wide) * SHARP - 1, (y + high) * SHARP - 1], colour)

    def paste(self, image, x, y, wide):
        image = to_pil(image).resize((wide * SHARP, wide * SHARP), Image.Resampling.NEAREST)
        self.image.paste(image, (round(x * SHARP), round(y * SHARP)))

    def cells(self, label, values, low=0.0, high=1.0):
        """One row of numbers on a scale of colours, one for each clip."""
        self.text(LEFT - 8, self.y + 9, label, anchor="rm")
        for n, value in enumerate(values.tolist()):
            share = min(max((value - low) / max(high - low, 1e-6), 0.0), 1.0)
            self.box(LEFT + n * CELL + 1, self.y + 1, CELL - 2, 16, shade(share))
            self.text(LEFT + n * CELL + CELL / 2, self.y + 9, f"{value:.2f}", 8, PAPER if share < 0.55 else INK, "mm")
        self.y += LINE


def shade(share):
    """A number in [0, 1] as a colour of the scale that data.pictures draws heat with."""
    return tuple(int(x) for x in ((heat(torch.tensor([[share]]))[:, 0, 0] + 1) * 127.5).round())


def draw(path, question, told, frames, out, effect, evidence=None):
    """The sheet of one question.

    question  list of words; told: the lines about its answer
    frames    (N, L, 3, H, W) in [-1, 1]: the frames of each clip that CLIP looked at
    out       Output of a batch of one; effect (N,) from `without_each_clip`; evidence (N,) bool where it is known
    """
    n, look = frames.shape[:2]
    cycles, picture, graph = len(out.words), CELL - 6, 96
    across = max(LEFT + n * CELL + 16, LEFT + 4 * (graph + 22))
    lines = wrap(" ".join(question) + "?", (across - 24) * SHARP, 12 * SHARP)
    height = 130 + 18 * len(lines) + 15 * len(told) + look * picture + LINE * (3 * cycles + 5) + cycles * (graph + 26)
    sheet = Sheet(across, height)
    for line in lines:
        sheet.text(12, sheet.y + 8, line, 12)
        sheet.y += 18
    for line in told:
        sheet.text(12, sheet.y + 8, line, 10, GREY)
        sheet.y += 15
    sheet.y += 8

    for k in range(n):                                                # the film, evidence in a coloured frame
        known = evidence is not None and bool(evidence[k])
        sheet.box(LEFT + k * CELL, sheet.y, CELL, look * picture + 10, PALETTE[1] if known else INK)
        for f in range(look):
            sheet.paste(frames[k, f], LEFT + k * CELL + 3, sheet.y + 3 + f * (picture + 2), picture)
    sheet.text(LEFT - 8, sheet.y + 16, f"{n} clips, {look} frames of each", anchor="rm")
    if evidence is not None:
        sheet.text(LEFT - 8, sheet.y + 32, "orange: the planted evidence", 8, PALETTE[1], "rm")
    sheet.y += look * picture + 18

    for t in range(cycles):
        for name, score in zip(("appearance", "motion"), out.scores[t, :, 0], strict=True):
            sheet.cells(f"punishment {t + 1}, {name}", score)
    sheet.cells("weight of the frames", out.readout[0], 0.0, float(out.readout.max()))
    sheet.cells("lost without this clip", effect, 0.0, max(0.2, float(effect.max())))
    sheet.y += 10

    for t in range(cycles):                                           # words, darker = more of the query
        sheet.text(LEFT - 8, sheet.y + 9, f"words of query {t + 1}", anchor="rm")
        x, top = LEFT, float(out.words[t, 0].max())
        for word, weight in zip(question, out.words[t, 0].tolist(), strict=False):
            wide = font(9 * SHARP).getlength(word) / SHARP + 8
            if x + wide > across - 8:
                break
            share = weight / max(top, 1e-6)
            sheet.box(x, sheet.y + 1, wide - 2, 16, shade(1 - 0.75 * share) if share > 0.15 else PALE)
            sheet.text(x + wide / 2 - 1, sheet.y + 9, word, 9, PAPER if share > 0.6 else INK, "mm")
            x += wide
        sheet.y += LINE
    sheet.y += 12

    for t in range(cycles):                                           # who listens to whom, mean of the heads
        sheet.text(LEFT - 8, sheet.y + 24, f"graph attention {t + 1}", anchor="rm")
        sheet.text(LEFT - 8, sheet.y + 38, f"row listens to column, white: {4 / n:.2g}", 8, GREY, "rm")
        shown = out.graph[t, :, 0].mean(2).flatten(0, 1)
        names = [f"{stream}, {view}" for stream in ("appearance", "motion") for view in ("common", "own")[: out.graph.shape[3]]]
        for k, name in enumerate(names):
            x = LEFT + k * (graph + 22)
            sheet.text(x, sheet.y + 6, name, 8, GREY)
            sheet.paste(heat(shown[k] * n / 4), x, sheet.y + 14, graph)
        sheet.y += graph + 26
    save(sheet.image.crop((0, 0, sheet.image.width, min(sheet.image.height, (sheet.y + 4) * SHARP))), path)
