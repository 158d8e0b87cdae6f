"""The built-in world against slow, separate code: areas on paper and a reader of sentences."""
import itertools
import math
import re

import pytest
import torch

from data import quiz, views, world
from data.draw import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, render
from data.world import captions, pick, scenes

# -- a reader of sentences, written apart from the grammar ---------------------------------------------------

MEANS = {"little": "small", "tiny": "small", "big": "large", "spotted": "dotted", "disc": "circle",
         "gray": "grey", "box": "square", "plus": "cross", "crescent": "moon", "shaded": "gradient",
         "fading": "gradient",
         "checkered": "checker", "checked": "checker", "cloudy": "noise", "noisy": "noise", "over": "above",
         "under": "below", "crosses": "cross"}
MEANS |= {s + "s": s for s in (*SHAPES, "shape", "thing")}
SIZES, GROUNDS = ("small", "large"), ("plain", "gradient", "checker", "noise")
SIDES = {"on the left": lambda o: o["x"] < 0, "on the right": lambda o: o["x"] > 0,
         "at the top": lambda o: o["y"] < 0, "at the bottom": lambda o: o["y"] > 0,
         "in the middle": lambda o: abs(o["x"]) < 0.25 and abs(o["y"]) < 0.25}
LIES = {"left of": lambda a, b: a["x"] < b["x"], "right of": lambda a, b: a["x"] > b["x"],
        "above": lambda a, b: a["y"] < b["y"], "below": lambda a, b: a["y"] > b["y"]}


def look(scene, b):
    """Row b of a scene as plain Python, read from the tensors."""
    things = [{"shape": SHAPES[scene["shape"][b, o]], "colour": list(COLOURS)[scene["colour"][b, o]],
               "texture": TEXTURES[scene["texture"][b, o]], "size": SIZES[scene["size"][b, o]],
               "x": float(scene["centre"][b, o, 0]), "y": float(scene["centre"][b, o, 1])}
              for o in range(scene["present"].shape[1]) if scene["present"][b, o]]
    return things, list(BACKGROUNDS)[scene["background"][b]], GROUNDS[scene["pattern"][b]]


def fits(phrase, thing):
    """Does "small red star with dots" describe the thing? Every word must be about it."""
    stripes, dots = phrase.endswith(" with stripes"), phrase.endswith(" with dots")
    words = re.sub(r" with (stripes|dots)$", "", phrase).split()
    assert words and set(words) <= {"shape", *SHAPES, *COLOURS, *TEXTURES, *SIZES}, phrase
    words += ["striped"] * stripes + ["dotted"] * dots
    return all(w == "shape" or w in thing.values() for w in words)


def true_of(sentence, seen):
    """Is the sentence true of (things, background, pattern)? Fails where it cannot be read."""
    things, ground, pattern = seen
    text = re.sub(r"\w+", lambda m: MEANS.get(m[0], m[0]), sentence)
    text = re.sub(r"^(there is |there are )(?!no )|^a picture (of|with) ", "", text)
    text = text.replace("to the left of", "left of").replace("to the right of", "right of")
    if m := re.fullmatch(r"the background is (\w+)", text):
        return m[1] in (ground, pattern)
    if m := re.fullmatch(r"there is no (.+)", text):
        return not any(fits(m[1], t) for t in things)
    if m := re.fullmatch(r"the (.+) is (?:an? )?(\w+)", text):
        named = [t for t in things if fits(m[1], t)]
        return len(named) == 1 and fits(m[2], named[0])
    if m := re.fullmatch(r"(.+) (?:on|against) an? (?:(\w+) )?(\w+) background", text):
        if m[3] != ground or m[2] not in (None, pattern):
            return False
        text = m[1]
    if m := re.fullmatch(r"(one|two|three) (.+)", text):
        return sum(fits(m[2], t) for t in things) == ("one", "two", "three").index(m[1]) + 1
    for words, holds in LIES.items():
        if f" {words} " in text:
            a, b = (re.sub(r"^an? ", "", part) for part in text.split(f" {words} "))
            pairs = itertools.permutations(things, 2)
            return any(fits(a, s) and fits(b, t) and holds(s, t) for s, t in pairs)
    for words, holds in SIDES.items():
        if text.endswith(words):
            return any(fits(re.sub(r"^an? ", "", text[: -len(words) - 1]), t) and holds(t) for t in things)
    phrases = [re.sub(r"^an? ", "", part) for part in re.split(", | and ", text)]
    return any(all(map(fits, phrases, chosen)) for chosen in itertools.permutations(things, len(phrases)))


# -- scenes --------------------------------------------------------------------------------------------------


