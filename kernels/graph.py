"""Sparse graph propagation: y = A x.      y[i] = sum over j in N(i) of a[i, j] x[j]      (LightGCN Eq. 3)

Forward    every row of a CSR matrix is cut into pieces of at most PIECE neighbours; a program gathers ROWS pieces of
           nearly equal length side by side and adds in float32. A row of one piece is written at once; the pieces of a
           long row (a hub) go to a scratch and a second small kernel adds them in order.
Backward   dx = A^T dy: the same walk over the transposed graph, which a symmetric graph shares with itself.
Hops       sum_l w_l A^l x by Horner's rule, h = w_L x; h <- A h + w_l x: no stack of layers, and the derivative is the
           same polynomial of A^T.
No atomics: a fixed tree of additions, so the same bits every run. E D multiply-adds, E D reads; nothing of size E D is stored.
"""
from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from kernels import backend, jit, on

if TYPE_CHECKING:
    import triton.language as tl

PIECE, ROWS = 32, 16          # neighbours in a piece, pieces in a program (measured without a GPU: see README)


# -- the plan ---------------------------------------------------------------------------------------------------------------


class Graph:
    """A constant sparse matrix A (N_out, N_in) in CSR form, sorted by row, then column; duplicates are summed.

    ptr (N_out + 1,) int32, col (E,) int32, weight (E,) float32. Built once; `g.T`, pieces and rows are kept or cheap.
    """

    def __init__(self, ptr, col, weight, shape, symmetric=False):
        self.ptr, self.col, self.weight, self.shape, self.symmetric = ptr, col, weight, tuple(shape), symmetric

    @staticmethod
    def from_edges(row, col, shape, weight=None, symmetric=False):
        """A from a list of edges in any order.   row, col (E,) int; weight (E,) float or None = all ones

        raises ValueError for an index out of range (first bad place), a weight that requires grad, 2^31 edges or more
        """
        if row.shape != col.shape or row.dim() != 1 or (weight is not None and weight.shape != row.shape):
            raise ValueError(f"row {tuple(row.shape)}, col {tuple(col.shape)} and weight must be vectors of one length")
        if row.is_floating_point() or col.is_floating_point() or len(row) >= 2**31:
            raise ValueError("row and col must be integers, fewer than 2^31 of them")
        if weight is not None and weight.requires_grad:
            raise ValueError("edge weights are constants here; for a gradient use the dense matrix")
        for name, index, size in (("row", row, shape[0]), ("col", col, shape[1])):
            bad = ((index < 0) | (index >= size)).nonzero()
            if len(bad):
                raise ValueError(f"{name}[{int(bad[0])}] is {int(index[bad[0]])}, outside 0 .. {size - 1}")
        key, order = (row.long() * shape[1] + col).sort(stable=True)
        weight = torch.ones(len(row), device=row.device) if weight is None else weight.float()
        key, place = torch.unique_consecutive(key, return_inverse=True)
        weight = torch.zeros(len(key), device=row.device).index_add_(0, place, weight[order])
        counts = torch.bincount(key // max(shape[1], 1), minlength=shape[0])
        ptr = F.pad(counts.cumsum(0), (1, 0)).int()
        return Graph(ptr, (key % max(shape[1], 1)).int(), weight, shape, symmetric)

    @staticmethod
    def bipartite(user, item, users, items):
        """Symmetric normalised A_hat (N, N) of an interaction list: users first, then items, a_ui = 1 / sqrt(d_u d_i).

        Nodes without an edge keep an empty row. `.R` (U, I) and `.RT` (I, U) are its two blocks.
        """
        row, col, n = torch.cat([user, item + users]), torch.cat([item + users, user]), users + items
        scale = torch.bincount(row, minlength=n).clamp(min=1).double().rsqrt()
        graph = Graph.from_edges(row, col, (n, n), (scale[row] * scale[col]).float(), symmetric=True)
        graph.users = users
        return graph

    @staticmethod
    def from_knn(neighbours, weight=None):
        """Directed item-item graph from neighbour lists (I, k); its transpose is another graph, built on first use."""
        rows = torch.arange(len(neighbours), device=neighbours.device).repeat_interleave(neighbours.shape[1])
        return Graph.from_edges(rows, neighbours.flatten(), (len(neighbours),) * 2, None if weight is None else weight.flatten())

    @cached_property
    def row_of(self):
        """Row of every edge.   (E,) int64"""
        return torch.repeat_interleave(torch.arange(self.shape[0], device=self.col.device), self.ptr.diff().long())

    @cached_property
    def T(self):
        """The transpose; a symmetric graph is its own."""
        if self.symmetric:
            return self
        graph = Graph.from_edges(self.col.long(), self.row_of, self.shape[::-1], self.weight)
        graph.T = self
        return graph

    @cached_property
    def R(self):
        """Upper right block (U, I) of a bipartite graph: what users receive from items."""
        users, last = self.users, int(self.ptr[self.users])
        return Graph(self.ptr[: users + 1], self.col[:last] - users, self.weight[:last], (users, self.shape[0] - users))

    @cached_property
    def RT(self):
        """Lower left block (I, U) of a bipartite graph: what items receive from users."""
        first = int(self.ptr[self.users])
        graph = Graph(self.ptr[self.users :] - first, self.col[first:], self.weight[first:], (self.shape[0] - self.users, self.users))
        graph.T = self.R
        self.R.T = graph
        return graph

    def rows(self, index):
        """The rows `index` (n,) of A as a graph (n, N_in); rows may repeat. Cheap: made anew for every batch."""
        start, counts = self.ptr[index].long(), (self.ptr[index + 1] - self.ptr[index]).long()
        ptr = F.pad(counts.cumsum(0), (1, 0))
        edges = torch.arange(int(ptr[-1]), device=self.col.device) + torch.repeat_interleave(start - ptr[:-1], counts)
        graph = Graph(ptr.int(), self.col[edges], self.weight[edges], (len(index), self.shape[1]))
        graph.parent, graph.index = self, index
        return graph

    def to(self, device):
        graph = Graph(self.ptr.to(device), self.col.to(device), self.weight.to(device), self.shape, self.symmetric)
        if hasattr(self, "users"):
            graph.users = self.users
        return graph

    @property
    def nnz(self):
        return len(self.col)

    def dense(self):
        return torch.zeros(self.shape, device=self.col.device).index_put_((self.row_of, self.col.long()), self.weight)

    @cached_property
    def pieces(self):
        """(start, length, destination) of every piece, longest first, and the long rows' (row, first slot, slots).

        Destination >= 0 is a whole row, finished in place; -1 - s is slot s of the scratch.
        """
        length = self.ptr.diff().long()
        count = (length + PIECE - 1).div(PIECE, rounding_mode="floor").clamp(min=1)           # an empty row is one piece
        row = torch.repeat_interleave(torch.arange(self.shape[0], device=length.device), count)
        nth = torch.arange(len(row), device=row.device) - torch.repeat_interleave(count.cumsum(0) - count, count)
        size = (length[row] - nth * PIECE).clamp(max=PIECE)
        long = count[row] > 1
        slot = long.cumsum(0) - 1
        table = torch.stack([self.ptr[:-1][row].long() + nth * PIECE, size, torch.where(long, -1 - slot, row)], 1).int()
        table = table[size.argsort(descending=True, stable=True)].contiguous()
        hubs = (count > 1).nonzero()[:, 0]
        first = count[hubs].cumsum(0) - count[hubs]
        return table, torch.stack([hubs, first, count[hubs]], 1).int().contiguous()


# -- the definition -----------------------------------------------------------------------------------------------------------


def propagate_reference(graph, x):
    """The definition, at PyTorch's best: columns as bags of rows of x. 2 to 4 times faster than sparse.mm on a CPU."""
    wide = x if x.dtype == torch.float64 else x.float()
    if graph.nnz == 0 or x.shape[1] == 0:
        return x.new_zeros(graph.shape[0], x.shape[1])
    y = F.embedding_bag(graph.col, wide.contiguous(), graph.ptr, mode="sum", include_last_offset=True,
                        per_sample_weights=graph.weight.to(wide.dtype))
    return y.to(x.dtype)


# -- the kernels ----------------------------------------------------------------------------------------------------------------


@jit
def _gather_kernel(pieces, col, weight, x, y, scratch, P, D, stride, WIDE: tl.constexpr, ROWS: tl.constexpr,
                   BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)              # the pieces of this program
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)        # the feature columns it covers
    start = tl.load(pieces + 3 * p, mask=p < P, other=0)
    length = tl.load(pieces + 3 * p + 1, mask=p < P, other=0)
    place = tl.load(pieces + 3 * p + 2, mask=p < P, other=0)
    acc = tl.zeros((ROWS, BLOCK_D), dtype=ACC)
    longest = tl.max(length)
    e = 0
    while e < longest:                                            # range(tensor) fails in Triton 3.6's interpreter
        live = e < length
        j = tl.load(col + start + e, mask=live, other=0)
        j = j.to(tl.int64) if WIDE else j                         # N * D can pass 2**31
        a = tl.load(weight + start + e, mask=live, other=0.0).to(ACC)
        acc += a[:, None] * tl.load(x + j[:, None] * stride + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0).to(ACC)
        e += 1
    inside = (p < P)[:, None] & (d < D)[None, :]
    row, slot = tl.maximum(place, 0).to(tl.int64), tl.maximum(-1 - place, 0).to(tl.int64)
    tl.store(y + row[:, None] * D + d[None, :], acc.to(y.dtype.element_ty), mask=inside & (place >= 0)[:, None])
    tl.store(scratch + slot[:, None] * D + d[None, :], acc, mask=inside & (place < 0)[:, None])


