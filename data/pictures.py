"""Pictures for people: curves, bars, grids, overlays, strips, GIFs. Pillow only.

Tensors are (3, H, W) or (N, 3, H, W) in [-1, 1]. Colours can be told apart by colour-blind readers (Okabe and Ito).
"""
import math

import torch
from PIL import Image, ImageDraw, ImageFont

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444")
INK, FAINT, PAPER = "#222222", "#dddddd", "#ffffff"
SCALE = 2                       # everything is drawn at twice the size: sharp on today's screens


def font(size):
    return ImageFont.load_default(size * SCALE)


def width_of(text, size):
    return font(size).getlength(text) / SCALE


def to_pil(image):
    """(3, H, W) in [-1, 1] -> an RGB picture."""
    pixels = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy(), "RGB")


class Canvas:
    """A white page in points; coordinates and font sizes are in points, pixels are SCALE times finer."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (round(width * SCALE), round(height * SCALE)), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def line(self, points, colour=INK, width=1.0):
        self.draw.line([(x * SCALE, y * SCALE) for x, y in points], fill=colour, width=max(1, round(width * SCALE)), joint="curve")

    def box(self, x0, y0, x1, y1, colour, outline=None):
        self.draw.rectangle((x0 * SCALE, y0 * SCALE, x1 * SCALE, y1 * SCALE), fill=colour, outline=outline)

    def text(self, x, y, text, size=10, colour=INK, anchor="lm"):
        self.draw.text((x * SCALE, y * SCALE), text, fill=colour, font=font(size), anchor=anchor)

    def paste(self, picture, x, y, size):
        sharp = Image.NEAREST if picture.width < size[0] * SCALE else Image.LANCZOS
        self.image.paste(picture.resize((round(size[0] * SCALE), round(size[1] * SCALE)), sharp), (round(x * SCALE), round(y * SCALE)))

    def save(self, path):
        self.image.save(path)


# -- curves and bars ------------------------------------------------------------------------------------------------------------


def ticks(low, high, count=5):
    """Round numbers that cover [low, high]: steps of 1, 2 or 5 times a power of ten."""
    if not math.isfinite(low) or not math.isfinite(high):
        low, high = 0.0, 1.0
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def spread(places, gap, low, high):
    """Move label heights apart so that none overlap, keeping their order and staying inside [low, high]."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for before, after in zip(order, order[1:], strict=False):
        moved[after] = max(moved[after], moved[before] + gap)
    limit = high
    for i in reversed(order):
        moved[i] = max(min(moved[i], limit), low)
        limit = moved[i] - gap
    return moved


