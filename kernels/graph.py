"""Sparse graph propagation: y = A x.      y[i] = sum over j in N(i) of a[i, j] x[j]      (LightGCN Eq. 3)

Backward   dx = A^T dy: the same walk over the transpose, by the same function, so nothing is saved and second
           derivatives work. A symmetric graph is its own transpose.
Hops       sum_l w[l] A^l x by Horner's rule: h = w[L] x, then h <- A h + w[l] x for l = L-1 .. 0. No stack of
           layers, no mean, and the derivative is the same polynomial of A^T.
Kernel     every row is cut into pieces of at most PIECE entries, pieces are sorted by length, and a program
           gathers a few of equal length side by side. A row of one piece is written at once; the partial sums
           of a long row are rows of a scratch, which the same kernel adds again until one is left. So a hub is
           many short sums in parallel, there is no atomic, and the sum is one fixed tree: the same bits every run.
Cost       E D multiply-adds, E D gathered numbers (memory bound); nothing of size E D is ever stored.
"""
from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from kernels import backend, jit, on, padded, sums, whole

if TYPE_CHECKING:
    import triton.language as tl

PIECE = 32              # entries of a piece: scratch traffic is 2 / PIECE of a long row's gathers
TILE = 1024             # numbers a program holds: 8 a thread of 4 warps, two 16-byte loads for each entry
UNROLL = 4              # entries in flight: the loop waits for memory, not for arithmetic
INT32 = 2**31           # tables with as many numbers need offsets of 64 bit


# -- the plan ------------------------------------------------------------------------------------------------


