"""data/charts.py and data/pictures.py: nothing is clipped, nothing overlaps, colours can be told apart."""
import math

import pytest
import torch
from PIL import Image, ImageFont

from data import charts, pictures


def pixels(path):
    return torch.frombuffer(bytearray(Image.open(path).convert("RGB").tobytes()), dtype=torch.uint8).view(
        *Image.open(path).size[::-1], 3)


def assert_white_frame(path, wide=3):
    """Whatever is drawn ends before the edge: a label that reaches the border was clipped."""
    x = pixels(path)
    for edge in (x[:wide], x[-wide:], x[:, :wide], x[:, -wide:]):
        assert (edge == 255).all(), path


STEPS = list(range(0, 2000, 5))
LONG = "a label that somebody wrote without any thought of how much room there is in a picture"


@pytest.mark.parametrize("panels", [
    [("training loss", {"bpr": (STEPS, [math.exp(-x / 300) for x in STEPS])}, {}), ("Recall@20", {}, {"chance": 0.03})],
    [("nothing at all", {}, {})],
    [("one point", {"a": ([100], [0.5])}, {"chance": 0.5})],
    [("constant", {"a": ([0, 1], [3e-5, 3e-5])}, {})],
    [("huge", {"a": ([0, 10**7], [-1e12, 1e12])}, {})],
    [("zero", {"a": ([1, 2], [0.0, 0.0])}, {"zero": 0.0})],
    [(LONG * 3, {LONG: ([1, 2], [1, 2]), "b" * 90: ([1, 2], [1, 2.0])}, {LONG: 1.5})],
    [("many", {f"line {i}": ([1, 2], [1, 2 + i / 1e4]) for i in range(40)}, {})],
    [("no number", {"a": ([1, 2, 3], [math.nan, math.inf, 0.5]), "b": ([1], [math.nan])}, {"c": math.nan})],
])
def test_no_chart_is_clipped(tmp_path, panels):
    charts.curves(tmp_path / "new folder" / "curve.png", panels)
    assert_white_frame(tmp_path / "new folder" / "curve.png")


def placed(monkeypatch, draw):
    """Boxes of all texts that a chart sets, in pixels, measured with the font itself."""
    texts = []
    keep = charts.Canvas.save
    monkeypatch.setattr(charts.Canvas, "save", lambda self, path: (texts.extend(self.texts), keep(self, path)))
    draw()
    boxes = []
    for x, y, text, size, _, anchor in texts:
        x0, y0, x1, y1 = ImageFont.load_default(size * charts.SHARP).getbbox(text, anchor=anchor)
        x, y = x * charts.SHARP, y * charts.SHARP
        boxes.append((x0 + x, y0 + y, x1 + x, y1 + y, text))
    return boxes


def assert_apart(boxes):
    for i, (a0, b0, a1, b1, text) in enumerate(boxes):
        for c0, d0, c1, d1, other in boxes[:i]:
            assert a1 <= c0 or c1 <= a0 or b1 <= d0 or d1 <= b0, f"{text!r} and {other!r} overlap"


def test_labels_of_lines_that_end_together_do_not_overlap(tmp_path, monkeypatch):
    lines = {f"method {i}": ([0, 1000], [0.1, 0.25 + i * 1e-6]) for i in range(15)} | {LONG: ([0, 700], [0.2, 0.21])}
    panels = [(LONG, lines, {"chance": 0.25}), ("second", dict(list(lines.items())[:3]), {})]
    boxes = placed(monkeypatch, lambda: charts.curves(tmp_path / "c.png", panels))
    assert len(boxes) > 20
    assert_apart(boxes)


