"""Clips of moving shapes with questions of the SVQA types: the view of the built-in world for video question answering.

    view = clips(range(100), seed=0, split="train", questions=8)
    view["question"][0], view["answer"][0], view["type"][0], view["video"][0], view["evidence"][0]
    frames = film(view, range(4), size=32)                    # (4, 32, 3, 32, 32): 8 clips of 4 frames

A video shows six objects, each for two of the eight clips, in two lanes: at most two are seen at once.

    lane one    | 0 0 | 2 2 | 4 4 | 6 6 |       seven places, named by the clip in which they begin; six are taken
    lane two      | 1 1 | 3 3 | 5 5 |           by a random order of the objects, one stays empty

Balance is built in. The colours of the six are dealt as a a a b b c and the shapes as x x x y y z, so every count from 0
to 3 is there to be asked for in every video; the type and the answer are drawn first, then a question that has it. The
attributes are dealt independently and alike, so the words of a question say nothing about its answer.
"""
from itertools import combinations

import torch

from data.draw import SHAPES, render, uniform
from data.world import BACKGROUND, COLOUR, PLURALS, SIZES, chances, keys, one, pick

CLIPS, OBJECTS = 8, 6
RADII = (0.25, 0.37)                       # small and large: two lanes of width 1 leave no more
TURNING = tuple(SHAPES.index(s) for s in ("square", "triangle", "star", "heart", "cross", "moon"))  # turns show
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*DIRECTIONS, "rotating", "static")                 # what a thing does; the first four are "moving"
DOES = {**{d: f"that moves {d}" for d in DIRECTIONS}, "rotating": "that turns", "static": "that stays still"}
STREAMS = ("appearance", "motion", "both")

SVQA = {"count": 5520, "exist": 1920, "query colour": 2160, "query size": 2160, "query action": 1920, "query direction": 2160,
        "query shape": 2160, "more": 720, "equal": 720, "less": 720, "same colour": 720, "same size": 720,
        "same action": 720, "same direction": 720, "same shape": 720}  # questions of a type in SVQA's test split
TYPES = {**SVQA, "relation": 1200, "order": 1200}      # ours: where two things are, which of them comes first
ANSWERS = (*"0123", "yes", "no", *COLOUR, *(SHAPES[s] for s in TURNING), *SIZES, *DIRECTIONS, "moving", "rotating", "static")


# -- videos --------------------------------------------------------------------------------------------------


def deal(u, values, pattern):
    """Distinct random values for the letters of a pattern, the pattern shuffled.   u (V, len(values) + 6) -> (V, 6)"""
    letters = values[u[:, : len(values)].argsort(1)]
    return letters.gather(1, torch.tensor(pattern)[u[:, len(values) :].argsort(1)])


def videos(key):
    """What the six objects of each video are and when they appear.   key (V,) -> dict of (V, 6) and (V,) tensors

    Three objects move (two of them the same way), the others turn or stay still, at least one of each.
    """
    u = uniform(key, 96)
    ways = u[:, 90:94].argsort(1)
    third = 4 + (u[:, 94:95] < 0.5).long()
    motion = torch.cat([ways[:, [0, 0, 1]], torch.tensor([4, 5]).expand(len(key), 2), third], 1)
    return {"colour": deal(u[:, :14], torch.arange(8), (0, 0, 0, 1, 1, 2)),
            "shape": deal(u[:, 14:26], torch.tensor(TURNING), (0, 0, 0, 1, 1, 2)),
            "size": deal(u[:, 26:34], torch.arange(2), (0, 0, 0, 1, 1, 1)),
            "motion": motion.gather(1, u[:, 34:40].argsort(1)),
            "start": u[:, 40:47].argsort(1)[:, :OBJECTS],          # first clip; even: lane one, odd: lane two
            "offset": u[:, 47:53] * 2 - 1, "spin": (u[:, 53:59] < 0.5) * 2.0 - 1, "upright": u[:, 60] < 0.5,
            "swap": u[:, 61] < 0.5, "background": (u[:, 62] * len(BACKGROUND)).long(), "pattern": (u[:, 63] * 2).long(),
            "key": key}