class Graph:
    """A constant sparse matrix A (N_out, N_in) in CSR form, by row, then column; duplicates are summed.

    ptr (N_out + 1,) int32, col (E,) int32, weight (E,) float32 (float64 if it was given so), on one device.
    The order in which edges come does not matter: the same edges give the same bits.
    """

    def __init__(self, ptr, col, weight, shape, symmetric=False, ones=False, users=None):
        self.ptr, self.col, self.weight, self.shape = ptr, col, weight, tuple(shape)
        self.symmetric, self.ones, self.users = symmetric, ones, users      # ones: weights need not be read

    @staticmethod
    def from_edges(row, col, shape, weight=None, symmetric=False):
        """A from a list of edges in any order.   row, col (E,) int; weight (E,) float or None = all ones

        symmetric   the caller knows that A = A^T, so no transpose is ever built
        raises      ValueError for an index out of range (the first), a weight that requires grad, 2^31 edges, ...
        """
        _check_edges(row, col, shape, weight)
        key, order = (row.long() * shape[1] + col).sort(stable=True)
        double = weight is not None and weight.dtype == torch.float64
        value = torch.ones(len(row), device=row.device) if weight is None else weight[order]
        value = value if double else value.float()
        distinct, place = torch.unique_consecutive(key, return_inverse=True)
        ones = weight is None and len(distinct) == len(key)
        if len(distinct) < len(key):          # index_put_ adds in a fixed order on a GPU, index_add_ does not
            value = value.new_zeros(len(distinct)).index_put_((place,), value, accumulate=True)
        source = distinct // max(shape[1], 1)
        ptr = torch.searchsorted(source, torch.arange(shape[0] + 1, device=row.device)).int()
        return Graph(ptr, (distinct - source * shape[1]).int(), value, shape, symmetric, ones)

    @staticmethod
    def bipartite(user, item, users, items):
        """Symmetric normalised A_hat (N, N): users first, then items, a_ui = 1 / sqrt(d_u d_i).

        Nodes without an edge keep an empty row. `.R` (U, I) and `.RT` (I, U) are its two blocks.
        """
        _check_edges(user, item, (users, items), None, ("user", "item"))
        row, col, n = torch.cat([user, item + users]), torch.cat([item + users, user]), users + items
        scale = torch.bincount(row, minlength=n).clamp(min=1).double().rsqrt()
        graph = Graph.from_edges(row, col, (n, n), (scale[row] * scale[col]).float(), symmetric=True)
        graph.users = users
        return graph

    @staticmethod
    def from_knn(neighbours, weight=None):
        """Directed graph of neighbour lists (I, k): row i points at neighbours[i]; not its own transpose."""
        if neighbours.dim() != 2 or (weight is not None and weight.shape != neighbours.shape):
            raise ValueError(f"neighbours {tuple(neighbours.shape)} must be (I, k), and weight, if any, the same")
        count, k = neighbours.shape
        rows = torch.arange(count, device=neighbours.device).repeat_interleave(k)
        weight = None if weight is None else weight.flatten()
        return Graph.from_edges(rows, neighbours.flatten(), (count, count), weight)

    @cached_property
    def row_of(self):
        """Row of every entry.   (E,) int64"""
        rows = torch.arange(self.shape[0], device=self.device)
        return rows.repeat_interleave(self.counts, output_size=self.nnz)

    @cached_property
    def counts(self):
        """Entries of every row.   (N_out,) int64"""
        return self.ptr.diff().long()

    @cached_property
    def T(self):
        """The transpose; a symmetric graph is its own."""
        if self.symmetric:
            return self
        graph = Graph.from_edges(self.col, self.row_of, self.shape[::-1], None if self.ones else self.weight)
        graph.T = self
        return graph

    @cached_property
    def R(self):
        """Upper right block (U, I) of a bipartite graph: what users receive from items. Shares weights."""
        users, last = self._split()
        shape = (users, self.shape[0] - users)
        return Graph(self.ptr[: users + 1], self.col[:last] - users, self.weight[:last], shape)

    @cached_property
    def RT(self):
        """Lower left block (I, U): what items receive from users. Shares columns and weights."""
        users, first = self._split()
        shape = (self.shape[0] - users, users)
        graph = Graph(self.ptr[users:] - first, self.col[first:], self.weight[first:], shape)
        graph.T, self.R.T = self.R, graph
        return graph

    def _split(self):
        if self.users is None:
            raise ValueError("R and RT are blocks of Graph.bipartite(...); this graph is not one")
        return self.users, int(self.ptr[self.users])

    def rows(self, index):
        """The rows `index` (n,) of A as a graph (n, N_in), repeats allowed. Nearly free: made for every batch."""
        return Rows(self, index)

    def to(self, device):
        move = [x.to(device) for x in (self.ptr, self.col, self.weight)]
        return Graph(*move, self.shape, self.symmetric, self.ones, self.users)

    @cached_property
    def nnz(self):
        return len(self.col)

    @cached_property
    def device(self):
        return self.ptr.device

    def dense(self):
        where = self.row_of, self.col.long()
        return self.weight.new_zeros(self.shape).index_put_(where, self.weight, accumulate=True)

    @cached_property
    def pieces(self):
        """[(table (P, 3) int32, slots)], a level each: start, length, destination of its pieces, longest first.

        Destination >= 0: the whole row, finished here. Destination -1 - s: slot s of this level's scratch, whose
        slots are the next level's entries. A row of 32 entries needs one level, of 1,024 two, of a million four.
        """
        device, levels = self.device, []
        ptr, rows = self.ptr.long(), torch.arange(self.shape[0], device=device)
        while True:
            length = ptr.diff()
            count = ((length + PIECE - 1) // PIECE).clamp(min=1)              # an empty row has one empty piece
            owner = torch.arange(len(count), device=device).repeat_interleave(count)
            nth = torch.arange(len(owner), device=device) - (count.cumsum(0) - count)[owner]
            size, long = (length[owner] - nth * PIECE).clamp(max=PIECE), count > 1
            place = torch.where(long[owner], -long[owner].long().cumsum(0), rows[owner])
            table = torch.stack([ptr[:-1][owner] + nth * PIECE, size, place], 1).int()
            levels.append((table[size.argsort(descending=True, stable=True)], int(count[long].sum())))
            if not levels[-1][1]:
                return levels
            rows, ptr = rows[long], F.pad(count[long].cumsum(0), (1, 0))


class Rows(Graph):
    """Chosen rows of a graph. Two ways to the product: walk them, or walk all and pick if that is less."""

    def __init__(self, parent, index):
        if index.dim() != 1 or not whole(index) or index.device != parent.device:
            raise ValueError(f"rows() takes a vector of integers on {parent.device}, not {tuple(index.shape)} of "
                             f"{index.dtype} on {index.device}")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < parent.shape[0]:
            raise ValueError(f"rows() of a graph with rows 0 .. {parent.shape[0] - 1} got {int(index.min())} "
                             f".. {int(index.max())}")
        self.parent, self.index, self.shape = parent, index.long(), (len(index), parent.shape[1])
        self.symmetric, self.ones, self.users, self.device = False, parent.ones, None, parent.device
        self.counts = parent.counts.index_select(0, self.index)
        self.nnz = int(self.counts.sum())

    @property
    def most(self):
        """True if walking all is less: copying an entry costs two walks, a plan on a GPU twenty launches."""
        return self.parent.nnz < 3 * self.nnz + (4_000_000 if self.device.type == "cuda" else 10_000)

    @cached_property
    def ptr(self):
        return F.pad(self.counts.cumsum(0), (1, 0)).int()

    @cached_property
    def entries(self):
        """Where these rows' entries stand in the parent.   (E,) int64"""
        shift = self.parent.ptr.index_select(0, self.index) - self.ptr[:-1]
        shift = shift.repeat_interleave(self.counts, output_size=self.nnz)
        return shift + torch.arange(self.nnz, device=self.device)

    @cached_property
    def col(self):
        return self.parent.col.index_select(0, self.entries)

    @cached_property
    def weight(self):
        return self.parent.weight.index_select(0, self.entries)


def _check_edges(row, col, shape, weight, names=("row", "col")):
    a, b = names
    if row.shape != col.shape or row.dim() != 1 or (weight is not None and weight.shape != row.shape):
        raise ValueError(f"{a} {tuple(row.shape)}, {b} {tuple(col.shape)} and weight must be of one length")
    if not whole(row, col) or max(len(row), *shape) >= 2**31:
        raise ValueError(f"{a} and {b} must be integers, edges and nodes fewer than 2^31: columns are int32")
    if weight is not None and (weight.requires_grad or not weight.is_floating_point()):
        raise ValueError("edge weights are floating-point constants here; for a gradient use the dense matrix")
    if len({x.device for x in (row, col, weight) if x is not None}) > 1:
        raise ValueError(f"{a}, {b} and weight must be on one device, not on {row.device} and {col.device}")
    for name, index, size in zip(names, (row, col), shape, strict=True):
        bad = ((index < 0) | (index >= size)).nonzero()
        if len(bad):
            raise ValueError(f"{name}[{int(bad[0])}] is {int(index[bad[0]])}, outside 0 .. {size - 1}")


# -- the definition ------------------------------------------------------------------------------------------


def propagate_reference(graph, x):
    """The definition, at PyTorch's best: rows of x in bags. 3 to 4 times faster than sparse.mm on a CPU."""
    return _hops_reference(graph, x, (0.0, 1.0))


def _hops_reference(graph, x, weights):
    """Horner's rule in float32 (float64 for float64), rounded once at the end."""
    wide = x.to(sums(x)).contiguous()
    value = graph.weight.to(wide.dtype)
    if len(weights) == 1:
        return (weights[0] * wide).to(x.dtype)
    h = wide
    for hop, (above, weight) in enumerate(zip(weights[:0:-1], weights[-2::-1], strict=True)):
        scaled = value if hop or above == 1 else above * value    # w[L] times E weights, not N D numbers
        plain = graph.ones and scaled is value
        if graph.nnz and x.shape[1]:
            h = F.embedding_bag(graph.col, h, graph.ptr, mode="sum", include_last_offset=True,
                                per_sample_weights=None if plain else scaled)
        else:
            h = wide.new_zeros(graph.shape[0], x.shape[1])
        if weight:
            h.add_(wide, alpha=weight)
    return h.to(x.dtype)


# -- the kernel ----------------------------------------------------------------------------------------------


@jit
def row_offset(i, stride, WIDE: tl.constexpr):
    """i * stride; in int64 if the host found that a product can pass 2^31."""
    return i.to(tl.int64) * stride if WIDE else i * stride


@jit
def _walk_kernel(pieces, col, weight, x, z, y, scratch, mix, P, D, x_stride, z_stride, GATHER: tl.constexpr,
                 WEIGHTED: tl.constexpr, MIX: tl.constexpr, WIDE: tl.constexpr, DOUBLE: tl.constexpr,
                 ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr):
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)                        # the pieces of this program
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]         # the feature columns it covers
    start = tl.load(pieces + 3 * p, mask=p < P, other=0)
    length = tl.load(pieces + 3 * p + 1, mask=p < P, other=0)
    place = tl.load(pieces + 3 * p + 2, mask=p < P, other=0)
    acc = tl.zeros((ROWS, BLOCK_D), dtype=ACC)
    longest = tl.max(length, 0)
    n = 0
    while n < longest:                                                # range(tensor): not in 3.6's interpreter
        for u in tl.static_range(UNROLL):
            live = n + u < length
            e = start + n + u
            j = tl.load(col + e, mask=live, other=0) if GATHER else e       # level 0 gathers, others add slots
            at = x + row_offset(j, x_stride, WIDE)[:, None] + d
            row = tl.load(at, mask=live[:, None] & (d < D), other=0.0).to(ACC)
            if WEIGHTED:
                row *= tl.load(weight + e, mask=live, other=0.0).to(ACC)[:, None]
            acc += row
        n += UNROLL
    whole = ((p < P) & (place >= 0))[:, None] & (d < D)
    part = ((p < P) & (place < 0))[:, None] & (d < D)
    tl.store(scratch + row_offset(-1 - place, D, WIDE)[:, None] + d, acc, mask=part)
    if MIX:                                                                 # Horner's step in the same launch
        own = tl.load(z + row_offset(place, z_stride, WIDE)[:, None] + d, mask=whole, other=0.0).to(ACC)
        acc = tl.load(mix).to(ACC) * acc + tl.load(mix + 1).to(ACC) * own
    tl.store(y + row_offset(place, D, WIDE)[:, None] + d, acc.to(y.dtype.element_ty), mask=whole)


