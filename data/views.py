"""Views of the built-in world with known answers: captioned pictures, edits, stories, shop products.

    view = captioned(range(32), seed=0, split="train")        # pictures, ten captions each, attributes
    view = edits(range(32), kinds=("recolour",))              # scene before, scene after, sentence; edit_pictures(view)
    view = stories(range(8), frames=4)                        # scenes of B x F frames, sentences, who is in them
    view = products(range(600))                               # what a shop sells: pictures, titles, what titles leave out

All are pure functions of (seed, split, index). The fifth view, clips with questions, is data/quiz.py.
"""
import torch

from data.draw import SHAPES, TEXTURES, hashed, render, uniform
from data.world import (
    BACKGROUND,
    COLOUR,
    HELD_OUT,
    KINDS,
    MATERIALS,
    NAMES,
    PLACES,
    alias,
    article,
    captions,
    chances,
    choose,
    facts,
    is_now,
    keys,
    noun,
    one,
    place,
    scenes,
)

EDITS = ("recolour", "retexture", "reshape", "background", "add", "remove")
POSES = ("stands", "walks", "jumps")
WHERE = ("left", "middle", "right")
CAST = {"Pip": ("star", "red", "plain"), "Mo": ("moon", "blue", "plain"), "Zuri": ("heart", "pink", "dotted"),
        "Otto": ("circle", "orange", "striped"), "Lila": ("triangle", "purple", "striped"),
        "Finn": ("square", "green", "dotted"), "Nara": ("ring", "cyan", "striped"), "Bo": ("cross", "yellow", "plain")}


# -- captions -----------------------------------------------------------------------------------------------------------


def captioned(index, seed=0, split="train", size=64, objects=(1, 1), count=10):
    """Pictures, `count` true captions of each and what is in them.

    -> pictures (B, 3, size, size), masks (B, O, size, size), captions: B lists, scene,
       attributes {shape, colour, texture, size (of object 0), background, pattern}: (B,) int64
    """
    scene = scenes(index, seed, split, objects)
    pictures, masks = render(scene, size)
    texts = list(zip(*(captions(scene, k) for k in range(count)), strict=True))
    attributes = {a: scene[a][:, 0] for a in ("shape", "colour", "texture", "size")}
    attributes |= {a: scene[a] for a in ("background", "pattern")}
    return {"pictures": pictures, "masks": masks, "captions": [list(t) for t in texts], "attributes": attributes,
            "scene": scene}


# -- edits --------------------------------------------------------------------------------------------------------------


def edits(index, seed=0, split="train", kinds=EDITS):
    """A scene of one or two objects, a sentence that is false of it, and the same scene with just that made true.

    -> before, after: scenes with the same jitter; kind (B,): place in EDITS; object (B,): whose attribute changes, -1 for
       the background; sentence: B strings, caption_before, caption_after: B full captions that differ in what changed
    The two objects differ in shape and in colour, before and after, so "the star" and "the red shape" name one thing.
    raises ValueError for an unknown kind
    """
    for name in kinds:
        if name not in EDITS:
            raise ValueError(f"there is no edit {name!r}; the built-in world has {', '.join(EDITS)}")
    u = uniform(keys(index, seed, split, view=1) ^ 1, 8)
    kind = torch.tensor([EDITS.index(name) for name in kinds])[(u[:, 0] * len(kinds)).long()]
    two = (kind >= EDITS.index("add")) | (u[:, 1] < 0.5)
    before = scenes(index, seed, split, objects=(2, 2), count=1 + two.long(), view=1)
    fresh = torch.ones_like(HELD_OUT) if split == "unseen" else ~HELD_OUT                  # (8, 8, 3)
    apart(before, u[:, 2], HELD_OUT if split == "unseen" else fresh)
    rows, which = torch.arange(len(u)), (two & (u[:, 3] < 0.5)).long()
    which = torch.where(kind >= EDITS.index("add"), 1, which)              # added or removed: always slot 1
    shape, colour, texture = (before[a][rows, which] for a in ("shape", "colour", "texture"))
    after = {name: value.clone() for name, value in before.items()}
    other = {a: before[a][rows, 1 - which] for a in ("shape", "colour")}
    ids = torch.arange(8)
    new = {"recolour": ("colour", fresh[shape, :, texture] & (ids != colour[:, None]) & (ids != other["colour"][:, None])),
           "retexture": ("texture", fresh[shape, colour] & (ids[:3] != texture[:, None])),
           "reshape": ("shape", fresh[:, colour, texture].T & (ids != shape[:, None]) & (ids != other["shape"][:, None]))}
    for name, (attribute, allowed) in new.items():
        now = kind == EDITS.index(name)
        after[attribute][rows[now], which[now]] = choose(u[:, 4], allowed)[now]
    now = kind == EDITS.index("background")
    after["background"][now] = choose(u[:, 4], torch.arange(6) != before["background"][:, None])[now]
    before["present"][:, 1] &= kind != EDITS.index("add")
    after["present"][:, 1] &= kind != EDITS.index("remove")
    where = torch.where(kind == EDITS.index("background"), -1, which)
    return {"before": before, "after": after, "kind": kind, "object": where,
            "sentence": wishes(before, after, kind, which), "caption_before": captions(before), "caption_after": captions(after)}


