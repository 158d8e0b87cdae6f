"""LD4MRec: Simplifying and Powering Diffusion Model for Multimedia Recommendation (Zhu et al., arXiv 2309.15363).

A reconstruction: neither version's full text nor any official code was at hand. Tags say how sure each part is:
[P1] [P2] abstract of version 1, 2   [F] framework figure   [K] formula quoted second hand   [N] reading note of version 2
[D] inherited from DiffRec (SIGIR 2023)   [I] our inference   UNVERIFIED: not confirmed, hence a switch.

A user is a row x_0 of the click matrix (I,). Training corrupts it, C-Net gives the clean row back; inference is one call
on the row as it is. No tensor of users x items is ever made: each exact shortcut below has a naive twin of the same name
with `_naive`, which tests hold it against.
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from data import parallel
from kernels.graph import Graph, knn, propagate

HISTORY = 10            # losses remembered per time step [D]
FLOOR = 1e-3            # share of uniform sampling mixed into importance sampling [D]


# -- forward process (specification, section 3) ---------------------------------------------------------------------------


def schedule(T, scale, low, high, first=0.0):
    """Linear-variance schedule of DiffRec [D].   -> betas (T,), abar (T + 1,) float64 with abar[0] = 1

    1 - abar_t = scale * [low + (t - 1) / (T - 1) * (high - low)],  t = 1..T;  T = 1 leaves scale * low
    beta_t = 1 - abar_t / abar_{t-1}, at most .999.   first > 0 replaces beta_1 (DiffRec: 1e-5)
    # Paper: eq. 3 is quoted with (1 - low) in place of (high - low) [K]; --high=1 is that reading. UNVERIFIED
    """
    if T < 1 or not 0 < low <= high <= 1 or not 0 <= scale <= 1:
        raise ValueError(f"T={T}, scale={scale}, low={low}, high={high}: need T >= 1, 0 <= scale <= 1, 0 < low <= high <= 1")
    noise = scale * torch.linspace(low, high if T > 1 else low, T, dtype=torch.float64)
    abar = torch.cat([torch.ones(1, dtype=torch.float64), 1 - noise])
    betas = (1 - abar[1:] / abar[:-1]).clamp(0, 0.999)
    if first:
        betas[0] = first
    return betas, torch.cat([abar[:1], (1 - betas).cumprod(0)])


class TimeSampler(nn.Module):
    """t ~ Importance({1..T}) [F][D]: hard times are drawn more often. The history is a buffer, so a resume keeps it.

    p_t ~ sqrt(mean of the last 10 squared losses at t), mixed with 0.1 % uniform; uniform until every t has 10 losses.
    A drawn loss counts 1 / (p_t T), which leaves the expected objective as it was.
    """

    def __init__(self, T, importance=True):
        super().__init__()
        self.T, self.importance = T, importance
        self.register_buffer("loss_history", torch.zeros(T, HISTORY))
        self.register_buffer("count", torch.zeros(T, dtype=torch.int64))

    def probabilities(self):
        """p_t (T,), t = 1 first."""
        uniform = torch.full_like(self.loss_history[:, 0], 1 / self.T)
        if not self.importance:
            return uniform
        p = self.loss_history.square().mean(1).sqrt() + 1e-30
        p = (1 - FLOOR) * p / p.sum() + FLOOR / self.T
        return torch.where((self.count >= HISTORY).all(), p, uniform)        # no device sync

    def draw(self, n):
        """-> t (n,) in 1..T, weight (n,) = 1 / (p_t T)"""
        p = self.probabilities()
        t = torch.multinomial(p, n, replacement=True)
        return t + 1, 1 / (p[t] * self.T)

    def record(self, t, loss):
        """Remember each time's last 10 losses. A ring buffer by scatter: the order inside does not matter.   t, loss (n,)"""
        t, order = (t - 1).sort(stable=True)
        arrived = torch.bincount(t, minlength=self.T)
        nth = torch.arange(len(t), device=t.device) - (arrived.cumsum(0) - arrived)[t]
        last = nth >= arrived[t] - HISTORY                                   # a slot is written once: the same bits every run
        t_last, slot = t[last], (self.count[t] + nth)[last] % HISTORY
        self.loss_history[t_last, slot] = loss[order][last].float()
        self.count += arrived


# -- conditions, precomputed without gradient (section 4) -------------------------------------------------------------------