def test_a_row_does_not_depend_on_its_batch():
    many, alone = scenes(range(200), seed=3), scenes([77], seed=3)
    for name, value in alone.items():
        assert torch.equal(value[0], many[name][77]), name
    for size in (64, 33):
        pictures, masks = render(many, size)
        one_picture, one_mask = render(alone, size)
        assert torch.equal(one_picture[0], pictures[77]) and torch.equal(one_mask[0], masks[77])
    assert captions(many, 4)[77] == captions(alone, 4)[0]
    few, more = quiz.clips([5]), quiz.clips(range(10))
    assert few["question"] == more["question"][40:48]
    assert torch.equal(quiz.film(few, [0]), quiz.film(more, [5]))
    assert views.stories([5])["sentences"][0] == views.stories(range(10))["sentences"][5]
    assert views.edits([5])["sentence"][0] == views.edits(range(10))["sentence"][5]
    assert views.products([5])["titles"][0] == views.products(range(10))["titles"][5]


def test_splits_seeds_and_views_share_nothing():
    drawn = [world.keys(range(1000), seed, split, view)
             for seed in (0, 1) for split in world.SPLITS for view in range(5)]
    assert len(torch.cat(drawn).unique()) == 40 * 1000


def test_unseen_combinations_are_in_no_other_split():
    for split in world.SPLITS:
        s = scenes(range(3000), split=split)
        held = world.HELD_OUT[s["shape"], s["colour"], s["texture"]][s["present"]]
        assert held.all() if split == "unseen" else not held.any()
    kept = world.HELD_OUT
    assert kept.sum() == 24 and (kept.sum((1, 2)) == 3).all() and (kept.sum((0, 2)) == 3).all()
    assert (kept.sum(2) <= 1).all()


def test_attributes_are_even_and_objects_keep_apart():
    s = scenes(range(6000))
    for name, values in world.VALUES.items():
        ids = s[name][s["present"]] if s[name].dim() == 2 else s[name]
        share = torch.bincount(ids, minlength=len(values)) / len(ids)
        assert (share * len(values) - 1).abs().max() < 0.12, name
    reach = s["centre"].abs().amax(-1) + s["radius"] * 1.06
    assert reach[s["present"]].max() < 1
    for i, j in ((0, 1), (0, 2), (1, 2)):
        both = s["present"][:, i] & s["present"][:, j]
        room = (s["centre"][:, i] - s["centre"][:, j]).norm(dim=1) - s["radius"][:, i] - s["radius"][:, j]
        assert room[both].min() > -0.08                              # measured -0.04
        assert (room[both] < 0.07).float().mean() < 0.02             # measured 0.003


# -- pictures ------------------------------------------------------------------------------------------------


def rounded(corners, r):
    """Area of a polygon grown by r: r along sides, + r^2 turn / 2 at tips, - r^2 tan(turn / 2) at notches."""
    area, n = 0.0, len(corners)
    for i in range(n):
        (x0, y0), (x1, y1), (x2, y2) = corners[i - 1], corners[i], corners[(i + 1) % n]
        area += (x1 * y2 - x2 * y1) / 2 + r * math.hypot(x2 - x1, y2 - y1)
        turn = math.remainder(math.atan2(y2 - y1, x2 - x1) - math.atan2(y1 - y0, x1 - x0), 2 * math.pi)
        area += r * r * (turn / 2 if turn > 0 else math.tan(turn / 2))
    return area


def star_corners(n, outer, inner):
    polar = [((outer, inner)[k % 2], k * math.pi / n) for k in range(2 * n)]
    return [(r * math.cos(angle), r * math.sin(angle)) for r, angle in polar]


def lens(a, b, d):
    """Overlap of two discs of radii a and b whose centres are d apart."""
    p, q = math.acos((d * d + a * a - b * b) / (2 * d * a)), math.acos((d * d + b * b - a * a) / (2 * d * b))
    return a * a * (p - math.sin(2 * p) / 2) + b * b * (q - math.sin(2 * q) / 2)


SQUARE = [(0.66, -0.66), (0.66, 0.66), (-0.66, 0.66), (-0.66, -0.66)]
PLUS = [(0.86, -0.26), (0.86, 0.26), (0.26, 0.26), (0.26, 0.86), (-0.26, 0.86), (-0.26, 0.26), (-0.86, 0.26),
        (-0.86, -0.26), (-0.26, -0.26), (-0.26, -0.86), (0.26, -0.86), (0.26, -0.26)]
AREAS = {"circle": math.pi * 0.88**2, "ring": math.pi * (0.94**2 - 0.46**2), "square": rounded(SQUARE, 0.1),
         "triangle": rounded(star_corners(3, 0.94, 0.47)[::2], 0.1),
         "star": rounded(star_corners(5, 0.98, 0.46), 0.06), "heart": 1.62**2 * (0.5 + math.pi / 8),
         "cross": rounded(PLUS, 0.08),
         "moon": math.pi * 0.92**2 - lens(0.92, 0.74, 0.45)}


@pytest.mark.parametrize("size", [64, 131])
def test_masks_have_the_area_that_geometry_gives(size):
    s = pick(scenes([0], objects=(1, 1)), torch.zeros(8, dtype=torch.long))
    s |= {"shape": torch.arange(8)[:, None], "radius": torch.full((8, 1), 0.6),
          "centre": torch.full((8, 1, 2), 0.05), "angle": torch.linspace(-0.2, 0.25, 8)[:, None]}
    covered = render(s, size)[1].sum((1, 2, 3)) * (2 / size) ** 2
    for n, name in enumerate(SHAPES):
        assert covered[n].item() == pytest.approx(0.36 * AREAS[name], rel=0.01), name