@jit
def _hub_kernel(hubs, scratch, y, D, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    h, d = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, slot, count = tl.load(hubs + 3 * h).to(tl.int64), tl.load(hubs + 3 * h + 1).to(tl.int64), tl.load(hubs + 3 * h + 2)
    acc = tl.zeros((BLOCK_D,), dtype=ACC)
    n = 0
    while n < count:                                              # in order: the same bits every run
        acc += tl.load(scratch + (slot + n) * D + d, mask=d < D, other=0.0)
        n += 1
    tl.store(y + row * D + d, acc.to(y.dtype.element_ty), mask=d < D)


def block_d(width):
    """Columns of a program: all of them up to 128, so that a neighbour's row is one burst of loads."""
    return min(128, max(16, 1 << (width - 1).bit_length()))


def _propagate_triton(graph, x):
    import triton.language as tl

    if x.stride(1) != 1:
        x = x.contiguous()
    (pieces, hubs), width = graph.pieces, x.shape[1]
    y = x.new_empty(graph.shape[0], width)
    if y.numel() == 0:
        return y
    total = torch.float64 if x.dtype == torch.float64 else torch.float32
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    scratch = torch.empty(max(int(hubs[:, 2].sum()), 1), width, dtype=total, device=x.device)
    wide = max(x.shape[0] * x.stride(0), y.numel()) >= 2**31
    block = block_d(width)
    with on(x):
        grid = (-(-len(pieces) // ROWS), -(-width // block))
        _gather_kernel[grid](pieces, graph.col, graph.weight, x, y, scratch, len(pieces), width, x.stride(0), WIDE=wide,
                             ROWS=ROWS, BLOCK_D=block, ACC=acc, num_warps=4)
        if len(hubs):
            _hub_kernel[(len(hubs), grid[1])](hubs, scratch, y, width, BLOCK_D=block, ACC=acc, num_warps=2)
    return y


# -- autograd and the public functions ------------------------------------------------------------------------------------------


class _Propagate(torch.autograd.Function):
    """Nothing is saved; the backward is a propagation too, so second derivatives work."""

    @staticmethod
    def forward(ctx, graph, x):
        ctx.graph = graph
        return _propagate_triton(graph, x) if backend(x) == "triton" else propagate_reference(graph, x)

    @staticmethod
    def backward(ctx, dy):
        graph = ctx.graph
        if hasattr(graph, "parent"):                              # some rows of A: (P A)^T dy = A^T (P^T dy), nothing to sort
            dy = dy.new_zeros(graph.parent.shape[0], dy.shape[1]).index_add(0, graph.index, dy)
            graph = graph.parent
        return None, propagate(graph.T, dy)


def propagate(graph, x):
    """A x for a sparse graph.   x (N_in, D) -> (N_out, D), same dtype; sums are float32 (float64 for float64)

    Several right-hand sides are columns: stack them, one walk serves all. raises ValueError for another shape or device
    """
    if x.dim() != 2 or x.shape[0] != graph.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)}; a graph {graph.shape} needs ({graph.shape[1]}, D)")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; propagation needs floating-point numbers")
    if x.device != graph.col.device:
        raise ValueError(f"x is on {x.device}, the graph on {graph.col.device}: move it with graph.to(device)")
    return _Propagate.apply(graph, x)


