"""Cross-attention of many queries to few keys, forward and backward; its frame-story form; its map for explanation.

    s_ij = scale q_i . k_j      p_ij = exp(s_ij) / sum_j exp(s_ij)      o_i = sum_j p_ij v_j       per head, j < length
    given do:   dv_j = sum_i p_ij do_i      dp_ij = do_i . v_j      ds_ij = p_ij (dp_ij - sum_j p_ij dp_ij)
                dq_i = scale sum_j ds_ij k_j                         dk_j = scale sum_i ds_ij q_i
A sentence has at most 256 tokens: all keys of a head fit on the chip. So there is one block of keys, the exact row
maximum, no running rescale; and backward sees every key of its queries, hence recomputes p from q and k and needs
nothing else: no log-sum-exp, no output, no extra pass for sum_j p dp. A query has one owner (dq is written once);
dk, dv are partial sums over S spans of queries, added in a fixed order: no atomics, the same bits every run.
Traffic: forward 2, backward 3 query-sized tensors. Frame-story (StoryImager's FS-CAM): two softmaxes over two sets of
keys in one pass, o = A(q, own frame's words) + gate A(q, whole story); d gate = sum of the story branch's p dp.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from kernels import backend, dot, interpreting, jit, matrix_units, on

if TYPE_CHECKING:
    import triton.language as tl


# -- the definitions ---------------------------------------------------------------------------------------------


def cross_attention_reference(q, k, v, lengths=None, scale=None, mask=None):
    """PyTorch's attention with a broadcast mask. A query that may see no key gives 0, and zero gradients."""
    keep = _visible(k, lengths, mask)                                     # (B, 1 or Q, K) bool, or None
    blind = None
    if keep is not None:
        blind = ~keep.any(-1)                                             # (B, 1 or Q): let it see all, then erase it
        keep = (keep | blind[..., None])[:, None]                         # (B, 1, 1 or Q, K), never expanded
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=keep, scale=scale)
    out = out.transpose(1, 2)
    return out if blind is None else out.masked_fill(blind[..., None, None], 0)


def frame_story_reference(q, kf, vf, ks, vs, gate, cells, board, q_story=None, lengths=None):
    """Cut the board into cells, attend to each frame's words, paste; add gate times attention to the story."""
    frames = cross_attention_reference(cut(q, cells, board), kf.flatten(0, 1), vf.flatten(0, 1),
                                       None if lengths is None else lengths.flatten())
    story = cross_attention_reference(q if q_story is None else q_story, ks, vs)
    return paste(frames, cells, board) + gate * story


