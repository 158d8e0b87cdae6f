"""The renderer: shapes as signed distances, painted with a handful of inks. Any size, any device, no files.

A scene (data/world.py) is a dict of tensors; row b is one picture of up to O objects. Coordinates run over [-1, 1], x to
the right, y down. A signed distance sd(p) is negative inside and grows by one per unit of length, so the part of a pixel
that an object covers is   coverage = clamp(1/2 - sd / pixel, 0, 1)   at any resolution: anti-aliasing without sampling.
"""
import math

import torch
from torch.nn import functional as F

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
TEXTURES = ("plain", "striped", "dotted")
PATTERNS = ("plain", "gradient", "checker", "noise")
# Chosen by a search for the largest smallest OKLab distance between two inks, seen normally, by deuteranopes and by
# protanopes at once (0.12; a just visible step is about 0.02): lightness separates what hue cannot.
COLOURS = {"red": "c01a16", "orange": "fb9622", "yellow": "fae85c", "green": "349673",
           "cyan": "85f5f6", "blue": "2c68cc", "purple": "693380", "pink": "f68ec6"}
BACKGROUNDS = {"white": "f7f4ec", "grey": "b3b6bd", "black": "33343f",                # pale or dark, never strong:
               "yellow": "ecd9a0", "green": "b5d3a2", "blue": "a5c8ea"}               # the objects carry the colour

OUTLINE = 0.036                       # width of the dark rim inside an object's edge: 1.2 pixels at 64
SHADOW, DARKNESS = 0.13, 0.42         # reach of the soft shadow and its strength at the edge
CHUNK = 32                            # pictures painted at once: planes of 0.5 MB stay in a core's cache
REACH = 1.06                          # no shape leaves this circle (in radii)


def ink(table):
    """Hex colours of a table as numbers.   -> (N, 3) float32 in [-1, 1]"""
    return torch.tensor([[int(code[i : i + 2], 16) / 127.5 - 1 for i in (0, 2, 4)] for code in table.values()])


# -- chance: numbers that depend on a key alone -------------------------------------------------------------------------

def hashed(key, n):
    """n integers of 63 bits from each key: the finaliser of splitmix64.   key (...) int64 -> (..., n) int64

    int64 products wrap around as uint64 would; a shift to the right must first drop the copies of the sign bit.
    """
    lane = torch.arange(1, n + 1, device=key.device) * -0x61C8864680B583EB                 # the golden ratio, 2**64 phi
    state = key[..., None] + lane
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        state = (state ^ (state >> shift & (1 << 64 - shift) - 1)) * factor
    return state & (1 << 63) - 1


def uniform(key, n):
    """n numbers in [0, 1) from each key, the same whatever else is in the batch.   key (...) int64 -> (..., n) float32"""
    return (hashed(key, n) >> 39).float() / 2**24


# -- shapes: x, y in radii, y down -> signed distance in radii -----------------------------------------------------------

def circle(x, y):
    return torch.hypot(x, y) - 0.88


def square(x, y, half=0.66, corner=0.1):
    """A square grown by rounded corners: half its width is half + corner."""
    x, y = x.abs() - half, y.abs() - half
    return torch.hypot(x.clamp(min=0), y.clamp(min=0)) + torch.maximum(x, y).clamp(max=0) - corner


def points(x, y, n, outer, inner, corner):
    """A star of n points (n odd) with rounded corners; n = 3 with inner = outer / 2 is a triangle.

    Mirrors fold the plane into one wedge of pi / n, where the outline is a single straight piece.
    """
    x, y = x.abs(), -y
    for step in range(n // 2, 0, -2):                       # mirror lines at 3 w and w (n = 5), at w (n = 3)
        angle = (2 * step - 1) * math.pi / n
        over = (x * math.cos(angle) - y * math.sin(angle)).clamp(min=0) * 2
        x, y = (x - over * math.cos(angle)).abs(), y + over * math.sin(angle)
    edge_x, edge_y = inner * math.sin(math.pi / n), inner * math.cos(math.pi / n) - outer
    y = y - outer
    along = ((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2)).clamp(0, 1)
    outside = x * edge_y - y * edge_x                       # sign of the cross product: which side of the edge
    return torch.hypot(x - along * edge_x, y - along * edge_y).copysign(-outside) - corner
