"""Clips of moving shapes with questions of the SVQA types: the built-in world for video question answering.

    view = clips(range(100), seed=0, split="train", questions=8)
    view["question"][0], view["answer"][0], view["type"][0], view["video"][0], view["evidence"][0]
    frames = film(view, range(4), size=32)                    # (4, 32, 3, 32, 32): 8 clips of 4 frames

A video is eight shots of one thing each, or of nothing: six things and two empty shots in random order, on one
background. So a clip is evidence for a question or it is not, and most are not.

    clip     0      1      2      3      4      5      6      7
           | star | moon |      | star | heart|      | moon | star |

Balance is built in. The colours of the six are dealt as a a a b b c and their shapes as x x x y y z, so every
number from 0 to 3 can be asked about in every video. Type and answer are drawn first, then a question that
has this answer. Attributes are dealt independently and alike: a question's words do not betray its answer.
"""
from itertools import combinations

import torch

from data.draw import SHAPES, render, uniform
from data.world import BACKGROUND, COLOUR, PLURALS, SIZES, article, chances, keys, one, pick

CLIPS, OBJECTS, PATIENCE = 8, 6, 40
RADII = (0.26, 0.44)                                # small and large
FORMS = ("square", "triangle", "star", "heart", "cross", "moon")  # a circle that turns looks as if it did not
TURNING = tuple(SHAPES.index(s) for s in FORMS)
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*DIRECTIONS, "rotating", "static")           # what a thing does; the first four are "moving"
DOES = {**{d: f"that moves {d}" for d in DIRECTIONS}, "rotating": "that turns", "static": "that stays still"}
STREAMS = ("appearance", "motion", "both")

SVQA = {"count": 5520, "exist": 1920, "query colour": 2160, "query size": 2160, "query action": 1920,
        "query direction": 2160, "query shape": 2160, "more": 720, "equal": 720, "less": 720,
        "same colour": 720, "same size": 720, "same action": 720, "same direction": 720,
        "same shape": 720}                              # the numbers of questions in SVQA's test split
TYPES = {**SVQA, "order": 1200}    # ours: which of two things comes first; DualVGR does not see the order of clips
ANSWERS = (*"0123", "yes", "no", *COLOUR, *FORMS, *SIZES, *DIRECTIONS, "moving", "rotating", "static")


# -- videos --------------------------------------------------------------------------------------------------


def deal(u, values, pattern):
    """Random distinct values for the letters of a pattern, shuffled.   u (V, len(values) + 6) -> (V, 6)"""
    letters = values[u[:, : len(values)].argsort(1)]
    return letters.gather(1, torch.tensor(pattern)[u[:, len(values) :].argsort(1)])


def videos(key):
    """What the six objects of each video are and when they appear.   key (V,) -> dict of (V, 6), (V,) tensors

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
            "clip": u[:, 40:48].argsort(1)[:, :OBJECTS],               # when it is seen
            "offset": u[:, 64:76].view(-1, OBJECTS, 2) * 2 - 1,        # where
            "spin": (u[:, 53:59] < 0.5) * 2.0 - 1,                     # which way it turns or leans
            "background": (u[:, 62] * len(BACKGROUND)).long(), "pattern": (u[:, 63] * 2).long(), "key": key}


def film(view, rows, size=32, frames=4):
    """The clips of some videos, `frames` pictures each.   -> (n, 8 * frames, 3, size, size) in [-1, 1]"""
    return render(frame_scene(view, rows, frames), size)[0].view(-1, CLIPS * frames, 3, size, size)


def frame_scene(view, rows, frames=4):
    """Every frame of some videos as a scene of n * 8 * frames rows with one slot."""
    some = pick(view["videos"], torch.as_tensor(list(rows), dtype=torch.long))
    match = some["clip"][:, None] == torch.arange(CLIPS)[:, None]              # (n, 8, 6)
    which = match.int().argmax(2)                                              # (n, 8)
    own = {name: some[name].gather(1, which) for name in ("colour", "shape", "size", "motion", "spin")}
    place = some["offset"].gather(1, which[..., None].expand(-1, -1, 2))       # (n, 8, 2)
    centre, angle = moves(own, place, frames)
    slots = {"present": match.any(2), "shape": own["shape"], "colour": own["colour"], "size": own["size"],
             "texture": torch.zeros_like(which), "radius": torch.tensor(RADII)[own["size"]], "tone": own["spin"] * 0}
    slots = {name: x.repeat_interleave(frames, 1) for name, x in slots.items()}
    slots |= {"centre": centre.flatten(1, 2), "angle": angle.flatten(1)}
    each = {name: some[name].repeat_interleave(CLIPS * frames) for name in ("background", "pattern", "key")}
    return {**{name: x.flatten(0, 1)[:, None] for name, x in slots.items()}, **each,
            "light": torch.zeros(len(each["key"]))}


def moves(own, place, frames):
    """Centres (n, 8, F, 2) and angles (n, 8, F). Across a clip things travel 0.9 of the picture's half, or turn 1.4 radians."""
    way = torch.tensor([*DIRECTIONS.values(), (0, 0), (0, 0)])[own["motion"]].float()[:, :, None]       # (n, 8, 1, 2)
    spent = torch.arange(frames) / max(1, frames - 1)
    still = place[:, :, None] * torch.where(way != 0, 0.1, 0.45)
    angle = own["spin"][..., None] * torch.where(own["motion"][..., None] == MOTIONS.index("rotating"), spent * 1.4, 0.1)
    return still + way * (spent[:, None] - 0.5) * 0.9, angle


