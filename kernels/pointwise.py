"""The two text-conditioned blocks of the image models as one pass each.   l(a) = a if a > 0 else slope * a

GALIP and DF-GAN, deep fusion block (one gamma, beta per sample and channel, applied twice):
    df_block    y = l(g1 m + b1),  m = l(g0 x + b0)
    backward    e = dy l'(g1 m + b1)      dg1 = sum_p e m      db1 = sum_p e
                f = e g1 l'(g0 x + b0)    dg0 = sum_p f x      db0 = sum_p f      dx = f g0
DE-Net, combination of a channel branch and a spatial branch (maps W, S: one number per pixel):
    de_combine  y = w l(a) + (1 - w) l(u) + skip,  a = gamma h + beta,  u = W h + S
    backward    e = dy w l'(a)            dgamma = sum_p e h   dbeta = sum_p e    dw = sum_p dy (l(a) - l(u))
                f = dy (1 - w) l'(u)      dW = sum_c f h       dS = sum_c f       dh = e gamma + f W,  dskip = dy

Eager PyTorch walks 12 and 14 times over the tensor; here forward walks 2 and 3 times, backward 3 times, and
only the inputs are saved. Sums are partial sums per tile, added in a fixed order: no atomics, the same bits.
On probation: whether they beat torch.compile on a GPU is *not yet measured*; there `python -m kernels.bench pointwise` ends with
the verdict, keep or delete, at the real sizes of both models.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from kernels import GRID, backend, fits, jit, on, sums

if TYPE_CHECKING:
    import triton.language as tl


# -- the definitions -----------------------------------------------------------------------------------------


def df_block_reference(x, g0, b0, g1, b1, slope=0.2):
    """The definition: two affines, two LeakyReLUs."""
    g0, b0, g1, b1 = (v[:, :, None, None] for v in (g0, b0, g1, b1))      # (B, C, 1, 1)
    return F.leaky_relu(g1 * F.leaky_relu(g0 * x + b0, slope) + b1, slope)


def de_combine_reference(h, skip, gamma, beta, w, W, S, slope=0.2):
    """The definition: two modulated branches, mixed per channel, plus the encoder's skip.

    addcmul and lerp take 4 passes instead of 8: on a CPU forward takes 0.5 to 0.7 of the time.
    """
    gamma, beta, w = (v[:, :, None, None] for v in (gamma, beta, w))      # (B, C, 1, 1)
    channel = F.leaky_relu(torch.addcmul(beta, gamma, h), slope)          # gamma h + beta
    spatial = F.leaky_relu(torch.addcmul(S, W, h), slope)                 # W h + S
    return torch.lerp(spatial, channel, w) + skip                         # w channel + (1 - w) spatial + skip


# -- the kernels ---------------------------------------------------------------------------------------------


@jit
def _wide(x):
    """float32 for sums and products (float64 stays): 16-bit arithmetic would lose the small terms."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@jit
def _leaky(a, SLOPE: tl.constexpr):
    return tl.where(a > 0, a, a * SLOPE)


@jit
def _df_kernel(x, g0, b0, g1, b1, y, P, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)                                          # one channel of one sample, b * C + c
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)              # the pixels of this program
    start = row.to(tl.int64) * P                                    # int64: B * C * P can pass 2**31
    m = _leaky(_wide(tl.load(g0 + row)) * _wide(tl.load(x + start + p, mask=p < P, other=0.0))
               + _wide(tl.load(b0 + row)), SLOPE)
    out = _leaky(_wide(tl.load(g1 + row)) * m + _wide(tl.load(b1 + row)), SLOPE)
    tl.store(y + start + p, out.to(y.dtype.element_ty), mask=p < P)


