"""The renderer: shapes as signed distances, painted with a handful of inks. Any size, any device, no files.

A scene (data/world.py) is a dict of tensors; row b is one picture of up to O objects. Coordinates run over
[-1, 1], x to the right, y down. A signed distance sd(p) is negative inside and grows by one per unit of
length: the share of a pixel that an object covers is   clamp(1/2 - sd / pixel, 0, 1)   without any sampling.
"""
import math

import torch
from torch.nn import functional as F

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
TEXTURES = ("plain", "striped", "dotted")
PATTERNS = ("plain", "gradient", "checker", "noise")
# Found by a search for the largest smallest OKLab distance of two inks, as seen normally, by deuteranopes and
# by protanopes (0.12 at least; a just visible step is about 0.02): lightness separates what hue cannot.
COLOURS = {"red": "b91711", "orange": "fb9622", "yellow": "fae85c", "green": "349673",
           "cyan": "85f5f6", "blue": "2f74dd", "purple": "74399a", "pink": "f68ec6"}
BACKGROUNDS = {"white": "f7f4ec", "grey": "b3b6bd", "black": "292a34",         # pale or dark, never strong:
               "yellow": "ecd9a0", "green": "9fc98a", "blue": "93bdf0"}        # the objects carry the colour

OUTLINE = 0.036                       # width of the dark rim inside an object's edge: 1.2 pixels at 64
SHADOW, DARKNESS = 0.13, 0.42         # reach of the soft shadow and its strength at the edge
CHUNK = {"cpu": 2**17, "cuda": 2**22}     # pixels painted at once: on a CPU planes of 0.5 MB stay in the cache
REACH = 1.06                          # no shape leaves this circle (in radii)


def ink(table):
    """Hex colours of a table as numbers.   -> (N, 3) float32 in [0, 1]"""
    return torch.tensor([[int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)] for code in table.values()])


def pick(scene, rows):
    """Some rows of a scene, or of any dict of tensors that share their first dimension."""
    return {name: value[rows] for name, value in scene.items()}


# -- chance: numbers that depend on a key alone --------------------------------------------------------------


def hashed(key, n):
    """n integers of 63 bits from each key: the finaliser of splitmix64.   key (...) int64 -> (..., n) int64

    int64 products wrap around as uint64 would; a right shift must first drop the copies of the sign.
    """
    lane = torch.arange(1, n + 1, device=key.device) * -0x61C8864680B583EB    # 2**64 / golden ratio, as int64
    state = key[..., None] + lane
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        state = (state ^ (state >> shift & (1 << 64 - shift) - 1)) * factor
    return state & (1 << 63) - 1


def uniform(key, n):
    """n numbers in [0, 1) from each key, whatever else is in the batch.   key (...) -> (..., n) float32"""
    return (hashed(key, n) >> 39).float() / 2**24


# -- shapes: x, y in radii, y down -> signed distance in radii -----------------------------------------------


def length(x, y):
    return (x * x).addcmul_(y, y).sqrt_()


def circle(x, y):
    return length(x, y) - 0.88


def ring(x, y):
    return (length(x, y) - 0.7).abs_() - 0.24


def square(x, y, half=0.66, corner=0.1):
    """A square grown by its rounded corner: half its width is half + corner."""
    x, y = x.abs() - half, y.abs() - half
    return length(x.clamp(min=0), y.clamp(min=0)) + torch.maximum(x, y).clamp_(max=0) - corner


def cross(x, y, arm=0.86, half=0.26, corner=0.08):
    """Two bars. Folded so that the point lies on the arm to the right, below its middle line."""
    x, y = x.abs(), y.abs()
    x, y = torch.maximum(x, y) - arm, torch.minimum(x, y) - half
    notch = length((x + (arm - half)).clamp_(max=0), y)     # within, the inner corner may be nearest
    outside = length(x.clamp(min=0), y.clamp(min=0))
    return torch.where(torch.maximum(x, y) <= 0, torch.maximum(x, -notch), outside) - corner


def points(x, y, n, outer, inner, corner):
    """A star of n points (n odd), corners rounded; with inner = outer / 2 and n = 3 it is a triangle.

    Mirrors fold the plane into one wedge of pi / n beside the upward axis, where the outline is straight.
    """
    x, y = x.abs(), -y
    for k in range(n - 2, 0, -2):                           # mirrors at (n - 2) pi / n, ..., 3 pi / n, pi / n
        c, s = math.cos(k * math.pi / n), math.sin(k * math.pi / n)
        over = (x * c - y * s).clamp_(min=0).mul_(2)
        x, y = x - over * c, y + over * s
    x, y = x.abs(), y - outer
    edge_x, edge_y = inner * math.sin(math.pi / n), inner * math.cos(math.pi / n) - outer
    along = (x * edge_x + y * edge_y).mul_(1 / (edge_x**2 + edge_y**2)).clamp_(0, 1)
    beyond = y * edge_x - x * edge_y                        # cross product: positive outside the edge
    return length(x - along * edge_x, y - along * edge_y).copysign_(beyond) - corner


