"""Pictures to edit, each with an instruction: the input of DE-Net.

    edits = load("noto", root="emoji", split="test", size=64)
    edits.source([0]), edits.instructions[0], edits.target([0])

    builtin                 the six kinds of data/views.py, with the result and the mask of what may change
    noto, emojitwo          the same emoji in another skin tone or gender
    codraw                  frame t of a story, the words of step t + 1, frame t + 1
    others of captions.py   the instruction is a sentence of another picture; no result is known

Unpaired training sees pictures and sentences, never a result: edits.said([0], seed=7) gives a sentence that is true of
the source and one that is false of it and asks for the edit, alike but for what should change.
"""
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data import captions, safe, stories, views, world
from data.batches import seed_from
from data.draw import uniform
from data.parts import BUILTIN, Lazy, check_name, set_aside
from data.views import ADD, BACKGROUND, RECOLOUR, REMOVE, RESHAPE


@dataclass
class Edits:
    """E pictures with instructions; what is not known is None."""
    name: str
    size: int                         # pixels of a side
    instructions: Sequence            # E sentences
    kinds: Sequence                   # E of tone, gender, recolour, ...
    source: Callable                  # rows -> (B, 3, size, size) in [-1, 1]
    captions: Sequence                # E lists of sentences that are true of the source
    target: Callable | None = None    # rows -> (B, 3, size, size), the known result
    mask: Callable | None = None      # rows -> (B, 1, size, size), 1 where the edit may change a pixel
    wanted: Sequence | None = None    # E lists of sentences that are true of the result; None: the instruction is one
    claims: Callable | None = None    # (rows, seed, k) -> [(B true, B false sentences)] more of the same pictures
    about: Callable | None = None     # (rows, seed) -> [(what it speaks of, B true, B false sentences)], see below
    view: Callable | None = None      # rows -> what data.views.edits says: scenes before and after, kinds

    def __len__(self):
        return len(self.instructions)

    def said(self, rows, seed=0, more=0):
        """Sentences about sources: pairs (true, false); the false one of the first pair asks for the edit.

        -> [(B strings, B strings), ...]: one pair, and up to `more` others where the data knows more to say
        """
        rows = [int(row) for row in rows]
        if self.claims:
            return self.claims(rows, seed, more)
        told = []
        for row in rows:
            asks = self.wanted[row] if self.wanted else [self.instructions[row]] * len(self.captions[row])
            differ = [pair for pair in zip(self.captions[row], asks, strict=False) if pair[0] != pair[1]]
            told.append(differ[seed_from(seed, row, 1) % len(differ)] if differ else (self.captions[row][0], asks[0]))
        return [tuple(map(list, zip(*told, strict=True)))]


def load(name="builtin", root="", split="test", size=64, seed=0, holdout=0.1, kinds=views.EDITS, pairs=0.5):
    """Open a data set by name, as in captions.load.   kinds, pairs: of the built-in world, see views.edits   -> Edits"""
    name = captions.ALIASES.get(name, name)
    check_name(name, captions.NAMES, root, split, "edits")
    if name == "builtin":
        return builtin(split, size, seed, kinds, pairs)
    if name == "codraw":
        return steps(stories.load(name, root, split, size, holdout=holdout))
    if name in ("noto", "emojitwo"):
        return emoji(name, Path(root), split, size, holdout)
    data = captions.load(name, root, split, size, seed, holdout)

    def other(row):
        return (row + 1 + seed_from(seed, row) % max(1, len(data) - 1)) % len(data)

    said = Lazy(len(data), lambda row: data.sentences([other(row)], seed)[0])
    return Edits(name, size, said, ["other"] * len(data), data.images, data.captions)


def builtin(split, size, seed, kinds, pairs):
    """Edits of the world: the picture that should come out and the pixels that may change are known."""
    @functools.lru_cache(maxsize=2)                          # pictures and sentences of a batch come from one view
    def drawn(rows):
        return views.edits(rows, seed, split, kinds, pairs)

    def view(rows):
        return drawn(tuple(int(row) for row in rows))

    def shown(rows):
        return views.edit_pictures(view(rows), size)

    def told(make):
        return Lazy(BUILTIN[split], lambda row: make(view([row])))

    return Edits("builtin", size, told(lambda v: v["sentence"][0]),
                 told(lambda v: views.EDITS[int(v["kind"][0])]),
                 lambda rows: world.render(view(rows)["before"], size)[0], told(lambda v: v["caption_before"][:1]),
                 lambda rows: shown(rows)[1], lambda rows: shown(rows)[2][:, None].float(),
                 claims=lambda rows, seed, more: claims(view(rows), seed, more, split),
                 about=lambda rows, seed: about(view(rows), seed, split), view=view)


