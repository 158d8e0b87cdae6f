"""The built-in shop: customers with planted tastes, products seen through a picture and a title, marked accidents.

Every product has attributes. Some show in its picture, some are told in its title. A customer has a taste for every
attribute value and a personal weight for what is seen against what is told (drawn from a U-shaped law: most customers
mind one of the two). A click is a draw from

    p(i | u)  ~  exp( strength (w_u seen_ui + (1 - w_u) told_ui) + fame_i )        without replacement

and a share of the training clicks is replaced by accidents, drawn by fame alone and marked. Valid and test clicks are
all meant. Features are what an encoder would make of the picture and the title: a random linear map of the attributes,
plus *drift* (the picture's clutter, which no customer cares about) and *omission* (titles leave attributes out).
"""
import numpy as np
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
USERS, ITEMS, CLUTTER, MOST = 1000, 600, 24, 15


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
    """Draws without replacement (Gumbel top-n), split as MMRec does, accidents among train.   -> (E,) sorted tensors

    Each user has 7 to MOST clicks. Returned are user, item, accident (bool) and label (0 train, 1 valid, 2 test).
    """
    def draw(logits):
        return (logits - torch.rand(scores.shape, generator=rng).log().neg().log()).topk(MOST, 1).indices

    meant = draw(scores)                                                                         # (U, MOST)
    slips = draw(famous.expand_as(scores).scatter(1, meant, -torch.inf))                         # none of them meant
    n = torch.randint(7, MOST + 1, (len(scores), 1), generator=rng)
    user, place = torch.nonzero(torch.arange(MOST) < n).T
    label = torch.from_numpy(split_rule(user.numpy(), int(torch.randint(2**31, (), generator=rng))))
    accident = (torch.rand(len(user), generator=rng) < accidents) & (label == 0)
    item = torch.where(accident, slips[user, place], meant[user, place])
    order = (user * scores.shape[1] + item).argsort()
    return user[order], item[order], accident[order], label[order]


def split_rule(user, seed):
    """MMRec's split, per user in random order: under 10 rows the last two are valid and test, else the last fifth.

    user (E,) in any order -> label (E,) 0, 1, 2.   n >= 10: held = floor(n / 5), valid = held // 2, test = the rest
    """
    order = np.lexsort((np.random.default_rng(seed).random(len(user)), user))
    _, start, count = np.unique(user[order], return_index=True, return_counts=True)
    held = np.where(count < 10, np.minimum(2, count - 1), count // 5)       # a user with one row keeps it in train
    late = np.arange(len(user)) - np.repeat(start + count - held, count)    # < 0: train
    label = np.empty(len(user), dtype=np.int64)
    label[order] = np.where(late < 0, 0, np.where(late < np.repeat(held // 2, count), 1, 2))
    return label


def features(items, told, drift, rng, width=64):
    """What frozen encoders would see: {"image": (I, 64), "text": (I, 64)}, rows of unit length.

    image   a random map of the seen attributes and of CLUTTER irrelevant directions (times drift), plus noise
    text    a random map of the told attributes that the title does not leave out, plus noise
    """
    def one_hot(a):
        return F.one_hot(items[a], len({**SEEN, **TOLD}[a])).float()

    clutter = drift * torch.randn(ITEMS, CLUTTER, generator=rng) / CLUTTER**0.5 * len(SEEN) ** 0.5
    inside = {"image": torch.cat([*(one_hot(a) for a in SEEN), clutter], 1),
              "text": torch.cat([one_hot(a) * told[a][:, None] for a in TOLD], 1)}
    outside = {}
    for name, x in inside.items():
        x = x @ torch.randn(x.shape[1], width, generator=rng) + 0.5 * torch.randn(ITEMS, width, generator=rng)
        outside[name] = F.normalize(x, dim=1)
    return outside


def titles(items, told):
    """A short sentence for each item; an attribute that is not told is left out."""
    def word(a, i, before="", after="", otherwise=""):
        return f"{before}{TOLD[a][items[a][i]]}{after}" if told[a][i] else otherwise

    return [word("material", i, after=" ") + word("kind", i, otherwise="gift") + word("occasion", i, before=" for ")
            for i in range(ITEMS)]
