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
    """Draws without replacement (Gumbel top-n), then the split.   -> user, item, noise, label (E,), sorted by user, item

    Each user clicks 8 to 16 times: one click in valid, two in test, the rest in train, where a share of the clicks is
    replaced by accidents drawn by fame alone.
    """
    most, users = 16, len(scores)
    gumbel = lambda: -torch.rand(scores.shape, generator=rng).clamp(1e-9, 1 - 1e-7).log().neg().log()  # noqa: E731
    meant = (scores + gumbel()).topk(most, dim=1).indices                                        # (U, most), best first
    meant = meant.gather(1, torch.rand(users, most, generator=rng).argsort(1))                   # splits are alike
    count = torch.randint(8, most + 1, (users, 1), generator=rng)
    place = torch.arange(most).expand(users, -1)
    label = torch.where(place == 0, 1, torch.where(place < 3, 2, 0))                             # valid, test, test, train
    noise = (torch.rand(users, most, generator=rng) < accidents) & (label == 0)
    others = (famous + gumbel()).scatter(1, meant, -torch.inf).topk(most, dim=1).indices         # nothing clicked twice
    item = torch.where(noise, others, meant)
    keep = place < count
    user = torch.arange(users)[:, None].expand(-1, most)[keep]
    item, noise, label = item[keep], noise[keep], label[keep]
    order = (user * ITEMS + item).argsort()
    return user[order], item[order], noise[order], label[order]


def features(items, told, drift, rng):
    """{"image": (I, 64), "text": (I, 64)}: random linear maps of one-hot attributes, clutter and gaps; unit rows."""
    def one_hot(attributes, keep=None):
        parts = [F.one_hot(items[a], len(v)).float() * (1 if keep is None else keep[a][:, None]) for a, v in attributes.items()]
        return torch.cat(parts, 1)

    clutter = drift * torch.randn(ITEMS, CLUTTER, generator=rng) / CLUTTER**0.5
    seen, heard = torch.cat([one_hot(SEEN), clutter], 1), one_hot(TOLD, told)
    result = {}
    for name, x in (("image", seen), ("text", heard)):
        x = x @ torch.randn(x.shape[1], 64, generator=rng) + 0.3 * torch.randn(ITEMS, 64, generator=rng)
        result[name] = F.normalize(x, dim=1)
    return result


def titles(items, told):
    """What the shop writes under each picture; what the title leaves out is missing from the text features too."""
    result = []
    for i in range(ITEMS):
        material, occasion = (TOLD[a][items[a][i]] if told[a][i] else "" for a in ("material", "occasion"))
        kind = TOLD["kind"][items["kind"][i]] if told["kind"][i] else "piece"
        result.append(" ".join(f"{material} {kind}".split()) + (f" for {occasion}" if occasion else ""))
    return result