def tile(width):
    """(pieces, columns) of a program: a neighbour's row is one burst of loads, up to 128 columns of it."""
    columns = min(128, padded(width))
    return TILE // columns, columns


@lru_cache(maxsize=256)
def _mix_table(weights, dtype, device):
    """Factors of A h and of x, first hop first.   (L, 2)   Python numbers would reach a kernel as float32"""
    rows = [(1.0 if hop else weights[-1], w) for hop, w in enumerate(weights[-2::-1])]
    return torch.tensor(rows, dtype=dtype, device=device)


def _hop_triton(graph, x, z, mix):
    """A x, or mix[0] A x + mix[1] z: one launch a level; one level unless a row is longer than PIECE."""
    y, source, width = x.new_empty(graph.shape[0], x.shape[1]), x, x.shape[1]
    rows, columns = tile(width)
    for level, (table, slots) in enumerate(graph.pieces):
        scratch = torch.empty(slots, width, dtype=sums(x), device=x.device) if slots else y
        reach = max(len(source) * source.stride(0), len(z) * z.stride(0), y.numel(), scratch.numel())
        _walk_kernel[(-(-len(table) // rows), -(-width // columns))](
            table, graph.col, graph.weight, source, z, y, scratch, y if mix is None else mix,
            len(table), width, source.stride(0), z.stride(0),
            GATHER=level == 0, WEIGHTED=level == 0 and not graph.ones, MIX=mix is not None, WIDE=reach >= INT32,
            DOUBLE=x.dtype == torch.float64, ROWS=rows, BLOCK_D=columns, UNROLL=UNROLL,
            num_warps=4, enable_fp_fusion=True)
        source = scratch
    return y


def _hops_triton(graph, x, weights):
    if len(weights) == 1:
        return weights[0] * x
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    if not graph.shape[0] * x.shape[1]:
        return x.new_empty(graph.shape[0], x.shape[1])
    h = x
    with on(x):
        for mix in [None] if weights == (0.0, 1.0) else _mix_table(weights, sums(x), x.device):
            h = _hop_triton(graph, h, x, mix)
    return h


# -- autograd and the public functions -----------------------------------------------------------------------


class _Hops(torch.autograd.Function):
    """sum_l weights[l] A^l x. Nothing is saved; backward is the same function of A^T."""

    @staticmethod
    def forward(ctx, x, graph, weights, path):
        ctx.graph, ctx.weights, ctx.path = graph, weights, path
        walk = _hops_triton if path == "triton" else _hops_reference
        if isinstance(graph, Rows) and graph.most:
            return walk(graph.parent, x, weights).index_select(0, graph.index)
        return walk(graph, x, weights)

    @staticmethod
    def backward(ctx, dy):
        graph = ctx.graph
        if isinstance(graph, Rows):               # some rows of A: (P A)^T dy = A^T (P^T dy), nothing to sort;
            whole, where = dy.new_zeros(graph.parent.shape[0], dy.shape[1]), graph.index
            dy = whole.index_put((where,), dy, True) if dy.is_cuda else whole.index_add(0, where, dy)
            graph = graph.parent                  # index_put adds in a fixed order on a GPU, index_add does not
        return _Hops.apply(dy, graph.T, ctx.weights, ctx.path), None, None, None


def propagate(graph, x):
    """A x for a sparse graph.   x (N_in, D) -> (N_out, D), same dtype; sums are float32 (float64 for float64)

    Several right-hand sides are columns: stack them, one walk serves all.
    raises ValueError if x has another shape, device or an integer type
    """
    _check_input(graph, x)
    return _Hops.apply(x, graph, (0.0, 1.0), backend(x))


def mix_hops(graph, x, weights):
    """sum_l weights[l] A^l x; LightGCN's mean of L + 1 layers is weights = [1 / (L + 1)] * (L + 1).

    weights are numbers, lowest hop first.   x (N, D) -> (N, D), same dtype
    """
    if graph.shape[0] != graph.shape[1] or isinstance(graph, Rows) or not len(weights):
        raise ValueError(f"hops need a square graph (not rows() of one) and at least one weight; the graph is "
                         f"{graph.shape}, weights {list(weights)}")
    if any(isinstance(w, torch.Tensor) for w in weights):
        raise ValueError("hop weights are numbers here, not tensors; call propagate once a hop to learn them")
    _check_input(graph, x)
    return _Hops.apply(x, graph, tuple(float(w) for w in weights), backend(x))


def _check_input(graph, x):
    if x.dim() != 2 or x.shape[0] != graph.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)}; a graph {graph.shape} needs ({graph.shape[1]}, D)")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; propagation needs floating-point numbers")
    if x.device != graph.device:
        raise ValueError(f"x is on {x.device}, the graph on {graph.device}: move it with graph.to(device)")


