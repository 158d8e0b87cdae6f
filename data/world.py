"""The built-in world: scenes of one to three shapes and true sentences about them, from (seed, split, index).

    scene = scenes(range(64), seed=0, split="train")          # dict of tensors, one row a picture
    pictures, masks = render(scene, size=64)                  # (64, 3, 64, 64) in [-1, 1], (64, 3, 64, 64)
    sentences = captions(scene, k=0)               # 64 strings; k = 0 tells everything, 1..9 leave things out

Nothing is stored and nothing depends on the batch: row i is the same alone and among thousands.

    python -m data.world --sheet out.png          a contact sheet with captions
    python -m data.world --bench                  pictures a second on this machine
"""
import argparse
import time
from functools import partial

import torch

from data.batches import generator, seed_from
from data.draw import BACKGROUNDS, COLOURS, PATTERNS, REACH, SHAPES, TEXTURES, hashed, pick, render, uniform
from data.pictures import grid

COLOUR, BACKGROUND = tuple(COLOURS), tuple(BACKGROUNDS)          # names in the order of their ids
SIZES = ("small", "large")
SPLITS = ("train", "valid", "test", "unseen")            # "unseen": combinations that no other split contains
ROWS = 2**20                                                     # scenes in each split
VALUES = {"shape": SHAPES, "colour": COLOUR, "texture": TEXTURES, "size": SIZES,
          "background": BACKGROUND, "pattern": PATTERNS}

RADIUS = (0.36, 0.58)              # small and large, times CROWD[number of objects - 1]: "large" is relative
CROWD = (1.0, 0.74, 0.6)           # to how many share the picture; with one number of objects they never meet
SPREAD, GAP, TRIES = 0.06, 0.07, 96          # radii vary by 6 %; least distance of two objects; layouts tried


# -- scenes --------------------------------------------------------------------------------------------------


def held_out():
    """Which combinations are kept for the split "unseen".   -> (8, 8, 3) bool, True for 24 of 192

    One random permutation a texture: every shape and colour is held out three times, every texture eight, no pair of shape
    and colour twice (the seed was chosen so): one attribute says little about another.
    """
    kept = torch.zeros(len(SHAPES), len(COLOUR), len(TEXTURES), dtype=torch.bool)
    for t in range(len(TEXTURES)):
        kept[torch.arange(len(SHAPES)), torch.randperm(len(COLOUR), generator=generator(1703, t)), t] = True
    return kept


HELD_OUT = held_out()


def combinations(split):
    """Which shape, colour and texture go together in a split.   -> (8, 8, 3) bool"""
    return HELD_OUT if split == "unseen" else ~HELD_OUT


def keys(index, seed, split, view=0):
    """One 63-bit key a row: every random choice of the row is drawn from it.   -> (B,) int64"""
    index = torch.as_tensor(index if torch.is_tensor(index) else list(index), dtype=torch.long)
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; the built-in world has {', '.join(SPLITS)}")
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < ROWS:
        raise ValueError(f"rows of the built-in world run from 0 to {ROWS - 1}; "
                         f"asked for {int(index.min())} to {int(index.max())}")
    # Splits and views are other seeds, so row 7 of "test" has nothing to do with row 7 of "train".
    return hashed(index + seed_from(seed, SPLITS.index(split), view), 1)[:, 0]


def choose(u, allowed):
    """An allowed id, all equally likely.   u (...) in [0, 1), allowed (..., N) bool -> (...) int64"""
    rank = (u * allowed.sum(-1)).long()                                    # how many allowed ids to pass over
    return (allowed.cumsum(-1) > rank[..., None]).int().argmax(-1)