def cut(x, cells, board):
    """Tokens of a board, row by row -> tokens of its cells.   (B, h w, H, D) -> (B r c, h/r w/c, H, D)"""
    (r, c), (h, w) = cells, board
    x = x.unflatten(1, (r, h // r, c, w // c)).transpose(2, 3)            # (B, r, c, h/r, w/c, H, D)
    return x.reshape(-1, h // r * (w // c), *x.shape[-2:])


def paste(x, cells, board):
    """The inverse of `cut`."""
    (r, c), (h, w) = cells, board
    x = x.unflatten(1, (h // r, w // c)).unflatten(0, (-1, r, c)).transpose(2, 3)
    return x.reshape(-1, h * w, *x.shape[-2:])


def attention_map_reference(q, k, lengths=None, mask=None, scale=None):
    """Softmax head by head: (B, H, Q, K) is never stored."""
    keep, total = _visible(k, lengths, mask), 0
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for h in range(q.shape[2]):
        s = _float(q[:, :, h]) @ _float(k[:, :, h]).mT * scale            # (B, Q, K)
        total = total + (s.softmax(-1) if keep is None else s.masked_fill(~keep, -1e38).softmax(-1) * keep)
    return total / q.shape[2]


def _log_sum_exp(q, k, lengths, mask, scale):
    s = torch.einsum("bqhd,bkhd->bqhk", _float(q), _float(k)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    keep = _visible(k, lengths, mask)
    return (s if keep is None else s.masked_fill(~keep[:, :, None], -torch.inf)).logsumexp(-1)    # (B, Q, H)


def _visible(k, lengths, mask):
    """Which keys a query may see: (B, 1 or Q, K) bool, or None for all."""
    keep = None if mask is None else mask[:, None] if mask.ndim == 2 else mask
    if lengths is not None:
        short = torch.arange(k.shape[1], device=k.device) < lengths[:, None, None]
        keep = short if keep is None else keep & short
    return keep


def _float(x):
    return x if x.dtype == torch.float64 else x.float()


# -- the kernels -------------------------------------------------------------------------------------------------


@jit
def _place(tile, f, n, cell_w, board_w, cols, BLOCK_Q: tl.constexpr, BOARD: tl.constexpr):
    """Tokens of the queries of one tile of cell f, and which of them exist. Cell and board are counted row by row."""
    p = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)                        # query p of the cell's n
    if BOARD:
        corner = f // cols * (n // cell_w) * board_w + f % cols * cell_w
        return corner + p // cell_w * board_w + p % cell_w, p < n
    return p, p < n


@jit
def _rows(x, row, valid, stride, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, (rows, BLOCK_D), zero beyond D.

    Strides come in units of 8 elements (UNIT): the compiler learns "divisible by 16" of an argument and nothing
    else, and a head offset of 40 would make it load two bytes at a time.
    """
    d = tl.arange(0, BLOCK_D)
    return tl.load(x + row[:, None] * (stride * UNIT) + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)


@jit
def _start(x, a, stride_a, b, stride_b, h, stride_h, UNIT: tl.constexpr):
    """Where head h of sample a, frame b starts: 64 bit, a batch can pass 2**31 elements (one sample cannot)."""
    return x + (tl.cast(a, tl.int64) * stride_a + tl.cast(b, tl.int64) * stride_b + h * stride_h) * UNIT


@jit
def _seen(key, K, lengths, mask, sample):
    """Which keys the queries of a sample see, (BLOCK_K). What is absent is None when the kernel is compiled."""
    seen = key < K
    if lengths is not None:
        seen = seen & (key < tl.load(lengths + sample))
    if mask is not None:
        seen = seen & (tl.load(mask + sample.to(tl.int64) * K + key, mask=seen, other=0) != 0)
    return seen


@jit
def _softmax(q, k, seen, SCALE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Unnormalised probabilities, row maximum (base 2), row sum: 0 where no key is seen, and never -inf - -inf."""
    s = dot(q, tl.trans(k), PRECISION, UPCAST) * (SCALE * 1.4426950408889634)       # log2(e): exp2 is one instruction
    s = tl.where(seen[None, :], s, -1e38)
    top = tl.max(s, 1)
    p = tl.where(seen[None, :], tl.exp2(s - top[:, None]), 0.0)
    return p, top, tl.sum(p, 1)


@jit
def _attend(q, k, v, seen, SCALE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """softmax(q k^T) v for one tile, with the maximum and the sum of its rows."""
    p, top, total = _softmax(q, k, seen, SCALE, PRECISION, UPCAST)
    out = dot(p.to(v.dtype), v, PRECISION, UPCAST)
    return out / tl.where(total > 0, total, 1.0)[:, None], top, total


@jit
def _forward_kernel(q, k, v, lengths, mask, out, lse, Q, K, H, qb, qt, qh, kb, kt, kh,
                    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
                    BLOCK_Q: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    b, h = tl.program_id(0) // H, tl.program_id(0) % H               # neighbours share the cache lines of a token
    token, valid = _place(tl.program_id(1), 0, Q, 1, 1, 1, BLOCK_Q, False)
    key = tl.arange(0, BLOCK_K)
    seen = _seen(key, K, lengths, mask, b)
    query = _rows(_start(q, b, qb, 0, 0, h, qh, UNIT), token, valid, qt, UNIT, D, BLOCK_D)
    keys = _rows(_start(k, b, kb, 0, 0, h, kh, UNIT), key, seen, kt, UNIT, D, BLOCK_D)
    values = _rows(_start(v, b, kb, 0, 0, h, kh, UNIT), key, seen, kt, UNIT, D, BLOCK_D)
    o, top, total = _attend(query, keys, values, seen, SCALE, PRECISION, UPCAST)
    d, at = tl.arange(0, BLOCK_D), token * H + h                     # out (B, Q, H, D), contiguous
    out += b.to(tl.int64) * (Q * H * D)
    tl.store(out + at[:, None] * D + d[None, :], o.to(out.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])
    if lse is not None:
        lse += b.to(tl.int64) * (Q * H)
        natural = (top + tl.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453
        tl.store(lse + at, tl.where(total > 0, natural, float("-inf")), mask=valid)


@jit
def _frame_story_kernel(q, q_story, kf, vf, ks, vs, lengths, gate, out, n, K, K2, H, frames, cell_w, board_w, cols,
                        qb, qt, qh, fb, ff, ft, fh, sb, st, sh,
                        SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
                        BLOCK_S: tl.constexpr, BLOCK_Q: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
                        UPCAST: tl.constexpr):
    h, f, b = tl.program_id(0) % H, tl.program_id(0) // H % frames, tl.program_id(0) // H // frames
    token, valid = _place(tl.program_id(1), f, n, cell_w, board_w, cols, BLOCK_Q, True)
    query = _rows(_start(q, b, qb, 0, 0, h, qh, UNIT), token, valid, qt, UNIT, D, BLOCK_D)
    key = tl.arange(0, BLOCK_K)                                      # the words of this cell's own frame
    seen = _seen(key, K, lengths, None, b * frames + f)
    keys = _rows(_start(kf, b, fb, f, ff, h, fh, UNIT), key, seen, ft, UNIT, D, BLOCK_D)
    values = _rows(_start(vf, b, fb, f, ff, h, fh, UNIT), key, seen, ft, UNIT, D, BLOCK_D)
    frame, _, _ = _attend(query, keys, values, seen, SCALE, PRECISION, UPCAST)
    key = tl.arange(0, BLOCK_S)                                      # the whole story
    if q_story is not None:
        query = _rows(_start(q_story, b, qb, 0, 0, h, qh, UNIT), token, valid, qt, UNIT, D, BLOCK_D)
    keys = _rows(_start(ks, b, sb, 0, 0, h, sh, UNIT), key, key < K2, st, UNIT, D, BLOCK_D)
    values = _rows(_start(vs, b, sb, 0, 0, h, sh, UNIT), key, key < K2, st, UNIT, D, BLOCK_D)
    story, _, _ = _attend(query, keys, values, key < K2, SCALE, PRECISION, UPCAST)
    o = frame + tl.load(gate) * story
    d, at = tl.arange(0, BLOCK_D), token * H + h
    out += b.to(tl.int64) * (n * frames * H * D)
    tl.store(out + at[:, None] * D + d[None, :], o.to(out.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])


@jit
def _backward_kernel(q, k, v, lengths, mask, gate, dout, dq, dk, dv, dgate,
                     n, K, H, frames, cell_w, board_w, cols, span, qb, qt, qh, kb, kf, kt, kh,
                     SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
                     BLOCK_Q: tl.constexpr, UNIT: tl.constexpr, BOARD: tl.constexpr, ADD: tl.constexpr,
                     PRECISION: tl.constexpr, UPCAST: tl.constexpr):
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
    factor = 1.0
    if gate is not None:
        factor = tl.load(gate)
    for i in range(span):                                            # this program's tiles of queries, in order
        token, valid = _place(tl.program_id(1) * span + i, f, n, cell_w, board_w, cols, BLOCK_Q, BOARD)
        query = _rows(_start(q, b, qb, 0, 0, h, qh, UNIT), token, valid, qt, UNIT, D, BLOCK_D)
        at, inside = (token * H + h)[:, None] * D + d[None, :], valid[:, None] & (d < D)[None, :]
        grad = tl.load(dout + at, mask=inside, other=0.0)            # 0 beyond the last query: adds nothing below
        p, _, total = _softmax(query, keys, seen, SCALE, PRECISION, UPCAST)
        p = p / tl.where(total > 0, total, 1.0)[:, None]
        dp = dot(grad, tl.trans(values), PRECISION, UPCAST)
        delta = tl.sum(p * dp, 1)                                    # = do . o, without reading o
        sum_gate += delta
        ds = (p * (dp - delta[:, None])).to(query.dtype)
        sum_v += dot(tl.trans(p.to(grad.dtype)), grad, PRECISION, UPCAST)
        sum_k += dot(tl.trans(ds), query, PRECISION, UPCAST)
        step = dot(ds, keys, PRECISION, UPCAST) * (factor * SCALE)
        if ADD:                                                      # the frame branch has written its part already
            step += tl.load(dq + at, mask=inside, other=0.0)
        tl.store(dq + at, step.to(dq.dtype.element_ty), mask=inside)
    part = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)        # (S, B, F, H, K, D)
    at, inside = part * (K * D) + key[:, None] * D + d[None, :], (key < K)[:, None] & (d < D)[None, :]
    tl.store(dk + at, sum_k * (factor * SCALE), mask=inside)
    tl.store(dv + at, sum_v * factor, mask=inside)
    if dgate is not None:
        tl.store(dgate + part, tl.sum(sum_gate))


@jit
def _map_kernel(q, k, lengths, mask, out, Q, K, H, qb, qt, qh, kb, kt, kh,
                SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
                BLOCK_Q: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    b = tl.program_id(0)
    token, valid = _place(tl.program_id(1), 0, Q, 1, 1, 1, BLOCK_Q, False)
    key = tl.arange(0, BLOCK_K)
    seen = _seen(key, K, lengths, mask, b)
    mean = tl.zeros((BLOCK_Q, BLOCK_K), dtype=out.dtype.element_ty)
    for h in range(H):                                               # one program holds all heads of its queries
        query = _rows(_start(q, b, qb, 0, 0, h, qh, UNIT), token, valid, qt, UNIT, D, BLOCK_D)
        keys = _rows(_start(k, b, kb, 0, 0, h, kh, UNIT), key, seen, kt, UNIT, D, BLOCK_D)
        p, _, total = _softmax(query, keys, seen, SCALE, PRECISION, UPCAST)
        mean += p / tl.where(total > 0, total, 1.0)[:, None]
    at = b.to(tl.int64) * (Q * K) + token[:, None] * K + key[None, :]
    tl.store(out + at, mean / H, mask=valid[:, None] & (key < K)[None, :])
