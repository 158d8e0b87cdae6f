"""Spoilt pictures: what to change and what to keep, learnt from pictures and sentences alone (ours, not in the paper).

    given, wanted, donor = spoil(pictures, generator(0))     # each lost a hue, or got a thing too many, or lacks one

Asked for what was true of a picture before it was spoilt, the editor has to give the picture back. That is an edit whose
result is known although nobody made it: change one thing as the sentence says, keep all else. What spoils a picture comes out
of another one, found by its hue: no scene, mask or attribute of the built-in world is used, so it serves any picture.
"""
import functools

import torch
from torch.nn import functional as F

HUE, THING, PASTED, ADDED = range(4)
WAYS = (HUE, ADDED, PASTED, ADDED, THING, ADDED, PASTED, ADDED)             # row i is spoilt in way i % 8: more of what is harder
HUES = (HUE, THING, THING, THING)                                             # where nobody knows what a sentence is about


def spoil(pictures, rng, ways=WAYS, near=(0.2, 0.3), tries=48):
    """Spoil row i in way i % len(ways), with what is found in other rows.   (B, 3, S, S) in [-1, 1]

    HUE     all places of the picture's median hue, mostly the background, take the mean colour of such places in another picture
    THING   the same for the hue least like it, mostly a thing on a background; the other thing's colour is unlike this one's
    PASTED  another picture's thing is put where there is room; best from a picture with the same background
    ADDED   the other way round: the picture is given whole, and another one's thing is wanted in its first quarter that has room,
            always of one size: what no sentence tells must be a function of the picture, or a blur is learnt

    All that lies within `near` of a hue (of HUE, of the others) is spoilt, half of that wholly; shades stay, and so textures and
    shadows. What is tiny, large or scattered about is no thing. A row without a partner stays as it is.
    -> given, wanted (B, 3, S, S): all but ADDED want the picture; (B,) whose thing was pasted or added, else the row itself
    """
    rows, light = torch.arange(len(pictures)), pictures.mean(1, keepdim=True)
    way = torch.tensor(ways)[rows % len(ways)]
    tint = torch.cat([pictures - light, 0.2 * light], dim=1)                         # (B, 4, S, S) hue, and a little light
    flat = tint.flatten(2)
    usual = flat.median(2, keepdim=True).values                                      # (B, 4, 1)
    places = torch.randint(flat.shape[2], (len(rows), tries), generator=rng).to(pictures.device)
    drawn = flat.gather(2, places[:, None].expand(-1, 4, -1))                        # (B, 4, tries)
    unlike = (drawn - usual).square().sum(1).argmax(1).cpu()
    chosen = torch.where((way == HUE)[:, None].to(flat.device), usual[..., 0], drawn[rows, :, unlike])               # (B, 4)
    far = length(tint - chosen[..., None, None])
    near = torch.where(way == HUE, *near).to(far)[:, None, None, None]
    share = (2 - far / near).clamp(0, 1)                                             # (B, 1, S, S), 1 where it is spoilt
    area = share.mean((1, 2, 3))
    colour = ((pictures * share).sum((2, 3)) / share.sum((2, 3)))[..., None, None]   # (B, 3, 1, 1) mean of what is spoilt
    apart = (usual[:, None, :, 0] - usual[..., 0]).abs().mean(2)                     # (B, B) how unlike backgrounds are
    spread = moments(share)[1][:, 0]                                                 # 2 area / pi of a disc, 3 area of a moon
    thing = (way.to(area.device) != HUE) & (area < 0.3) & (area > 0.01) & (3 * area > spread)             # not scattered about

    def partners(mine, cost, among):
        """One of the `among` cheapest things of other pictures.   -> rows, and whether there is one"""
        cost = cost[mine] + 0.02 * torch.rand(len(mine), len(rows), generator=rng).to(cost)
        cost = cost + 9.0 * ((rows == mine[:, None]).to(cost.device) | ~thing)
        best = cost.topk(min(among, len(rows)), largest=False)
        pick = torch.randint(best.indices.shape[1], (len(mine), 1), generator=rng).to(cost.device)
        return best.indices.gather(1, pick)[:, 0].cpu(), (best.values.gather(1, pick) < 5)[..., None, None]

    other = colour.roll(-len(ways) if len(rows) > len(ways) else -1, 0)
    given, wanted, donor = pictures + share * (other - colour), pictures.clone(), rows.clone()               # HUE
    mine = (way == THING).nonzero()[:, 0]
    if len(mine):
        alike = (colour.flatten(1)[:, None] - colour.flatten(1)).abs().amax(2) < 0.4                              # (B, B)
        other, good = partners(mine, 9.0 * alike, 8)
        good = good & thing[mine][:, None, None, None]
        given[mine] = pictures[mine] + good * share[mine] * (colour[other] - colour[mine])
    for kind, put, changed in ((PASTED, functools.partial(paste, rng=rng), given), (ADDED, add, wanted)):
        mine = (way == kind).nonzero()[:, 0]
        if len(mine):
            other, good = partners(mine, apart, 4)
            busy = (length(tint - usual[..., None])[mine] > 0.2).to(share)
            busy = torch.maximum(busy, share[mine] * thing[mine][:, None, None, None])
            both, fits = put(pictures[mine], busy, pictures[other], share[other])
            good = good & fits[:, None, None, None]
            given[mine], changed[mine] = pictures[mine], torch.where(good, both, pictures[mine])
            donor[mine] = torch.where(good.flatten().cpu(), other, mine)
    return given.clamp(-1, 1), wanted.clamp(-1, 1), donor


