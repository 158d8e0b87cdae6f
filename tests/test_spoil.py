"""What spoilt pictures promise: one hue changes, the sentence that is asked for says which, and areas count alike."""
import torch

from data import edits
from data.batches import generator
from edit.spoil import ADDED, PASTED, THING, most_hurt, restored, spoil

GREY, RED, BLUE = (0.1, 0.1, 0.1), (0.8, -0.6, -0.6), (-0.6, -0.5, 0.9)


def flat(*things, size=16):
    """Pictures of one square each, from a quarter to three quarters of the side, on grey."""
    pictures = torch.tensor(GREY)[:, None, None].repeat(len(things), 1, size, size)
    for picture, colour in zip(pictures, things, strict=True):
        picture[:, size // 4 : -size // 4, size // 4 : -size // 4] = torch.tensor(colour)[:, None, None]
    return pictures


def scene(thing, size=32, at=(8, 8), wide=12, ground=GREY):
    """One square of a colour, or of what `thing` (3, wide, wide) shows, on a ground."""
    picture = torch.tensor(ground)[:, None, None].repeat(1, size, size)
    thing = torch.tensor(thing)[:, None, None] if isinstance(thing, tuple) else thing
    picture[:, at[0] : at[0] + wide, at[1] : at[1] + wide] = thing
    return picture


def striped(colour, wide=12):
    return torch.tensor(colour)[:, None, None] + 0.1 * (1 - 2 * (torch.arange(wide) // 3 % 2)).expand(1, wide, wide)


def test_a_thing_takes_the_colour_of_another_pictures_thing():
    pictures = flat(*[RED, BLUE] * 8)
    spoilt, wanted, donor = spoil(pictures, generator(0), ways=(THING,))
    assert torch.equal(wanted, pictures) and donor.tolist() == list(range(16))
    for row in range(16):
        options = flat(RED, BLUE)
        assert min((spoilt[row] - option).abs().max() for option in options) < 1e-5
    changed = (spoilt - pictures).abs().flatten(1).amax(1) > 0.5
    assert changed.all()                                     # half of the others are of the same colour: no partners


def test_the_background_takes_the_colour_of_another_background():
    pictures = flat(*[RED] * 16)
    pictures[8:] = torch.where(pictures[8:] == 0.1, 0.7, pictures[8:])
    spoilt = spoil(pictures, generator(0))[0][0]
    assert (spoilt[:, 0, 0] - 0.7).abs().max() < 1e-6 and torch.equal(spoilt[:, 8, 8], pictures[0, :, 8, 8])


def test_what_is_scattered_about_is_no_thing():
    """Four bits of a hue in the corners are neither recoloured nor pasted; the same bits side by side are."""
    for wide, at, thing in ((5, ((2, 2), (2, 25), (25, 2), (25, 25)), False), (5, ((8, 8), (8, 13), (13, 8), (13, 13)), True)):
        pictures = torch.tensor(GREY)[:, None, None].repeat(8, 1, 32, 32)
        for y, x in at:
            pictures[:, :, y : y + wide, x : x + wide] = torch.tensor([RED, BLUE] * 4)[..., None, None]
        for way in (THING, PASTED):
            assert (spoil(pictures, generator(0), ways=(way,))[0] != pictures).any() == thing, (thing, way)


def test_shades_stay_and_nothing_else_changes():
    """Stripes of two lights of one hue stay stripes in another colour, and the ground keeps its bits."""
    pictures = torch.stack([scene(striped(RED)), *[scene(BLUE)] * 3])
    spoilt = spoil(pictures, generator(0), ways=(THING,))[0][0]
    thing = (slice(None), slice(8, 20), slice(8, 20))
    assert torch.equal(spoilt[:, :8], pictures[0][:, :8]) and spoilt[2, 10, 10] > spoilt[0, 10, 10]          # red has become blue
    torch.testing.assert_close(spoilt[thing].diff(dim=2), pictures[0][thing].diff(dim=2))


def test_a_thing_is_pasted_where_there_is_room():
    """The pasted thing comes out of the picture that is named, on the same background, beside what was there."""
    light, colours = (0.9, 0.9, 0.9), [RED, BLUE, RED, BLUE, RED] * 2
    places = [(2, 2), (20, 3), (3, 20), (18, 18), (2, 10)] * 2
    pictures = torch.stack([scene(colour, at=at, wide=9, ground=GREY if i < 5 else light)
                            for i, (colour, at) in enumerate(zip(colours, places, strict=True))])
    spoilt, _, donor = spoil(pictures, generator(0), ways=(PASTED,))
    assert (donor != torch.arange(10)).sum() > 6 and ((donor < 5) == (torch.arange(10) < 5)).all()
    for row in range(10):
        colour = torch.tensor(colours[int(donor[row])])[:, None, None]
        before, after = ((x[row] - colour).abs().amax(0) < 0.1 for x in (pictures, spoilt))
        own = (pictures[row] - torch.tensor(colours[row])[:, None, None]).abs().amax(0) < 1e-6
        assert 12 <= after.sum() - before.sum() <= 81 or donor[row] == row
        assert (spoilt[row] == pictures[row]).all(0)[own].float().mean() > 0.8               # hardly covered


def test_a_thing_is_added_to_the_first_quarter_with_room_at_one_size():
    """The given picture is whole; what is wanted is a function of it and of the thing: place and size are always the same."""
    corners = {(3, 3): (7.5, 23.5), (20, 3): (7.5, 7.5), (3, 20): (7.5, 7.5)}                # what is there, what is to come
    for at, wanted_at in corners.items():
        pictures = torch.stack([scene(RED, at=at, wide=9), *[scene(BLUE, at=(8 + i, 12), wide=6 + i) for i in range(4)]])
        for seed in range(3):
            given, wanted, donor = spoil(pictures, generator(seed), ways=(ADDED,))
            assert torch.equal(given, pictures) and donor[0] > 0
            new = (wanted[0] - torch.tensor(BLUE)[:, None, None]).abs().amax(0) < 0.1
            y, x = (float(index.float().mean()) for index in new.nonzero(as_tuple=True))
            assert abs(y - wanted_at[0]) < 1 and abs(x - wanted_at[1]) < 1 and 60 <= new.sum() <= 100, (at, y, x, int(new.sum()))
            assert (wanted[0] == pictures[0]).all(0)[(pictures[0] - torch.tensor(RED)[:, None, None]).abs().amax(0) < 1e-6].all()


def test_spoiling_is_a_function_of_its_generator_and_leaves_its_input():
    pictures = edits.load("builtin", split="train", size=32).source(range(24))
    before = pictures.clone()
    first, again, other = (torch.stack(spoil(pictures, generator(seed))[:2]) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(pictures, before)
    assert first.isfinite().all() and first.abs().max() <= 1 and (first[0] != first[1]).flatten(1).any(1).sum() > 12
    assert (spoil(pictures[:4], generator(3))[0] != pictures[:4]).any()                      # a batch of four has partners too
    assert spoil(pictures[:1], generator(3))[0].allclose(pictures[:1])                       # one picture has none
    blank = torch.zeros(8, 3, 32, 32)
    assert torch.equal(spoil(blank, generator(0))[0], blank)                                 # nothing to be found


def test_the_sentence_that_lost_most_is_asked_for():
    before = torch.tensor([[[5.0, 5, 5], [1, 1, 1]], [[4, 4, 4], [2, 2, 2]]])                # (T, 2, B)
    after = torch.tensor([[[5.0, 1, 4], [1, 1, 0]], [[1, 4, 4], [2, 2, 1.8]]])
    pair, hurt = most_hurt(before, after)                    # what both sentences of a pair lose tells nothing
    assert pair[:2].tolist() == [1, 0] and hurt.tolist() == [True, True, False]
    assert most_hurt(before, after, least=3.5)[1].tolist() == [False, True, False]
    fits = torch.tensor([[True, False, True], [False, True, True]])
    assert most_hurt(before, after, fits)[1].tolist() == [False, False, False]      # what was hurt speaks of other things


def test_a_small_spoilt_thing_counts_as_much_as_its_surroundings():
    source = flat(RED, RED, RED)
    spoilt = flat(BLUE, BLUE, RED)
    inside, outside = spoilt.clone(), source.clone()
    outside[:, :, 0] += 0.5                                  # one row of sixteen, three quarters of which are elsewhere
    assert restored(source, source, spoilt).abs().max() == 0
    inner, outer = restored(inside, source, spoilt), restored(outside, source, spoilt)
    apart = torch.tensor([abs(a - b) for a, b in zip(RED, BLUE, strict=True)])
    copied, off = (apart + 3 * apart.square()).mean(), 0.5 + 3 * 0.25
    torch.testing.assert_close(inner, torch.stack([copied, copied, copied * 0]))
    torch.testing.assert_close(outer, off * torch.tensor([16 / 192, 16 / 192, 1 / 16]))    # whole: a plain mean
    torch.testing.assert_close(restored(outside, source, spoilt, 2.0), 2 * outer)
    torch.testing.assert_close(restored(inside, source, spoilt, 2.0), inner)
