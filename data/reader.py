"""The attribute reader: a small convolutional net that reads pictures of the built-in world back into scenes.

    reading = reader()(pictures)                # any size; up to 3 objects a picture, the largest first
    reading["shape"][:, 0]                      # ids in data.world.SHAPES; NO_SHAPE where it sees no known shape
    agree(reading, scene)                       # what of a scene is in the picture, object by object

It is the independent judge of generated and edited pictures: trained on renders by `python train.py clip`, shipped in
data/weights/, and never a part of a loss. Its own accuracy on renders bounds every score it gives: print it beside.
On a grid of 16 x 16 cells it says where an object's centre is (a heat map, read at its peaks) and, there, what it is:
no mask, no position and no number of objects has to be given.
"""
from itertools import permutations
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from data.clip import freeze
from data.weights import load_checked, read_safetensors, sha256
from data.world import BACKGROUND, COLOUR, PATTERNS, SHAPES, SIZES, TEXTURES

SHIPPED = Path(__file__).parent / "weights" / "reader.safetensors"
NO_SHAPE = len(SHAPES)                       # the ninth answer: an object, but a blob
OBJECT = {"shape": len(SHAPES) + 1, "colour": len(COLOUR), "texture": len(TEXTURES), "size": len(SIZES)}
GROUND = {"background": len(BACKGROUND), "pattern": len(PATTERNS)}
SIDE, CELLS, SLOTS = 64, 16, 3               # pixels a side it reads, cells a side, objects reported
SEEN = 0.3                                   # a peak of the heat map below this is no object
NEAR = 0.2                                   # a tenth of the picture: how far from its place an object may be found