def truncated_svd(graph, k, rounds=12):
    """U_k sqrt(Sigma_k) of a sparse matrix by subspace iteration [F][K].   -> (U, k) float32

    Deterministic: fixed start, and the largest entry of each right vector is positive. Directions beyond the rank (a
    singular value below 1e-4 of the first, or k > min(U, I)) are columns of zeros: their rotation would be noise.
    """
    width = min(k + 16, *graph.shape)
    q = torch.randn(graph.shape[1], width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = q.to(graph.col.device)
    for _ in range(rounds):
        q = torch.linalg.qr(propagate(graph.T, propagate(graph, q)))[0]
    left, sigma, right = torch.linalg.svd(propagate(graph, q), full_matrices=False)
    right = q @ right.T                                                       # (I, width)
    sign = right.gather(0, right.abs().argmax(0)[None])[0].sign()
    scaled = left * sign * sigma.sqrt() * (sigma > 1e-4 * sigma[0].clamp(min=1e-12))
    return F.pad(scaled, (0, max(0, k - width)))[:, :k].float()


def normalised(graph, users, items, smooth=0.0):
    """R_hat = D_u^-1/2 R D_i^-1/2 with `smooth` added to the degrees.   graph (U, I) of ones -> Graph (U, I)

    # Paper: raw or normalised R is not known. With smooth = 0 every connected component of the click graph has the top
    # singular value 1: where there are hundreds (TikTok), the leading directions only say which component a user is in.
    """
    degree_u, degree_i = (g.ptr.diff().float() + smooth for g in (graph, graph.T))
    weight = (degree_u[graph.row_of] * degree_i[graph.col.long()]).rsqrt()
    return Graph(graph.ptr, graph.col, weight, (users, items))


def modality_preference(graph, x, most=256):
    """p_u = R_hat X: one parameter-free hop [F][K].   graph (U, I) normalised, x (I, d_m) -> (U, min(d_m, most))

    Columns are standardised and rows get length 1 first (image vectors have large norms) [I]; wide features are reduced
    by PCA, so that U x 4096 numbers are never stored.
    """
    x = x.double()
    if x.shape[1] > most:
        values, axes = torch.linalg.eigh(torch.cov(x.T))
        x = (x - x.mean(0)) @ axes[:, -most:]
    x = (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-6)
    return propagate(graph, F.normalize(x, dim=1).float())


# -- C-Net (section 5) ---------------------------------------------------------------------------------------------------------


def time_code(t, width):
    """Sinusoidal code of t, cosines then sines, longest period 10000.   t (n,) -> (n, width)"""
    half = width // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angle = t[:, None].float() * frequency
    return F.pad(torch.cat([angle.cos(), angle.sin()], 1), (0, width % 2))


def dropout(x, p, training):
    """Dropout whose mask is drawn for the global batch, then cut: one process and several agree."""
    if not training or p == 0:
        return x
    keep = parallel.shard(torch.rand(len(x) * parallel.world(), *x.shape[1:], device=x.device)) >= p
    return x * keep / (1 - p)


class Denoise(nn.Module):
    """BD, behaviour-denoising block [F]; inner formula UNVERIFIED [I].

    z = SiLU(W1 LN(h) + W_t tau + W_c c_u + b1)        h <- h + W2 dropout(z) + b2
    cond   add: as written;   film: LN(h) is scaled and shifted by a linear map of [tau; c_u];   concat: W1 [LN(h); tau; c_u]
           (the same family of functions as add, with one initial scale for all inputs)
    """

    def __init__(self, cfg, collab, modal=0):
        super().__init__()
        d, given = cfg.width, cfg.time_width + collab + modal
        self.cond, self.p, self.ln = cfg.cond, cfg.dropout, nn.LayerNorm(d)
        self.w1 = nn.Linear(d + given * (cfg.cond == "concat"), d)
        self.given = {"add": lambda: nn.Linear(given, d, bias=False), "film": lambda: nn.Linear(given, 2 * d),
                      "concat": nn.Identity}[cfg.cond]()
        self.w2 = nn.Linear(d, d)

    def forward(self, h, conditions):
        normal, given = self.ln(h), self.given(torch.cat(conditions, 1))
        if self.cond == "film":
            scale, shift = given.chunk(2, 1)
            normal, given = normal * (1 + scale) + shift, 0
        elif self.cond == "concat":
            normal, given = torch.cat([normal, given], 1), 0
        return h + self.w2(dropout(F.silu(self.w1(normal) + given), self.p, self.training))


class Guide(nn.Module):
    """BG, behaviour-guidance block [F] ("BI" in one source [K]); inner formula UNVERIFIED [I].

    h <- h + sigmoid(W_g [LN(h); r] + b_g) * (W_r SiLU(r) + b_r)        r: the user's blended modality preference
    """

    def __init__(self, cfg):
        super().__init__()
        d = cfg.width
        self.ln, self.gate, self.out = nn.LayerNorm(d), nn.Linear(2 * d, d), nn.Linear(d, d)

    def forward(self, h, r):
        return h + torch.sigmoid(self.gate(torch.cat([self.ln(h), r], 1))) * self.out(F.silu(r))


class Preference(nn.Module):
    """Personalised modality weights [P2], form UNVERIFIED [I].

    a_m = softmax_m(q^T tanh(W_a W_m p_um + b_a))        r = sum_m a_m W_m p_um
    """

    def __init__(self, cfg, widths):
        super().__init__()
        self.proj = nn.ModuleDict({m: nn.Linear(w, cfg.width, bias=False) for m, w in widths.items()})
        self.personal = cfg.modality_weights == "personal"
        if self.personal:
            self.hidden, self.q = nn.Linear(cfg.width, cfg.width), nn.Linear(cfg.width, 1, bias=False)

    def forward(self, p):
        """p {modality: (B, d_m)} -> r (B, d), weights (B, M)"""
        each = torch.stack([self.proj[m](x) for m, x in p.items()], 1)                        # (B, M, d)
        logits = self.q(torch.tanh(self.hidden(each)))[..., 0] if self.personal else each.new_zeros(each.shape[:2])
        a = logits.softmax(1)
        return (a[..., None] * each).sum(1), a