def test_pictures_of_any_size_show_the_same_thing(device):
    s = scenes(range(24))
    large, small = render(s, 128), render(world.to(s, device), 32)
    assert all(-1 <= x.min() and x.max() <= 1 for x in large[:1] + small[:1])
    for big, little in zip(large, small, strict=True):
        shrunk = torch.nn.functional.avg_pool2d(big, 4)
        assert (shrunk - little.cpu()).abs().mean() < 0.02           # thin rims and textures blur differently
    assert ((small[1] >= 0) & (small[1] <= 1)).all() and (small[1].sum(1) <= 1.0001).all()
    assert (small[1][~s["present"]] == 0).all()


def test_a_nearer_object_hides_what_is_behind_it():
    s = pick(scenes(range(50), objects=(2, 2)), slice(0, 1))
    s |= {"centre": torch.zeros(1, 2, 2), "radius": torch.tensor([[0.5, 0.6]]),
          "shape": torch.tensor([[1, 0]])}
    masks = render(s, 64)[1][0]
    assert masks[1, 32, 32] == 1 and masks[0, 32, 32] == 0 and masks.sum(0).max() <= 1


def oklab(rgb):
    """Bjorn Ottosson's perceptual space; distances of 0.02 are just visible."""
    a = rgb.new_tensor([[0.4122214708, 0.5363325363, 0.0514459929],
                        [0.2119034982, 0.6806995451, 0.1073969566],
                        [0.0883024619, 0.2817188376, 0.6299787005]])
    b = rgb.new_tensor([[0.2104542553, 0.7936177850, -0.0040720468],
                        [1.9779984951, -2.4285922050, 0.4505937099],
                        [0.0259040371, 0.7827717662, -0.8086757660]])
    return (rgb @ a.T).clamp(min=0).pow(1 / 3) @ b.T


EYES = {"normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],      # Machado, Oliveira, Fernandes 2009, on linear light
        "deuteranope": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                        [-0.011820, 0.042940, 0.968881]],
        "protanope": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                      [-0.003882, -0.048116, 1.051998]]}


@pytest.mark.parametrize("eye", EYES)
def test_colours_can_be_told_apart_by_colour_blind_readers(eye):
    for table, least in ((COLOURS, 0.115), (BACKGROUNDS, 0.07)):       # measured 0.118 and 0.072
        rgb = torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (0, 2, 4)] for c in table.values()])
        linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen = oklab((linear @ torch.tensor(EYES[eye]).float().T).clamp(0, 1))
        assert torch.pdist(seen).min() > least


# -- sentences -----------------------------------------------------------------------------------------------


def test_captions_are_true_and_say_something():
    s, wrong, distinct = scenes(range(400), seed=1), [], set()
    seen = [look(s, b) for b in range(400)]
    for k in range(10):
        for b, text in enumerate(captions(s, k)):
            assert true_of(text, seen[b]), (text, seen[b])
            wrong.append(not true_of(text, seen[b - 1]))
            distinct.add(text)
    assert sum(wrong) / len(wrong) > 0.9 and len(distinct) > 3000         # measured 0.94 and 3,513


def test_caption_zero_tells_every_attribute():
    s = scenes(range(200))
    for text, fact in zip(captions(s, 0), world.facts(s), strict=True):
        words = [MEANS.get(w, w) for w in text.replace(",", "").split()]
        for thing in fact["objects"]:
            assert {thing["shape"], thing["colour"], thing["size"]} <= set(words)
        assert fact["background"] in words and fact["pattern"] in words


def test_the_vocabulary_is_closed_and_used():
    used = set()
    texts = [*(captions(scenes(range(600)), k) for k in range(20)), views.edits(range(600))["sentence"],
             *views.stories(range(600))["sentences"], views.products(range(600))["titles"],
             quiz.clips(range(300), types=quiz.TYPES)["question"], quiz.ANSWERS]
    for text in itertools.chain(*texts):
        used |= set(re.findall(r"[a-z0-9]+", text.lower()))
    assert used == set(world.WORDS), used ^ set(world.WORDS)


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call, part", [
    (lambda: scenes([0], split="dev"), "train, valid, test, unseen"), (lambda: scenes([2**20]), "1048575"),
    (lambda: scenes([-1]), "rows of the built-in world"), (lambda: render(scenes([0]), 4), "at least 8"),
    (lambda: views.edits([0], kinds=("paint",)), "recolour"),
    (lambda: views.stories([0], frames=0), "1 frame"),
    (lambda: views.stories([0], looks="new"), "fixed or story"),
    (lambda: quiz.clips([0], types={"why": 1}), "query colour")])
def test_bad_input_gets_a_sentence(call, part):
    with pytest.raises(ValueError, match=part):
        call()


def test_an_empty_request_gives_empty_tensors():
    assert render(scenes([]), 16)[0].shape == (0, 3, 16, 16) and captions(scenes([])) == []