def knn(features, k, block=2048):
    """The k most similar rows by cosine, the row itself included, without an (I, I) matrix.

    features (I, C) -> neighbours (I, k) int64, cosines (I, k) float32, best first; ties: lower index first
    raises ValueError for a row that is zero or not finite (it has no direction) or k outside 1 .. I
    """
    if features.dim() != 2 or features.is_complex() or not 1 <= k <= len(features):
        raise ValueError(f"k={k} neighbours of {len(features)} rows, features {tuple(features.shape)}: features are "
                         f"real (I, C), k is 1 to {len(features)}")
    norm = features.float().norm(dim=1, keepdim=True)
    bad = (~((norm > 0) & (norm < torch.inf))).nonzero()
    if len(bad):
        raise ValueError(f"feature row {int(bad[0, 0])} is zero or not finite: it has no direction")
    unit, found, values = features.float() / norm, [], []
    for rows in unit.split(max(1, min(block, 2**27 // len(unit)))):                # at most 512 MiB
        similarity = rows @ unit.T                                                   # (block, I)
        top, index = largest(similarity, k)
        found.append(index)
        values.append(top)
    return torch.cat(found), torch.cat(values)


def largest(scores, k):
    """(values, indices) of the k largest of every row, largest first; ties: lower index first, which topk leaves open."""
    top, index = scores.topk(k, dim=1)
    crowd = ((scores >= top[:, -1:]).sum(1, dtype=torch.int32) > k).nonzero()[:, 0]      # a tie across the border
    if len(crowd):
        ordered = scores[crowd].sort(dim=1, descending=True, stable=True)
        top[crowd], index[crowd] = ordered.values[:, :k], ordered.indices[:, :k]
    index, order = index.sort(dim=1)                                                     # and ties within the k
    top, order = top.gather(1, order).sort(dim=1, descending=True, stable=True)
    return top, index.gather(1, order)


def compile_cases():
    """Rows for kernels/check.py: float32 and bf16 on every target, rarer variants on sm_90."""
    usual = {"GATHER": True, "WEIGHTED": True, "MIX": True, "WIDE": False, "DOUBLE": False, "UNROLL": UNROLL}
    for name, dtype, width, flags, everywhere in (
            ("mix", "fp32", 64, {}, True), ("mix", "bf16", 64, {}, True), ("mix", "fp16", 64, {}, False),
            ("plain", "fp32", 64, {"MIX": False}, False), ("ones", "fp32", 64, {"WEIGHTED": False}, False),
            ("slots", "fp32", 64, {"GATHER": False, "WEIGHTED": False}, False),
            ("wide", "fp32", 64, {"WIDE": True}, False), ("mix", "fp32", 16, {}, False),
            ("mix", "fp32", 128, {}, False), ("mix", "bf16", 128, {}, False), ("mix", "fp32", 32, {}, False),
            ("plain", "bf16", 64, {"MIX": False}, False), ("mix", "fp64", 64, {"DOUBLE": True}, False)):
        rows, columns = tile(width)
        x, p = f"*{dtype}:16", "*fp64:16" if dtype == "fp64" else "*fp32:16"
        yield {"name": f"propagate {name} {dtype} D={width}", "kernel": _walk_kernel, "kind": "bandwidth",
               "wide": UNROLL * {"fp64": 4, "fp32": 2}.get(dtype, 1), "num_warps": 4,
               "constants": {**usual, **flags, "ROWS": rows, "BLOCK_D": columns},
               "signature": {"pieces": "*i32:16", "col": "*i32:16", "weight": p, "x": x, "z": x, "y": x, "scratch": p,
                             "mix": p, "P": "i32", "D": "i32:16", "x_stride": "i32:16", "z_stride": "i32:16"},
               **({} if everywhere else {"targets": ("sm_90",)})}