def triangle(x, y):
    return points(x, y - 0.12, 3, 0.94, 0.47, 0.1)


def star(x, y):
    return points(x, y - 0.04, 5, 0.98, 0.46, 0.06)


def heart(x, y, scale=1.62):
    """A square on its tip with half discs on its upper sides, built with the tip at the origin."""
    x, y = x.abs() / scale, 0.55 - y / scale
    lobe = length(x - 0.25, y - 0.75) - 8**-0.5
    rise = (x + y).clamp_(min=0).mul_(0.5)                  # foot of the perpendicular on the side x = y
    side = torch.minimum(length(x, y - 1), length(x - rise, y - rise)).copysign_(x - y)
    return torch.where(x + y > 1, lobe, side) * scale


def moon(x, y, disc=0.92, bite=0.74, shift=0.45):
    """A disc less a smaller one shifted to the upper right; its horns are where the two circles meet."""
    x, y = (x - y) * 0.5**0.5 - 0.12, (x + y).abs_() * 0.5**0.5
    at = (disc**2 - bite**2 + shift**2) / (2 * shift)
    horn = (disc**2 - at**2) ** 0.5
    beyond = (x * horn - y * at) > shift * (horn - y).clamp_(min=0)
    arcs = torch.maximum(length(x, y) - disc, bite - length(x - shift, y))
    return torch.where(beyond, length(x - at, y - horn), arcs)


DISTANCE = (circle, square, triangle, star, heart, cross, ring, moon)          # in the order of SHAPES


# -- textures and backgrounds: how much of the second tone covers a pixel ------------------------------------


def striped(x, y, pixel, period=0.58):
    """Slanting stripes, as wide as the gaps.   x, y in radii, pixel: its size in radii"""
    u = (x + y * 0.6).mul_(1 / 1.36**0.5 / period)
    return coverage((u - u.round()).abs_().sub_(0.25).mul_(period), pixel)


def dotted(x, y, pixel, period=0.5, radius=0.16):
    """Round dots on a square grid turned by 45 degrees."""
    u, v = (x + y) * (0.5**0.5 / period), (x - y) * (0.5**0.5 / period)
    return coverage(length(u - u.round(), v - v.round()).mul_(period).sub_(radius), pixel)


def coverage(sd, pixel):
    """Share of a pixel inside the edge: 1/2 - sd / pixel, cut to [0, 1]. Works in place on sd."""
    return sd.div_(pixel).neg_().add_(0.5).clamp_(0, 1)


def backdrop(scene, size):
    """Share of the background's second tone.   -> (B, H, W) in [0, 1]; a pattern costs only where it is."""
    pattern, key = scene["pattern"], scene["key"]
    weight = torch.zeros(len(key), size, size, device=key.device)
    ramp = pixels(size, key.device)                                            # (W,)
    for name in PATTERNS[1:]:
        rows = (pattern == PATTERNS.index(name)).nonzero()[:, 0]
        if name == "gradient":
            weight[rows] = (ramp / 2 + 0.5)[None, :, None]
        elif name == "checker":                                                # eight fields a side
            field = (ramp * 4).floor().long()
            weight[rows] = ((field[:, None] + field) % 2).float()
        elif len(rows):                                                  # random numbers on a lattice, smooth
            lattice = uniform(key[rows], 81).view(-1, 1, 9, 9)
            blobs = F.interpolate(lattice, (size, size), mode="bicubic", align_corners=True)[:, 0]
            weight[rows] = (blobs * 2.4 - 0.7).clamp_(0, 1)
    return weight


def pixels(size, device):
    """Centres of a row of pixels in [-1, 1]."""
    return (torch.arange(size, device=device) + 0.5) * (2 / size) - 1


# -- painting ------------------------------------------------------------------------------------------------


def inks(scene):
    """The inks of each picture: two of the background, three of each object.   -> (B, 3, 2 + 3 O) in [0, 1]

    An object has its colour, the second tone of its texture (of the same hue, so the name holds) and its rim.
    """
    device = scene["key"].device
    ground = ink(BACKGROUNDS).to(device)[scene["background"]] + scene["light"][:, None]        # (B, 3)
    lit = (ground.mean(1, keepdim=True) < 0.4).float()      # a dark ground gets a lighter second tone
    base = ink(COLOURS).to(device)[scene["colour"]] + scene["tone"][..., None]                 # (B, O, 3)
    pale = base @ base.new_tensor([[0.3], [0.59], [0.11]]) > 0.56
    second = torch.where(pale, base * 0.62, base * 0.36 + 0.64)
    own = torch.stack([base, second, base * 0.4], 2).flatten(1, 2)             # (B, 3 O, 3)
    return torch.cat([ground[:, None], (ground * 0.84 + 0.23 * lit)[:, None], own], 1).clamp_(0, 1).mT


