"""Views of the built-in world with known answers: edits, stories, shop products.

    view = edits(range(32), seed=0, split="train")       # scene before and after, sentence; edit_pictures(view)
    view = stories(range(8), frames=4)                   # scenes of B x F frames, sentences, who is in them
    view = products(range(600))                          # what a shop sells: designs, titles, what they omit

All are pure functions of (seed, split, index). Pictures with captions are data/captions.py, clips with questions data/quiz.py.
"""
import torch

from data import world
from data.draw import SHAPES, TEXTURES, hashed, render, uniform

EDITS = ("recolour", "retexture", "reshape", "background", "add", "remove")
RECOLOUR, RETEXTURE, RESHAPE, BACKGROUND, ADD, REMOVE = range(len(EDITS))
CHANGES = {"recolour": "colour", "retexture": "texture", "reshape": "shape"}
TOLD = 0.6                   # the chance that a title tells the shape, the colour, the texture of its product
POSES = ("stands", "walks", "jumps")
WHERE = ("left", "middle", "right")
LOOKS = (("star", "red", "plain"), ("moon", "blue", "plain"), ("heart", "pink", "dotted"),     # Pip, Mo, Zuri
         ("circle", "orange", "striped"), ("triangle", "purple", "striped"),                   # Otto, Lila
         ("square", "green", "dotted"), ("ring", "cyan", "striped"),                           # Finn, Nara
         ("cross", "yellow", "plain"))                                                         # Bo


# -- edits ---------------------------------------------------------------------------------------------------


def edits(index, seed=0, split="train", kinds=EDITS, pairs=0.5):
    """A scene of one or two objects, a sentence that is false of it, and the scene with just that made true.

    pairs    the share of pictures with a second thing; those of add and remove always have two, before or after
    returns  before, after: scenes with the same jitter; kind (B,): place in EDITS; object (B,): the slot that changes, -1
             for the background; sentence: B strings; caption_before, caption_after: B full captions
    raises   ValueError for an unknown kind
    Two objects differ in shape and colour, before and after: "the star" and "the red shape" name one thing.
    """
    for name in kinds:
        if name not in EDITS:
            raise ValueError(f"there is no edit {name!r}; the built-in world has {', '.join(EDITS)}")
    u = uniform(world.keys(index, seed, split, view=1) ^ 1, 8)   # "^ 1": not the numbers the scene is made of
    kind = torch.tensor([EDITS.index(name) for name in kinds])[(u[:, 0] * len(kinds)).long()]
    moved = kind >= ADD                                     # added or removed: always slot 1
    two = moved | (u[:, 1] < pairs)
    # What is added or removed has its place in both layouts, so nothing else moves or changes size.
    before = world.scenes(index, seed, split, objects=(2, 2), count=1 + two.long(), view=1)
    tell_apart(before, u[:, 2], split)
    which = torch.where(moved, 1, (two & (u[:, 3] < 0.5)).long())
    after = {name: value.clone() for name, value in before.items()}
    change(before, after, kind, which, u[:, 4], split)
    before["present"][:, 1] &= kind != ADD
    after["present"][:, 1] &= kind != REMOVE
    return {"before": before, "after": after, "kind": kind,
            "object": torch.where(kind == BACKGROUND, -1, which), "sentence": wishes(before, after, kind, which),
            "caption_before": world.captions(before), "caption_after": world.captions(after)}


def tell_apart(scene, u, split):
    """Draw slot 1's combination anew, so that it shares neither shape nor colour with slot 0. In place."""
    ids = torch.arange(8)
    shape, colour = (scene[a][:, 0, None, None, None] for a in ("shape", "colour"))
    free = world.combinations(split) & (ids[:, None, None] != shape) & (ids[:, None] != colour)          # (B, 8, 8, 3)
    for attribute, value in world.design(u, free).items():
        scene[attribute][:, 1] = value


def change(before, after, kind, which, u, split):
    """Give `after` its new colour, texture, shape or background, never one that its neighbour has. In place.

    Results stay within the split's combinations; from "unseen" sources any combination may come out.
    """
    free = torch.ones_like(world.HELD_OUT) if split == "unseen" else ~world.HELD_OUT               # (8, 8, 3)
    rows, ids = torch.arange(len(kind)), torch.arange(8)
    shape, colour, texture = (before[a][rows, which] for a in ("shape", "colour", "texture"))
    new = {"colour": free[shape, :, texture], "texture": free[shape, colour],
           "shape": free[:, colour, texture].T}                            # (B, 8 or 3) each
    for name, attribute in CHANGES.items():
        now, allowed = kind == EDITS.index(name), new[attribute]
        allowed = allowed & (ids[: allowed.shape[1]] != before[attribute][rows, which, None])
        if name != "retexture":
            allowed = allowed & (ids != before[attribute][rows, 1 - which, None])
        after[attribute][rows[now], which[now]] = world.choose(u, allowed)[now]
    now = kind == BACKGROUND
    others = torch.arange(len(world.BACKGROUND)) != before["background"][:, None]
    after["background"][now] = world.choose(u, others)[now]