def claims(view, seed, more, split):
    """What is true and what is false of the sources, in the words of the instructions.   -> [(B true, B false), ...]

    The first pair is the instruction and what undoes it ("the star is red", "the star is blue"); the others are about
    what the edit leaves as it is, so they are true and false of the result too: each with a change that is never painted.
    """
    before, after, edit, edited = (view[name] for name in ("before", "after", "kind", "object"))
    undone = torch.where(edit >= ADD, ADD + REMOVE - edit, edit)                      # what was added is to be removed
    pairs = [(views.wishes(after, before, undone, edited.clamp(min=0)), view["sentence"])]
    for k in range(more):
        u = uniform(before["key"] ^ seed_from(seed, k), 3)
        kind = (u[:, 0] * ADD).long()                                                 # any but add and remove
        which = (before["present"][:, 1] & (u[:, 1] < 0.5)).long()
        # The edited thing keeps its texture and, if that is what changed, its colour; its name is gone with its shape.
        lost = (kind == edit) | (edit == RESHAPE) | (edit == REMOVE) | (edit == RECOLOUR) & (kind == RESHAPE)
        kind = torch.where((which == edited) & lost, BACKGROUND, kind)
        kind = torch.where((edit == BACKGROUND) & (kind == BACKGROUND), RECOLOUR, kind)
        other = {name: value.clone() for name, value in before.items()}
        views.change(before, other, kind, which, u[:, 2], split)
        pairs.append((views.wishes(other, before, kind, which), views.wishes(before, other, kind, which)))
    return pairs


def about(view, seed, split):
    """What is true of the sources, by what it speaks of.   -> [("colour", B true, B false sentences), ...]

    Colour of either thing (of the only one twice), background, presence: "there is a red star", "there is no red star". False
    sentences name a value that the thing could have.
    """
    before, told = view["before"], []
    u = uniform(before["key"] ^ seed_from(seed, 9), 1)[:, 0]
    for what, slot, kind in (("colour", 0, RECOLOUR), ("background", 0, BACKGROUND), ("colour", 1, RECOLOUR)):
        which = slot * before["present"][:, 1].long()
        kinds, other = torch.full_like(which, kind), {name: value.clone() for name, value in before.items()}
        views.change(before, other, kinds, which, u, split)
        told.append((what, views.wishes(other, before, kinds, which), views.wishes(before, other, kinds, which)))
    for slot in (0, 1):
        things = [fact["objects"][min(slot, len(fact["objects"]) - 1)] for fact in world.facts(before)]
        there, gone = (list(map(world.noun, world.chances(before["key"], k), things, [tell] * len(things)))
                       for k, tell in ((97, {"shape", "colour", "texture", "size"}), (98, {"shape", "colour"})))
        told.append(("presence", [f"there is {world.article(x)}" for x in there], [f"there is no {x}" for x in gone]))
    return told


def emoji(name, root, split, size, holdout):
    """X_edits.tsv: `source target kind instruction`, rows of X.npz. A pair is of one concept: of one part."""
    part = "test" if split == "test" else "train"
    data = captions.load(name, root, part, size, holdout=0)
    valid = set(set_aside(captions.concepts(data), holdout)) if part == "train" else set()
    found = []
    file = root / f"{name}_{part}_edits.tsv"
    lines = safe.read_text(file, "source, target, kind, instruction").splitlines()
    for number, line in enumerate(lines[1:], 2):
        try:
            source, target, kind, instruction = line.split("\t")
            pair = int(source), int(target)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {line!r:.60} is not 'source target kind instruction' with tabs between and "
                             "two row numbers") from error
        if not 0 <= min(pair) <= max(pair) < len(data):
            raise ValueError(f"{file}, line {number}: rows {pair} are not among the {len(data)} pictures")
        if (pair[0] in valid) == (pair[1] in valid) == (split == "valid"):
            found.append((pair, instruction, kind))
    if not found:
        raise ValueError(f"{file} holds no edit of the {split} part")
    pairs, said, kinds = zip(*found, strict=True)

    def end(side):
        return lambda rows: data.images([pairs[int(row)][side] for row in rows])

    return Edits(name, size, said, kinds, end(0), [data.captions[source] for source, _ in pairs], end(1),
                 wanted=[data.captions[target] for _, target in pairs])


def steps(data):
    """Frame t of a story, the sentence of frame t + 1, frame t + 1."""
    places = [(story, t) for story, told in enumerate(data.captions) for t in range(len(told) - 1)]

    def frame(later):
        def pictures(rows):
            picked = [places[int(row)] for row in rows]
            shown = data.frames([story for story, _ in picked])                      # (B, F, 3, H, W)
            return shown[range(len(picked)), [t + later for _, t in picked]]
        return pictures

    return Edits(data.name, data.size, [data.captions[s][t + 1] for s, t in places], ["draw"] * len(places),
                 frame(0), [[data.captions[s][t]] for s, t in places], frame(1))