# -- questions -----------------------------------------------------------------------------------------------


def clips(index, seed=0, split="train", questions=8, types=SVQA):
    """Videos and questions about them.   types: {type: weight}

    -> videos: dict for film(); and for every question, number n of video v at v * questions + n: video,
       question, answer, type: lists; evidence (Q, 8) bool: the clips that show what it is about, none where
       nothing does; stream (Q,): place in STREAMS, where the answer lies; filters (Q,): attributes named
    """
    for name in types:
        if name not in TYPES:
            raise ValueError(f"there is no question type {name!r}; the built-in world has {', '.join(TYPES)}")
    # One stream of chance a question: asking for more questions leaves the first ones as they are.
    key = keys(index, seed, split, view=4)
    shown = videos(key)
    pot = [name for name, weight in types.items() for _ in range(max(1, round(weight / 120)))]
    streams, asked = [chances(key, 100 + n) for n in range(questions)], []
    for v, things in enumerate(contents(shown)):
        asked += [ask(streams[n][v], things, pot) | {"video": v} for n in range(questions)]
    view = {name: [a[name] for a in asked] for name in ("video", "question", "answer", "type")}
    view["evidence"] = torch.tensor([[c in a["clips"] for c in range(CLIPS)] for a in asked])
    view["stream"], view["filters"] = (torch.tensor([a[k] for a in asked]) for k in ("stream", "filters"))
    return view | {"videos": shown}


def contents(shown):
    """Videos in words.   -> V lists of six dicts"""
    names = ("colour", "shape", "size", "motion", "clip")
    return [[{"colour": COLOUR[c], "shape": SHAPES[s], "size": SIZES[z], "motion": MOTIONS[m], "clip": b,
              "action": "moving" if m < 4 else MOTIONS[m]} for c, s, z, m, b in zip(*six, strict=True)]
            for six in zip(*(shown[name].tolist() for name in names), strict=True)]


def ask(chance, things, pot):
    """One question. Its type comes first, then its answer, then words that have it; if none do, again.

    A video that no wanted type fits is asked to count: one in ten if "same direction" is all there is.
    """
    for attempt in range(PATIENCE + 1):
        name = one(chance, pot) if attempt < PATIENCE else "count"
        family, _, attribute = name.partition(" ")
        found = WRITERS[family](chance, things, attribute or name)
        if found:
            question, answer, about, named = found
            stream = 1 if attribute in ("action", "direction") else 2 if "motion" in named else 0
            seen = {things[i]["clip"] for i in about}
            return {"question": question, "answer": answer, "type": name, "stream": stream,
                    "filters": len(named), "clips": seen}


def phrase(thing, named):
    """"large red star that moves left", with the named attributes only."""
    words = [thing[a] for a in ("size", "colour") if a in named]
    words += [thing["shape"] if "shape" in named else "thing"]
    return " ".join(words + [DOES[thing["motion"]]] * ("motion" in named))


def describe(chance, things, i, hidden):
    """A phrase that fits thing i alone and does not tell `hidden`.   -> phrase, attributes named; or None"""
    hidden = "motion" if hidden in ("action", "direction") else hidden
    free = [a for a in ("colour", "shape", "size", "motion") if a != hidden]
    rest = things[:i] + things[i + 1 :]                       # equal attributes in the rest make it ambiguous
    for n in (1, 2, 3):
        fits = [named for named in combinations(free, n)
                if not any(all(t[a] == things[i][a] for a in named) for t in rest)]
        if fits and (n > 1 or next(chance) % 2):                 # one attribute half the time if it is enough
            named = one(chance, fits)
            return phrase(things[i], named), named
    return None


