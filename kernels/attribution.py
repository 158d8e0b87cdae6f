"""Attribution maps: which places of a picture a score comes from, and how they are shown.

    cosine_map   s_p = z_p . t / (|z_p| |t|)                            a grid of places against a vector (BeFA)
    grad_cam     w_c = mean_p g_cp,  heat_p = max(0, sum_c w_c a_cp)    Grad-CAM: activation a, its gradient g
    word_maps    heat_jp = sum over heads of softmax_j(q_p . k_j)       where word j of a sentence is looked for
    show         map = Wy n(heat) Wx^T,   picture = (1 - alpha) image + alpha colour(map)

Bilinear upsampling is two matrix products: row y of Wy holds hat functions max(0, 1 - |y' - i|) around the
place y' = (y + 1/2) h / H - 1/2, clamped to 0 .. h - 1, which is `interpolate(align_corners=False)`. The colour
map is the same trick: hat functions around five colours. So one program owns a tile of the output, reads the
few numbers of the coarse heat, and writes map and picture once; eager PyTorch makes a dozen passes at full
size. Grad-CAM to picture is two launches: partial sums over 32 channels each, then `show` adds them in a fixed
order. No atomics, the same bits. Everything is float32 and forward only: an explanation carries no gradient.
The speed is *not yet measured*.
"""
from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from kernels import GRID, backend, fits, jit, on, padded
from kernels.attention import attention_map

if TYPE_CHECKING:
    import triton.language as tl

# Five anchors from cold to hot; red, green, blue in [0, 1]. Brightness rises all the way, so the map survives
# grey print and every kind of colour blindness.
COLOURS = ((0.00, 0.00, 0.15), (0.35, 0.05, 0.50), (0.80, 0.25, 0.35), (0.98, 0.60, 0.10), (1.00, 1.00, 0.60))
NORMALISE = ("minmax", "max", "none")


# -- the definitions -----------------------------------------------------------------------------------------


def cosine_map_reference(z, target):
    """The definition; a zero vector has cosine 0 with everything."""
    return F.cosine_similarity(z.float(), target.float()[:, None], dim=2)                # (B, P)


def grad_cam_reference(activation, gradient):
    """The definition: channel weights from mean gradients, weighted sum, ReLU."""
    weight = gradient.float().mean((2, 3), keepdim=True)                                 # (B, C, 1, 1)
    return (weight * activation.float()).sum(1).relu()                                   # (B, h, w)


def show_reference(heat, image, alpha=0.5, normalise="minmax"):
    """Normalise, upsample, colour, blend."""
    upsampled = F.interpolate(scale_to_one(heat, normalise)[:, None], image.shape[2:], mode="bilinear")[:, 0].clamp(max=1)
    colours = torch.tensor(COLOURS, device=image.device)                                 # (5, 3)
    anchor = torch.arange(len(colours), device=image.device)[:, None, None]
    hats = (1 - (upsampled[:, None] * (len(colours) - 1) - anchor).abs()).clamp(min=0)   # (B, 5, H, W)
    colour = torch.einsum("bkhw,kc->bchw", hats, colours)                                # in [0, 1]
    picture = (1 - alpha) * image.float() + alpha * (2 * colour - 1)
    return upsampled, picture.to(image.dtype)


def scale_to_one(heat, how="minmax"):
    """Each map of a batch to [0, 1].   heat (B, h, w) -> float32 of the same shape

    "minmax": lowest 0, highest 1; a constant map is 0.   "none": clamped to [0, 1] as it is.
    "max": negative values 0, highest 1; a map without a positive value is 0.
    """
    heat = heat.float()
    if how == "none":
        return heat.clamp(0, 1)
    low = heat.amin((1, 2), keepdim=True) if how == "minmax" else torch.zeros_like(heat[:, :1, :1])
    spread = heat.amax((1, 2), keepdim=True) - low
    return torch.where(spread > 0, (heat - low).clamp(min=0) / spread, 0.0)


# -- the kernels ---------------------------------------------------------------------------------------------