def design(u, allowed):
    """An allowed combination.   u (...) in [0, 1), allowed (..., 8, 8, 3) bool -> {shape, colour, texture: (...) int64}"""
    combination = choose(u, allowed.flatten(-3))
    return {"shape": combination // 24, "colour": combination // 3 % 8, "texture": combination % 3}


def scenes(index, seed=0, split="train", objects=(1, 3), count=None, view=0):
    """Draw scenes.   index: rows of the split; objects: least and most in a picture

    count    (B,) fixes how many each has; views are told apart by a number, so that no two share their scenes
    returns  present (B, O) bool; shape, colour, texture, size (B, O) int64; radius, angle, tone (B, O) and centre (B, O, 2)
             float32; background, pattern, key (B,) int64; light (B,) float32. Objects keep apart
    """
    key = keys(index, seed, split, view)
    slots = objects[1]
    u = uniform(key, 4 + 6 * slots)                                 # all the chance of a scene but its layout
    if count is None:
        count = objects[0] + (u[:, 0] * (slots - objects[0] + 1)).long()
    of = u[:, 4:].view(-1, 6, slots)                                       # (B, 6, O)
    size = (of[:, 1] * 2).long()
    radius = torch.tensor(RADIUS)[size] * torch.tensor(CROWD)[count - 1, None]                 # (B, O)
    scene = {"present": torch.arange(slots) < count[:, None], **design(of[:, 0], combinations(split)),
             "size": size, "radius": radius * (1 + SPREAD * (2 * of[:, 2] - 1)),
             "angle": (of[:, 3] - 0.5) * 0.5,                              # tilts of at most 14 degrees
             "tone": (of[:, 4] - 0.5) * 0.07, "light": (u[:, 3] - 0.5) * 0.06,   # lighter or darker, a little
             "background": (u[:, 1] * 6).long(), "pattern": (u[:, 2] * 4).long(), "key": key}
    scene["centre"] = place(key, scene["radius"], scene["present"])
    return scene


def place(key, radius, present):
    """Centres, (B, O, 2): the first of TRIES random layouts that keeps objects apart, or the roomiest."""
    slots = radius.shape[1]
    # Trying all layouts at once is dearer than one by one, but the same work for every row of a batch.
    u = uniform(key ^ 0x5CA1AB1E, TRIES * slots * 2).view(-1, TRIES, slots, 2)
    centre = (2 * u - 1) * (0.96 - REACH * radius)[:, None, :, None]       # (B, TRIES, O, 2)
    room = torch.full(centre.shape[:2], 9.0)
    for i in range(slots):
        for j in range(i):
            apart = (centre[:, :, i] - centre[:, :, j]).norm(dim=-1) - (radius[:, i] + radius[:, j])[:, None]
            room = torch.where((present[:, i] & present[:, j])[:, None], torch.minimum(room, apart), room)
    best = room.clamp(max=GAP).argmax(1)                                   # argmax takes the first of equals
    return centre[torch.arange(len(key)), best]


def to(scene, device):
    return {name: value.to(device) for name, value in scene.items()}


def facts(scene):
    """A scene in words.   -> B dicts: background, pattern, objects: [{shape, colour, texture, size, x, y}]"""
    present, centre, *ids = (scene[name].tolist() for name in ("present", "centre", *VALUES))
    shape, colour, texture, size, background, pattern = ids

    def thing(b, o):
        x, y = centre[b][o]
        return {"shape": SHAPES[shape[b][o]], "colour": COLOUR[colour[b][o]], "texture": TEXTURES[texture[b][o]],
                "size": SIZES[size[b][o]], "x": x, "y": y}

    return [{"background": BACKGROUND[background[b]], "pattern": PATTERNS[pattern[b]],
             "objects": [thing(b, o) for o, here in enumerate(row) if here]} for b, row in enumerate(present)]


# -- sentences -----------------------------------------------------------------------------------------------

# Colours have one name each and shapes two at most: the word alone must say what is right.
SYNONYMS = {"small": ("small", "little", "tiny"), "large": ("large", "big"), "dotted": ("dotted", "spotted"),
            "circle": ("circle", "disc"), "square": ("square", "box"), "cross": ("cross", "plus"),
            "moon": ("moon", "crescent"), "grey": ("grey", "gray"), "gradient": ("shaded", "fading"),
            "checker": ("checkered", "checked"), "noise": ("cloudy", "noisy")}
PLURALS = {"shape": "shapes", "cross": "crosses", **{s: s + "s" for s in SHAPES if s != "cross"}}
NUMBERS = ("no", "one", "two", "three")
FAR = 0.2                           # "on the left", "above": only for at least a tenth of the picture's width


def one(chance, options):
    """One of the options; `chance` is an endless iterator over random integers."""
    return options[next(chance) % len(options)]


def chances(key, k):
    """Endless streams of random integers, one for sentence k of each row.   key (B,) -> B iterators"""
    return [stream(row) for row in hashed(key ^ seed_from(2, k), 40).tolist()]


def stream(numbers):
    yield from numbers
    while True:                                                            # few sentences take more than 40
        numbers = [seed_from(numbers[-1])]
        yield from numbers


def alias(chance, word):
    return one(chance, SYNONYMS.get(word, (word,)))


def article(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def noun(chance, thing, told):
    """"small striped red star", with the told attributes only; without its shape it is a "shape"."""
    textured = "texture" in told and thing["texture"] != "plain"
    after = one(chance, (True, False, False)) and textured                 # "star with stripes"
    size, texture, shape = (alias(chance, thing[a]) for a in ("size", "texture", "shape"))
    words = [size] if "size" in told else []        # always four draws: an edited thing keeps its other words
    words += [texture] if textured and not after else []
    words += [thing["colour"]] if "colour" in told else []
    words += [shape if "shape" in told else "shape"]
    words += [{"striped": "with stripes", "dotted": "with dots"}[thing["texture"]]] if after else []
    return " ".join(words)


def some(chance, names, least=1):
    """A random subset of attribute names with at least `least` of them."""
    names = list(names)
    number = least + next(chance) % (len(names) - least + 1)
    return {names.pop(next(chance) % len(names)) for _ in range(number)}


def ground(chance, fact, tell_pattern):
    """"on a shaded blue background"."""
    name = alias(chance, fact["pattern"]) + " " if tell_pattern else ""
    before = one(chance, ("on", "on", "against"))
    return f"{before} {article(name + alias(chance, fact['background']))} background"


def listing(phrases):
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def whole(chance, fact, full=False):
    """Every object and the background; full: with every attribute."""
    phrases = []
    for thing in fact["objects"]:
        shape = {"shape"} if next(chance) % 6 else set()
        told = set(VALUES) if full else some(chance, ("colour", "texture", "size")) | shape
        phrases.append(article(noun(chance, thing, told)))
    start = one(chance, ("", "", "a picture of ", "there is "))
    return f"{start}{listing(phrases)} {ground(chance, fact, full or next(chance) % 2)}"


def part(chance, fact):
    """One of the objects, under-specified, perhaps with where it is or what it is on."""
    thing = one(chance, fact["objects"])
    told, x, y = some(chance, VALUES), thing["x"], thing["y"]
    places = {"on the left": x < -FAR, "on the right": x > FAR, "at the top": y < -FAR,
              "at the bottom": y > FAR, "in the middle": max(abs(x), abs(y)) < FAR}
    places = [name for name, true in places.items() if true]
    start = one(chance, ("", "there is ", "a picture with ")) + article(noun(chance, thing, told))
    return f"{start} {one(chance, [*places, *places, ground(chance, fact, False)])}"


def relation(chance, fact):
    """Two objects and how they lie; a picture of one object says where that is instead."""
    if len(fact["objects"]) < 2:
        return part(chance, fact)
    first = next(chance) % len(fact["objects"])                    # a neighbour in the list, either way round
    a, b = fact["objects"][first], fact["objects"][first - 1]
    dx, dy = a["x"] - b["x"], a["y"] - b["y"]
    words = {"l": ("left of", "to the left of"), "r": ("right of", "to the right of"),
             "a": ("above", "over"), "b": ("below", "under")}
    # Objects keep apart, so the larger of the two differences is always a clear one.
    way = ("l" if dx < 0 else "r") if abs(dx) > abs(dy) else "a" if dy < 0 else "b"
    a, b = (article(noun(chance, thing, some(chance, ("colour", "shape", "texture")))) for thing in (a, b))
    return f"{one(chance, ('', 'there is '))}{a} {one(chance, words[way])} {b}"


def predicate(chance, fact):
    """"the star is red", "the red shape is a star", "the background is blue": about what there is one of."""
    claims = [f"the background is {alias(chance, fact['background'])}"]
    claims += [f"the background is {alias(chance, fact['pattern'])}"]
    for thing in fact["objects"]:
        alone = {a: sum(o[a] == thing[a] for o in fact["objects"]) == 1 for a in ("shape", "colour")}
        claims += [is_now(chance, thing, what) for what in ("colour", "texture", "size") if alone["shape"]]
        claims += [is_now(chance, thing, "shape") for _ in "12" if alone["colour"]]
    return one(chance, claims)


def is_now(chance, thing, what):
    """The sentence that states one attribute of a thing; also what an edit asks for."""
    if what == "shape":
        return f"the {thing['colour']} shape is {article(alias(chance, thing['shape']))}"
    return f"the {alias(chance, thing['shape'])} is {alias(chance, thing[what])}"


def counting(chance, fact):
    """"two stars", "there is no red shape", "three shapes on a blue background": exactly that many."""
    thing = one(chance, fact["objects"])
    shape, colour = one(chance, ((thing["shape"], ""), ("shape", thing["colour"]), ("shape", "")))
    if next(chance) % 4 == 0:                                            # anything: most likely there is none
        shape, colour = one(chance, ((one(chance, SHAPES), ""), ("shape", one(chance, COLOUR))))
    number = sum(shape in (o["shape"], "shape") and colour in (o["colour"], "") for o in fact["objects"])
    name = f"{NUMBERS[number]} {colour} {PLURALS[shape] if number > 1 else shape}".replace("  ", " ")
    if number == 0:
        return "there is " + name
    there = one(chance, ("", "there are " if number > 1 else "there is "))
    return f"{there}{name} {ground(chance, fact, False)}"


FORMS = (partial(whole, full=True), part, whole, relation, predicate, whole, part, counting, relation, whole)


def captions(scene, k=0):
    """Caption k of every scene: true, and a pure function of the scene's key and k.   -> B strings

    k = 0 tells every attribute of every object; 1..9 leave things out, relate, state or count; then again.
    """
    form = FORMS[k % len(FORMS)]
    return [form(chance, fact) for chance, fact in zip(chances(scene["key"], k), facts(scene), strict=True)]


# -- every word of every view --------------------------------------------------------------------------------

NAMES = ("Pip", "Mo", "Zuri", "Otto", "Lila", "Finn", "Nara", "Bo")                  # the cast of the stories
PLACES = dict(zip(BACKGROUND, ("snow", "fog", "night", "desert", "meadow", "sea"), strict=True))
KINDS = ("mug", "poster", "cushion", "lamp", "bag", "clock", "plate", "scarf")         # the shop: what titles
MATERIALS = ("wooden", "glass", "linen", "steel", "paper", "clay")                 # tell and no picture shows
OTHER = """a an and against background on in the of there is are with picture no one two three stripes dots
    shape shapes left right above below over under to at top bottom middle it they meets goes into
    stands walks jumps stand walk jump how many what which way does do doing thing things that moves moving
    move turns stays still rotating static more fewer as than same colour size come before yes up down
    0 1 2 3"""
# All of them, in alphabetical order: the small CLIP reads one token a word.
WORDS = tuple(sorted({*(word for table in VALUES.values() for v in table for word in SYNONYMS.get(v, (v,))),
                      *PLURALS.values(), *PLACES.values(), *KINDS, *MATERIALS, *OTHER.split(),
                      *(name.lower() for name in NAMES)}))


# -- commands ------------------------------------------------------------------------------------------------


def bench(count=2048):
    """How many a second, by the clock and by the processor's time: they differ when the machine is shared."""
    scene = scenes(range(count))
    print(f"{count} scenes, 64 x 64, {torch.get_num_threads()} thread(s): best of five")
    jobs = {"sample scenes": lambda: scenes(range(count)), "render": lambda: render(scene),
            "write captions": lambda: captions(scene, 2)}
    for what, work in jobs.items():
        seconds = []
        for _ in range(5):
            clock, processor = time.perf_counter(), time.process_time()
            work()
            seconds.append((time.perf_counter() - clock, time.process_time() - processor))
        wall, busy = (count / min(column) for column in zip(*seconds, strict=True))
        print(f"{what:16}{wall:10,.0f} a second  {busy:10,.0f} a CPU-second")


def sheet(path, count=32):
    """A page of pictures under which caption 0, 1, 2, ... of each is written."""
    scene = scenes(range(count))
    texts = [captions(pick(scene, slice(b, b + 1)), b)[0] for b in range(count)]
    grid(path, render(scene, 160)[0], texts, columns=8, title="The built-in world")
    print(f"wrote {path}: {count} pictures of the split train")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sheet", metavar="PNG", help="write a contact sheet")
    parser.add_argument("--bench", action="store_true", help="measure speed")
    parser.add_argument("--threads", type=int, default=1, help="threads for --bench")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.sheet:
        sheet(options.sheet)
    elif options.bench:
        bench()
    else:
        parser.print_help()