def mix_hops(graph, x, weights):
    """sum_l weights[l] A^l x by Horner's rule; LightGCN's mean of L + 1 layers is weights = [1 / (L + 1)] * (L + 1).

    weights are numbers, lowest hop first.   x (N, D) -> (N, D)
    """
    if graph.shape[0] != graph.shape[1] or not len(weights):
        raise ValueError(f"hops need a square graph and at least one weight; the graph is {graph.shape}, weights {list(weights)}")
    h = weights[-1] * x
    for weight in reversed(weights[:-1]):
        h = torch.add(propagate(graph, h), x, alpha=weight)
    return h


def knn(features, k, block=2048):
    """The k most similar rows by cosine, the row itself included, without an (I, I) matrix.

    features (I, C) -> neighbours (I, k) int64, similarities (I, k) float32, best first; ties: lower index first
    raises ValueError for a zero row (its cosine is undefined) or k outside 1 .. I
    """
    norm = features.float().norm(dim=1, keepdim=True)
    if not 1 <= k <= len(features):
        raise ValueError(f"k={k} neighbours of {len(features)} rows: choose 1 to {len(features)}")
    if (norm == 0).any():
        raise ValueError(f"feature row {int((norm[:, 0] == 0).nonzero()[0])} is zero: it has no direction to compare")
    unit, found, values = features.float() / norm, [], []
    for rows in unit.split(block):
        similarity = rows @ unit.T                                                        # (block, I)
        top, index = similarity.topk(k, dim=1)
        worst = top[:, -1:]
        crowd = ((similarity >= worst).sum(1) > k).nonzero()[:, 0]                         # a tie across the border
        if len(crowd):
            top[crowd], index[crowd] = (t[:, :k] for t in similarity[crowd].sort(dim=1, descending=True, stable=True))
        index, order = index.sort(dim=1)
        top, order = top.gather(1, order).sort(dim=1, descending=True, stable=True)
        found.append(index.gather(1, order))
        values.append(top)
    return torch.cat(found), torch.cat(values)
