"""Charts of a run: curves, histograms, bars. Pillow only.

They are laid out in points, drawn FINE / SHARP times larger and reduced, so thin lines are smooth; letters are set afterwards
at the final size. Every label is measured with the font before anything is placed: the plot keeps its size and the picture
grows around it, so no label is ever clipped and no two overlap.
"""
import functools
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8A6D3B")          # Okabe and Ito
INK, GREY, PALE, PAPER = "#222222", "#6F6F6F", "#E4E4E4", "#FFFFFF"
FINE, SHARP = 4, 2              # pixels per point while drawing, and in the file
PLOT = 300                      # width of the space between a panel's axes, in points


@functools.lru_cache
def font(size):
    return ImageFont.load_default(size)


def wrap(text, width, size):
    """Break text into lines of at most `width` pixels as the font measures them; too long words are cut."""
    lines = []
    for paragraph in str(text).splitlines():
        line = ""
        for word in paragraph.split():
            if font(size).getlength(f"{line} {word}".strip()) <= width:
                line = f"{line} {word}".strip()
                continue
            lines += [line] * bool(line)
            while len(word) > 1 and font(size).getlength(word) > width:
                cut = len(word) - 1
                while cut > 1 and font(size).getlength(word[:cut]) > width:
                    cut -= 1
                lines.append(word[:cut])
                word = word[cut:]
            line = word
        lines.append(line)
    return lines