def apart(scene, u, allowed):
    """Draw slot 1's combination anew, so that it shares neither shape nor colour with slot 0. In place."""
    ids = torch.arange(8)
    free = allowed & (ids[:, None, None] != scene["shape"][:, 0, None, None, None])
    free = (free & (ids[:, None] != scene["colour"][:, 0, None, None, None])).flatten(1)       # (B, 192)
    combination = choose(u, free)
    for name, value in (("shape", combination // 24), ("colour", combination // 3 % 8), ("texture", combination % 3)):
        scene[name][:, 1] = value


def wishes(before, after, kind, which):
    """What to change, said as if it were so: "the star is red", "there is no blue ring"."""
    sentences = []
    both = zip(kind.tolist(), which.tolist(), facts(before), facts(after), chances(before["key"], 99), strict=True)
    for k, o, old, new, chance in both:
        name = EDITS[k]
        if name == "background":
            sentences.append(f"the background is {alias(chance, new['background'])}")
        elif name == "add":
            sentences.append("there is " + article(noun(chance, new["objects"][1], {"shape", "colour", "texture", "size"})))
        elif name == "remove":
            sentences.append("there is no " + noun(chance, old["objects"][1], {"shape", "colour"}))
        else:
            sentences.append(is_now(chance, new["objects"][o],
                                    {"recolour": "colour", "retexture": "texture", "reshape": "shape"}[name]))
    return sentences


def edit_pictures(view, size=64):
    """-> source, target (B, 3, size, size), region (B, size, size) bool: the pixels that the edit may change.

    The object before and after with its shadow; for the background, all that is not covered by an object. Outside the
    region source and target are the same bits.
    """
    (source, old), (target, new) = render(view["before"], size), render(view["after"], size)
    whole = (source != target).any(1)
    rows = view["object"].clamp(min=0)
    own = [mask[torch.arange(len(rows)), rows] > 0 for mask in (old, new)]
    inside = torch.where((view["object"] < 0)[:, None, None], old.sum(1) < 1, own[0] | own[1])
    return source, target, inside | whole


# -- stories ------------------------------------------------------------------------------------------------------------


def stories(index, seed=0, split="train", frames=4, looks="fixed"):
    """Stories about eight named characters, told so that many frames can be drawn only with the sentences before.

    -> scene: B * F rows, frame f of story b is row b F + f; sentences: B lists of F strings;
       character (B, F, 2): ids in NAMES, -1 for nobody; named (B, F, 2) bool: this sentence says the name;
       pronoun (B, F) bool: somebody in the frame is not named; place (B, F), place_told (B, F) bool;
       pose, where (B, F); look (B, 8, 3): shape, colour, texture of every name
    looks: "fixed" (the CAST: a name is enough to draw it) or "story" (dealt anew each time, told at first mention only)
    The sentences of a story determine its pictures: there is no other jitter.
    """
    if frames < 1 or looks not in ("fixed", "story"):
        raise ValueError(f"a story needs at least 1 frame and looks 'fixed' or 'story', not {frames} and {looks!r}")
    key = keys(index, seed, split, view=2)
    look = torch.tensor([[SHAPES.index(s), COLOUR.index(c), TEXTURES.index(t)] for s, c, t in CAST.values()])
    look = look.expand(len(key), -1, -1).clone()
    if looks == "story":
        for attribute in (0, 1):
            look[..., attribute] = uniform(key ^ (3 + attribute), 8).argsort(1)
    told = [script(iter(row), frames, one_look) for row, one_look in
            zip(hashed(key, 8 * frames).tolist(), look.tolist(), strict=True)]
    view = {name: torch.tensor([[frame[name] for frame in story] for story in told]) for name in told[0][0] if name != "sentence"}
    view["pronoun"] = ((view["character"] >= 0) & ~view["named"]).any(-1)
    view["sentences"] = [[frame["sentence"] for frame in story] for story in told]
    return view | {"look": look, "scene": stage(view, look, key)}


def script(chance, frames, look):
    """One story.   -> F dicts. "It" is the subject of the sentence before, "they" are the two who have just met."""
    subject, place, met, known, story = next(chance) % 8, one(chance, BACKGROUND), None, set(), []
    for f in range(frames):
        act = "name" if f == 0 else one(chance, ("they", "they", "name", "enter") if met else
                                        ("it", "it", "it", "it", "go", "meet", "meet", "name", "enter"))
        other = one(chance, [n for n in range(8) if n != subject])
        pose, where = one(chance, POSES), one(chance, WHERE)
        who, named = (subject, -1), (False, False)
        if act == "it":
            text = f"It {pose} {spot(where)}"
        elif act == "go":
            place, pose, where = one(chance, [b for b in BACKGROUND if b != place]), "walks", "middle"
            text = f"It goes into the {PLACES[place]}"
        elif act == "meet":
            who, named, pose, where = (subject, other), (False, True), "stands", "middle"
            text = f"It meets {called(other, known, look)}"
        elif act == "they":
            who, where = met, "middle"
            text = f"They {pose[:-1]}"                                     # stands -> stand
        else:
            subject = other if act == "enter" else subject
            who, named = (subject, -1), (True, False)
            text = f"{called(subject, known, look)} {pose} {spot(where)}{f' in the {PLACES[place]}' if f == 0 else ''}"
        met = who if who[1] >= 0 else None
        story.append({"sentence": text + ".", "character": who, "named": named, "pose": POSES.index(pose),
                      "where": WHERE.index(where), "place": BACKGROUND.index(place), "place_told": f == 0 or act == "go"})
    return story


def spot(where):
    return "in the middle" if where == "middle" else f"on the {where}"


def called(n, known, look):
    """"Pip the red star" at the first mention, then "Pip"."""
    if n in known:
        return NAMES[n]
    known.add(n)
    return f"{NAMES[n]} the {COLOUR[look[n][1]]} {SHAPES[look[n][0]]}"


def stage(view, look, key):
    """The frames as scenes: one character stands large where it is told, two share the picture, subject to the left."""
    who = view["character"]                                                # (B, F, 2)
    total, frames = who.shape[:2]
    looks = look[torch.arange(total)[:, None, None], who.clamp(min=0)].flatten(0, 1)       # (B F, 2, 3)
    two = (who[..., 1] >= 0).flatten()[:, None]
    pose, where = (view[name].flatten()[:, None].expand(-1, 2) for name in ("pose", "where"))
    x = torch.where(two, torch.tensor([-0.46, 0.46]), (where - 1) * 0.5)
    y = torch.where(pose == POSES.index("jumps"), -0.3, 0.26)
    flat = torch.zeros(total * frames)
    return {"present": (who >= 0).flatten(0, 1), "shape": looks[..., 0], "colour": looks[..., 1], "texture": looks[..., 2],
            "size": torch.ones_like(pose), "centre": torch.stack([x, y], -1), "radius": torch.where(two, 0.36, 0.42).expand(-1, 2),
            "angle": (pose == POSES.index("walks")) * 0.35, "tone": flat[:, None].expand(-1, 2), "light": flat,
            "background": view["place"].flatten(), "pattern": torch.ones(total * frames, dtype=torch.long),        # gradient
            "key": key.repeat_interleave(frames)}


# -- shop ---------------------------------------------------------------------------------------------------------------


def products(index, seed=0, split="train", told=0.6):
    """What a shop sells. The picture shows the design among clutter; the title tells more (kind, material) and less.

    -> scene: slot 0 is the product's design, the others are clutter; titles: B strings;
       attributes {shape, colour, texture, kind, material}: (B,) ids;  told {attribute: (B,) bool}: is it in the title?
    told: the chance that a title tells shape, colour or texture. The product mask is render(scene)[1][:, 0].
    """
    count = 1 + (uniform(keys(index, seed, split, view=3) ^ 1, 1)[:, 0] * 3).long()
    scene = scenes(index, seed, split, objects=(3, 3), count=count, view=3)
    key = scene["key"]
    u = uniform(key ^ 2, 5)
    scene["size"] = torch.tensor([1, 0, 0]).expand(len(key), -1).clone()
    scene["radius"] = torch.tensor([0.5, 0.19, 0.19]) * (scene["radius"] * 0 + 1)
    scene["centre"] = place(key, scene["radius"], scene["present"])
    attributes = {a: scene[a][:, 0] for a in ("shape", "colour", "texture")}
    attributes |= {"kind": (u[:, 3] * len(KINDS)).long(), "material": (u[:, 4] * len(MATERIALS)).long()}
    tells = {a: u[:, i] < told for i, a in enumerate(("shape", "colour", "texture"))}
    tells |= {"kind": torch.ones(len(key), dtype=torch.bool), "material": torch.ones(len(key), dtype=torch.bool)}
    titles = []
    for b, (fact, chance) in enumerate(zip(facts(scene), chances(key, 98), strict=True)):
        design = noun(chance, fact["objects"][0], {a for a in tells if tells[a][b]})
        titles.append(f"{MATERIALS[attributes['material'][b]]} {KINDS[attributes['kind'][b]]} with {article(design)}")
    return {"scene": scene, "titles": titles, "attributes": attributes, "told": tells}
