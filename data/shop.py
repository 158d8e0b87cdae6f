"""The built-in shop: customers with planted tastes, products with a picture and a title, marked accidents.

A product (data/views.py) is a design (shape, colour, texture) in a cluttered picture, and a title that always tells its kind
and material and leaves attributes of the design out. A customer belongs to one of STYLES styles, deviates from it personally,
and weighs what is seen against what is told (a U-shaped law: most customers mind one of the two):

    taste_u  =  LOYAL style + sqrt(1 - LOYAL^2) own
    p(i | u) ~  exp( STRENGTH (w_u seen_ui + (1 - w_u) told_ui) + fame_i )

seen_ui sums the tastes for what the picture shows, told_ui for kind and material. Clicks are drawn from p without
replacement. A share of the training clicks is replaced by accidents, drawn by fame alone and marked in `noise`; valid and test
clicks are all meant. So the truth is known: who likes what and why, and which clicks mean nothing. The features are what the
frozen small CLIP makes of pictures and titles.
"""
import functools

import numpy as np
import torch
from torch.nn import functional as F

from data import clip
from data.batches import generator
from data.draw import render
from data.views import products

SEEN, TOLD = {"shape": 8, "colour": 8, "texture": 3}, {"kind": 8, "material": 6}
USERS, ITEMS, MOST = 1000, 600, 15            # at most MOST clicks a user
STYLES, LOYAL, STRENGTH, FAME, ACCIDENTS = 60, 0.8, 4.0, 0.4, 0.15


def shop(seed=0):
    """The fields of an `Interactions`, as a dict; deterministic from seed.

    "truth" holds attributes {name: (I,)}, told {name: (I,) bool}, tastes {name: (U, values)}, style and weight (U,),
    likes (U, I), fame (I,), and masks, a function from item ids to the product's pixels (n, 1, H, W).
    """
    view, rng = products(range(ITEMS), seed), generator(seed, 7)
    attributes = view["attributes"]
    style = torch.randint(STYLES, (USERS,), generator=rng)
    tastes = {a: LOYAL * torch.randn(STYLES, n, generator=rng)[style]                            # (U, values)
              + (1 - LOYAL**2) ** 0.5 * torch.randn(USERS, n, generator=rng)
              for a, n in {**SEEN, **TOLD}.items()}
    weight = torch.rand(USERS, 1, generator=rng).mul(torch.pi).cos().add(1).div(2)        # U-shaped on [0, 1]
    likes = sum(w * sum(tastes[a][:, attributes[a]] for a in side) / len(side) ** 0.5            # (U, I)
                for w, side in ((weight, SEEN), (1 - weight, TOLD)))
    fame = FAME * torch.randn(ITEMS, generator=rng)
    user, item, accident, label = clicks(STRENGTH * likes + fame, fame, rng)
    train, valid, test = (torch.stack([user, item], 1)[label == k] for k in range(3))

    def drawn(ids, part):
        rows = torch.as_tensor(ids).tolist()
        return render(products(rows, seed)["scene"], 64)[part]

    truth = {"attributes": attributes, "told": view["told"], "tastes": tastes, "style": style,
             "weight": weight[:, 0], "likes": likes, "fame": fame, "masks": lambda ids: drawn(ids, 1)[:, :1]}
    return {"users": USERS, "items": ITEMS, "train": train, "valid": valid, "test": test,
            "features": dict(features(seed)), "titles": view["titles"], "pictures": lambda ids: drawn(ids, 0),
            "noise": accident[label == 0], "truth": truth, "source": f"built-in shop (seed {seed})",
            "dropped": {"valid": 0, "test": 0}}


def clicks(scores, fame, rng):
    """Draws without replacement (Gumbel top-n), split as MMRec does, accidents among train.   -> (E,) each

    Each user has 7 to MOST clicks. Returned are user, item, accident (bool) and label (0 train, 1 valid, 2 test).
    """
    def draw(logits):
        return (logits - torch.rand(scores.shape, generator=rng).log().neg().log()).topk(MOST, 1).indices

    meant = draw(scores)                                                                         # (U, MOST)
    slips = draw(fame.expand_as(scores).scatter(1, meant, -torch.inf))                    # none of them meant
    n = torch.randint(7, MOST + 1, (len(scores), 1), generator=rng)
    user, place = torch.nonzero(torch.arange(MOST) < n).T
    label = torch.from_numpy(split_rule(user.numpy(), int(torch.randint(2**31, (), generator=rng))))
    accident = (torch.rand(len(user), generator=rng) < ACCIDENTS) & (label == 0)
    item = torch.where(accident, slips[user, place], meant[user, place])
    order = (user * scores.shape[1] + item).argsort()
    return user[order], item[order], accident[order], label[order]


def split_rule(user, seed):
    """MMRec's split, per user in random order: the last fifth is held out; under 10 rows, the last two.

    user (E,) in any order -> label (E,): 0 train, 1 valid, 2 test.   valid = held // 2, test: the rest
    """
    order = np.lexsort((np.random.default_rng(seed).random(len(user)), user))
    _, start, count = np.unique(user[order], return_index=True, return_counts=True)
    held = np.where(count < 10, np.minimum(2, count - 1), count // 5)  # a user with one row keeps it in train
    late = np.arange(len(user)) - np.repeat(start + count - held, count)    # < 0: train
    label = np.empty(len(user), dtype=np.int64)
    label[order] = np.where(late < 0, 0, np.where(late < np.repeat(held // 2, count), 1, 2))
    return label


@functools.cache                               # it takes seconds
@torch.no_grad()
def features(seed):
    """What the frozen small CLIP makes of the products: {"image": (I, E), "text": (I, w)}, rows of length 1.

    image   its embedding of the picture, with clutter and background that no customer minds (drift)
    text    the mean of its word features: what a title leaves out is missing (omission). Not its sentence embedding, which
            was trained to keep only what pictures show; kind and material are in no picture
    """
    view = products(range(ITEMS), seed)
    model, words = clip.small(), clip.small_tokeniser()(view["titles"])
    words = words[:, : int((words > 0).sum(1).max())]
    image = model.encode_image(clip.standard(render(view["scene"], model.size)[0], model.size))[1]
    told = (words > 0)[..., None]                                                                # no padding
    text = (model.encode_text(words)[1] * told).sum(1) / told.sum(1)
    return {"image": F.normalize(image, dim=1), "text": F.normalize(text, dim=1)}