def curves(path, panels, xlabel="step"):
    """Panels side by side; each line is named at its end.   panels [(title, {label: (xs, ys)}, {level label: y})]"""
    panel_width, height, top, bottom = 430, 290, 38, 40
    page = Canvas(panel_width * len(panels), height)
    for n, (title, lines, levels) in enumerate(panels):
        lines = {label: [(x, y) for x, y in zip(*xy, strict=True) if math.isfinite(y)] for label, xy in lines.items()}
        lines = {label: points for label, points in lines.items() if points}
        points = [p for line in lines.values() for p in line] or [(0, 0.0), (1, 1.0)]
        ys = ticks(min([y for _, y in points] + list(levels.values())), max([y for _, y in points] + list(levels.values())))
        xs = ticks(min(x for x, _ in points), max(x for x, _ in points), 4)
        left = n * panel_width + 20 + max(width_of(number(y), 9) for y in ys)
        right = (n + 1) * panel_width - 14 - max([width_of(label, 10) for label in [*lines, *levels]] + [20])
        place = lambda x, y, left=left, right=right, xs=xs, ys=ys: (  # noqa: E731
            left + (right - left) * (x - xs[0]) / (xs[-1] - xs[0]), height - bottom - (height - bottom - top) * (y - ys[0]) / (ys[-1] - ys[0]))
        page.text(n * panel_width + 14, 18, title, 12)
        for y in ys:
            page.line([place(xs[0], y), place(xs[-1], y)], FAINT, 0.5)
            page.text(left - 6, place(xs[0], y)[1], number(y), 9, "#666666", "rm")
        for x in xs:
            page.text(place(x, ys[0])[0], height - bottom + 12, number(x), 9, "#666666", "mm")
        page.text((left + right) / 2, height - 10, xlabel, 9, "#666666", "mm")
        ends = []
        for colour, (label, line) in zip(PALETTE * 3, lines.items(), strict=False):
            drawn = [place(*p) for p in line]
            page.line(drawn if len(drawn) > 1 else [drawn[0], (drawn[0][0] + 2, drawn[0][1])], colour, 1.2)
            ends.append((drawn[-1][1], label, colour))
        for label, y in levels.items():
            x0, x1, height_y = left, right, place(xs[0], y)[1]
            for k in range(int((x1 - x0) // 8) + 1):
                page.line([(x0 + 8 * k, height_y), (min(x0 + 8 * k + 4, x1), height_y)], "#888888", 0.8)
            ends.append((height_y, label, "#888888"))
        heights = spread([y for y, _, _ in ends], 13, top, height - bottom)
        for y, (_, label, colour) in zip(heights, ends, strict=True):
            page.text(right + 6, y, label, 10, colour)
    page.save(path)


def bars(path, values, title, level=None):
    """Horizontal bars, each with its name on the left and its value at its end.   values {label: number >= 0}"""
    left, row = 16 + max(width_of(label, 10) for label in values), 22
    page = Canvas(left + 380, 44 + row * len(values) + 10)
    page.text(14, 18, title, 12)
    most = max([*values.values(), level or 0, 1e-12])
    for n, (label, value) in enumerate(values.items()):
        y, end = 42 + row * n, left + 8 + 290 * value / most
        page.text(left, y + 8, label, 10, anchor="rm")
        page.box(left + 8, y, max(end, left + 9), y + 15, PALETTE[0])
        page.text(end + 6, y + 8, f"{value:.3g}", 10, "#666666")
    if level is not None:
        x = left + 8 + 290 * level / most
        page.line([(x, 36), (x, 42 + row * len(values))], PALETTE[1], 1)
    page.save(path)


# -- pictures with captions --------------------------------------------------------------------------------------------------------


def wrap(text, width, size=9, lines=4):
    """Break a caption into lines that fit; what does not fit ends in an ellipsis."""
    rows = [""]
    for word in str(text).split():
        trial = f"{rows[-1]} {word}".strip()
        if width_of(trial, size) <= width or not rows[-1]:
            rows[-1] = trial
        else:
            rows.append(word)
    if len(rows) > lines:
        rows = rows[: lines - 1] + [rows[lines - 1] + " ..."]
    for i, row in enumerate(rows):
        while width_of(row, size) > width and len(row) > 4:
            row = row[:-4] + "..."
        rows[i] = row
    return rows


def panels(path, rows, size=96, title=None):
    """Rows of captioned pictures.   rows [[(image (3, H, W), caption), ...], ...]"""
    gap, head = 10, 30 if title else 8
    text = [[wrap(caption, size) if caption else [] for _, caption in row] for row in rows]
    shapes = [[(size, size * image.shape[1] / image.shape[2]) for image, _ in row] for row in rows]
    heights = [max(h for _, h in shape) + 12 * max(map(len, lines), default=0) + gap for shape, lines in zip(shapes, text, strict=True)]
    page = Canvas(max(max(map(len, rows)) * (size + gap) + gap, (width_of(title, 12) if title else 0) + 2 * gap), head + sum(heights))
    if title:
        page.text(gap, 15, title, 12)
    y = head
    for row, shape, lines, height in zip(rows, shapes, text, heights, strict=True):
        for n, ((image, _), (w, h), words) in enumerate(zip(row, shape, lines, strict=True)):
            page.paste(to_pil(image), gap + n * (size + gap), y, (w, h))
            for k, line in enumerate(words):
                page.text(gap + n * (size + gap), y + h + 8 + 12 * k, line, 9)
        y += height
    page.save(path)


def grid(path, images, captions=None, columns=4, title=None, size=96):
    """Pictures in rows of `columns`, each over its caption.   images (N, 3, H, W) in [-1, 1]"""
    captions = captions or [""] * len(images)
    cells = list(zip(images, captions, strict=True))
    panels(path, [cells[i : i + columns] for i in range(0, len(cells), columns)], size, title)


def strip(path, frames, captions=None, size=112, title=None):
    """One row: a story or a film.   frames (F, 3, H, W)"""
    panels(path, [list(zip(frames, captions or [""] * len(frames), strict=True))], size, title)


def gif(path, frames, ms=200, size=192):
    """An animation that repeats for ever.   frames (F, 3, H, W)"""
    pictures = [to_pil(frame).resize((size, size * frame.shape[1] // frame.shape[2]), Image.NEAREST) for frame in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=ms, loop=0)


def heat(values):
    """A map in [0, 1] as colours: dark blue, teal, yellow.   (H, W) -> (3, H, W) in [-1, 1]"""
    stops = torch.tensor([[0.17, 0.11, 0.40], [0.13, 0.45, 0.56], [0.37, 0.73, 0.42], [0.99, 0.91, 0.15]])
    x = values.detach().float().cpu().clamp(0, 1) * (len(stops) - 1)
    low = x.floor().clamp(max=len(stops) - 2).long()
    mixed = torch.lerp(stops[low], stops[low + 1], (x - low)[..., None])
    return mixed.permute(2, 0, 1) * 2 - 1


def overlay(image, values, alpha=0.5):
    """A heat map over the grey picture: colour shows the map, brightness the picture.   -> (3, H, W) in [-1, 1]"""
    grey = image.detach().float().cpu().mean(0, keepdim=True).expand(3, -1, -1)
    return (1 - alpha) * grey + alpha * heat(values)