def objects(scene, size):
    """The present objects, ordered by shape: each distance is computed for its own shape only, on slices.

    -> owner, slot (N,); cover (N, H, W); its shares for the three inks (N, 3, H, W); shadow (N, H, W)
    """
    owner, slot = scene["present"].nonzero(as_tuple=True)
    order = scene["shape"][owner, slot].argsort(stable=True)
    owner, slot = owner[order], slot[order]
    shape, texture, radius, angle = (scene[k][owner, slot] for k in ("shape", "texture", "radius", "angle"))
    grid, centre = pixels(size, owner.device), scene["centre"][owner, slot]
    right, down = ((grid - centre[:, i, None]) / radius[:, None] for i in (0, 1))             # (N, W), (N, H)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    x = (right * cos)[:, None, :] + (down * sin)[:, :, None]                 # (N, H, W) the object's own axes
    y = (down * cos)[:, :, None] - (right * sin)[:, None, :]
    counts = torch.bincount(shape, minlength=len(SHAPES)).tolist()
    parts = zip(DISTANCE, x.split(counts), y.split(counts), strict=True)
    sd = torch.cat([distance(*xy) for distance, *xy in parts])                 # (N, H, W) in radii
    radius = radius[:, None, None]
    pixel = 2 / size / radius                                                  # one pixel in radii
    light = (right[:, None, :] + down[:, :, None]).clamp_(-1.4, 1.4)           # it comes from the upper left
    shadow = (sd * (-radius / SHADOW)).add_(1).clamp_(0, 1).square_()
    shadow *= (light * 0.22).add_(0.7).mul_(DARKNESS)
    second = light.mul_(-0.06).clamp_(min=0)                                   # a faint sheen
    for t, cut in ((1, striped), (2, dotted)):
        rows = (texture == t).nonzero()[:, 0]
        second[rows] = cut(x[rows], y[rows], pixel[rows])
    within = coverage(sd + OUTLINE / radius, pixel)                            # the object without its rim
    cover = coverage(sd, pixel)
    second.mul_(within)
    return owner, slot, cover, torch.stack([within - second, second, cover - within], 1), shadow


def render(scene, size=64):
    """Paint scenes.   -> pictures (B, 3, size, size) in [-1, 1], masks (B, O, size, size) in [0, 1]

    A mask is the share of each pixel that shows the object: exact, and zero for objects that are absent.
    raises ValueError for a size below 8, where no shape can be told
    """
    if size < 8:
        raise ValueError(f"pictures of {size} x {size} pixels show no shape; ask for a size of at least 8")
    total, slots = scene["present"].shape
    pictures = torch.empty(total, 3, size, size, device=scene["key"].device)
    masks = torch.zeros(total, slots, size, size, device=scene["key"].device)
    step = max(1, CHUNK.get(pictures.device.type, 2**18) // size**2)
    for start in range(0, total, step):
        rows = slice(start, start + step)
        paint(pick(scene, rows), size, pictures[rows], masks[rows])
    return pictures, masks


def paint(scene, size, picture, mask):
    """A picture is inks times weights, found from the front slot to the back. Fills its last two arguments.

    An object lets through (1 - cover) (1 - shadow) of what lies behind it. A shadow is black, an ink of 0.
    """
    owner, slot, cover, shares, shadow = objects(scene, size)
    total, slots = mask.shape[:2]
    weight = picture.new_zeros(total, 2 + 3 * slots, size, size)
    ground, own = weight[:, :2], weight[:, 2:].unflatten(1, (slots, 3))
    own[owner, slot] = shares
    mask[owner, slot] = cover
    clear = 1 - cover
    through, bare = ground[:, 0].fill_(1), torch.ones_like(ground[:, 1])    # light and view that reach a slot
    for s in reversed(range(slots)):
        own[:, s] *= through[:, None]
        mask[:, s] *= bare
        here = (slot == s).nonzero()[:, 0]
        bare[owner[here]] *= clear[here]
        through[owner[here]] *= clear[here].mul(1 - shadow[here])
    torch.mul(through, backdrop(scene, size), out=ground[:, 1])
    ground[:, 0] -= ground[:, 1]
    white = picture.new_ones(1, 1, 1)
    torch.baddbmm(white, 2 * inks(scene), weight.flatten(2), beta=-1, out=picture.flatten(2))