def moved(others, share, scale, spot=0.0):
    """The marked things at `spot` (B, 2), `scale` (B, 1) times as large.   -> pictures, masks with outline and shadow"""
    middle, size = moments(share)[0], share.shape[-1]
    turn = torch.eye(2, device=share.device) / scale[..., None]                                              # (B, 2, 2)
    grid = F.affine_grid(torch.cat([turn, (middle - spot / scale)[..., None]], dim=2), others.shape, align_corners=False)
    others = F.grid_sample(others, grid, padding_mode="border", align_corners=False)
    mask = F.grid_sample(share, grid, align_corners=False)
    return others, F.avg_pool2d(F.max_pool2d(mask, 3 + 2 * (size // 32), 1, 1 + size // 32), 3, 1, 1)


def length(x):
    """Of the vectors along dim 1, which stays; many times as fast as .norm there."""
    return x.square().sum(1, keepdim=True).sqrt()


def moments(share):
    """Where the marked places lie, and how far about.   (B, 1, S, S) -> centre (B, 2), mean square distance from it (B, 1)"""
    at, mass = coordinates(share), share / share.sum((2, 3), keepdim=True).clamp(min=1)
    sums = [mass.sum(axis) for axis in (2, 3)]                                       # along x, along y: (B, 1, S)
    middle = torch.cat([(line * at).sum(2) for line in sums], dim=1)
    return middle, sum((line * at.square()).sum(2) for line in sums) - middle.square().sum(1, keepdim=True)


def coordinates(share):
    """Coordinates of pixels, as grid_sample counts them.   -> (S,) in (-1, 1)"""
    size = share.shape[-1]
    return torch.linspace(1 / size - 1, 1 - 1 / size, size, device=share.device)


def paste(pictures, busy, others, share, rng, room=0.1):
    """Put the marked things of `others`, 0.5 to 0.9 of their size, where hardly any is in the way.   -> pictures, (B,) fits"""
    size = pictures.shape[-1]
    others, mask = moved(others, share, (0.5 + 0.4 * torch.rand(len(pictures), 1, generator=rng)).to(share))
    busy = busy.clone()
    busy[..., [0, -1], :] = busy[..., [0, -1]] = 20.0                                # nothing reaches over the edge
    # What is in the way of the thing, for all its shifts around the edges at once: sums of busy(p) mask(p - s) over places p.
    cost = torch.fft.irfft2(torch.fft.rfft2(busy) * torch.fft.rfft2(mask).conj(), s=(size, size))
    cost = (cost / mask.sum((2, 3), keepdim=True).clamp(min=1)).flatten(1)          # (B, S S)
    free = (cost < room).float() + 1e-9 * (cost == cost.amin(1, keepdim=True))
    shift = torch.multinomial(free.cpu(), 1, generator=rng)[:, 0]
    cut = mask[:, :, [0, -1]].sum((1, 2, 3)) + mask[..., [0, -1]].sum((1, 2, 3))
    fits = (cut == 0) & (cost[torch.arange(len(shift)), shift] < 2 * room)
    mask, others = (torch.stack([one.roll((s // size, s % size), (1, 2)) for one, s in zip(x, shift.tolist(), strict=True)])
                    for x in (mask, others))
    return pictures + mask * (others - pictures), fits


def add(pictures, busy, others, share, room=0.1, radius=0.25):
    """Put the marked things of `others`, root mean square `radius`, in the first quarter with room.   -> pictures, (B,) fits"""
    at = coordinates(share)
    spots = torch.tensor([[x, y] for y in (-0.5, 0.5) for x in (-0.5, 0.5)], device=share.device)      # (4, 2) as one reads
    near = torch.exp(-((at - spots[:, :1]).square()[:, None] + (at - spots[:, 1:]).square()[..., None]) / 0.18)     # (4, S, S)
    taken = busy.flatten(1) @ (near / near.sum((1, 2), keepdim=True)).flatten(1).T                     # (B, 4)
    spot = spots[(taken > 0.03).byte().argmin(1)]
    others, mask = moved(others, share, radius / moments(share)[1].clamp(min=1e-4).sqrt(), spot)
    return pictures + mask * (others - pictures), (mask * busy).sum((1, 2, 3)) < room * mask.sum((1, 2, 3))


# -- the sentence to ask by, and what is asked ------------------------------------------------------------------------------


def most_hurt(before, after, fits=None, least=0.5):
    """Which true sentence a picture no longer deserves.   before, after: CLIP's logits of pairs (T, 2, B), true and false

    fits  (T, B) bool: pairs that speak of what was spoilt; None: any
    -> (B,) the pair whose true sentence lost most against its false one, (B,) whether it lost more than `least`
    """
    lost = (before[:, 0] - before[:, 1]) - (after[:, 0] - after[:, 1])
    lost, pair = (lost if fits is None else lost.masked_fill(~fits, -torch.inf)).max(0)
    return pair, lost > least


def restored(back, source, spoilt, elsewhere=1.0, squares=3.0):
    """Error |d| + squares d^2 to the wanted picture: mean where it differs from the given one plus `elsewhere` times the mean of
    all else.   -> (B,)

    |d| alone is least at the median of what is possible, a blob for a thing whose shape is not understood yet, and stays there
    long; d^2 alone forgives many small changes where none is wanted.
    """
    apart, inside = (back - source).abs(), ((spoilt - source).abs().amax(1) > 0.02).to(back)                        # (B, S, S)
    error = (apart + squares * apart.square()).mean(1)
    here, there = ((error * part).sum((1, 2)) / part.sum((1, 2)).clamp(min=1) for part in (inside, 1 - inside))
    return here + elsewhere * there