def test_labels_keep_the_order_of_their_lines_and_stay_near():
    found = charts.spread_out([50, 10, 11, 12, 100], 5, 0, 100)
    assert [round(y, 3) for y in found] == [50, 6, 11, 16, 100]
    assert charts.spread_out([0, 0, 0], 5, 0, 100) == [0, 5, 10]
    assert charts.spread_out([100, 100, 100], 5, 0, 100) == [90, 95, 100]
    assert charts.spread_out([], 5, 0, 100) == []


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.03, 0.26, [0.05, 0.1, 0.15, 0.2, 0.25]), (-3, 4, [-2, 0, 2, 4]),
    (0, 12000, [0, 5000, 10000]),
])
def test_ticks_are_round_and_inside(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_numbers_read_well():
    assert [charts.number(x) for x in (0, 0.25, 12000, 3e-5, -5e-4, 0.12345678, 1e8)] == [
        "0", "0.25", "12,000", "3e-5", "-5e-4", "0.1235", "1e8"]
    assert charts.tick_labels([0, 0.05, 0.1]) == ["0.00", "0.05", "0.10"]
    assert charts.tick_labels([0, 5000, 10000]) == ["0", "5,000", "10,000"]


def test_a_curve_goes_through_its_points_and_a_level_is_drawn(tmp_path):
    charts.curves(tmp_path / "c.png", [("t", {"a": ([0, 1], [0.0, 1.0])}, {"chance": 0.5})])
    x = pixels(tmp_path / "c.png").int()
    blue = torch.tensor([0x00, 0x72, 0xB2])
    found = ((x - blue).abs().sum(-1) < 60).nonzero()
    left, right = found[found[:, 1].argmin()], found[(found[:, 1] <= found[:, 1].min() + 590)][-1]
    assert left[0] > x.shape[0] // 2                                  # it rises: y runs downwards
    assert found[:, 0].min() < right[0]


def test_long_curves_are_smoothed_without_bias():
    points = [(x, 3.0 + (-1) ** x) for x in range(400)]
    mean = charts.smooth(points)
    assert [x for x, _ in mean] == list(range(400))
    assert all(abs(y - 3) < 0.35 for _, y in mean) and len(mean) == 400
    flat = [(x, 2.0) for x in range(100)]
    assert charts.smooth(flat) == flat


@pytest.mark.parametrize("values", [{"LightGCN": 0.09, LONG: 0.1074, "popularity": 0.06}, {"a": -0.012, "b": 0.004, "zero": 0.0},
                                    {"only": 0.0}, {"a": -1.0, LONG: -200000.0}])
@pytest.mark.parametrize("level", [None, 0.003])
def test_bars_are_whole_and_their_numbers_apart(tmp_path, monkeypatch, values, level):
    boxes = placed(monkeypatch, lambda: charts.bars(tmp_path / "b.png", values, LONG, level))
    assert_white_frame(tmp_path / "b.png")
    assert_apart(boxes)
    with pytest.raises(ValueError, match="no bar"):
        charts.bars(tmp_path / "none.png", {}, "t")


def test_histograms_of_anything(tmp_path):
    charts.histogram(tmp_path / "h.png", [("attention", {"users": torch.rand(500), "items": torch.rand(9)}),
                                          ("constant", {"a": torch.ones(5)}), ("empty", {"a": torch.empty(0)})])
    assert_white_frame(tmp_path / "h.png")


def linear(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def test_the_first_colours_differ_for_a_reader_without_green_cones():
    """Deuteranopia after Machado et al. 2009 (severity 1), on linear RGB; distances in that space."""
    matrix = torch.tensor([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]])
    seen = torch.stack([matrix @ torch.tensor(linear(c)) for c in charts.PALETTE[:6]]).clamp(0, 1) ** (1 / 2.2)
    apart = torch.cdist(seen, seen) + torch.eye(6)
    assert apart.min() > 0.12


def test_the_heat_map_grows_lighter_all_the_way():
    """Lightness carries the map, so it survives grey printing."""
    colours = pictures.heat(torch.linspace(0, 1, 50)[None])[:, 0]                     # (3, 50)
    grey = (torch.tensor([0.299, 0.587, 0.114])[:, None] * colours).sum(0)
    assert (grey.diff() > 0).all() and colours.min() >= -1 and colours.max() <= 1


# -- pictures ------------------------------------------------------------------------------------------------


def test_to_pil_takes_every_kind_and_refuses_the_rest():
    image = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1).expand(3, 4, 5)
    assert pictures.to_pil(image).getpixel((0, 0)) == (0, 128, 255) and pictures.to_pil(image).size == (5, 4)
    assert pictures.to_pil(image[:1] + 9).getpixel((0, 0)) == (255, 255, 255)             # grey, clamped
    assert pictures.to_pil(image[0].bfloat16()).mode == "RGB"
    assert pictures.to_pil(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == (7, 7, 7)
    for bad in (torch.zeros(2, 3, 3), torch.zeros(1, 3, 4, 4), torch.full((3, 2, 2), math.nan)):
        with pytest.raises(ValueError, match="a picture must be"):
            pictures.to_pil(bad)


def test_wrapped_captions_fit_and_lose_nothing():
    text = "a dotted green star above a moon, Donaudampfschifffahrtsgesellschaftskapitän\nand a new line"
    for width in (12, 60, 200):
        lines = pictures.wrap(text, width, 16)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")
        assert all(charts.font(16).getlength(line) <= width or len(line) == 1 for line in lines)
    assert pictures.wrap("", 50, 16) == []


def test_a_grid_shows_every_picture_over_its_caption(tmp_path):
    images = torch.stack([torch.full((3, 8, 12), v) for v in (-1.0, -0.5, 0.0, 0.5, 0.9)])
    pictures.grid(tmp_path / "g.png", images, ["one", LONG, "", "four", "x" * 80], columns=2, title=LONG, size=60)
    assert_white_frame(tmp_path / "g.png")
    x = pixels(tmp_path / "g.png")
    for value in (0, 64, 128, 191, 242):
        assert ((x == value).all(-1)).sum() >= 120 * 80, value                  # 60 points at two pixels each
    with pytest.raises(ValueError, match="no picture"):
        pictures.grid(tmp_path / "g.png", images[:0])
    with pytest.raises(ValueError, match="1 captions for 5 pictures"):
        pictures.grid(tmp_path / "g.png", images, ["too few"])


def test_strips_break_into_rows(tmp_path):
    frames = torch.zeros(11, 3, 16, 16)
    pictures.strip(tmp_path / "s.png", frames, [LONG] * 11)
    assert_white_frame(tmp_path / "s.png")
    pictures.strip(tmp_path / "t.png", frames[:3])
    assert_white_frame(tmp_path / "t.png")
    assert Image.open(tmp_path / "s.png").height > 2 * Image.open(tmp_path / "t.png").height


def test_gifs_keep_frames_and_time(tmp_path):
    frames = torch.stack([torch.full((3, 8, 8), v) for v in (-1.0, 0.0, 1.0)])
    pictures.gif(tmp_path / "a.gif", frames, ms=120)
    with Image.open(tmp_path / "a.gif") as found:
        assert found.n_frames == 3 and found.info["duration"] == 120 and found.info["loop"] == 0
    pictures.gif(tmp_path / "one.gif", frames[:1])
    with pytest.raises(ValueError, match="no frame"):
        pictures.gif(tmp_path / "none.gif", frames[:0])


def test_a_page_holds_whole_pictures_and_upper_parts(tmp_path):
    picture = Image.new("RGB", (200, 100), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 50, 200, 100))                    # red over blue
    picture.save(tmp_path / "a.png")
    pictures.page(tmp_path / "whole.png", [f"red=blue={tmp_path / 'a.png'}"])
    pictures.page(tmp_path / "upper.png", [f"red={tmp_path / 'a.png'}@0.5"])
    blue = torch.tensor([0, 0, 255], dtype=torch.uint8)
    assert [bool((pixels(tmp_path / f"{name}.png") == blue).all(2).any()) for name in ("whole", "upper")] == [True, False]
    assert_white_frame(tmp_path / "upper.png")