def wishes(before, after, kind, which):
    """What to change, said as if it were so: "the star is red", "there is no blue ring"."""
    rows = zip(kind.tolist(), which.tolist(), world.facts(before), world.facts(after), strict=True)
    sentences = []
    for (k, o, old, new), chance in zip(rows, world.chances(before["key"], 99), strict=True):
        if EDITS[k] in CHANGES:
            sentences.append(world.is_now(chance, new["objects"][o], CHANGES[EDITS[k]]))
        elif k == BACKGROUND:
            sentences.append(f"the background is {world.alias(chance, new['background'])}")
        elif k == ADD:
            thing = world.noun(chance, new["objects"][1], {"shape", "colour", "texture", "size"})
            sentences.append(f"there is {world.article(thing)}")
        else:
            sentences.append(f"there is no {world.noun(chance, old['objects'][1], {'shape', 'colour'})}")
    return sentences


def edit_pictures(view, size=64):
    """-> source, target (B, 3, size, size), region (B, size, size) bool: the pixels that the edit may change.

    The object before and after, with its shadow; for the background all that no object covers. Outside the region source
    and target are the same bits.
    """
    (source, old), (target, new) = render(view["before"], size), render(view["after"], size)
    rows, slot = torch.arange(len(source)), view["object"].clamp(min=0)
    own = (old[rows, slot] > 0) | (new[rows, slot] > 0)
    region = torch.where((view["object"] < 0)[:, None, None], old.sum(1) < 1, own)
    return source, target, region | (source != target).any(1)


# -- stories -------------------------------------------------------------------------------------------------


def stories(index, seed=0, split="train", frames=4, looks="fixed"):
    """Stories about eight named characters; many frames can be drawn only with the sentences before.

    looks    "fixed" (LOOKS: a name is enough to draw it) or "story" (dealt anew, told at the first mention)
    returns  scene: B * F rows, frame f of story b is row b F + f; sentences: B lists of F strings;
             character (B, F, 2): places in world.NAMES, -1 for nobody; named (B, F, 2) bool: the sentence says the name;
             pronoun (B, F) bool: somebody in the frame is not named; place (B, F), place_told (B, F) bool;
             pose, where (B, F); look (B, 8, 3): shape, colour, texture of every name
    The sentences of a story determine its pictures: there is no other jitter.
    """
    if frames < 1 or looks not in ("fixed", "story"):
        raise ValueError(f"a story needs 1 frame or more and looks fixed or story, not {frames}, {looks!r}")
    key = world.keys(index, seed, split, view=2)
    look = [[SHAPES.index(s), world.COLOUR.index(c), TEXTURES.index(t)] for s, c, t in LOOKS]
    look = torch.tensor(look).expand(len(key), -1, -1).clone()
    if looks == "story":                                           # eight shapes, eight colours: no two alike
        look[..., 0], look[..., 1] = uniform(key ^ 3, 8).argsort(1), uniform(key ^ 4, 8).argsort(1)
    told = [script(iter(row), frames, own)
            for row, own in zip(hashed(key, 8 * frames).tolist(), look.tolist(), strict=True)]
    view = {name: torch.tensor([[frame[name] for frame in story] for story in told])
            for name in ("character", "named", "pose", "where", "place", "place_told")}
    view["pronoun"] = ((view["character"] >= 0) & ~view["named"]).any(-1)
    view["sentences"] = [[frame["sentence"] for frame in story] for story in told]
    return view | {"look": look, "scene": stage(view, look, key)}


