"""Full-ranking evaluation by counting: the rank of a target is the number of items that score above it.

    rank(u, i) = #{ j not seen by u : s_uj > s_ui, or s_uj = s_ui and j < i }         s_uj = users[u] . items[j]

All metrics of a ranked list follow from the ranks of its targets, so there is no sorted list and no users x items
matrix: a tile of scores is multiplied, counted and forgotten. Seen items are counted too and taken off again,
from tiles of the same shape: the same product gives the same bits, so equal items tie wherever they stand.
A score that is NaN counts as above everything: a diverged model ranks last, not first.
Cost: 2 T I D multiply-adds (bound by arithmetic), T ranks out; blocked top-k writes and reads T I scores as well.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels import GRID, backend, dot, interpreting, jit, matrix_units, on, padded, sums, whole
from kernels.graph import largest, row_offset

if TYPE_CHECKING:
    import triton.language as tl

WIDEST = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 64, torch.float64: 64}   # wider tiles spill


# -- the definition ------------------------------------------------------------------------------------------


def _ranks_reference(users, items, user, target, rows, block):
    """A block of scores at a time, small enough for the cache, compared into one buffer and summed."""
    items, count = items.to(sums(items)).contiguous(), len(items)      # rows that share memory would be rounded differently
    block = block or max(16, min(1024, (2**26 if items.is_cuda else 2**19) // count // 16 * 16))
    tables = torch.empty(2, min(block, len(user)), count, dtype=items.dtype, device=items.device)
    ids, own, above, seen = torch.arange(count, device=items.device), [], [], []
    for start in range(0, len(user), block):
        u, i = user[start : start + block], target[start : start + block]
        scores, hit = tables[:, : len(u)]                                          # one memory for all blocks
        torch.mm(users[u].to(items.dtype), items.T, out=scores)                    # (block, I)
        mine = scores.gather(1, i[:, None])
        below, least = (compare(scores, mine, out=hit).sum(1).long() for compare in (torch.lt, torch.le))
        above.append(count - least)                                                # NaN is never <=: it counts
        tie = (least - below > 1).nonzero()[:, 0]                                  # more than the target itself
        above[-1][tie] += ((scores[tie] == mine[tie]) & (ids < i[tie, None])).sum(1)
        own.append(mine[:, 0])
        if rows is not None:
            first, last = int(rows.ptr[start]), int(rows.ptr[start + len(u)])
            seen.append(scores[rows.row_of[first:last] - start, rows.col[first:last].long()])
    above, own = torch.cat(above), torch.cat(own)
    if rows is not None:
        row, col, score = rows.row_of, rows.col, torch.cat(seen)
        beats = ~(score <= own[row]) | ((score == own[row]) & (col < target[row]))
        above -= torch.zeros_like(above).index_add_(0, row, (beats & (col != target[row])).long())
    return (above - own.isnan().long()).int()                                      # a NaN target counted itself


# -- the kernels ---------------------------------------------------------------------------------------------


@jit
def _tile(table, ids, live, D, stride, BLOCK_D: tl.constexpr):
    """Rows `ids` of an embedding table.   (BLOCK, BLOCK_D)"""
    d = tl.arange(0, BLOCK_D)
    return tl.load(table + row_offset(ids, stride, True)[:, None] + d[None, :],
                   mask=live[:, None] & (d < D)[None, :], other=0.0)


@jit
def _own(u, items, i, live, D, i_stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
         UPCAST: tl.constexpr):
    """Scores of the targets: the diagonal of a whole tile, so that they are rounded as every other score is."""
    s = dot(u, tl.trans(_tile(items, i, live, D, i_stride, BLOCK_D)), PRECISION, UPCAST)
    n = tl.arange(0, BLOCK)
    return tl.sum(tl.where(n[:, None] == n[None, :], s, 0.0), 1)


@jit
def _above(s, own, j, i):
    """Which scores (targets, items) rank above the target's: higher, or equal with a lower id; never itself."""
    nan, j, i, own = s != s, j[None, :], i[:, None], own[:, None]
    return ((s > own) | nan | (own != own) | ((s == own) & (j < i))) & (j != i)