@jit
def _cosine_kernel(z, target, out, P, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    b, p = tl.program_id(0), tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    z, target = z + b.to(tl.int64) * P * D, target + b.to(tl.int64) * D
    product, own = tl.zeros((BLOCK_P,), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
    length = tl.zeros((BLOCK_D,), tl.float32)
    start = 0
    while start < D:                                                 # `range` of an argument: not in 3.6's interpreter
        d = start + tl.arange(0, BLOCK_D)
        t = tl.load(target + d, mask=d < D, other=0.0).to(tl.float32)
        place = tl.load(z + p[:, None] * D + d[None, :], mask=(p < P)[:, None] & (d < D)[None, :], other=0.0)
        place = place.to(tl.float32)
        product += tl.sum(place * t[None, :], 1)
        own += tl.sum(place * place, 1)
        length += t * t
        start += BLOCK_D
    norm = tl.maximum(tl.sqrt(own), 1e-8) * tl.maximum(tl.sqrt(tl.sum(length)), 1e-8)    # floor as in PyTorch
    tl.store(out + b.to(tl.int64) * P + p, product / norm, mask=p < P)


@jit
def _cam_kernel(activation, gradient, parts, C, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    b, chunk = tl.program_id(0), tl.program_id(1)
    c, p = chunk * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    at = b.to(tl.int64) * C * P + c[:, None] * P + p[None, :]        # all pixels of these channels
    inside = (c < C)[:, None] & (p < P)[None, :]
    weight = tl.sum(tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32), 1) / P
    heat = tl.sum(weight[:, None] * tl.load(activation + at, mask=inside, other=0.0).to(tl.float32), 0)
    tl.store(parts + (b.to(tl.int64) * tl.num_programs(1) + chunk) * P + p, heat, mask=p < P)


@jit
def _hat(size, scale, start, OUT: tl.constexpr, IN: tl.constexpr):
    """Bilinear weights (OUT, IN) of output places start .. start + OUT - 1 over `size` input places."""
    place = (start + tl.arange(0, OUT) + 0.5) * scale - 0.5
    place = tl.minimum(tl.maximum(place, 0.0), tl.cast(size - 1, tl.float32))   # a size of 1 is no tensor: no .to()
    return tl.maximum(1.0 - tl.abs(place[:, None] - tl.arange(0, IN)[None, :].to(tl.float32)), 0.0)


@jit
def _show_kernel(parts, image, colours, out, picture, S, h, w, H, W, scale_y, scale_x, alpha,
                 RELU: tl.constexpr, HOW: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
                 BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    b, columns = tl.program_id(0), tl.cdiv(W, BLOCK_X)
    first_y, first_x = tl.program_id(1) // columns * BLOCK_Y, tl.program_id(1) % columns * BLOCK_X
    i, j = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_J)
    inside, at = (i < h)[:, None] & (j < w)[None, :], i[:, None] * w + j[None, :]
    heat = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)                  # the whole coarse map, S partial sums
    parts += b.to(tl.int64) * S * (h * w)
    s = 0
    while s < S:
        heat += tl.load(parts + s * (h * w) + at, mask=inside, other=0.0).to(tl.float32)
        s += 1
    if RELU:
        heat = tl.maximum(heat, 0.0)
    if HOW == "none":
        heat = tl.minimum(tl.maximum(heat, 0.0), 1.0)
    else:
        top, low = tl.max(tl.where(inside, heat, float("-inf"))), 0.0
        if HOW == "minmax":
            low = tl.min(tl.where(inside, heat, float("inf")))
        heat = tl.where(top > low, tl.maximum(heat - low, 0.0) / tl.where(top > low, top - low, 1.0), 0.0)
    heat = tl.where(inside, heat, 0.0)
    rows = tl.dot(_hat(h, scale_y, first_y, BLOCK_Y, BLOCK_I), heat, input_precision="ieee")
    value = tl.dot(rows, tl.trans(_hat(w, scale_x, first_x, BLOCK_X, BLOCK_J)), input_precision="ieee")
    value = tl.minimum(value, 1.0)                                   # weights may add up to 1 and a rounding
    y, x = first_y + tl.arange(0, BLOCK_Y), first_x + tl.arange(0, BLOCK_X)
    inside, at = (y < H)[:, None] & (x < W)[None, :], y[:, None] * W + x[None, :]
    tl.store(out + b.to(tl.int64) * (H * W) + at, value, mask=inside)
    for channel in range(3):
        colour = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
        for k in range(5):                                           # len(COLOURS)
            colour += tl.maximum(1.0 - tl.abs(value * 4.0 - k), 0.0) * tl.load(colours + k * 3 + channel)
        pixel = (b.to(tl.int64) * 3 + channel) * (H * W) + at
        old = tl.load(image + pixel, mask=inside, other=0.0).to(tl.float32)
        new = (1.0 - alpha) * old + alpha * (2.0 * colour - 1.0)
        tl.store(picture + pixel, new.to(picture.dtype.element_ty), mask=inside)


# -- launching (nothing to differentiate, so no autograd function) -------------------------------------------


def _cam_parts(activation, gradient):
    """Partial Grad-CAM sums, (B, S, h, w) float32: one map for every 32 channels (8 where maps are large)."""
    B, C, h, w = activation.shape
    block = padded(h * w)
    channels = 32 if block <= 256 else 8
    parts = torch.empty((B, -(-C // channels), h, w), device=activation.device)
    with on(activation):
        _cam_kernel[(B, parts.shape[1])](activation.contiguous(), gradient.contiguous(), parts, C, h * w,
                                         BLOCK_C=channels, BLOCK_P=block, num_warps=8, enable_fp_fusion=True)
    return parts


def _show(parts, image, alpha, normalise, relu):
    B, S, h, w = parts.shape
    H, W = image.shape[2:]
    image, out = image.contiguous(), torch.empty((B, H, W), device=image.device)
    picture = torch.empty_like(image)
    with on(image):
        _show_kernel[(B, -(-H // 16) * -(-W // 64))](
            parts.contiguous(), image, _colours(image.device), out, picture,
            S, h, w, H, W, h / H, w / W, alpha,
            RELU=relu, HOW=normalise, BLOCK_I=padded(h), BLOCK_J=padded(w), BLOCK_Y=16, BLOCK_X=64, num_warps=4,
            enable_fp_fusion=True)
    return out, picture


@functools.cache
def _colours(device):
    return torch.tensor(COLOURS, device=device)


# -- the public functions ------------------------------------------------------------------------------------


@torch.no_grad()
def cosine_map(z, target):
    """Cosine of every place with a vector (BeFA variant A).   z (B, P, D), target (B, D) -> (B, P) float32

    raises  ValueError if shapes, devices or dtypes disagree.   A zero vector has cosine 0 with everything.
    """
    fits("cosine_map", z, "B, P, D", target=(target, (*z.shape[:1], *z.shape[2:])))
    if z.numel() == 0 or backend(z, _too_large(z, -(-z.shape[1] // 16))) == "reference":
        return cosine_map_reference(z, target)
    B, P, D = z.shape
    out = torch.empty((B, P), device=z.device)
    with on(z):
        _cosine_kernel[(B, -(-P // 16))](z.contiguous(), target.contiguous(), out, P, D, BLOCK_P=16,
                                         BLOCK_D=128, num_warps=4, enable_fp_fusion=True)
    return out


@torch.no_grad()
def grad_cam(activation, gradient):
    """Grad-CAM (BeFA variant B).   activation, gradient (B, C, h, w) -> heat (B, h, w) float32, >= 0, raw

    gradient  of the score with respect to the activation; torch.autograd.grad(score.sum(), activation)[0]
    A map without a positive value is 0. Pass (activation, gradient) to `show` to save the stop in between.
    """
    fits("grad_cam", activation, "B, C, h, w", gradient=(gradient, activation.shape))
    if activation.numel() == 0 or backend(activation, _cam_limit(activation)) == "reference":
        return grad_cam_reference(activation, gradient)
    return _cam_parts(activation, gradient).sum(1).relu()


def word_maps(q, k, board, lengths=None, mask=None, scale=None):
    """Where each word is looked for: attention summed over heads.   -> (B, K, h, w) float32, raw, 0 .. heads

    q (B, h w, H, D) queries of a picture or board of h x w tokens, k (B, K, H, D); rest as in `attention_map`
    """
    if q.ndim != 4 or q.shape[1] != board[0] * board[1]:
        raise ValueError(f"word_maps: q {tuple(q.shape)} does not hold the {board[0]} x {board[1]} tokens of the "
                         "board")
    mean = attention_map(q, k, lengths, mask, scale)                                     # (B, h w, K)
    return (mean * q.shape[2]).mT.unflatten(2, tuple(board))


@torch.no_grad()
def show(heat, image, alpha=0.5, normalise="minmax"):
    """A heat map over its picture.   -> map (B, H, W) float32 in [0, 1], picture (B, 3, H, W) like image

    heat       (B, h, w) raw values, or a pair (activation, gradient) as for `grad_cam`
    image      (B, 3, H, W) in [-1, 1]
    alpha      share of the colour in the picture, 0 .. 1
    normalise  "minmax", "max" or "none", per picture, see `scale_to_one`
    raises     ValueError for shapes or devices that disagree, alpha outside 0 .. 1, an unknown `normalise`
    """
    pair = heat if isinstance(heat, (tuple, list)) else None
    if pair:
        fits("show", pair[0], "B, C, h, w", gradient=(pair[1], pair[0].shape))
    first = pair[0] if pair else heat
    _check_show(first, 4 if pair else 3, image, alpha, normalise)
    if image.numel() == 0:
        return image.float()[:, 0], image.clone()
    limit = _too_large(image, -(-image.shape[2] // 16) * -(-image.shape[3] // 64))
    limit = limit or ("a heat map of more than 64 x 64" if max(first.shape[-2:]) > 64 else "")
    if backend(image, limit or (_cam_limit(first) if pair else "")) == "reference":
        return show_reference(grad_cam_reference(*pair) if pair else heat, image, alpha, normalise)
    return _show(_cam_parts(*pair) if pair else heat[:, None], image, float(alpha), normalise, bool(pair))


def _check_show(first, ndim, image, alpha, normalise):
    fits("show", image, "B, 3, H, W")
    if first.ndim != ndim or image.shape[1] != 3 or len(first) != len(image) or 0 in first.shape[1:]:
        raise ValueError(f"show: heat must be (B, h, w) and image (B, 3, H, W), got {tuple(first.shape)} and "
                         f"{tuple(image.shape)}")
    if normalise not in NORMALISE or not 0 <= alpha <= 1:
        raise ValueError(f"show: alpha={alpha} must be 0 .. 1, normalise={normalise!r} one of "
                         f"{', '.join(NORMALISE)}")
    if not first.is_floating_point() or first.device != image.device:
        raise ValueError(f"show: heat is {first.dtype} on {first.device}; it must be floating point on the image's device, "
                         f"{image.device}")


def _too_large(batch, tiles):
    """Offsets inside a sample are 32 bit, those of samples 64 bit; its tiles are one axis of a grid."""
    if batch[0].numel() >= 2 ** 31:
        return "one sample holds 2**31 elements or more"
    return f"one sample has {tiles:,} tiles, a grid holds {GRID:,}" if tiles > GRID else ""


def _cam_limit(activation):
    limit = _too_large(activation, activation.shape[1] // 8)
    return limit or ("an activation of more than 1,024 places" if activation.shape[2] * activation.shape[3] > 1024 else "")


# -- rows for kernels/check.py -------------------------------------------------------------------------------


def compile_cases():
    """Every launch that can occur, at sizes that are multiples of 16 (7 x 7 maps load one by one: tiny).

    The usual size in float32 on every target, the others on sm_90.
    """
    sizes = {"S": "i32", "h": "i32", "w": "i32", "H": "i32:16", "W": "i32:16", "scale_y": "fp32", "scale_x": "fp32",
             "alpha": "fp32"}
    for dtype in ("fp32", "bf16", "fp16", "fp64"):
        t, f = f"*{dtype}:16", "*fp32:16"
        rest, rare = {"kind": "bandwidth", "num_stages": 3}, {"targets": ("sm_90",)}
        usual = {} if dtype == "fp32" else rare
        yield {"name": f"cosine_map {dtype}", "kernel": _cosine_kernel, "num_warps": 4, **rest, **usual,
               "signature": {"z": t, "target": t, "out": f, "P": "i32", "D": "i32:16"},
               "constants": {"BLOCK_P": 16, "BLOCK_D": 128}}
        for block, channels in ((64, 32), (256, 32), (1024, 8)) if dtype in ("fp32", "bf16") else ((256, 32),):
            yield {"name": f"grad_cam {dtype} {block}", "kernel": _cam_kernel, "num_warps": 8, **rest,
                   **(usual if block == 256 else rare),
                   "signature": {"activation": t, "gradient": t, "parts": f, "C": "i32:16", "P": "i32:16"},
                   "constants": {"BLOCK_C": channels, "BLOCK_P": block}}
        for side in (16, 32, 64) if dtype in ("fp32", "bf16") else (16,):
            yield {"name": f"show {dtype} {side}", "kernel": _show_kernel, "num_warps": 4, **rest,
                   **(usual if side == 16 else rare),
                   "signature": {"parts": f, "image": t, "colours": f, "out": f, "picture": t, **sizes},
                   "constants": {"RELU": True, "HOW": "minmax", "BLOCK_I": side, "BLOCK_J": side, "BLOCK_Y": 16,
                                 "BLOCK_X": 64}}