class Residual(nn.Module):
    """Two dilated 3 x 3 convolutions around an identity."""

    def __init__(self, channels, dilation):
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False) for _ in "12")
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Reader(nn.Module):
    """pictures (B, 3, H, W) in [-1, 1] -> a reading; `features` gives what a Frechet distance compares."""

    def __init__(self, channels=48, dilations=(1, 2, 1), hidden=96):
        super().__init__()
        self.stem = nn.Sequential(                                       # to cells of 4 x 4 pixels
            nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.Sequential(*(Residual(channels, d) for d in dilations))
        self.cell, self.around = nn.Conv2d(channels, hidden, 1), nn.Linear(2 * channels, hidden)
        self.what = nn.Conv2d(hidden, 2 + sum(OBJECT.values()), 1)       # centre, log radius, attributes
        self.ground = nn.Linear(2 * channels, sum(GROUND.values()))
        nn.init.constant_(self.what.bias[:1], -4.0)                      # few cells hold a centre

    def trunk(self, pictures):
        """-> cells (B, C, 16, 16), features (B, 2 C): their mean and their maximum"""
        if pictures.shape[-2:] != (SIDE, SIDE):
            pictures = F.interpolate(pictures, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        cells = self.blocks(self.stem(pictures.clamp(-1, 1)))
        return cells, torch.cat([cells.mean((2, 3)), cells.amax((2, 3))], 1)

    def features(self, pictures):
        """(B, 96): the named features "reader" of Frechet and kernel distances."""
        return self.trunk(pictures)[1]

    def logits(self, pictures):
        """-> centre (B, 16, 16), log radius (B, 16, 16), {attribute: (B, n, 16, 16)}, {attribute: (B, n)}

        Every cell also sees the whole picture: a small object alone is as large as a large one among three.
        """
        cells, features = self.trunk(pictures)
        y = self.what(F.relu(self.cell(cells) + self.around(features)[:, :, None, None]))
        attributes = dict(zip(OBJECT, y[:, 2:].split(list(OBJECT.values()), 1), strict=True))
        ground = dict(zip(GROUND, self.ground(features).split(list(GROUND.values()), 1), strict=True))
        return y[:, 0], y[:, 1], attributes, ground

    @torch.no_grad()
    def forward(self, pictures):
        """A reading in the form of a scene: present (B, 3) bool, shape, colour, texture, size (B, 3) int64, centre
        (B, 3, 2), radius, score (B, 3) in [0, 1], background, pattern (B,). Present objects first, largest first."""
        centre, radius, attributes, ground = self.logits(pictures)
        peak = centre == F.max_pool2d(centre[:, None], 3, 1, 1)[:, 0]    # no higher neighbour
        score, place = centre.sigmoid().mul(peak).flatten(1).topk(SLOTS)
        big = radius.flatten(1).gather(1, place).exp()
        order = (big + 9 * (score > SEEN)).argsort(1, descending=True)
        score, place, big = (x.gather(1, order) for x in (score, place, big))
        reading = {"present": score > SEEN, "score": score, "radius": big}
        reading["centre"] = (torch.stack([place % CELLS, place // CELLS], -1) + 0.5) * (2 / CELLS) - 1
        for name, y in attributes.items():
            reading[name] = y.argmax(1).flatten(1).gather(1, place)
        return reading | {name: y.argmax(1) for name, y in ground.items()}


def loss(reader, pictures, scene):
    """Centres by a focal loss (Zhou et al. 2019, CenterNet), attributes at the true centres by cross-entropy.

    An attribute of -1 in the scene is not told and does not count.   -> scalar
    """
    centre, radius, attributes, ground = reader.logits(pictures)
    owner, slot = scene["present"].nonzero(as_tuple=True)
    place = (scene["centre"] + 1) * (CELLS / 2)                          # (B, O, 2) in cells
    x, y = place[owner, slot].long().clamp(0, CELLS - 1).unbind(1)
    middle = torch.arange(CELLS, device=pictures.device) + 0.5
    distance = (middle - place[..., 0, None])[:, :, None, :] ** 2 + (middle - place[..., 1, None])[..., None] ** 2
    blob = ((-distance / 2).exp() * scene["present"][..., None, None]).amax(1)               # neighbours count less
    at = torch.zeros_like(blob)
    at[owner, y, x] = 1
    p = centre.sigmoid()
    hit, miss = (1 - p) ** 2 * F.logsigmoid(centre), p**2 * (1 - blob) ** 4 * F.logsigmoid(-centre)
    total = -(at * hit + (1 - at) * miss).sum() / max(len(owner), 1)
    total = total + (radius[owner, y, x] - scene["radius"][owner, slot].log()).abs().mean()
    for name, logits in attributes.items():
        total = total + F.cross_entropy(logits[owner, :, y, x], scene[name][owner, slot], ignore_index=-1)
    return total + sum(F.cross_entropy(logits, scene[name]) for name, logits in ground.items())


def agree(reading, scene, where=True):
    """Which facts of a scene does a reading confirm?   -> {found, shape, colour, texture, size: (B, O) bool,
    background, pattern, count: (B,) bool}; absent objects are False: divide by scene["present"].sum()

    where=True   an object must be found at its place (within a tenth of the picture)
    where=False  sentences seldom tell places: objects are assigned so that as many attributes as possible agree
    """
    fits = {name: reading[name][:, None] == scene[name][..., None] for name in OBJECT}       # (B, O, 3)
    there = reading["present"][:, None] & scene["present"][..., None]
    apart = (reading["centre"][:, None] - scene["centre"][:, :, None]).norm(dim=-1)
    gain = (2 - apart) if where else sum(x.float() for x in fits.values()) + 0.5
    if where:
        there = there & (apart < NEAR)
    objects, read = there.shape[1:]
    spare = (0, max(0, objects - read))                                  # fewer readings than objects: some find none
    ways = torch.tensor(list(permutations(range(max(objects, read)), objects)), device=there.device)
    total = F.pad(gain * there, spare)[:, torch.arange(objects), ways].sum(-1)               # (B, ways)
    best = ways[total.argmax(1)][..., None]                              # (B, O, 1): the reading of each object
    pairs = {name: F.pad(x & there, spare).gather(2, best)[..., 0] for name, x in {"found": there, **fits}.items()}
    return pairs | {name: reading[name] == scene[name] for name in GROUND} | {
        "count": reading["present"].sum(1) == scene["present"].sum(1)}


def accuracy(reading, scene, where=True):
    """{attribute: share of the scene's objects (or pictures) read correctly}; an object not found counts as wrong."""
    right, objects = agree(reading, scene, where), scene["present"].sum().clamp(min=1)
    return {name: float(x.sum() / objects) if x.ndim == 2 else float(x.float().mean()) for name, x in right.items()}


def reader():
    """The shipped reader, frozen; `.sha256` says which file."""
    state, _ = read_safetensors(SHIPPED)
    model = freeze(load_checked(Reader(), state, SHIPPED))
    model.sha256 = sha256(SHIPPED)
    return model