def save(image, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


# -- a sheet, and numbers on it ------------------------------------------------------------------------------


class Canvas:
    """A white sheet measured in points: shapes are drawn fine and reduced, text is set last."""

    def __init__(self, width, height):
        self.size = math.ceil(width), math.ceil(height)
        self.sheet = Image.new("RGB", (self.size[0] * FINE, self.size[1] * FINE), PAPER)
        self.draw, self.texts = ImageDraw.Draw(self.sheet), []

    def line(self, points, colour, width=1.0, dash=None):
        """A polyline; dash is the length of a stroke and of a gap in points."""
        points = [(x * FINE, y * FINE) for x, y in points]
        pen = round(width * FINE)
        if dash:
            (x0, y0), (x1, y1) = points[0], points[-1]
            strokes = max(1, int(math.hypot(x1 - x0, y1 - y0) / (2 * dash * FINE)))
            for i in range(strokes):
                ends = [(x0 + a * (x1 - x0), y0 + a * (y1 - y0)) for a in (i / strokes, (i + 0.5) / strokes)]
                self.draw.line(ends, colour, pen)
        elif len(points) > 1:
            self.draw.line(points, colour, pen, joint="curve")

    def dot(self, x, y, colour, radius):
        self.draw.ellipse([side * FINE for side in (x - radius, y - radius, x + radius, y + radius)], colour)

    def box(self, x0, y0, x1, y1, colour):
        self.draw.rectangle([x0 * FINE, y0 * FINE, x1 * FINE, y1 * FINE], colour)

    def text(self, x, y, string, size=9, colour=INK, anchor="lm"):
        self.texts.append((x, y, string, size, colour, anchor))

    def save(self, path):
        image = self.sheet.reduce(FINE // SHARP)
        draw = ImageDraw.Draw(image)
        for x, y, string, size, colour, anchor in self.texts:
            draw.text((x * SHARP, y * SHARP), string, colour, font(size * SHARP), anchor)
        save(image, path)


def measure(string, size=9):
    """Width of a label in points."""
    return font(size * SHARP).getlength(string) / SHARP


def ticks(low, high, count=5):
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high], about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_labels(values):
    """Labels of one axis, all with the same number of decimals."""
    largest = max(map(abs, values), default=0)
    if largest >= 1e7 or 0 < largest < 1e-3:
        return [number(v) for v in values]
    decimals = max((len(f"{v:.9f}".rstrip("0").split(".")[1]) for v in values), default=0)
    return [f"{v:,.{decimals}f}" for v in values]


def number(value):
    """A number as a reader writes it: 12,000  0.25  3e-5."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e").replace(".00e", "e").replace("0e", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def spread_out(wanted, gap, low, high):
    """Heights for labels: nearest to `wanted` (least squares) in the same order and at least `gap` apart.

    Subtracting i * gap turns "at least gap apart" into "not decreasing": pool neighbours that violate it.
    """
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    pools = []                                                       # [sum, count] of pooled heights
    for i, k in enumerate(order):
        pools.append([wanted[k] - i * gap, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + count]
    flat = [total / count for total, count in pools for _ in range(count)]
    place = [0.0] * len(wanted)
    for i, k in enumerate(order):
        place[k] = min(max(flat[i], low), high - (len(wanted) - 1) * gap) + i * gap
    return place


# -- curves --------------------------------------------------------------------------------------------------


def curves(path, panels, xlabel="step", outline=False):
    """Panels side by side, each (title, {label: (xs, ys)}, {level label: y}); labels at the ends of lines.

    Values that are not finite are left out. A line of more than 80 points is drawn pale, with its running mean on top.
    outline   of a histogram: it stands on zero, is never smoothed and is labelled at its peak, without a value
    """
    plots = [layout(*panel, outline) for panel in panels]
    height = max(plot["height"] for plot in plots)
    top = max(16 * len(plot["title"]) for plot in plots) + 14
    canvas = Canvas(sum(plot["width"] for plot in plots), top + height + 40)
    left = 0
    for plot in plots:
        draw_panel(canvas, plot, left, top, height, xlabel)
        left += plot["width"]
    canvas.save(path)


def smooth(points):
    """Running mean over a fortieth of the curve."""
    half = max(1, len(points) // 80)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    window = [(max(0, i - half), min(len(points), i + half + 1)) for i in range(len(points))]
    return [(x, (sums[b] - sums[a]) / (b - a)) for (x, _), (a, b) in zip(points, window, strict=True)]


def layout(title, lines, levels, outline):
    """What must be known of a panel before the canvas has a size: ranges, ticks, labels and their room."""
    lines = {label: [(float(x), float(y)) for x, y in zip(*line, strict=True) if math.isfinite(x + y)]
             for label, line in lines.items()}
    lines = {label: points for label, points in lines.items() if points}
    means = {label: smooth(points) for label, points in lines.items() if not outline and len(points) > 80}
    levels = {label: y for label, y in levels.items() if math.isfinite(y)}
    ys = [y for points in lines.values() for _, y in points] + list(levels.values()) or [0.0, 1.0]
    xs = [x for points in lines.values() for x, _ in points] or [0.0, 1.0]
    pad, x_pad = 0.06 * (max(ys) - min(ys)) or 0.1 * abs(ys[0]) or 1.0, 0.5 * (min(xs) == max(xs))
    x, y = (min(xs) - x_pad, max(xs) + x_pad), (0.0 if outline else min(ys) - pad, max(ys) + pad)
    whole = all(v == round(v) for v in xs)                           # no tick at step 1.5
    for n in (6, 5, 4, 3, 2):
        x_ticks = [t for t in ticks(*x, n) if not whole or t == round(t)]
        if sum(measure(label, 8) + 14 for label in tick_labels(x_ticks)) < PLOT:
            break
    names = [f"{label} {number(v)}" for label, v in levels.items()]
    names += [label if outline else f"{label} {number(means.get(label, points)[-1][1])}" for label, points in lines.items()]
    left = max(measure(label, 8) for label in tick_labels(ticks(*y))) + 26
    right = max(map(measure, names), default=0) + 26
    return {"title": wrap(title, (PLOT + right) * SHARP, 11 * SHARP), "lines": lines, "means": means,
            "levels": levels, "outline": outline, "x": x, "y": y, "x_ticks": x_ticks, "y_ticks": ticks(*y),
            "names": names, "left": left, "width": left + PLOT + right, "height": max(190, 13 * len(names))}


def draw_panel(canvas, plot, left, top, height, xlabel):
    """One pair of axes with its title, lines, level lines and the labels at their ends."""
    x0, x1, y0, y1 = left + plot["left"], left + plot["left"] + PLOT, top + height, top
    (low_x, high_x), (low_y, high_y) = plot["x"], plot["y"]

    def across(x):
        return x0 + (x1 - x0) * ((x - low_x) / (high_x - low_x))

    def up(y):
        return y0 + (y1 - y0) * ((y - low_y) / (high_y - low_y))

    for i, line in enumerate(plot["title"]):
        canvas.text(x0, 14 + 14 * i, line, 11, anchor="lm")
    for y, label in zip(map(up, plot["y_ticks"]), tick_labels(plot["y_ticks"]), strict=True):
        canvas.line([(x0, y), (x1, y)], PALE, 0.5)
        canvas.text(x0 - 6, y, label, 8, GREY, "rm")
    canvas.line([(x0, y0), (x1, y0)], GREY, 0.6)
    for x, label in zip(map(across, plot["x_ticks"]), tick_labels(plot["x_ticks"]), strict=True):
        canvas.line([(x, y0), (x, y0 + 3)], GREY, 0.6)
        canvas.text(x, y0 + 11, label, 8, GREY, "mm")
    canvas.text((x0 + x1) / 2, y0 + 26, xlabel, 9, GREY, "mm")
    ends, colours = [(x1, up(y)) for y in plot["levels"].values()], [GREY] * len(plot["levels"])
    for _, y in ends:
        canvas.line([(x0, y), (x1, y)], GREY, 0.8, dash=3)
    for i, (label, points) in enumerate(plot["lines"].items()):
        colours.append(PALETTE[i % len(PALETTE)])
        drawn, mean = ([(across(x), up(y)) for x, y in line] for line in (points, plot["means"].get(label, [])))
        ends.append(draw_line(canvas, drawn, mean, colours[-1], x1 if plot["outline"] else None))
    heights = spread_out([y for _, y in ends], 12, y1, y0)
    for (x, y), place_y, name, colour in zip(ends, heights, plot["names"], colours, strict=True):
        if abs(place_y - y) > 3 or x1 - x > 3:                       # a hair from the line's end to its label
            canvas.line([(x + 3, y), (x1 + 2, y), (x1 + 8, place_y)], colour, 0.4)
        canvas.text(x1 + 10, place_y, name, 9, colour)
    if not ends:
        canvas.text((x0 + x1) / 2, (y0 + y1) / 2, "nothing measured yet", 9, GREY, "mm")


def draw_line(canvas, points, mean, colour, right):
    """One line; returns the place that its label belongs to: its end, or for an outline its peak on the right."""
    if mean:
        canvas.line(points, tint(colour), 0.6)
    canvas.line(mean or points, colour, 1.2)
    if right is not None:
        return right, min(y for _, y in points)                      # y runs downwards
    if len(points) <= 25:                                            # few enough to see what was measured
        for x, y in points:
            canvas.dot(x, y, colour, 1.6)
    return (mean or points)[-1]


def tint(colour, white=0.72):
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(part * (1 - white) + 255 * white):02x}" for part in parts)


# -- bars and histograms -------------------------------------------------------------------------------------


def bars(path, values, title, level=None, level_label="chance"):
    """Horizontal bars, each with its name on the left and its number at its end.   values {label: number}; level: a line"""
    if not values:
        raise ValueError(f"there is no bar to draw in {path}")
    ends = [*values.values(), 0.0, level or 0.0]
    low, high = min(ends), max(ends)
    high = high if high > low else low + 1
    texts = {label: number(float(f"{v:.4g}")) for label, v in values.items()}
    names = {label: wrap(label, 200 * SHARP, 9 * SHARP) for label in values}
    tall = {label: max(20, 11 * len(lines) + 7) for label, lines in names.items()}
    room = max([0, *(measure(texts[label]) + 8 for label, v in values.items() if v < 0)])   # their numbers
    left = max(measure(line) for lines in names.values() for line in lines) + 20
    start, right = left + room + 8, max(measure(text) for text in texts.values()) + 24
    heading = wrap(title, (start + 280 + right - 24) * SHARP, 11 * SHARP)
    top = 18 + 14 * len(heading) + 14 * (level is not None)
    canvas = Canvas(start + 280 + right, top + sum(tall.values()) + 8)
    for i, line in enumerate(heading):
        canvas.text(12, 14 + 14 * i, line, 11)
    for label, value in values.items():
        zero, tip = (start + 280 * (v - low) / (high - low) for v in (0, value))
        middle = top + tall[label] / 2
        for i, line in enumerate(names[label]):
            canvas.text(left, middle + 11 * (i - (len(names[label]) - 1) / 2), line, 9, INK, "rm")
        canvas.box(min(zero, tip), middle - 6, max(zero, tip), middle + 6, PALETTE[0])
        x, anchor = (tip + 6, "lm") if value >= 0 else (tip - 6, "rm")
        canvas.text(x, middle, texts[label], 9, GREY, anchor)
        top += tall[label]
    if level is not None:
        x, text = start + 280 * (level - low) / (high - low), f"{level_label} {number(float(f'{level:.3g}'))}"
        first = top - sum(tall.values())
        canvas.line([(x, first - 4), (x, top)], PALETTE[1], 0.9, dash=3)
        canvas.text(max(x, 8 + measure(text, 8) / 2), first - 10, text, 8, PALETTE[1], "mm")
    canvas.save(path)


def histogram(path, panels, bins=24):
    """Outlines of histograms, panels (title, {label: values}): the share of values in each of common bins."""
    plots = []
    for title, groups in panels:
        groups = {label: torch.as_tensor(x).detach().double().cpu().flatten() for label, x in groups.items()}
        every = torch.cat([x[x.isfinite()] for x in groups.values()])
        low, high = (float(every.min()), float(every.max())) if len(every) else (0.0, 1.0)
        edges = torch.linspace(low, high if high > low else low + 1, bins + 1, dtype=torch.float64)
        lines = {}
        for label, x in groups.items():
            share = torch.histc(x[x.isfinite()], bins, float(edges[0]), float(edges[-1])) / max(1, len(x))
            lines[label] = (edges.repeat_interleave(2)[1:-1].tolist(), share.repeat_interleave(2).tolist())
        plots.append((title, lines, {}))
    curves(path, plots, "value", outline=True)
