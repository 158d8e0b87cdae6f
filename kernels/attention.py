"""Cross-attention of many queries to few keys, forward and backward; its frame-story form; its map.

    s_ij = scale q_i . k_j      p_ij = exp(s_ij) / sum_j exp(s_ij)      o_i = sum_j p_ij v_j     for each head
    given do:   dv_j = sum_i p_ij do_i    dp_ij = do_i . v_j    ds_ij = p_ij (dp_ij - sum_j p_ij dp_ij)
                dq_i = scale sum_j ds_ij k_j                    dk_j = scale sum_i ds_ij q_i

A sentence has at most 256 tokens: all keys of a head fit on the chip. So there is one block of keys, the exact row maximum,
no running rescale; and backward sees every key of its queries, hence recomputes p from q and k and needs nothing else: no
log-sum-exp, no output, no extra pass for sum_j p dp. A query has one owner (dq is written once); dk, dv are partial sums
over spans of queries, added in a fixed order: no atomics, same bits. Traffic: forward 2, backward 3 query-sized tensors.
Frame-story (StoryImager's FS-CAM) is two softmaxes over two sets of keys in one pass, o = A(q, own frame's words)
+ gate A(q, story); d gate = sum of its p dp.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels import GRID, backend, dot, fits, interpreting, jit, matrix_units, on, padded, sums, whole

if TYPE_CHECKING:
    import triton.language as tl


# -- the definitions -----------------------------------------------------------------------------------------


def cross_attention_reference(q, k, v, lengths=None, scale=None, mask=None, return_lse=False):
    """PyTorch's attention with a broadcast mask. A query that may see no key gives 0, and zero gradients."""
    keep = _visible(k, lengths, mask)                                     # (B, 1 or Q, K) bool, or None
    blind = see = None
    if keep is not None:
        blind = ~keep.any(-1)                                             # (B, 1 or Q): let it see all, then erase it
        see = (keep | blind[..., None])[:, None]                          # (B, 1, 1 or Q, K), never expanded
        blind = None if blind.is_cpu and not blind.any() else blind       # looking would stop a GPU
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=see, scale=scale).transpose(1, 2)
    out = out if blind is None else out.masked_fill(blind[..., None, None], 0)
    if not return_lse:
        return out
    s = torch.einsum("bqhd,bkhd->bqhk", q.detach().to(sums(q)), k.detach().to(sums(q))) * _scale(q, scale)
    return out, (s if keep is None else s.masked_fill(~keep[:, :, None], -torch.inf)).logsumexp(-1)       # (B, Q, H)


def frame_story_reference(q, kf, vf, ks, vs, gate, cells, board, q_story=None, lengths=None, scale=None):
    """Cut the board into cells, look at each frame's words, paste; add gate times attention to the story."""
    frames = cross_attention_reference(cut(q, cells, board), kf.flatten(0, 1), vf.flatten(0, 1),
                                       None if lengths is None else lengths.flatten(), scale)
    story = cross_attention_reference(q if q_story is None else q_story, ks, vs, None, scale)
    return paste(frames, cells, board) + gate * story