def value_with(chance, things, attribute, number):
    """A colour or shape that exactly `number` of the things have: there is one for every number, 0 to 3."""
    values = COLOUR if attribute == "colour" else FORMS
    return one(chance, [v for v in values if sum(t[attribute] == v for t in things) == number])


def many(attribute, value):
    return f"{value} things" if attribute == "colour" else PLURALS[value]


# Every writer returns (question, answer, places of the things it is about, attributes named), or None.


def count(chance, things, _):
    number, attribute = next(chance) % 4, one(chance, ("colour", "shape"))
    value = value_with(chance, things, attribute, number)
    about = [i for i, t in enumerate(things) if t[attribute] == value]
    return f"how many {many(attribute, value)} are there", str(number), about, (attribute,)


def exist(chance, things, _):
    """Keep one attribute of some thing; the other is its own (yes) or makes a pair that fits nothing."""
    answer, thing = one(chance, ("yes", "no")), one(chance, things)
    kept = one(chance, ("colour", "shape", "motion", "motion"))
    other = {"colour": "shape", "shape": "colour"}.get(kept) or one(chance, ("colour", "shape"))
    if answer == "no":
        taken = {t[other] for t in things if t[kept] == thing[kept]}
        values = COLOUR if other == "colour" else FORMS
        thing = thing | {other: one(chance, [v for v in values if v not in taken])}
    about = [i for i, t in enumerate(things) if all(t[a] == thing[a] for a in (kept, other))]
    return f"is there {article(phrase(thing, (kept, other)))}", answer, about, (kept, other)


def query(chance, things, attribute):
    """One attribute of one thing. Sizes and actions are drawn first; the others are dealt evenly."""
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
    """"are there more red things than stars": two numbers come first, then a colour and a shape with them."""
    true = {"more": lambda m, n: m > n, "less": lambda m, n: m < n, "equal": lambda m, n: m == n}[kind]
    answer = one(chance, ("yes", "no"))
    # Always a colour against a shape: two colours that are there are never equally many.
    numbers = one(chance, [(m, n) for m in range(4) for n in range(4) if true(m, n) == (answer == "yes")])
    sets = one(chance, (("colour", "shape"), ("shape", "colour")))
    values = [value_with(chance, things, a, n) for a, n in zip(sets, numbers, strict=True)]
    left, right = (many(a, v) for a, v in zip(sets, values, strict=True))
    words = {"more": f"more {left} than", "less": f"fewer {left} than", "equal": f"as many {left} as"}[kind]
    about = [i for i, t in enumerate(things) if any(t[a] == v for a, v in zip(sets, values, strict=True))]
    return f"are there {words} {right}", answer, about, sets


def same(chance, things, attribute):
    """Do two things, each described without it, share an attribute?"""
    own = "motion" if attribute == "direction" else attribute
    answer = one(chance, ("yes", "no"))
    rows = [i for i, t in enumerate(things) if attribute != "direction" or t["action"] == "moving"]
    pairs = [(i, j) for i in rows for j in rows
             if i != j and (things[i][own] == things[j][own]) == (answer == "yes")]
    words = {"action": "doing the same", "direction": "moving the same way"}
    words = "are the {} and the {} " + words.get(attribute, f"the same {attribute}")
    return pairwise(chance, things, pairs, attribute, words, answer)


def order(chance, things, _):
    """Which of two things comes first."""
    answer = one(chance, ("yes", "no"))
    pairs = [(i, j) for i, a in enumerate(things) for j, b in enumerate(things)
             if i != j and (b["clip"] > a["clip"]) == (answer == "yes")]
    return pairwise(chance, things, pairs, "", "does the {} come before the {}", answer)


def pairwise(chance, things, pairs, hidden, words, answer):
    """Fill a question about two things with their descriptions."""
    if not pairs:
        return None
    i, j = one(chance, pairs)
    a, b = describe(chance, things, i, hidden), describe(chance, things, j, hidden)
    return (words.format(a[0], b[0]), answer, [i, j], (*a[1], *b[1])) if a and b else None


WRITERS = {"count": count, "exist": exist, "query": query, "more": compare, "equal": compare, "less": compare,
           "same": same, "order": order}
