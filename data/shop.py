"""The built-in shop: customers with planted tastes, products seen through a picture and a title, marked accidents.

Every product has attributes. Some show in its picture, some are told in its title. A customer has a taste for every
attribute value and a personal weight for what is seen against what is told (drawn from a U-shaped law: most customers
mind one of the two). A click is a draw from

    p(i | u)  ~  exp( strength (w_u seen_ui + (1 - w_u) told_ui) + fame_i )        without replacement

and a share of the training clicks is replaced by accidents, drawn by fame alone and marked. Valid and test clicks are
all meant. Features are what an encoder would make of the picture and the title: a random linear map of the attributes,
plus *drift* (the picture's clutter, which no customer cares about) and *omission* (titles leave attributes out).
"""
import torch
from torch.nn import functional as F

from data.batches import generator

SEEN = {
    "shape": ("circle", "square", "triangle", "star", "heart", "ring", "cross", "moon"),
    "colour": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black"),
    "texture": ("plain", "striped", "dotted"),
}
TOLD = {
    "kind": ("mug", "poster", "cushion", "lamp", "bag", "clock", "plate", "scarf"),
    "material": ("wooden", "glass", "linen", "steel", "paper", "clay"),
    "occasion": ("birthdays", "travel", "the office", "the garden", "winter", "children"),
}
USERS, ITEMS, CLUTTER = 1000, 600, 24


def shop(seed=0, strength=3.0, fame=0.8, accidents=0.15, omission=0.15, drift=1.0):
    """The fields of an `Interactions` as a dict. Deterministic from seed; the planted truth is in "truth"."""
    rng = generator(seed, 7)
    items = {a: torch.randint(len(v), (ITEMS,), generator=rng) for a, v in {**SEEN, **TOLD}.items()}
    tastes = {a: torch.randn(USERS, len(v), generator=rng) for a, v in {**SEEN, **TOLD}.items()}
    weight = torch.rand(USERS, 1, generator=rng).mul(torch.pi).cos().add(1).div(2)               # U-shaped on [0, 1]
    likes = sum(w * sum(tastes[a][:, items[a]] for a in side) / len(side) ** 0.5
                for w, side in ((weight, SEEN), (1 - weight, TOLD)))                             # (U, I)
    famous = fame * torch.randn(ITEMS, generator=rng)
    users, chosen, noise, label = clicks(strength * likes + famous, famous, accidents, rng)
    split = [torch.stack([users, chosen], 1)[label == k] for k in range(3)]
    told = {a: torch.rand(ITEMS, generator=rng) >= omission for a in TOLD}
    truth = {"items": items, "tastes": tastes, "weight": weight[:, 0], "likes": likes, "fame": famous, "told": told}
    return {"users": USERS, "items": ITEMS, "train": split[0], "valid": split[1], "test": split[2],
            "features": features(items, told, drift, rng), "titles": titles(items, told), "noise": noise[label == 0],
            "truth": truth, "source": f"built-in shop (seed {seed})", "dropped": {"valid": 0, "test": 0}}


def clicks(scores, famous, accidents, rng):
    """Gumbel top-n draws without replacement.   -> user, item, noise, label (E,), sorted by user, then item

    Each user has 7 to 15 clicks: one for valid, two for test, the rest train.
    """
    gumbel = -torch.rand(scores.shape, generator=rng, dtype=torch.float64).log().neg().log()     # (U, I)
    order = (scores - gumbel.neg()).argsort(1, descending=True)
    n = torch.randint(7, 16, (len(scores), 1), generator=rng)
    place = torch.arange(15).expand(len(scores), -1)
    user = torch.arange(len(scores))[:, None].expand(-1, 15)
    return user, order, place, n