@jit
def _count_kernel(users, items, user, target, partial, T, I, D, u_stride, i_stride, TILES: tl.constexpr,
                  BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)                     # the targets of this program
    first = tl.program_id(1) * TILES * BLOCK                               # and its span of items
    i = tl.load(target + t, mask=t < T, other=0)
    u = _tile(users, tl.load(user + t, mask=t < T, other=0), t < T, D, u_stride, BLOCK_D)
    own = _own(u, items, i, t < T, D, i_stride, BLOCK, BLOCK_D, PRECISION, UPCAST)
    count = tl.zeros((BLOCK,), dtype=tl.int32)
    for n in range(0, TILES):
        j = first + n * BLOCK + tl.arange(0, BLOCK)
        s = dot(u, tl.trans(_tile(items, j, j < I, D, i_stride, BLOCK_D)), PRECISION, UPCAST)
        count += tl.sum((_above(s, own, j, i) & (j < I)[None, :]).to(tl.int32), 1)
    tl.store(partial + tl.program_id(1) * T + t, count, mask=t < T)


@jit
def _seen_kernel(users, items, user, target, ptr, col, row_of, seen, T, D, u_stride, i_stride,
                 BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    n = tl.program_id(0) * BLOCK
    t = n + tl.arange(0, BLOCK)
    i = tl.load(target + t, mask=t < T, other=0)
    u = _tile(users, tl.load(user + t, mask=t < T, other=0), t < T, D, u_stride, BLOCK_D)
    own = _own(u, items, i, t < T, D, i_stride, BLOCK, BLOCK_D, PRECISION, UPCAST)
    count = tl.zeros((BLOCK,), dtype=tl.int32)
    e, last = tl.load(ptr + n), tl.load(ptr + tl.minimum(n + BLOCK, T))    # what these targets' users have seen
    while e < last:
        k = e + tl.arange(0, BLOCK)
        j = tl.load(col + k, mask=k < last, other=0)
        owner = tl.load(row_of + k, mask=k < last, other=-1)               # the target each seen item belongs to
        s = dot(u, tl.trans(_tile(items, j, k < last, D, i_stride, BLOCK_D)), PRECISION, UPCAST)
        count += tl.sum((_above(s, own, j, i) & (owner[None, :] == t[:, None])).to(tl.int32), 1)
        e += BLOCK
    tl.store(seen + t, count, mask=t < T)


def tile(capability):
    """Targets and items of a tile: 64 x 64 where wgmma reads shared memory, 32 x 32 if operands sit in registers."""
    return 64 if capability in (9, 10) else 32


def _ranks_triton(users, items, user, target, rows):
    T, (count, width) = len(user), items.shape
    capability = torch.cuda.get_device_capability(items.device)[0] if items.is_cuda else 8
    block = tile(capability)
    tiles = -(-count // block)
    spans = max(1, min(tiles // 8, 1024 * block // max(T, 1), GRID))     # enough programs for any GPU, the same for all
    per_span = -(-tiles // spans)
    users, items = (x if x.stride(1) == 1 else x.contiguous() for x in (users, items))
    user, target = user.int(), target.int()
    partial = torch.empty(spans, T, dtype=torch.int32, device=items.device)
    shared = {"BLOCK": block, "BLOCK_D": padded(width), "PRECISION": "tf32x3",
              "UPCAST": interpreting(), "num_warps": 4, "enable_fp_fusion": True}
    strides, grid = (users.stride(0), items.stride(0)), -(-T // block)
    with on(items):
        _count_kernel[(grid, spans)](users, items, user, target, partial, T, count, width, *strides, TILES=per_span, **shared)
        ranks = partial.sum(0, dtype=torch.int32)
        if rows is not None and rows.nnz:
            seen = torch.empty_like(user)
            _seen_kernel[(grid,)](users, items, user, target, rows.ptr, rows.col, rows.row_of.int(), seen, T, width,
                                  *strides, **shared)
            ranks -= seen
    return ranks


# -- the public functions ------------------------------------------------------------------------------------


@torch.no_grad()
def rank_of_targets(users, items, user, target, seen=None, block=None):
    """Rank of each target among the items its user has not seen, 0 = best; ties: lower id first.

    users (U, D), items (I, D)   embeddings; scores are summed in float32 (float64 for float64)
    user, target (T,) int        the pairs to rank, any order, several per user allowed
    seen                         Graph (U, I) whose edges are left out, usually the training clicks; None: nothing.
                                 A target that is itself seen is still ranked, among the unseen.
    block                        pairs at a time in the reference (None: what fits the cache); changes no rank
    returns                      (T,) int32
    raises                       ValueError for other shapes, dtypes or devices, or indices out of range
    """
    _check(users, items, user, target, seen)
    if not len(user):
        return torch.zeros(0, dtype=torch.int32, device=items.device)
    user, target = user.long(), target.long()
    rows = None if seen is None else seen.rows(user)
    widest = 0 if items.is_cuda and items.dtype == torch.float64 else WIDEST[items.dtype]
    unless = matrix_units(items) or ("" if items.shape[1] <= widest else f"{items.dtype} tiles end at width {widest}")
    if backend(items, unless) == "triton":
        return _ranks_triton(users, items, user, target, rows)
    return _ranks_reference(users, items, user, target, rows, block)


@torch.no_grad()
def top_k(users, items, user, k, seen=None, block=None):
    """The k best unseen items of each user, best first; ties: lower id first.   -> ids (T, k) int64, scores (T, k)

    Where a user has fewer than k unseen items the rest of the row is -1 with score -inf.
    """
    if not 1 <= k <= len(items):
        raise ValueError(f"k={k} of {len(items)} items: choose 1 to {len(items)}")
    _check(users, items, user, torch.zeros_like(user), seen)
    wide = items.to(sums(items))
    ids, values = [torch.zeros(0, k, dtype=torch.int64, device=items.device)], [wide.new_zeros(0, k)]
    for u in user.long().split(block or max(16, min(1024, 2**24 // len(items)))):
        scores = users[u].to(wide.dtype) @ wide.T                                         # (block, I)
        if seen is not None:
            rows = seen.rows(u)
            scores[rows.row_of, rows.col.long()] = -torch.inf
        best, index = largest(scores, k)
        ids.append(index.masked_fill(best == -torch.inf, -1))
        values.append(best)
    return torch.cat(ids), torch.cat(values)


def _check(users, items, user, target, seen):
    if users.dim() != 2 or items.dim() != 2 or users.shape[1] != items.shape[1] or user.shape != target.shape:
        raise ValueError(f"users {tuple(users.shape)} and items {tuple(items.shape)} need one width, user "
                         f"{tuple(user.shape)} and target {tuple(target.shape)} one length")
    devices = [x.device for x in (users, items, user, target)]
    if users.dtype != items.dtype or not items.is_floating_point() or len({*devices}) > 1:
        raise ValueError(f"users ({users.dtype}, {users.device}) and items ({items.dtype}, {items.device}) need one "
                         f"floating-point type, and all four one device")
    if user.dim() != 1 or not whole(user, target):
        raise ValueError(f"user and target are vectors of integers, not {tuple(user.shape)} of {user.dtype}")
    if len(user) and (user.min() < 0 or user.max() >= len(users) or target.min() < 0 or target.max() >= len(items)):
        raise ValueError(f"user ids must be 0 .. {len(users) - 1} and targets 0 .. {len(items) - 1}")
    if seen is not None and (seen.shape != (len(users), len(items)) or seen.device != items.device):
        raise ValueError(f"seen is a graph {seen.shape} on {seen.device}; {len(users)} users and {len(items)} items "
                         f"on {items.device} need that shape there")


def compile_cases():
    """Rows for kernels/check.py. Compute capability 7.5 has no row: it takes the reference."""
    for width, dtype, target in ((64, "fp32", "sm_80"), (64, "fp32", "sm_90"), (64, "fp32", "sm_100"),
                                 (64, "fp32", "sm_120"), (128, "bf16", "sm_80"), (128, "bf16", "sm_90"),
                                 (128, "fp16", "sm_90"), (32, "fp32", "sm_80"), (32, "fp32", "sm_90")):
        x, p = f"*{dtype}:16", "*i32:16"
        usual = {"kind": "product", "num_warps": 4, "targets": [target], "tf32": dtype == "fp32"}
        sizes = {"T": "i32", "D": "i32:16", "u_stride": "i32:16", "i_stride": "i32:16"}
        constants = {"BLOCK": tile(int(target[3:]) // 10), "BLOCK_D": width, "PRECISION": "tf32x3", "UPCAST": False}
        both = {"users": x, "items": x, "user": p, "target": p, **sizes}
        yield {"name": f"ranks {dtype} D={width}", "kernel": _count_kernel, **usual,
               "constants": {"TILES": 16, **constants}, "signature": {**both, "partial": p, "I": "i32"}}
        yield {"name": f"ranks seen {dtype} D={width}", "kernel": _seen_kernel, **usual, "constants": constants,
               "signature": {**both, "ptr": p, "col": p, "row_of": p, "seen": p}}