def script(chance, frames, look):
    """One story.   -> F dicts. "It" is the subject of the sentence before, "they" are the two who met."""
    # After a meeting "it" could be either of two: it is not said until a name settles the subject.
    subject, place, met, known, story = next(chance) % 8, world.one(chance, world.BACKGROUND), None, set(), []
    for f in range(frames):
        act = world.one(chance, ("they", "they", "name", "enter") if met else
                        ("it", "it", "it", "it", "go", "meet", "meet", "name", "enter")) if f else "name"
        other = world.one(chance, [n for n in range(8) if n != subject])
        pose, where = world.one(chance, POSES), world.one(chance, WHERE)
        who, named = (subject, -1), (False, False)
        if act == "it":
            text = f"It {pose} {spot(where)}"
        elif act == "go":
            place, pose, where = world.one(chance, [b for b in world.BACKGROUND if b != place]), "walks", "middle"
            text = f"It goes into the {world.PLACES[place]}"
        elif act == "meet":
            who, named, pose, where = (subject, other), (False, True), "stands", "middle"
            text = f"It meets {called(other, known, look)}"
        elif act == "they":
            who, where = met, "middle"
            text = f"They {pose[:-1]}"                                     # stands -> stand
        else:
            subject = other if act == "enter" else subject
            who, named = (subject, -1), (True, False)
            text = f"{called(subject, known, look)} {pose} {spot(where)}"
            text += "" if f else f" in the {world.PLACES[place]}"
        met = who if who[1] >= 0 else None
        story.append({"sentence": text + ".", "character": who, "named": named, "pose": POSES.index(pose),
                      "where": WHERE.index(where), "place": world.BACKGROUND.index(place),
                      "place_told": act == "go" or f == 0})
    return story


def spot(where):
    return "in the middle" if where == "middle" else f"on the {where}"


def called(n, known, look):
    """"Pip the red star" at the first mention, then "Pip"."""
    if n in known:
        return world.NAMES[n]
    known.add(n)
    return f"{world.NAMES[n]} the {world.COLOUR[look[n][1]]} {SHAPES[look[n][0]]}"


def stage(view, look, key):
    """The frames as scenes: one character stands where it is told; two share the picture, subject left."""
    who = view["character"]                                                # (B, F, 2)
    total, frames = who.shape[:2]
    own = look[torch.arange(total)[:, None, None], who.clamp(min=0)].flatten(0, 1)             # (B F, 2, 3)
    two = (who[..., 1] >= 0).flatten()[:, None]
    pose, where = (view[name].flatten()[:, None].expand(-1, 2) for name in ("pose", "where"))
    x = torch.where(two, torch.tensor([-0.46, 0.46]), (where - 1) * 0.5)
    y = torch.where(pose == POSES.index("jumps"), -0.3, 0.26)
    none, place = torch.zeros(total * frames), view["place"].flatten()
    return {"present": (who >= 0).flatten(0, 1), "shape": own[..., 0], "colour": own[..., 1], "texture": own[..., 2],
            "size": torch.ones_like(pose), "centre": torch.stack([x, y], -1),
            "radius": torch.where(two, 0.36, 0.42).expand(-1, 2), "angle": 0.35 * (pose == POSES.index("walks")),
            "tone": none[:, None].expand(-1, 2), "light": none, "key": key.repeat_interleave(frames),
            "background": place, "pattern": torch.ones_like(place)}                # a gradient: floor and sky


# -- shop ----------------------------------------------------------------------------------------------------


def products(index, seed=0, split="train"):
    """What a shop sells. The picture shows the design among clutter; the title leaves attributes of it out.

    -> scene: slot 0 is the design, the other slots are clutter; titles: B strings;
       attributes {shape, colour, texture, kind, material}: (B,) ids;  told {attribute: (B,) bool}: in title?
    A title always tells kind and material, which are never seen. The mask of the product is render(scene)[1][:, 0].
    """
    # Clutter: none, one or two small objects. No taste depends on them; they are what features may drift to.
    count = 1 + (uniform(world.keys(index, seed, split, view=3) ^ 1, 1)[:, 0] * 3).long()
    scene = world.scenes(index, seed, split, objects=(3, 3), count=count, view=3)
    key, u = scene["key"], uniform(scene["key"] ^ 2, 5)
    scene["size"] = torch.tensor([1, 0, 0]).repeat(len(key), 1)
    scene["radius"] = torch.tensor([0.5, 0.19, 0.19]).repeat(len(key), 1)
    scene["centre"] = world.place(key, scene["radius"], scene["present"])
    seen = ("shape", "colour", "texture")
    attributes = {a: scene[a][:, 0] for a in seen}
    attributes |= {"kind": (u[:, 3] * len(world.KINDS)).long(), "material": (u[:, 4] * len(world.MATERIALS)).long()}
    tells = {a: u[:, i] < TOLD for i, a in enumerate(seen)}
    tells |= {a: torch.ones_like(tells["shape"]) for a in ("kind", "material")}
    rows = zip(world.facts(scene), attributes["kind"].tolist(), attributes["material"].tolist(), strict=True)
    titles = []
    for b, ((fact, kind, material), chance) in enumerate(zip(rows, world.chances(key, 98), strict=True)):
        design = world.article(world.noun(chance, fact["objects"][0], {a for a in seen if tells[a][b]}))
        titles.append(f"{world.MATERIALS[material]} {world.KINDS[kind]} with {design}")
    return {"scene": scene, "titles": titles, "attributes": attributes, "told": tells}