def cut(x, cells, board):
    """Tokens of a board, row by row -> tokens of its cells.   (B, h w, H, D) -> (B r c, h/r w/c, H, D)"""
    (r, c), (h, w) = cells, board
    x = x.unflatten(1, (r, h // r, c, w // c)).transpose(2, 3)            # (B, r, c, h/r, w/c, H, D)
    return x.reshape(len(x) * r * c, h // r * (w // c), *x.shape[-2:])


def paste(x, cells, board):
    """The inverse of `cut`."""
    (r, c), (h, w) = cells, board
    x = x.unflatten(1, (h // r, w // c)).unflatten(0, (len(x) // (r * c), r, c)).transpose(2, 3)
    return x.reshape(len(x), h * w, *x.shape[-2:])


def attention_map_reference(q, k, lengths=None, mask=None, scale=None):
    """Softmax head by head: (B, H, Q, K) is never stored."""
    keep, total = _visible(k, lengths, mask), q.new_zeros(len(q), q.shape[1], k.shape[1], dtype=sums(q))
    for h in range(q.shape[2]):
        s = q[:, :, h].to(total.dtype) @ (k[:, :, h].to(total.dtype) * _scale(q, scale)).mT     # (B, Q, K)
        total += s.softmax(-1) if keep is None else s.masked_fill_(~keep, -1e38).softmax(-1) * keep
    return total / q.shape[2]


def _visible(k, lengths, mask):
    """Which keys a query may see: (B, 1 or Q, K) bool, or None for all."""
    keep = None if mask is None else mask[:, None] if mask.ndim == 2 else mask
    if lengths is not None:
        short = torch.arange(k.shape[1], device=k.device) < lengths[:, None, None]
        keep = short if keep is None else keep & short
    return keep


# -- the kernels ---------------------------------------------------------------------------------------------


@jit
def _place(tile, f, n, cell_w, board_w, cols, BLOCK_Q: tl.constexpr, BOARD: tl.constexpr):
    """Tokens of the queries of one tile of cell f, and which exist. Cell and board are counted row by row."""
    p = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)                        # query p of the cell's n
    if BOARD:
        corner = f // cols * (n // cell_w) * board_w + f % cols * cell_w
        return corner + p // cell_w * board_w + p % cell_w, p < n
    return p, p < n


@jit
def _rows(x, row, valid, stride, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, (rows, BLOCK_D), zero beyond D.

    Strides come in units of 8 elements (UNIT): the compiler learns "divisible by 16" of an argument and nothing else, and a
    head offset of 40 would make it load two bytes at a time.
    """
    d = tl.arange(0, BLOCK_D)
    return tl.load(x + row[:, None] * (stride * UNIT) + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)


@jit
def _start(x, a, stride_a, b, stride_b, h, stride_h, UNIT: tl.constexpr):
    """Where head h of sample a, frame b starts: 64 bit: a batch may pass 2**31 elements."""
    return x + (tl.cast(a, tl.int64) * stride_a + tl.cast(b, tl.int64) * stride_b + h * stride_h) * UNIT


@jit
def _seen(key, K, lengths, mask, sample):
    """Which keys the queries of a sample see, (BLOCK_K). What is absent is None at compile time."""
    seen = key < K
    if lengths is not None:
        seen = seen & (key < tl.load(lengths + sample))
    if mask is not None:
        seen = seen & (tl.load(mask + sample.to(tl.int64) * K + key, mask=seen, other=0) != 0)
    return seen


@jit
def _softmax(q, k, seen, SCALE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Unnormalised probabilities, row maximum (base 2), row sum. A row that sees nothing: 0, -1e38, 1; no -inf - -inf."""
    s = dot(q, tl.trans(k), PRECISION, UPCAST) * (SCALE * 1.4426950408889634)   # log2 e: exp2 is native
    s = tl.where(seen[None, :], s, -1e38)
    top = tl.max(s, 1)
    p = tl.where(seen[None, :], tl.exp2(s - top[:, None]), 0.0)
    total = tl.sum(p, 1)
    return p, top, tl.where(total > 0, total, 1.0)


@jit
def _forward_kernel(q, q_story, k, v, ks, vs, lengths, mask, gate, out, lse, n, K, K2, H, frames, cell_w, board_w, cols,
                    qb, qt, qh, kb, kf, kt, kh, sb, st, sh, SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                    BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_Q: tl.constexpr, UNIT: tl.constexpr,
                    BOARD: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    # neighbouring programs are heads: they share the cache lines of a token
    h, f, b = tl.program_id(0) % H, tl.program_id(0) // H % frames, tl.program_id(0) // H // frames
    token, valid = _place(tl.program_id(1), f, n, cell_w, board_w, cols, BLOCK_Q, BOARD)
    query = _rows(_start(q, b, qb, 0, 0, h, qh, UNIT), token, valid, qt, UNIT, D, BLOCK_D)
    key = tl.arange(0, BLOCK_K)                                      # all keys; on a board, those of this cell's frame
    seen = _seen(key, K, lengths, mask, b * frames + f)
    keys = _rows(_start(k, b, kb, f, kf, h, kh, UNIT), key, seen, kt, UNIT, D, BLOCK_D)
    values = _rows(_start(v, b, kb, f, kf, h, kh, UNIT), key, seen, kt, UNIT, D, BLOCK_D)
    p, top, total = _softmax(query, keys, seen, SCALE, PRECISION, UPCAST)
    o = dot(p.to(values.dtype), values, PRECISION, UPCAST) / total[:, None]
    if ks is not None:                                               # the whole story, a softmax of its own
        if q_story is not None:
            query = _rows(_start(q_story, b, qb, 0, 0, h, qh, UNIT), token, valid, qt, UNIT, D, BLOCK_D)
        key = tl.arange(0, BLOCK_S)
        keys = _rows(_start(ks, b, sb, 0, 0, h, sh, UNIT), key, key < K2, st, UNIT, D, BLOCK_D)
        values = _rows(_start(vs, b, sb, 0, 0, h, sh, UNIT), key, key < K2, st, UNIT, D, BLOCK_D)
        p, _, rest = _softmax(query, keys, key < K2, SCALE, PRECISION, UPCAST)
        o += tl.load(gate) * (dot(p.to(values.dtype), values, PRECISION, UPCAST) / rest[:, None])
    d, at = tl.arange(0, BLOCK_D), token * H + h                     # out (B, frames n, H, D), contiguous
    out += b.to(tl.int64) * (n * frames * H * D)
    inside = valid[:, None] & (d < D)[None, :]
    tl.store(out + at[:, None] * D + d[None, :], o.to(out.dtype.element_ty), mask=inside)
    if lse is not None:
        lse += b.to(tl.int64) * (n * frames * H)
        natural = (top + tl.log2(total)) * 0.6931471805599453        # ln 2
        tl.store(lse + at, tl.where(top > -1e38, natural, float("-inf")), mask=valid)


@jit
def _backward_kernel(q, k, v, lengths, mask, gate, dout, dq, dk, dv, dgate, n, K, H, frames, cell_w, board_w, cols,
                     qb, qt, qh, kb, kf, kt, kh, SPAN: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr,
                     BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, UNIT: tl.constexpr,
                     BOARD: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    h, f, b = tl.program_id(0) % H, tl.program_id(0) // H % frames, tl.program_id(0) // H // frames
    key, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    seen = _seen(key, K, lengths, mask, b * frames + f)
    keys = _rows(_start(k, b, kb, f, kf, h, kh, UNIT), key, seen, kt, UNIT, D, BLOCK_D)
    values = _rows(_start(v, b, kb, f, kf, h, kh, UNIT), key, seen, kt, UNIT, D, BLOCK_D)
    sum_k = tl.zeros((BLOCK_K, BLOCK_D), dtype=dk.dtype.element_ty)
    sum_v = tl.zeros((BLOCK_K, BLOCK_D), dtype=dk.dtype.element_ty)
    sum_gate = tl.zeros((BLOCK_Q,), dtype=dk.dtype.element_ty)
    dout += b.to(tl.int64) * (n * frames * H * D)
    dq += b.to(tl.int64) * (n * frames * H * D)
    factor = 1.0 if gate is None else tl.load(gate)
    for i in range(SPAN):                                          # this program's tiles of queries, in order
        token, valid = _place(tl.program_id(1) * SPAN + i, f, n, cell_w, board_w, cols, BLOCK_Q, BOARD)
        query = _rows(_start(q, b, qb, 0, 0, h, qh, UNIT), token, valid, qt, UNIT, D, BLOCK_D)
        at, inside = (token * H + h)[:, None] * D + d[None, :], valid[:, None] & (d < D)[None, :]
        grad = tl.load(dout + at, mask=inside, other=0.0)        # 0 beyond the last query: adds nothing below
        p, _, total = _softmax(query, keys, seen, SCALE, PRECISION, UPCAST)
        p = p / total[:, None]
        dp = dot(grad, tl.trans(values), PRECISION, UPCAST)
        delta = tl.sum(p * dp, 1)                                    # = do . o, without reading o
        sum_gate += delta
        ds = (p * (dp - delta[:, None])).to(query.dtype)
        sum_v += dot(tl.trans(p.to(grad.dtype)), grad, PRECISION, UPCAST)
        sum_k += dot(tl.trans(ds), query, PRECISION, UPCAST)
        step = dot(ds, keys, PRECISION, UPCAST) * SCALE * factor
        if ADD:                                                # the frame branch has written its part already
            step += tl.load(dq + at, mask=inside, other=0.0)
        tl.store(dq + at, step.to(dq.dtype.element_ty), mask=inside)
    part = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)        # (S, B, F, H, K, D)
    at, inside = part * (K * D) + key[:, None] * D + d[None, :], (key < K)[:, None] & (d < D)[None, :]
    tl.store(dk + at, sum_k * SCALE * factor, mask=inside)
    tl.store(dv + at, sum_v * factor, mask=inside)
    if dgate is not None:
        tl.store(dgate + part, tl.sum(sum_gate))


@jit
def _map_kernel(q, k, lengths, mask, out, Q, K, H, qb, qt, qh, kb, kt, kh, SCALE: tl.constexpr, D: tl.constexpr,
                BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, UNIT: tl.constexpr,
                PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    b = tl.program_id(0)
    token, valid = _place(tl.program_id(1), 0, Q, 1, 1, 1, BLOCK_Q, False)
    key = tl.arange(0, BLOCK_K)
    seen = _seen(key, K, lengths, mask, b)
    mean = tl.zeros((BLOCK_Q, BLOCK_K), dtype=out.dtype.element_ty)
    h = 0
    while h < H:                                                  # one program holds all heads of its queries
        query = _rows(_start(q, b, qb, 0, 0, h, qh, UNIT), token, valid, qt, UNIT, D, BLOCK_D)
        keys = _rows(_start(k, b, kb, 0, 0, h, kh, UNIT), key, seen, kt, UNIT, D, BLOCK_D)
        p, _, total = _softmax(query, keys, seen, SCALE, PRECISION, UPCAST)
        mean += p / total[:, None]
        h += 1
    at = b.to(tl.int64) * (Q * K) + token[:, None] * K + key[None, :]
    tl.store(out + at, mean / H, mask=valid[:, None] & (key < K)[None, :])


# -- launching and the autograd function ---------------------------------------------------------------------

# Queries per program / warps for padded head width 32, 64, 128, 256: on chips 8.x, 12.x; then 9.x, 10.x.
# "-": no tile without spills, the reference runs.  "*": needs more than 99 KiB of shared memory, so 8.0 only.
# "half": float16, bfloat16.   "float": float32 by three TF32 products, as exact as float32 (by one, if torch allows TF32).
# "story": forward with the story branch. Read off kernels.check, for any flags; the fastest is *not yet measured*.
TILES = {
    ("forward", "half", 128): ("64/4 64/4 64/8 32/8", "64/4 64/4 64/8 64/8"),
    ("forward", "half", 256): ("16/8 32/8 32/8 -", "16/8 64/8 64/8 -"),
    ("forward", "float", 128): ("16/4 16/8 16/8 -", "16/4 16/8 - -"),
    ("story", "half", 128): ("64/4 32/4 32/8 16/8", "64/4 64/4 32/8 16/8"),
    ("story", "float", 128): ("16/8 16/8 - -", "16/8 16/8 - -"),
    ("backward", "half", 128): ("16/4 16/8 16/8* -", "16/4 32/8 16/8 -"),
    ("backward", "half", 256): ("16/8 16/8* - -", "16/8 16/8 - -"),
    ("backward", "float", 128): ("16/8* - - -", "16/8 - - -"),
    ("map", "half", 128): ("64/8 64/8 64/8 32/8", "64/8 64/8 64/8 32/8"),
    ("map", "float", 128): ("16/8 16/8 - -", "16/8 16/8 - -"),
}
PROGRAMS = 320          # of backward: enough to fill any chip twice or so; more queries make longer spans


def _tile(kind, x, keys):
    """(queries, warps) of kernel `kind` for queries x (..., D) and so many keys, or None."""
    if not x.is_cuda:
        return 64, 4                                                  # the interpreter knows no registers
    capability, width = torch.cuda.get_device_capability(x.device), padded(x.shape[-1], 32)
    rows = TILES.get((kind, "half" if x.element_size() == 2 else "float", max(_block(keys), 128)))
    entry = rows[capability[0] in (9, 10)].split()[width.bit_length() - 6] if rows and width <= 256 else "-"
    if entry == "-" or (entry[-1] == "*" and capability != (8, 0)):
        return None
    queries, warps = entry.rstrip("*").split("/")
    return int(queries), int(warps)


def _block(keys):
    """Keys of a tile: few sizes, few kernels to compile."""
    return 16 if keys <= 16 else 128 if keys <= 128 else 256


def _launch(kind, q, keys, scale, *tensors):
    """(strides of q and the other tensors, constants and options): the same for the same shapes, dtype and device."""
    queries, warps = _tile(kind, q, keys)
    strides = [stride for x in (q, *tensors) for stride in x.stride()[:-1]]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    single = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    return [stride // unit for stride in strides], {
        "SCALE": scale, "D": q.shape[-1], "BLOCK_D": padded(q.shape[-1], 32), "BLOCK_K": _block(keys), "BLOCK_Q": queries,
        "UNIT": unit, "PRECISION": single if q.dtype == torch.float32 else "ieee", "UPCAST": interpreting(),
        "num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}


def _backward(q, k, v, lengths, mask, gate, dout, dq, scale, board, add):
    """One branch: writes dq, or adds to it; returns dk, dv, d gate.   k, v (B, F, K, H, D), board as in `_Attention`"""
    B, frames, K, H, D = k.shape
    n, *layout = board or (q.shape[1], 1, 1, 1)
    strides, settings = _launch("backward", q, K, scale, k)
    tiles, programs = -(-n // settings["BLOCK_Q"]), B * frames * H
    span = padded(-(-tiles // max(1, PROGRAMS // programs)), 1)        # a power of two: few variants to compile
    spans = -(-tiles // span)
    parts = torch.empty((2, spans, B, frames, H, K, D), dtype=sums(q), device=q.device)
    dgate = None if gate is None else torch.empty((spans, programs), dtype=sums(q), device=q.device)
    with on(q):
        _backward_kernel[(programs, spans)](
            q, k, v, lengths, mask, gate, dout, dq, *parts, dgate, n, K, H, frames, *layout, *strides,
            SPAN=span, BOARD=board is not None, ADD=add, **settings)
    dk, dv = parts.sum(1).transpose(3, 4).to(q.dtype)                  # (B, F, K, H, D)
    return dk, dv, None if gate is None else dgate.sum()


class _Attention(torch.autograd.Function):
    """(out like q, log-sum-exp (B, Q, H) or None).   k, v (B, F, K, H, D); inputs are all that is saved

    Without a story, q_story, ks, vs and gate are None.
    board   (queries of a cell, width of a cell, width of the board, columns of cells); None: q is no board
    """

    @staticmethod
    def forward(ctx, q, k, v, q_story, ks, vs, gate, lengths, mask, scale, board, want_lse):
        ctx.save_for_backward(q, k, v, q_story, ks, vs, gate, lengths, mask)
        ctx.scale, ctx.board, (B, frames, K, H, _) = scale, board, k.shape
        n, *layout = board or (q.shape[1], 1, 1, 1)
        K2 = 0 if ks is None else ks.shape[1]
        strides, settings = _launch("story" if K2 else "forward", q, max(K, K2), scale, k, *([ks] if K2 else []))
        settings |= {"BLOCK_K": _block(K), "BLOCK_S": _block(K2), "BOARD": board is not None}
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=sums(q), device=q.device) if want_lse else None
        with on(q):
            _forward_kernel[(B * frames * H, -(-n // settings["BLOCK_Q"]))](
                q, q_story, k, v, ks, vs, lengths, mask, gate, out, lse, n, K, K2, H, frames, *layout,
                *strides, *(() if K2 else (0, 0, 0)), **settings)
        if want_lse:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        q, k, v, q_story, ks, vs, gate, lengths, mask = ctx.saved_tensors
        dout, dq = dout.contiguous(), torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk, dv, _ = _backward(q, k, v, lengths, mask, None, dout, dq, ctx.scale, ctx.board, add=False)
        dq_story = dks = dvs = dgate = None
        if ks is not None:                                # the story branch adds to dq, or has a dq of its own
            dq_story = None if q_story is None else torch.empty_like(dq)
            dks, dvs, dgate = _backward(q if q_story is None else q_story, ks[:, None], vs[:, None], None, None, gate, dout,
                                        dq if q_story is None else dq_story, ctx.scale, None, add=q_story is None)
            dks, dvs = dks[:, 0], dvs[:, 0]
        return dq, dk, dv, dq_story, dks, dvs, dgate, *[None] * 5


# -- the public functions ------------------------------------------------------------------------------------


def cross_attention(q, k, v, lengths=None, scale=None, mask=None, return_lse=False):
    """softmax(scale q k^T) v for every head.   q (B, Q, H, D), k, v (B, K, H, D) -> (B, Q, H, D), dtype kept

    Heads are a view of a projection's last axis: any strides whose last is 1. Autocast decides the dtype. Sums are float32;
    float32 products use TF32 if torch.backends.cuda.matmul.allow_tf32 says so.
    lengths     (B,) int, keys >= length are ignored; 0 gives 0 and zero gradients
    mask        (B, K) or (B, Q, K) bool, True = may be seen; the second form always takes the reference
    scale       number, default D ** -0.5
    return_lse  also log sum_j exp(s_ij), (B, Q, H) float32 without gradient; -inf where nothing is seen
    raises      ValueError for shapes, dtypes, devices that do not fit, or lengths outside 0 .. K (on a GPU lengths are
                clamped instead: looking would wait for it)
    """
    q, k, v = _autocast(q, k, v)
    _check("cross_attention", q, scale, lengths, mask, k=k, v=v)
    if _reference("forward", q, k.shape[1], k, v, mask=mask):
        return cross_attention_reference(q, k, v, lengths, scale, mask, return_lse)
    lengths, mask, q, k, v = _ready(lengths, mask, (q,), (k[:, None], v[:, None]))
    out, lse = _Attention.apply(q, k, v, None, None, None, None, lengths, mask, _scale(q, scale), None, return_lse)
    return (out, lse) if return_lse else out


def frame_story_attention(q, kf, vf, ks, vs, gate, cells, board, q_story=None, lengths=None, scale=None):
    """StoryImager's FS-CAM:  A(q, words of the token's own frame) + gate A(q_story, story), two softmaxes.

    q        (B, h w, H, D) tokens of the whole board, row by row: nothing is cut out or pasted back
    kf, vf   (B, F, K, H, D) words of each frame, F = r c: frame f lies in cell f, cells counted row by row
    ks, vs   (B, K2, H, D) the story's tokens
    gate     number or tensor of one element; it gets a gradient
    cells    (r, c), board (h, w): r must divide h, c must divide w
    q_story  (B, h w, H, D) queries of the story branch, if they differ from q (LoRA on the query projection)
    lengths  (B, F) int, words >= length are ignored. Paper: padding words are not masked, hence None
    returns  (B, h w, H, D), dtype of q.     raises  ValueError for whatever does not fit
    """
    name, (q, kf, vf, ks, vs) = "frame_story_attention", _autocast(q, kf, vf, ks, vs)
    q_story = None if q_story is None else _autocast(q_story)[0]
    gate = gate if isinstance(gate, torch.Tensor) else torch.full((), float(gate), device=q.device)
    (r, c), (h, w) = _check_board(name, q, gate, cells, board)
    fits(name, q, "B, Q, H, D", q_story=(q if q_story is None else q_story, q.shape))
    _check(name, q, scale, ks=ks, vs=vs)
    _check(name, q, scale, lengths, frames=(r * c,), kf=kf, vf=vf)
    gate = gate.reshape(())
    if _reference("story", q, max(kf.shape[2], ks.shape[1]), kf, vf, ks, vs, gate, q_story):
        return frame_story_reference(q, kf, vf, ks, vs, gate, cells, board, q_story, lengths, scale)
    lengths, _, kf, vf, ks, vs, q, *own = _ready(lengths, None, (kf, vf), (ks, vs), (q,) if q_story is None else (q, q_story))
    layout = h // r * (w // c), w // c, w, c
    return _Attention.apply(q, kf, vf, *(own or [None]), ks, vs, gate.to(sums(q)), lengths, None, _scale(q, scale), layout,
                            False)[0]


@torch.no_grad()
def attention_map(q, k, lengths=None, mask=None, scale=None):
    """Attention weights, mean over heads, without gradient.   -> (B, Q, K) float32; never a (B, H, Q, K)

    Arguments as in `cross_attention`. A query that sees no key has a row of zeros; the others sum to 1.
    """
    q, k = _autocast(q, k)
    _check("attention_map", q, scale, lengths, mask, k=k)
    if _reference("map", q, k.shape[1], k, mask=mask):
        return attention_map_reference(q, k, lengths, mask, scale)
    lengths, mask, q, k = _ready(lengths, mask, (q,), (k,))
    (B, Q, H, _), K = q.shape, k.shape[1]
    strides, settings = _launch("map", q, K, _scale(q, scale), k)
    out = torch.empty((B, Q, K), dtype=sums(q), device=q.device)
    with on(q):
        _map_kernel[(B, -(-Q // settings["BLOCK_Q"]))](q, k, lengths, mask, out, Q, K, H, *strides, **settings)
    return out


# -- what the public functions check and prepare -------------------------------------------------------------


def _reference(kind, q, keys, *others, mask=None):
    """True if the reference runs: nothing to do, or `backend` says so; here is what the kernels cannot take."""
    tensors = [q, *(x for x in others if x is not None)]
    if not all(x.numel() for x in tensors):
        return True
    reach = max(sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) for x in tensors)
    grad = kind != "map" and torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    reasons = (
        (matrix_units(q), matrix_units(q)),
        (q.dtype == torch.float64 and q.is_cuda, "float64 products are for the interpreter"),
        (mask is not None and mask.ndim == 3, "a mask of its own for every query"),
        (keys > 256 or q.shape[-1] > 256, f"{keys} keys of width {q.shape[-1]} do not fit on the chip (256 and 256 do)"),
        (max(reach, q[0].numel()) >= 2**31 or q.shape[1] > 16 * GRID,
         f"one sample spans 2**31 elements or {16 * GRID:,} queries"),
        *((_tile(part, q, keys) is None, f"no {part} tile for width {q.shape[-1]}, {keys} keys, {q.dtype} on this GPU")
          for part in ((kind, "backward") if grad else (kind,))))
    return backend(q, next((words for bad, words in reasons if bad), "")) == "reference"


def _check(name, q, scale, lengths=None, mask=None, frames=(), **keys):
    """q (B, Q, H, D), keys and values (B, *frames, K, H, D), lengths (B, *frames) and mask fit each other."""
    if isinstance(scale, torch.Tensor):
        raise ValueError(f"{name}: scale is a number, not a tensor; to learn it, multiply q by it")
    shape, K = (*q.shape[:1], *frames), next(iter(keys.values())).shape[1 + len(frames):][:1]
    fits(name, q, "B, Q, H, D", **{label: (x, (*shape, *K, *q.shape[2:])) for label, x in keys.items()})
    if lengths is not None:
        if lengths.shape != shape or not whole(lengths) or lengths.device != q.device:
            raise ValueError(f"{name}: lengths must be integers {shape} on {q.device}, got {lengths.dtype} "
                             f"{tuple(lengths.shape)} on {lengths.device}")
        if lengths.is_cpu and lengths.numel() and not 0 <= lengths.min() <= lengths.max() <= K[0]:
            raise ValueError(f"{name}: lengths {lengths.tolist()} must lie in 0 .. {K[0]}")
    shapes = (*shape, *K), (*shape, q.shape[1], *K)
    if mask is not None and (mask.dtype != torch.bool or mask.device != q.device or mask.shape not in shapes):
        raise ValueError(f"{name}: mask must be bool {shapes[0]} or {shapes[1]}, True where a key may be seen, got "
                         f"{mask.dtype} {tuple(mask.shape)} on {mask.device}")


def _check_board(name, q, gate, cells, board):
    if len(cells) != 2 or len(board) != 2:
        raise ValueError(f"{name}: cells {cells} and board {board} are rows and columns, two numbers each")
    (r, c), (h, w) = cells, board
    if min(r, c, h, w) < 1 or h % r or w % c or q.ndim != 4 or q.shape[1] != h * w:
        raise ValueError(f"{name}: q {tuple(q.shape)} must hold the h w = {h} x {w} tokens of the board, and the {r} x {c} "
                         "cells must divide it evenly")
    if gate.numel() != 1 or gate.device != q.device or not gate.is_floating_point():
        raise ValueError(f"{name}: gate must be one number, got {gate.dtype} {tuple(gate.shape)} on {gate.device}")
    return cells, board


def _autocast(*tensors):
    """Under autocast, tensors in autocast's dtype (float64 stays)."""
    if torch.is_autocast_enabled(tensors[0].device.type) and tensors[0].dtype != torch.float64:
        return [x.to(torch.get_autocast_dtype(x.device.type)) for x in tensors]
    return tensors


def _ready(lengths, mask, *groups):
    """As the kernels want it: int32, bytes, and tensors of last stride 1; a group shares its strides, or is copied."""
    yield None if lengths is None else lengths.to(torch.int32).contiguous()
    yield None if mask is None else mask.contiguous().view(torch.uint8)
    for group in groups:
        same = all(x.stride(-1) == 1 and x.stride() == group[0].stride() for x in group)
        yield from group if same else (x.contiguous() for x in group)


def _scale(q, scale):
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


# -- rows for kernels/check.py -------------------------------------------------------------------------------


def compile_cases():
    """Every entry of TILES with all options present, the worst case, on the oldest chip of its column.

    StoryImager's (16 bit, 128 keys, width 64) also without options, in float16, with 16 keys and on every other chip; width 64
    by one TF32 product.
    """
    for (kind, numbers, keys), columns in TILES.items():
        for column, chips in zip(columns, (("sm_80", "sm_86", "sm_120"), ("sm_90", "sm_100")), strict=True):
            for width, head, entry in zip((32, 64, 128, 256), (32, 40, 80, 160), column.split(), strict=True):
                if entry == "-":
                    continue
                chip, *others = chips[:1] if entry[-1] == "*" else chips
                case = kind, numbers, keys, width, head, [int(n) for n in entry.rstrip("*").split("/")]
                yield _case(*case, chip, others)
                if (numbers, keys, width) == ("half", 128, 64):
                    yield _case(kind, "fp16", *case[2:], chip, others)
                    yield _case(kind, numbers, 16, *case[3:], chip, others)
                if width == 64 and keys == 128 and kind != "map":
                    yield _case(*case, chip, others, plain=True)
                    for other in others if numbers == "half" else ():
                        yield _case(*case, other, ())


def _case(kind, numbers, keys, width, head, tile, target, also, plain=False):
    """One row. `also`: chips of the same column, whose smaller shared memory must do."""
    kernel = {"backward": _backward_kernel, "map": _map_kernel}.get(kind, _forward_kernel)
    number, size = {"half": ("*bf16:16", 2), "fp16": ("*fp16:16", 2), "float": ("*fp32:16", 4)}[numbers]
    story, backward = kind == "story", kind == "backward"
    types = dict.fromkeys("lse gate dk dv dgate out".split(), "*fp32:16") | {"lengths": "*i32:16", "mask": "*u8:16"}
    types |= dict.fromkeys("q q_story k v ks vs dout dq".split() + ["out"] * (kind != "map"), number)
    constants = {"SCALE": head ** -0.5, "D": head, "BLOCK_D": width, "BLOCK_K": keys, "BLOCK_Q": tile[0], "UNIT": 8,
                 "BLOCK_S": 16 if plain else keys, "SPAN": 1 if plain else 4, "BOARD": kind != "forward" and not plain,
                 "ADD": not plain, "PRECISION": "ieee" if size == 2 else "tf32" if plain else "tf32x3", "UPCAST": False}
    absent = ("" if story else "q_story ks vs ") + ("" if story or backward and not plain else "gate ")
    absent += "lengths mask lse q_story dgate" if plain else "mask lse" if story else ""
    constants |= dict.fromkeys(absent.split())
    names, tables = kernel.real().arg_names, 1 if kind == "map" else 2
    loads = sum(n * width * size // (512 * tile[1]) for n in ((keys, constants["BLOCK_S"]) if story else (keys,)))   # a thread's
    return {"name": f"attention {kind} {numbers} {keys}x{width}{' plain' if plain else ''}", "kernel": kernel,
            "kind": "product", "wide": tables * loads,
            "signature": {name: types.get(name, "i32") for name in names if name not in constants},
            "constants": {name: value for name, value in constants.items() if name in names},
            "targets": (target,), "also": also, "num_warps": tile[1], "num_stages": 1, "tf32": size == 4}
