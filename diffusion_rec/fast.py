"""Exact shortcuts that keep users x items out of a training step, each beside its naive twin (specification, section 13).

    input      W_in^T x_0 is a sum of rows of W_in over the user's clicks: `propagate`, no product with a dense row
    noise      W_in^T eps with eps ~ N(0, 1_I) is Gaussian with covariance G = W_in^T W_in: draw it in d dimensions
    loss       || f - (V h + b) ||^2 over all items from V^T V and the scores of the few items whose target is special
    chain      the next state of the reverse chain enters C-Net as W_in^T x: follow that (d numbers) instead of x (I numbers)

Matrices: W_in (I, d) `table`, V (I, d) `out`, b (I,) `bias`. Everything here stays in float32 under autocast.
"""
import torch
from torch.nn import functional as F

from kernels.graph import Graph


def drop_clicks(rows, p, share):
    """Forget each click with probability p and scale the others by 1 / (1 - p).   rows Graph (B, I) -> Graph (B, I)

    share   uniform numbers, one per click (E,)
    """
    if p == 0:
        return rows
    return Graph(rows.ptr, rows.col, rows.weight * (share >= p) / (1 - p), rows.shape)


def unit_rows(rows):
    """Every row divided by its length; an empty row stays empty.   Graph -> Graph"""
    square = torch.zeros(rows.shape[0], device=rows.col.device).index_add_(0, rows.row_of, rows.weight.square())
    return Graph(rows.ptr, rows.col, rows.weight * square.clamp(min=1e-12).rsqrt()[rows.row_of], rows.shape)


def latent_noise(table, z):
    """W_in^T eps for eps ~ N(0, 1_I), equal in distribution: chol(G) z, G = W_in^T W_in.   z (B, d) normal -> (B, d)

    The gradient runs through the Cholesky factor. G has rank <= I: with fewer items than dimensions (or collinear columns)
    a jitter of 1e-6 of its mean diagonal keeps the factor defined and adds a variance of that size.
    """
    gram = (table.T @ table).double()                                               # (d, d)
    jitter = 1e-6 * gram.diagonal().mean().detach() + 1e-30
    factor = torch.linalg.cholesky(gram + jitter * torch.eye(len(gram), device=gram.device, dtype=gram.dtype))
    return z @ factor.T.to(z.dtype)


def reconstruction(h, out, bias, target, click_weight=1.0):
    """sum_i w_i (f_i - y_i)^2 for y = V h + b without y; w is click_weight at clicks, 1 elsewhere.   h (B, d) -> (B,)

    Were every target `low`: h^T V^T V h + 2 h.V^T b + b.b - 2 low (h.V^T 1 + sum b) + I low^2.
    Each special entry e then trades (low - y_e)^2 for w_e (value_e - y_e)^2.
    """
    low, row = target.low, target.rows.row_of
    everywhere = ((h @ (out.T @ out)) * h).sum(1) + 2 * h @ (out.T @ bias) + bias @ bias
    everywhere = everywhere - 2 * low * (h @ out.sum(0) + bias.sum()) + len(out) * low.square()
    y, w = observed(h, out, bias, target.rows), 1 + (click_weight - 1) * target.rows.weight
    return everywhere.index_add(0, row, w * (target.value - y).square() - (low[row] - y).square())


def reconstruction_naive(h, out, bias, target, click_weight=1.0):
    w = 1 + (click_weight - 1) * target.rows.dense()
    return (w * (target.dense() - (h @ out.T + bias)).square()).sum(1)


def cross_entropy(h, out, bias, target):
    """- sum_i f_i log softmax(y)_i over all items; only the normaliser needs the scores y = V h + b (B, I).   -> (B,)"""
    y, row = observed(h, out, bias, target.rows), target.rows.row_of
    norm = torch.addmm(bias, h, out.T).logsumexp(1)                                 # (B,)
    everywhere = target.low * (h @ out.sum(0) + bias.sum() - len(out) * norm)
    return -everywhere.index_add(0, row, (target.value - target.low[row]) * (y - norm[row]))


def observed(h, out, bias, rows):
    """Scores of the listed entries only.   rows Graph (B, I) with E entries -> (E,)"""
    col = rows.col.long()
    return (F.embedding(rows.row_of, h) * F.embedding(col, out)).sum(1) + bias[col]