def film(view, rows, size=32, frames=4):
    """The clips of some videos.   -> (n, 8 * frames, 3, size, size) in [-1, 1]; `frames` pictures a clip"""
    return render(frame_scene(view, rows, frames), size)[0].view(-1, CLIPS * frames, 3, size, size)


def frame_scene(view, rows, frames=4):
    """Every frame of some videos as a scene of n * 8 * frames rows; slot 0 is lane one, slot 1 lane two."""
    film = pick(view["videos"], torch.as_tensor(list(rows)))
    total, time = len(film["key"]), torch.arange(CLIPS * frames)
    lane = torch.arange(2)[:, None]
    begins = (time // frames - lane) // 2 * 2 + lane                 # (2, T): where the object seen now began
    match = film["start"][:, None, None] == begins[..., None]              # (n, 2, T, 6)
    present, which = match.any(-1), match.int().argmax(-1)
    own = {name: film[name].gather(1, which.flatten(1)).view(which.shape) for name in
           ("colour", "shape", "size", "motion", "offset", "spin")}        # each (n, 2, T)
    spent = (time - begins * frames) / (2 * frames - 1) * 2 - 1            # -1 .. 1 while the object is there
    moving = own["motion"] < 4
    way = torch.tensor([*DIRECTIONS.values(), (0, 0), (0, 0)])[own["motion"]].float()      # (n, 2, T, 2)
    upright = film["upright"][:, None, None]               # lanes side by side instead of one below the other
    across = torch.where(film["swap"][:, None, None], 0.5, -0.5) * (1 - 2 * lane)          # (n, 2, 1)
    along_way = torch.where(upright, way[..., 1], way[..., 0])
    along = own["offset"] * torch.where(along_way != 0, 0.08, 0.5) + along_way * spent * 0.46
    across = across + torch.where(upright, way[..., 0], way[..., 1]) * spent * 0.13
    centre = torch.where(upright[..., None], torch.stack([across, along], -1), torch.stack([along, across], -1))
    angle = torch.where(own["motion"] == 4, own["spin"] * (time - begins * frames) * (1.4 / frames), own["spin"] * 0.1)
    flat = {name: x.transpose(1, 2).flatten(0, 1) for name, x in (                         # (n T, 2)
        ("present", present), ("shape", own["shape"]), ("colour", own["colour"]), ("size", own["size"]), ("angle", angle),
        ("radius", torch.tensor(RADII)[own["size"]]), ("centre", centre), ("tone", moving * 0.0))}
    still = {name: film[name].repeat_interleave(len(time)) for name in ("background", "pattern", "key")}
    return flat | still | {"texture": torch.zeros_like(flat["shape"]), "light": torch.zeros(total * len(time))}


# -- questions -----------------------------------------------------------------------------------------------


def clips(index, seed=0, split="train", questions=8, types=SVQA):
    """Videos and questions about them.   types: {type: weight}

    -> videos: dict for film(); and per question, q = video * questions + number: video, question, answer, type: lists;
       evidence (Q, 8) bool: the clips that show what the question is about (none where the answer is that nothing does);
       stream (Q,): place in STREAMS, where the answer lies; filters (Q,): how many attributes the question names
    """
    for name in types:
        if name not in TYPES:
            raise ValueError(f"there is no question type {name!r}; the built-in world has {', '.join(TYPES)}")
    key = keys(index, seed, split, view=4)
    shown = videos(key)
    pot = [name for name, weight in types.items() for _ in range(max(1, round(weight / 120)))]
    rows = zip(*(shown[name].tolist() for name in ("colour", "shape", "size", "motion", "start", "upright", "swap")), strict=True)
    asked, streams = [], [chances(key, 100 + q, 96) for q in range(questions)]
    for v, (*columns, upright, swap) in enumerate(rows):
        things = [{"colour": COLOUR[c], "shape": SHAPES[s], "size": SIZES[z], "motion": MOTIONS[m], "start": b,
                   "action": "moving" if m < 4 else MOTIONS[m], "first": (b % 2 == 0) != swap}
                  for c, s, z, m, b in zip(*columns, strict=True)]
        for q in range(questions):
            asked.append(ask(streams[q][v], things, pot, upright) | {"video": v})
    view = {name: [a[name] for a in asked] for name in ("video", "question", "answer", "type")}
    view["stream"], view["filters"] = (torch.tensor([a[name] for a in asked]) for name in ("stream", "filters"))
    view["evidence"] = torch.tensor([[any(b <= c < b + 2 for b in a["starts"]) for c in range(CLIPS)] for a in asked])
    return view | {"videos": shown}


def ask(chance, things, pot, upright):
    """One question: draw its type, then its answer, then words that have this answer here; if there are none, again."""
    while True:
        name = one(chance, pot)
        family, _, attribute = name.partition(" ")
        found = {"count": count, "exist": exist, "query": query, "same": same}.get(family, compare)(chance, things, attribute or name) \
            if family not in ("relation", "order") else pairwise(chance, things, name, upright)
        if found:
            question, answer, touched, named = found
            moves = bool({"motion"} & set(named))
            stream = 1 if attribute in ("action", "direction") else 2 if moves else 0
            return {"question": question, "answer": answer, "type": name, "starts": [things[i]["start"] for i in touched],
                    "stream": stream, "filters": len(named)}


def phrase(thing, named):
    """"large red star that moves left", with the named attributes only."""
    words = [thing[a] for a in ("size", "colour") if a in named] + [thing["shape"] if "shape" in named else "thing"]
    return " ".join(words + [DOES[thing["motion"]]] * ("motion" in named))


def describe(chance, things, i, hidden):
    """A phrase that fits thing i alone and does not mention the hidden attribute.   -> phrase, attributes named; or None"""
    hidden = {"action": "motion", "direction": "motion"}.get(hidden, hidden)
    free = [a for a in ("colour", "shape", "size", "motion") if a != hidden]
    for n in (1, 2, 3):                                              # one or two attributes if that is enough
        fits = [named for named in combinations(free, n)
                if all(any(t[a] != things[i][a] for a in named) for j, t in enumerate(things) if j != i)]
        if n == 1 and one(chance, (True, False)):                    # half of the questions name two at least
            continue
        if fits:
            named = one(chance, fits)
            return phrase(things[i], named), named
    return None


def value_with(chance, things, attribute, number):
    """A colour or shape that exactly `number` of the things have: the deal has one for every number from 0 to 3."""
    values = COLOUR if attribute == "colour" else [SHAPES[s] for s in TURNING]
    return one(chance, [v for v in values if sum(t[attribute] == v for t in things) == number])


def many(attribute, value):
    return f"{value} things" if attribute == "colour" else PLURALS[value]


def count(chance, things, _):
    number, attribute = next(chance) % 4, one(chance, ("colour", "shape"))
    value = value_with(chance, things, attribute, number)
    touched = [i for i, t in enumerate(things) if t[attribute] == value]
    return f"how many {many(attribute, value)} are there", str(number), touched, (attribute,)


def exist(chance, things, _):
    """Take one attribute of some thing; the other is its own (yes) or one that makes the pair fit nothing (no)."""
    answer, thing = one(chance, ("yes", "no")), one(chance, things)
    kept, other = one(chance, (("colour", "shape"), ("shape", "colour"), ("motion", "colour"), ("motion", "shape")))
    if answer == "no":
        values = COLOUR if other == "colour" else [SHAPES[s] for s in TURNING]
        thing = thing | {other: one(chance, [v for v in values if not any(
            t[kept] == thing[kept] and t[other] == v for t in things)])}
    touched = [i for i, t in enumerate(things) if all(t[a] == thing[a] for a in (kept, other))]
    words = phrase(thing, (kept, other))
    return f"is there {'an' if words[0] in 'aeiou' else 'a'} {words}", answer, touched, (kept, other)


def query(chance, things, attribute):
    """One attribute of one thing. The answer comes first where there are few: sizes and actions."""
    rows = list(range(OBJECTS))
    if attribute in ("size", "action"):
        wanted = one(chance, SIZES if attribute == "size" else ("moving", "rotating", "static"))
        rows = [i for i in rows if things[i][attribute] == wanted]
    elif attribute == "direction":
        rows = [i for i in rows if things[i]["action"] == "moving"]
    i = one(chance, rows)
    found = describe(chance, things, i, attribute)
    if not found:
        return None
    words = {"action": f"what does the {found[0]} do", "direction": f"which way does the {found[0]} move"}
    answer = things[i]["motion" if attribute == "direction" else attribute]
    return words.get(attribute, f"what {attribute} is the {found[0]}"), answer, [i], found[1]


def compare(chance, things, kind):
    """"are there more red things than stars": how many of each comes first, then a colour and a shape that have it."""
    true = {"more": lambda m, n: m > n, "less": lambda m, n: m < n, "equal": lambda m, n: m == n}[kind]
    answer = one(chance, ("yes", "no"))
    numbers = one(chance, [(m, n) for m in range(4) for n in range(4) if true(m, n) == (answer == "yes")])
    sets = one(chance, (("colour", "shape"), ("shape", "colour")))
    values = [value_with(chance, things, a, n) for a, n in zip(sets, numbers, strict=True)]
    left, right = (many(a, v) for a, v in zip(sets, values, strict=True))
    words = {"more": f"more {left} than", "less": f"fewer {left} than", "equal": f"as many {left} as"}[kind]
    touched = [i for i, t in enumerate(things) if any(t[a] == v for a, v in zip(sets, values, strict=True))]
    return f"are there {words} {right}", answer, touched, sets


def same(chance, things, attribute):
    """Do two things, each described without it, share an attribute?"""
    own = "motion" if attribute == "direction" else attribute
    answer = one(chance, ("yes", "no"))
    pairs = [(i, j) for i in range(OBJECTS) for j in range(OBJECTS) if i != j
             and (things[i][own] == things[j][own]) == (answer == "yes")
             and (attribute != "direction" or things[i]["action"] == things[j]["action"] == "moving")]
    i, j = one(chance, pairs)
    a, b = describe(chance, things, i, attribute), describe(chance, things, j, attribute)
    if not (a and b):
        return None
    words = {"action": "doing the same", "direction": "moving the same way"}.get(attribute, f"the same {attribute}")
    return f"are the {a[0]} and the {b[0]} {words}", answer, [i, j], (*a[1], *b[1])


def pairwise(chance, things, kind, upright):
    """Relation: two things seen in one clip, one in each lane. Order: two things whose times do not touch."""
    gap = [(i, j, things[j]["start"] - things[i]["start"]) for i in range(OBJECTS) for j in range(OBJECTS)]
    answer = one(chance, ("yes", "no"))
    if kind == "order":
        pairs = [(i, j) for i, j, after in gap if abs(after) > 2 and (after > 0) == (answer == "yes")]
    else:
        pairs = [(i, j) for i, j, after in gap if abs(after) == 1 and things[i]["first"] == (answer == "yes")]
    if not pairs:
        return None
    i, j = one(chance, pairs)
    a, b = describe(chance, things, i, ""), describe(chance, things, j, "")
    if not (a and b):
        return None
    words = {"order": f"does the {a[0]} come before the {b[0]}"}.get(
        kind, f"is the {a[0]} {'left of' if upright else 'above'} the {b[0]}")
    return words, answer, [i, j], (*a[1], *b[1])
