"""Pictures that a run leaves behind: captioned grids, heat maps, film strips, GIFs, charts. Pillow only.

Images are (3, H, W), (1, H, W) or (H, W) tensors in [-1, 1], or Pillow images; every function takes either. Captions are
wrapped as the font measures them and rows grow with the longest, so no caption is ever clipped.
`python -m data.pictures PAGE.png "a caption=picture.png" ...` puts finished pictures, or their upper parts, on one page.
"""
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from data.charts import INK, PAPER, SHARP, bars, curves, font, histogram, save, wrap

__all__ = ["bars", "curves", "gif", "grid", "heat", "histogram", "panels", "strip", "to_pil"]
HEAT = ((0, 0, 4), (60, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191))   # 0 to 1


def to_pil(image):
    """(3, H, W), (1, H, W) or (H, W) in [-1, 1] -> an RGB Pillow image; Pillow images pass through."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    pixels = image.detach().float().cpu()
    if pixels.dim() == 2 or pixels.dim() == 3 and len(pixels) == 1:
        pixels = pixels.expand(3, -1, -1)
    if pixels.dim() != 3 or pixels.shape[0] != 3 or not pixels.isfinite().all():
        raise ValueError(f"a picture must be (3, H, W), (1, H, W) or (H, W) of finite numbers, got {tuple(image.shape)}")
    pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def heat(values):
    """A map in [0, 1] as colours, black, purple, orange, pale yellow.   (H, W) -> (3, H, W) in [-1, 1]

    Lightness rises evenly, so the map also reads in grey and for colour-blind readers.
    """
    stops = torch.tensor(HEAT) / 127.5 - 1
    x = values.detach().float().cpu().clamp(0, 1) * (len(stops) - 1)
    low = x.floor().clamp(max=len(stops) - 2).long()
    return torch.lerp(stops[low], stops[low + 1], (x - low)[..., None]).permute(2, 0, 1)


def resized(image, width):
    """To `width` points: small pictures keep their pixels as squares, large ones are averaged."""
    image = to_pil(image)
    wide = round(width * SHARP)
    how = Image.Resampling.NEAREST if image.width < wide else Image.Resampling.LANCZOS
    return image.resize((wide, max(1, round(wide * image.height / image.width))), how)


def panels(path, rows, size=96, title=None, gap=8):
    """Rows of captioned pictures, each `size` points wide.   rows [[(image, caption or None), ...], ...]"""
    gap, edge = gap * SHARP, 12 * SHARP
    rows = [[(resized(image, size), wrap(caption or "", size * SHARP, 8 * SHARP)) for image, caption in row]
            for row in rows]
    if not any(rows):
        raise ValueError(f"there is no picture to draw in {path}")
    width = 2 * edge + max(len(row) * (size * SHARP + gap) for row in rows if row) - gap
    heading = wrap(title or "", width - 2 * edge, 11 * SHARP)
    head = edge + (15 * SHARP * len(heading) + 4 * SHARP) * bool(title)
    tall = [max(image.height + (4 + 10 * len(text)) * SHARP * bool(text) for image, text in row) + 8 * SHARP
            for row in rows if row]
    sheet = Image.new("RGB", (width, head + sum(tall) + 4 * SHARP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(heading):
        draw.text((edge, edge + 15 * SHARP * i), line, INK, font(11 * SHARP))
    y = head
    for row, height in zip([row for row in rows if row], tall, strict=True):
        for column, (image, text) in enumerate(row):
            x = edge + column * (size * SHARP + gap)
            sheet.paste(image, (x, y))
            for i, line in enumerate(text):
                draw.text((x, y + image.height + (4 + 10 * i) * SHARP), line, INK, font(8 * SHARP))
        y += height
    save(sheet, path)


def grid(path, images, captions=None, columns=4, title=None, size=96):
    """Pictures in rows of `columns`, each over its caption.   images (N, 3, H, W) in [-1, 1]"""
    captions = [None] * len(images) if captions is None else captions
    if len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} pictures in {path}: one each, or none")
    panels(path, lines(list(zip(images, captions, strict=True)), columns), size, title)


def lines(cells, columns):
    """Cells broken into rows of at most `columns`."""
    return [cells[i : i + columns] for i in range(0, len(cells), columns)]


def film(image):
    """A frame between two rows of sprocket holes."""
    hole, band, edge = image.width / 16, round(image.width / 10), round(image.width / 50)
    sheet = Image.new("RGB", (image.width, image.height + 2 * band), INK)
    draw = ImageDraw.Draw(sheet)
    sheet.paste(image.resize((image.width - 2 * edge, image.height)), (edge, band))
    for k in range(8):
        for y in ((band - hole) / 2, image.height + band + (band - hole) / 2):
            draw.rounded_rectangle([(2 * k + 0.5) * hole, y, (2 * k + 1.5) * hole, y + hole], hole / 4, PAPER)
    return sheet


def strip(path, frames, captions=None, size=112, columns=8):
    """A story or a clip on film.   frames (F, 3, H, W)"""
    captions = captions or [None] * len(frames)
    cells = [(film(resized(frame, size)), caption) for frame, caption in zip(frames, captions, strict=True)]
    panels(path, lines(cells, columns), size, gap=0)


def gif(path, frames, ms=200, size=192):
    """An animation that repeats for ever, `size` pixels wide.   frames (F, 3, H, W)"""
    images = [resized(frame, size / SHARP) for frame in frames]
    if not images:
        raise ValueError(f"there is no frame to write to {path}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=ms, loop=0)


def page(path, words, columns=2, size=440):
    """Finished pictures on one page.   words: "a caption=picture.png", or "...=picture.png@0.4" for its upper 0.4 alone"""
    cells = []
    for caption, file in (word.rsplit("=", 1) for word in words):
        file, _, share = file.partition("@")
        image = Image.open(file)
        cells.append((image.crop((0, 0, image.width, round(image.height * float(share or 1)))), caption))
    panels(path, lines(cells, columns), size)


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all("=" in word for word in sys.argv[2:]):
        sys.exit('python -m data.pictures PAGE.png "a caption=picture.png" "another=tall.png@0.4" ...      two pictures a row')
    page(sys.argv[1], sys.argv[2:])
