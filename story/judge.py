"""Scores of drawn stories: a reader that no loss has seen says who is in each frame, and where.

    scores = judge(reader(), pictures, view, mask)       # pictures (B, F, 3, H, W), view of data.stories, mask 1 = drawn

named       share of drawn frames with exactly the right characters (shape and colour), where every one of them is named
pronoun     the same where somebody is only "it" or "they": the sentences before, or the given frames, tell who
attributes  share of the characters' shapes, colours and textures that are right
place       share of drawn frames with the right background, where the frame's own sentence does not tell it
position    share of characters that stand where they should, within a tenth of the picture
consistency share of pairs of frames of one story that show the same character alone, at least one of them drawn, in which
            the reader reads the same shape and colour, be they right or wrong
"""
import torch

from data.metrics import frechet_distance
from data.reader import agree


def judge(read, pictures, view, mask):
    """{score: share in [0, 1]}, not a number where no frame asks for it."""
    scene, drawn = view["scene"], mask.bool().flatten().cpu()
    reading = read(pictures.flatten(0, 1))
    reading = {name: x.cpu() for name, x in reading.items()}
    right, there, present = agree(reading, scene, where=False), agree(reading, scene), scene["present"]
    who = ((right["shape"] & right["colour"]) | ~present).all(1) & right["count"]
    pronoun, told = view["pronoun"].flatten(), view["place_told"].flatten()
    looks = torch.stack([right[name] for name in ("shape", "colour", "texture")], -1)          # (B F, 2, 3)
    scores = {"named": who[drawn & ~pronoun], "pronoun": who[drawn & pronoun], "attributes": looks[drawn][present[drawn]],
              "place": right["background"][drawn & ~told], "position": there["found"][drawn][present[drawn]]}
    scores = {name: x.float().mean() for name, x in scores.items()}
    return scores | {"consistency": consistency(reading, view["character"], drawn.view_as(view["pronoun"]))}


def consistency(reading, character, drawn):
    """Do two frames of a story show the same character alike?   character (B, F, 2), drawn (B, F) bool -> scalar"""
    batch, frames = drawn.shape
    seen = (reading["shape"][:, 0] * 100 + reading["colour"][:, 0]).view(batch, frames)
    alone, first = character[..., 1] < 0, character[..., 0]
    i, j = torch.triu_indices(frames, frames, 1)
    asked = alone[:, i] & alone[:, j] & (first[:, i] == first[:, j]) & (drawn[:, i] | drawn[:, j])
    return (seen[:, i] == seen[:, j])[asked].float().mean()


def chance(view):
    """What blind guesses reach: any of the cast in a named frame; in a pronoun frame whatever its own sentence leaves open.

    One of eight alone; a pair of 28; the other of a pair, of seven, where the sentence names one ("It meets Mo").
    """
    two, named = view["character"][..., 1] >= 0, view["named"].any(-1)
    blind = torch.where(two, 1 / 28, 1 / 8)
    guess = torch.where(two & named, 1 / 7, blind)
    return {"named": float(blind[~view["pronoun"]].mean()), "pronoun": float(guess[view["pronoun"]].mean()), "consistency": 1 / 8,
            "place": 1 / 6}


def distances(read, drawn, real):
    """Frechet distances on the reader's features, of frames and of whole stories.   (B, F, 3, H, W) twice, unpaired

    A story is its mean frame and its mean change from frame to frame, side by side (ours: the published story distance
    reads clips with a video net).
    """
    def features(pictures):
        x = read.features(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])            # (B, F, 96)
        change = (x[:, 1:] - x[:, :-1]).abs().mean(1) if x.shape[1] > 1 else x[:, 0] * 0
        return x.flatten(0, 1).cpu(), torch.cat([x.mean(1), change], 1).cpu()

    (frame, story), (real_frame, real_story) = features(drawn), features(real)
    return {"Frechet frame": float(frechet_distance(frame, real_frame, "reader")),
            "Frechet story": float(frechet_distance(story, real_story, "reader story"))}
