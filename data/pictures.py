"""Pictures that a run leaves behind: curves, bars, grids with captions, heat maps, film strips, GIFs. Pillow only.

Charts are laid out in points, drawn FINE times larger and reduced by two, so thin lines are smooth; letters are set
afterwards at the final size. Every label is measured with the font before anything is placed: the plot keeps its
size and the picture grows around it, so no label is ever clipped and no two overlap.
Images are (3, H, W) or (H, W) tensors in [-1, 1], or PIL images; all functions take either.
"""
import functools
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8A6D3B")   # Okabe and Ito
INK, GREY, PALE, PAPER = "#222222", "#777777", "#E4E4E4", "#FFFFFF"
HEAT = ((0, 0, 4), (60, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191))  # dark to light
FINE, SHARP = 4, 2              # pixels a point while drawing, and in the file


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
                cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font(size).getlength(word[:n]) <= width)
                lines.append(word[:cut])
                word = word[cut:]
            line = word
        lines.append(line)
    return lines


def save(image, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


# ---- charts ----------------------------------------------------------------------------------------------------------

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
                a, b = i / strokes, (i + 0.5) / strokes
                self.draw.line([(x0 + a * (x1 - x0), y0 + a * (y1 - y0)), (x0 + b * (x1 - x0), y0 + b * (y1 - y0))],
                               colour, pen)
        elif len(points) > 1:
            self.draw.line(points, colour, pen, joint="curve")

    def dot(self, x, y, colour, radius=2.0):
        self.draw.ellipse([((x - radius) * FINE, (y - radius) * FINE), ((x + radius) * FINE, (y + radius) * FINE)], colour)

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
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value):
    """A number as a reader writes it: 12,000  0.25  3e-5."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e").replace(".00e", "e").replace("0e", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def spread_out(wanted, gap, low, high):
    """Heights for labels: as near to `wanted` as possible, in the same order, at least `gap` apart (least squares).

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


def finite(xs, ys):
    return [(float(x), float(y)) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]


def smooth(points):
    """Running mean over a fortieth of the curve."""
    half = max(1, len(points) // 80)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    window = [(max(0, i - half), min(len(points), i + half + 1)) for i in range(len(points))]
    return [(x, (sums[b] - sums[a]) / (b - a)) for (x, _), (a, b) in zip(points, window, strict=True)]


def curves(path, panels, xlabel="step", marks="line"):
    """Panels side by side, each (title, {label: (xs, ys)}, {level label: y}); labels stand at the lines' ends.

    Values that are not finite are left out. A line of more than 80 points is drawn pale, with its running mean on top.
    marks   "line", or "dots" for a scatter plot
    """
    plots = [layout(*panel, marks) for panel in panels]
    height = max(plot["height"] for plot in plots)
    top = max(16 * len(plot["title"]) for plot in plots) + 14
    canvas = Canvas(sum(plot["width"] for plot in plots), top + height + 40)
    left = 0
    for plot in plots:
        draw_panel(canvas, plot, left, top, height, xlabel)
        left += plot["width"]
    canvas.save(path)


def layout(title, lines, levels, marks):
    """Everything about a panel that must be known before the canvas has a size: ranges, ticks, label widths."""
    lines = {label: finite(*line) for label, line in lines.items()}
    lines = {label: points for label, points in lines.items() if points}
    levels = {label: y for label, y in levels.items() if math.isfinite(y)}
    ys = [y for points in lines.values() for _, y in points] + list(levels.values()) or [0.0, 1.0]
    xs = [x for points in lines.values() for x, _ in points] or [0.0, 1.0]
    low, high = min(ys), max(ys)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    x_pad = 0.5 if min(xs) == max(xs) else 0.04 * (max(xs) - min(xs)) if marks == "dots" else 0.0
    y_ticks = ticks(low - pad, high + pad)
    names = [f"{label} {number(y)}" for label, y in levels.items()]
    names += [label if marks == "dots" else f"{label} {number(points[-1][1])}" for label, points in lines.items()]
    left = max(measure(number(y)) for y in y_ticks) + 20
    right = max(map(measure, names), default=0) + 30
    wide = 300
    return {"title": wrap(title, (wide + right) * SHARP, 11 * SHARP), "lines": lines, "levels": levels, "marks": marks,
            "x": (min(xs) - x_pad, max(xs) + x_pad), "y": (low - pad, high + pad), "y_ticks": y_ticks, "names": names,
            "left": left, "plot_width": wide, "width": left + wide + right, "height": max(190, 14 * len(names))}
