"""What spoilt pictures promise: one hue changes, the sentence that is asked for says which, and areas count alike."""
import torch

from data import edits
from data.batches import generator
from edit.spoil import THINGS, most_hurt, restored, spoil
from edit.task import Config, Sentences

GREY, RED, BLUE = (0.1, 0.1, 0.1), (0.8, -0.6, -0.6), (-0.6, -0.5, 0.9)


def flat(*things, size=16):
    """Pictures of one square each, from a quarter to three quarters of the side, on grey."""
    pictures = torch.tensor(GREY)[:, None, None].repeat(len(things), 1, size, size)
    for picture, colour in zip(pictures, things, strict=True):
        picture[:, size // 4 : -size // 4, size // 4 : -size // 4] = torch.tensor(colour)[:, None, None]
    return pictures


def test_a_thing_takes_the_colour_of_another_pictures_thing():
    pictures = flat(*[RED] * THINGS, *[BLUE] * THINGS)
    spoilt = spoil(pictures, generator(0), tries=64)
    for row in range(2 * THINGS):
        if row % THINGS:                                     # the others lose the hue of a random place
            torch.testing.assert_close(spoilt[row], pictures[(row + THINGS) % (2 * THINGS)])


def test_the_background_takes_the_colour_of_another_background():
    pictures = flat(*[RED] * (2 * THINGS))
    pictures[THINGS:] = torch.where(pictures[THINGS:] == 0.1, 0.7, pictures[THINGS:])
    seeds = [spoil(pictures, generator(seed), tries=1)[0] for seed in range(30)]
    changed = [bool((seed[:, 0, 0] - 0.7).abs().max() < 1e-6 and (seed[:, 8, 8] == pictures[0, :, 8, 8]).all()) for seed in seeds]
    assert sum(changed) > 10                                 # three quarters of the places are background, in both pictures


def test_shades_stay_and_nothing_else_changes():
    """Stripes of two lights of one hue stay stripes, and the ground keeps its bits."""
    pictures = flat(*[RED] * THINGS, *[BLUE] * THINGS)
    pictures[1, :, 4:12, 4:12:2] += 0.1
    spoilt = spoil(pictures, generator(0), tries=64)[1]
    assert torch.equal(spoilt[:, :4], pictures[1][:, :4])
    torch.testing.assert_close(spoilt[:, 4:12, 4:12:2] - spoilt[:, 4:12, 5:12:2], torch.full((3, 8, 4), 0.1))
    assert spoilt[2, 8, 8] > spoilt[0, 8, 8]                 # red has become blue


def test_spoiling_is_a_function_of_its_generator_and_leaves_its_input():
    pictures = edits.load("builtin", split="train", size=32).source(range(12))
    before = pictures.clone()
    first, again, other = (spoil(pictures, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(pictures, before)
    assert first.abs().max() <= 1 and (first != pictures).flatten(1).any(1).sum() > 8
    assert (spoil(pictures[:THINGS], generator(3)) != pictures[:THINGS]).any()               # a batch of four has partners too
    assert spoil(pictures[:1], generator(3)).allclose(pictures[:1])                          # one picture has none


def test_the_sentence_that_lost_most_is_asked_for():
    before = torch.tensor([[[5.0, 5, 5], [1, 1, 1]], [[4, 4, 4], [2, 2, 2]]])                # (T, 2, B)
    after = torch.tensor([[[5.0, 1, 4], [1, 1, 0]], [[1, 4, 4], [2, 2, 1.5]]])
    pair, hurt = most_hurt(before, after)                    # what both sentences of a pair lose tells nothing
    assert pair[:2].tolist() == [1, 0] and hurt.tolist() == [True, True, False]
    assert most_hurt(before, after, least=3.5)[1].tolist() == [False, True, False]


def test_a_small_spoilt_thing_counts_as_much_as_its_surroundings():
    source = flat(RED, RED, RED)
    spoilt = flat(BLUE, BLUE, RED)
    inside, outside = spoilt.clone(), source.clone()
    outside[:, :, 0] += 0.5                                  # one row of sixteen, three quarters of which are elsewhere
    assert restored(source, source, spoilt).abs().max() == 0
    inner, outer = restored(inside, source, spoilt), restored(outside, source, spoilt)
    copied = torch.tensor([abs(a - b) for a, b in zip(RED, BLUE, strict=True)]).mean()
    torch.testing.assert_close(inner, torch.stack([copied, copied, copied * 0]))
    torch.testing.assert_close(outer, torch.tensor([0.5 * 16 / 192, 0.5 * 16 / 192, 0.5 / 16]))    # whole: a plain mean
    torch.testing.assert_close(restored(outside, source, spoilt, 2.0), 2 * outer)
    torch.testing.assert_close(restored(inside, source, spoilt, 2.0), inner)


def test_clip_finds_the_sentence_that_became_false():
    """Of the world's spoilt things most are asked back by a sentence that names their colour, of grounds by theirs."""
    data = edits.load("builtin", split="train", size=64, pairs=0.0)
    rows, read = range(48), Sentences(Config(), [], torch.device("cpu"))
    pictures, said = data.source(rows), data.said(rows, 3, 3)
    spoilt = spoil(pictures, generator(1))
    with torch.no_grad():
        pair, hurt = most_hurt(read.logits(pictures, said), read.logits(spoilt, said))
    assert 0.5 < hurt.float().mean() < 1
    asked = [said[int(pair[row])][0][row] for row in rows if hurt[row]]
    ground = torch.tensor([(spoilt[row] - pictures[row]).abs().amax(0)[[0, 0, -1, -1], [0, -1, 0, -1]].max() > 0.1
                           for row in rows if hurt[row]])                                    # a corner changed
    says = torch.tensor(["background" in text for text in asked])
    assert (says & ground).sum() > 0.5 * ground.sum() > 3 and (says & ~ground).sum() < 0.2 * (~ground).sum()