@jit
def _df_backward_kernel(x, g0, b0, g1, b1, dy, dx, sums, P, ROWS, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    row, tile = tl.program_id(0), tl.program_id(1)
    p = tile * BLOCK + tl.arange(0, BLOCK)
    start = row.to(tl.int64) * P
    value = _wide(tl.load(x + start + p, mask=p < P, other=0.0))
    scale0, scale1 = _wide(tl.load(g0 + row)), _wide(tl.load(g1 + row))
    inner = scale0 * value + _wide(tl.load(b0 + row))
    m = _leaky(inner, SLOPE)
    e = _wide(tl.load(dy + start + p, mask=p < P, other=0.0))    # 0 beyond the last pixel: adds nothing below
    e = tl.where(scale1 * m + _wide(tl.load(b1 + row)) > 0, e, e * SLOPE)
    f = tl.where(inner > 0, e * scale1, e * scale1 * SLOPE)
    tl.store(dx + start + p, (f * scale0).to(dx.dtype.element_ty), mask=p < P)
    slot = sums + tile.to(tl.int64) * 4 * ROWS + row                # sums (tiles, 4, B * C)
    tl.store(slot, tl.sum(f * value))
    tl.store(slot + ROWS, tl.sum(f))
    tl.store(slot + 2 * ROWS, tl.sum(e * m))
    tl.store(slot + 3 * ROWS, tl.sum(e))


@jit
def _de_kernel(h, skip, gamma, beta, w, W, S, y, C, P, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, pixel = row.to(tl.int64) * P, (row // C).to(tl.int64) * P + p     # pixel: place in the maps (B, P)
    value = _wide(tl.load(h + start + p, mask=p < P, other=0.0))
    mix = _wide(tl.load(w + row))
    channel = _leaky(_wide(tl.load(gamma + row)) * value + _wide(tl.load(beta + row)), SLOPE)
    spatial = _leaky(_wide(tl.load(W + pixel, mask=p < P, other=0.0)) * value
                     + _wide(tl.load(S + pixel, mask=p < P, other=0.0)), SLOPE)
    out = mix * channel + (1 - mix) * spatial + _wide(tl.load(skip + start + p, mask=p < P, other=0.0))
    tl.store(y + start + p, out.to(y.dtype.element_ty), mask=p < P)


@jit
def _de_backward_kernel(h, gamma, beta, w, W, S, dy, dh, sums, maps, B, C, P,
                        SLOPE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    b, c_tile, p_tile = tl.program_id(0) % B, tl.program_id(0) // B, tl.program_id(1)
    c, p = c_tile * BLOCK_C + tl.arange(0, BLOCK_C), p_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    row, inside = b * C + c, (c < C)[:, None] & (p < P)[None, :]
    pixel = b.to(tl.int64) * P + p
    place = row.to(tl.int64)[:, None] * P + p[None, :]              # (BLOCK_C, BLOCK_P) of h, dy and dh
    value = _wide(tl.load(h + place, mask=inside, other=0.0))
    grad = _wide(tl.load(dy + place, mask=inside, other=0.0))
    scale = _wide(tl.load(gamma + row, mask=c < C, other=0.0))[:, None]
    mix = _wide(tl.load(w + row, mask=c < C, other=0.0))[:, None]
    weight = _wide(tl.load(W + pixel, mask=p < P, other=0.0))[None, :]
    a = scale * value + _wide(tl.load(beta + row, mask=c < C, other=0.0))[:, None]
    u = weight * value + _wide(tl.load(S + pixel, mask=p < P, other=0.0))[None, :]
    e, f = grad * mix, grad * (1 - mix)
    e, f = tl.where(a > 0, e, e * SLOPE), tl.where(u > 0, f, f * SLOPE)
    tl.store(dh + place, (e * scale + f * weight).to(dh.dtype.element_ty), mask=inside)
    slot, step = sums + p_tile.to(tl.int64) * 3 * B * C + row, B * C          # sums (pixel tiles, 3, B, C)
    tl.store(slot, tl.sum(e * value, 1), mask=c < C)
    tl.store(slot + step, tl.sum(e, 1), mask=c < C)
    tl.store(slot + 2 * step, tl.sum(grad * (_leaky(a, SLOPE) - _leaky(u, SLOPE)), 1), mask=c < C)
    slot = maps + (c_tile.to(tl.int64) * 2 * B + b) * P + p                   # maps (channel tiles, 2, B, P)
    tl.store(slot, tl.sum(f * value, 0), mask=p < P)
    tl.store(slot + tl.cast(B, tl.int64) * P, tl.sum(f, 0), mask=p < P)       # a B of 1 is no tensor: no .to()


# -- the autograd functions ----------------------------------------------------------------------------------


def _tile(pixels):
    """Pixels per program, warps: eight numbers a thread. Small maps take the small tile."""
    return (256, 1) if pixels <= 256 else (1024, 4)


BLOCK_C, BLOCK_P = 16, 128  # de_combine backward: partial sums add 2 / 16 + 3 / 128 to the traffic


def _first_order(name):
    """Refuse a backward that is recorded (create_graph): the kernel's own derivative does not exist."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} can be differentiated once: its kernel has no second derivative. Put "
                           'a loss that needs one (a gradient penalty) inside  with kernels.use("reference"):')


class _DFBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, g0, b0, g1, b1, slope):
        ctx.save_for_backward(x, g0, b0, g1, b1)
        ctx.slope = slope
        y, pixels = torch.empty_like(x), x[0, 0].numel()
        block, warps = _tile(pixels)
        with on(x):
            _df_kernel[(g0.numel(), -(-pixels // block))](
                x, g0, b0, g1, b1, y, pixels, SLOPE=slope, BLOCK=block, num_warps=warps, enable_fp_fusion=True)
        return y

    @staticmethod
    def backward(ctx, dy):
        _first_order("df_block")
        x, *vectors = ctx.saved_tensors
        dx, rows, pixels = torch.empty_like(x), vectors[0].numel(), x[0, 0].numel()
        block, warps = _tile(pixels)
        tiles = -(-pixels // block)
        parts = torch.empty((tiles, 4, *vectors[0].shape), dtype=sums(x), device=x.device)
        with on(x):
            _df_backward_kernel[(rows, tiles)](
                x, *vectors, dy.contiguous(), dx, parts, pixels, rows, SLOPE=ctx.slope, BLOCK=block,
                num_warps=warps, enable_fp_fusion=True)
        return dx, *parts.sum(0).to(x.dtype), None


class _DECombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, skip, gamma, beta, w, W, S, slope):
        ctx.save_for_backward(h, gamma, beta, w, W, S)
        ctx.slope = slope
        y, pixels = torch.empty_like(h), h[0, 0].numel()
        block, warps = _tile(pixels)
        with on(h):
            _de_kernel[(gamma.numel(), -(-pixels // block))](
                h, skip, gamma, beta, w, W, S, y, h.shape[1], pixels, SLOPE=slope, BLOCK=block, num_warps=warps,
                enable_fp_fusion=True)
        return y

    @staticmethod
    def backward(ctx, dy):
        _first_order("de_combine")
        h, gamma, beta, w, W, S = ctx.saved_tensors
        B, C, pixels = *gamma.shape, h[0, 0].numel()
        dh, dy = torch.empty_like(h), dy.contiguous()
        c_tiles, p_tiles = -(-C // BLOCK_C), -(-pixels // BLOCK_P)
        rows = torch.empty((p_tiles, 3, B, C), dtype=sums(h), device=h.device)
        maps = torch.empty((c_tiles, 2, *W.shape), dtype=sums(h), device=h.device)
        with on(h):
            _de_backward_kernel[(B * c_tiles, p_tiles)](
                h, gamma, beta, w, W, S, dy, dh, rows, maps, B, C, pixels, SLOPE=ctx.slope, BLOCK_C=BLOCK_C,
                BLOCK_P=BLOCK_P, num_warps=4, enable_fp_fusion=True)
        return dh, dy, *rows.sum(0).to(h.dtype), *maps.sum(0).to(h.dtype), None


# -- the public functions ------------------------------------------------------------------------------------


def df_block(x, g0, b0, g1, b1, slope=0.2):
    """Deep fusion block of GALIP and DF-GAN:  l(g1 l(g0 x + b0) + b1).   x (B, C, H, W), vectors (B, C)

    Sums are float32, the result has x's dtype. The kernel can be differentiated once and says so; a layout that
    is not contiguous (channels_last) is copied.
    raises  ValueError for a vector that is not (B, C), on another device, or of another dtype outside autocast
    """
    vector = x.shape[:2]
    vectors = _like("df_block", x, g0=(g0, vector), b0=(b0, vector), g1=(g1, vector), b1=(b1, vector))
    if x.numel() == 0 or backend(x, _too_many_tiles(x)) == "reference":
        return df_block_reference(x, *vectors, slope)
    return _DFBlock.apply(x.contiguous(), *(v.contiguous() for v in vectors), slope)


def de_combine(h, skip, gamma, beta, w, W, S, slope=0.2):
    """DE-Net's combination:  w l(gamma h + beta) + (1 - w) l(W h + S) + skip.

    h, skip (B, C, H, W);  gamma, beta, w (B, C);  maps W, S (B, 1, H, W);  returns (B, C, H, W) like h
    Sums are float32. The kernel can be differentiated once and says so. channels_last is copied.
    raises  ValueError for a shape, device or dtype (outside autocast) that does not fit h
    """
    vector, one_channel = h.shape[:2], (*h.shape[:1], 1, *h.shape[2:])
    rest = _like("de_combine", h, skip=(skip, h.shape), gamma=(gamma, vector), beta=(beta, vector),
                 w=(w, vector), W=(W, one_channel), S=(S, one_channel))
    if h.numel() == 0 or backend(h, _too_many_tiles(h)) == "reference":
        return de_combine_reference(h, *rest, slope)
    return _DECombine.apply(h.contiguous(), *(t.contiguous() for t in rest), slope)


def _like(name, x, **wanted):
    """Check each (tensor, shape) of `wanted` against x; under autocast bring it to x's dtype first."""
    if torch.is_autocast_enabled(x.device.type):
        wanted = {label: (tensor.to(x.dtype), shape) for label, (tensor, shape) in wanted.items()}
    fits(name, x, "B, C, H, W", **wanted)
    return [tensor for tensor, _ in wanted.values()]


def _too_many_tiles(x):
    """A picture's tiles are one axis of a grid; no picture comes near its end. Offsets themselves are 64 bit."""
    most = BLOCK_P * GRID
    return f"a picture of more than {most:,} pixels" if x.shape[2] * x.shape[3] > most else ""


# -- rows for kernels/check.py -------------------------------------------------------------------------------


def compile_cases():
    """float32 and the large tile on every target, the others on sm_90; H * W a multiple of 16 as in all real sizes."""
    for dtype, block, warps in (("fp32", 1024, 4), ("fp32", 256, 1), ("bf16", 1024, 4), ("bf16", 256, 1), ("fp16", 1024, 4),
                                ("fp64", 1024, 4)):
        t, f, usual = f"*{dtype}:16", "*fp64:16" if dtype == "fp64" else "*fp32:16", (dtype, block) == ("fp32", 1024)
        rest = {"kind": "bandwidth", "num_stages": 3, **({} if usual else {"targets": ("sm_90",)})}
        tile = {"constants": {"SLOPE": 0.2, "BLOCK": block}, "num_warps": warps, **rest}
        vectors, sizes = dict.fromkeys(("g0", "b0", "g1", "b1"), t), {"C": "i32:16", "P": "i32:16"}
        yield {"name": f"df_block {dtype} {block}", "kernel": _df_kernel,
               "signature": {"x": t, **vectors, "y": t, "P": "i32:16"}, **tile}
        yield {"name": f"df_block backward {dtype} {block}", "kernel": _df_backward_kernel,
               "signature": {"x": t, **vectors, "dy": t, "dx": t, "sums": f, "P": "i32:16", "ROWS": "i32:16"}, **tile}
        yield {"name": f"de_combine {dtype} {block}", "kernel": _de_kernel,
               "signature": {**dict.fromkeys(("h", "skip", "gamma", "beta", "w", "W", "S", "y"), t), **sizes}, **tile}
        if block == 1024:
            yield {"name": f"de_combine backward {dtype}", "kernel": _de_backward_kernel, "num_warps": 4, **rest,
                   "signature": {**dict.fromkeys(("h", "gamma", "beta", "w", "W", "S", "dy", "dh"), t), "sums": f, "maps": f,
                                 "B": "i32", **sizes},
                   "constants": {"SLOPE": 0.2, "BLOCK_C": BLOCK_C, "BLOCK_P": BLOCK_P}}
