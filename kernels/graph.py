"""Sparse graph propagation: y = A x.      y[i] = sum over j in N(i) of a[i, j] x[j]      (LightGCN Eq. 3)

Backward is the same walk over the transpose, dx = A^T dy, and it is this very function: nothing is saved, and
second derivatives come for free. Several hops at once,  sum_l w[l] A^l x,  by Horner's rule:

    h = w[L] x;   h <- A h + w[l] x   for l = L-1 .. 0;         derivative: the same polynomial of A^T

so LightGCN's mean over layers stores no layer, no stack and no mean. Cost of a hop: E * D multiply-adds and
E * D gathered numbers (memory bound); nothing of size E * D is ever stored.
"""
from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from kernels import backend, jit, on

if TYPE_CHECKING:
    import triton.language as tl

PIECE = 32                       # K: entries one lane walks alone; longer rows are cut, so a hub becomes parallel pieces


class Graph:
    """A sparse matrix of constant weights, rows sorted, in int32 CSR.   shape = (outputs, inputs)

    first    (N_out + 1,) int32, row i owns entries first[i] : first[i + 1]
    col      (E,) int32, sorted within a row: the same edges give the same bits in whatever order they came
    weight   (E,) float32 or float64, or None: all ones
    pick     (P,) int64 or None: the product is computed for all rows, then only these are kept (see `rows`)
    spread   (P,) int64 or None: the transpose of pick: inputs are added into these rows before the walk
    """

    def __init__(self, first, col, weight, shape, symmetric=False, users=0, pick=None, spread=None):
        self.first, self.col, self.weight, self.shape = first, col, weight, shape
        self.symmetric, self.users, self.pick, self.spread = symmetric, users, pick, spread
        self.kept = {}                                       # transpose, halves, plans, casts: made when first asked for

    @staticmethod
    def from_edges(row, col, shape, weight=None):
        """Entries (row[e], col[e]) in any order; duplicates are summed.   row, col (E,) integers, weight (E,) or None"""
        row, col, weight = _check_edges(row, col, shape, weight)
        key, order = torch.sort(row * shape[1] + col, stable=True)
        weight = None if weight is None else weight[order]
        new = torch.ones_like(key, dtype=torch.bool)
        new[1:] = key[1:] != key[:-1]
        if not bool(new.all()):                              # sum duplicates in a fixed order: index_put_ is, index_add_
            group = new.cumsum(0) - 1                        # on a GPU is not
            ones = torch.ones(len(key), device=key.device) if weight is None else weight
            key = key[new]
            weight = ones.new_zeros(len(key)).index_put_((group,), ones, accumulate=True)
        row, col = key // shape[1], key % shape[1]
        first = torch.searchsorted(row, torch.arange(shape[0] + 1, device=row.device))
        return Graph(first.int(), col.int(), weight, tuple(shape))

    @staticmethod
    def bipartite(user, item, U, I):
        """A_hat = D^-1/2 [[0, R], [R^T, 0]] D^-1/2 over U + I nodes, users first. R_hat = .R and its transpose = .RT"""
        both = torch.stack([torch.as_tensor(user), torch.as_tensor(item)]).long()
        _check_edges(*both, (U, I), None)
        user, item = both[0], both[1] + U
        graph = Graph.from_edges(torch.cat([user, item]), torch.cat([item, user]), (U + I, U + I)).normalised()
        graph.symmetric, graph.users = True, U
        return graph

    @staticmethod
    def from_knn(neighbours, weight=None):
        """Row i points at neighbours[i]: directed, so it keeps its own transpose.   neighbours, weight (I, k)"""
        count, k = neighbours.shape
        row = torch.arange(count, device=neighbours.device).repeat_interleave(k)
        weight = None if weight is None else weight.reshape(-1)
        return Graph.from_edges(row, neighbours.reshape(-1), (count, count), weight)

    def normalised(self):
        """a[i, j] / sqrt(g[i] g[j]) with g the row sums, also for the columns; a row without weight stays 0."""
        if self.shape[0] != self.shape[1]:
            raise ValueError(f"normalised() needs a square graph, this one is {self.shape}")
        weight = self.values(torch.float64)
        weight = torch.ones(self.nnz, dtype=torch.float64, device=self.col.device) if weight is None else weight
        row = self.row_of_entry()
        g = torch.zeros(self.shape[0], dtype=torch.float64, device=weight.device).index_put_((row,), weight, True)
        s = torch.where(g > 0, g, torch.inf).rsqrt()
        return Graph(self.first, self.col, (s[row] * weight * s[self.col.long()]).float(), self.shape)

    def row_of_entry(self):
        """(E,) int64"""
        rows = torch.arange(len(self.first) - 1, device=self.col.device)
        return rows.repeat_interleave(self.first.diff(), output_size=self.nnz)

    @property
    def nnz(self):
        return len(self.col)

    @property
    def device(self):
        return self.col.device

    @property
    def T(self):
        if self.symmetric:
            return self
        if "T" not in self.kept:
            if self.pick is not None or self.spread is not None:
                whole = Graph.T.fget(self.kept["whole"])
                back = Graph(whole.first, whole.col, whole.weight, self.shape[::-1], pick=self.spread, spread=self.pick)
                back.kept["whole"] = whole
            else:
                back = Graph.from_edges(self.col, self.row_of_entry(), self.shape[::-1], self.weight)
            self.kept["T"], back.kept["T"] = back, self
        return self.kept["T"]
