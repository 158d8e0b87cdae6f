"""The diffusion of a behaviour vector: schedule, time sampling, reverse posterior, softened targets (specification, 3, 6, 7).

Inherited from DiffRec (SIGIR 2023) unless a tag says otherwise; the tags are explained in ld4mrec.py.
Random numbers are drawn for the global batch and then cut, so that one process and several take the same step.
"""
from typing import NamedTuple

import torch
from torch import nn

from data import parallel
from kernels.graph import Graph, propagate

HISTORY = 10            # losses remembered for each time step [D]
FLOOR = 1e-3            # share of uniform sampling mixed into importance sampling [D]


def drawn(draw, n, *rest, device):
    """draw(n, *rest) for this process's n rows of the global batch; draw is torch.rand or torch.randn."""
    return parallel.shard(draw(n * parallel.world(), *rest, device=device))


def drawn_for_entries(graph, users):
    """One uniform number for each entry of the rows `users` (global batch) of a Graph; this process keeps its own."""
    counts = graph.counts[users]
    share = torch.rand(int(counts.sum()), device=counts.device)
    return torch.cat(parallel.shard(share.split(counts.tolist()))) if parallel.world() > 1 else share


def dropout(x, p, training):
    """Dropout with a mask drawn for the global batch."""
    if not training or p == 0:
        return x
    return x * (drawn(torch.rand, *x.shape, device=x.device) >= p) / (1 - p)


# -- the forward process ------------------------------------------------------------------------------------------------


def schedule(T, scale, low, high, first=0.0):
    """Linear-variance schedule [D].   -> betas (T,), abar (T + 1,), float64, abar[0] = 1 is the clean row

    1 - abar_t = scale * [low + (t - 1) / (T - 1) * (high - low)],  t = 1..T        T = 1 leaves scale * low
    beta_t = 1 - abar_t / abar_{t-1}, at most .999                                  first > 0 replaces beta_1 (DiffRec: 1e-5)
    # Paper: its eq. 3 is quoted with (1 - low) in place of (high - low) [K]. UNVERIFIED; --high=1 is that reading
    """
    if T < 1 or not 0 < low <= high <= 1 or not 0 <= scale <= 1:
        raise ValueError(f"T={T}, scale={scale}, low={low}, high={high}: need T >= 1, 0 <= scale <= 1, 0 < low <= high <= 1")
    noise = scale * torch.linspace(low, high if T > 1 else low, T, dtype=torch.float64)
    abar = torch.cat([torch.ones(1, dtype=torch.float64), 1 - noise])
    betas = (1 - abar[1:] / abar[:-1].clamp(min=1e-12)).clamp(0, 0.999)
    if first:
        betas[0] = first
    return betas, torch.cat([abar[:1], (1 - betas).cumprod(0)])


def posterior(betas, abar):
    """Mean of q(x_{t-1} | x_t, x_0) = a_t x_0 + b_t x_t.   -> a, b (T,), t = 1 first

    a = beta_t sqrt(abar_{t-1}) / (1 - abar_t)        b = (1 - abar_{t-1}) sqrt(alpha_t) / (1 - abar_t)
    Without noise (scale = 0) the posterior is a point: a = 1, b = 0.
    """
    noise = 1 - abar[1:]
    a = torch.where(noise > 0, betas * abar[:-1].sqrt() / noise, 1.0)
    b = torch.where(noise > 0, (1 - abar[:-1]) * (1 - betas).sqrt() / noise, 0.0)
    return a, b


def snr_weight(abar):
    """Weight of the loss at t: SNR(t - 1) - SNR(t), and 1 at the first step [D]; SNR = abar / (1 - abar).   -> (T,)"""
    snr = abar / (1 - abar).clamp(min=1e-12)
    return torch.cat([torch.ones_like(snr[:1]), snr[1:-1] - snr[2:]])


class TimeSampler(nn.Module):
    """t ~ Importance({1..T}) [F][D]: times with large losses are drawn more often. Buffers, so a resume keeps them.

    p_t ~ sqrt(mean of the last 10 squared losses at t), mixed with 0.1 % uniform; uniform until every t has 10 losses.
    A drawn loss counts 1 / (p_t T) times, which leaves the expected objective as it was.
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
        return torch.where((self.count >= HISTORY).all(), p, uniform)        # decided on the device: no sync

    def draw(self, n):
        """For this process's n rows of the global batch: t (n,) in 1..T, weight (n,) = 1 / (p_t T)"""
        p = self.probabilities()
        t = parallel.shard(torch.multinomial(p, n * parallel.world(), replacement=True))
        return t + 1, 1 / (p[t] * self.T)

    def record(self, t, loss, kept):
        """Remember each time's last 10 losses; a ring buffer, as their order does not matter.   t, loss, kept (n,)

        Only rows with `kept` count (the others were not corrupted). All processes record all rows.
        """
        t, loss, kept = everybody(torch.stack([t.float(), loss.detach().float(), kept.float()])).unbind(0)
        slot_of_none = self.T                                                # rows not kept go to an extra row, cut off below
        t, order = torch.where(kept > 0, t.long() - 1, slot_of_none).sort(stable=True)
        arrived = torch.bincount(t, minlength=self.T + 1)
        nth = torch.arange(len(t), device=t.device) - (arrived.cumsum(0) - arrived)[t]
        count = torch.cat([self.count, self.count.new_zeros(1)])
        last = nth >= arrived[t] - HISTORY                                   # each slot is written once: the same bits every run
        table = torch.cat([self.loss_history, self.loss_history.new_zeros(1, HISTORY)])
        table[t[last], (count[t] + nth)[last] % HISTORY] = loss[order][last]
        self.loss_history.copy_(table[: self.T])
        self.count += arrived[: self.T]


def everybody(x):
    """The columns of all processes side by side.   x (k, n) -> (k, n world)"""
    if parallel.world() == 1:
        return x
    whole = x.new_zeros(x.shape[0], x.shape[1] * parallel.world())
    whole[:, parallel.rank() * x.shape[1] : (parallel.rank() + 1) * x.shape[1]] = x * parallel.world()
    parallel.average_([whole])
    return whole


# -- soft behavioural reconstruction ------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """What x_hat should be: `low` everywhere except at the entries of `rows`, where it is `value`."""

    low: torch.Tensor       # (B,)
    rows: Graph             # (B, I) with E entries; weights x_0: 1 at clicks, 0 at entries that only have a special target
    value: torch.Tensor     # (E,)

    def dense(self):
        whole = self.low[:, None].repeat(1, self.rows.shape[1])
        return whole.index_put((self.rows.row_of, self.rows.col.long()), self.value)


def soft_target(form, p, gamma, rows, share_user, share_entry, score=None):
    """f_S(x_0) [P1][N]: a clean row does not exist, so the target is softened. Exact form UNVERIFIED; four readings.

    user_level      with probability p the whole row becomes (1 - gamma) x_0 + gamma (1 - x_0)
    positive_only   each click becomes 1 - gamma with probability p, zeros stay 0
    neighbour       with probability p the row becomes (1 - gamma) x_0 + gamma * item-neighbour score [I]
    off             x_0
    rows            Graph (B, I): entries are the clicks (neighbour: clicks and scored items), weights x_0
    share_user (B,), share_entry (E,)   uniform numbers;   score (E,) in [0, 1], neighbour only
    """
    zero, x = torch.zeros_like(share_user), rows.weight
    if form == "user_level":
        low = gamma * (share_user < p)
        return Target(low, rows, x - low[rows.row_of])
    if form == "positive_only":
        return Target(zero, rows, x - gamma * (share_entry < p))
    if form == "neighbour":
        chosen = (share_user < p)[rows.row_of]
        return Target(zero, rows, torch.where(chosen, (1 - gamma) * x + gamma * score, x))
    return Target(zero, rows, x)


def neighbour_scores(clicks, k, block=1024):
    """Semi-supervised targets [I]: how near an item is to the user's clicks, at most 1, for their k nearest items each.

    Nearness is a two-step walk item -> its users -> their items without the way back to itself, D_i^-1 R^T D_u^-1.5 R: a user
    with many clicks says less.
    clicks Graph (U, I) of ones -> pattern Graph (U, I) (clicks and scored items, weights x_0), score (E,) in [0, 1]
    """
    U, I = clicks.shape
    per_item, per_user = clicks.T.counts.clamp(min=1).float(), clicks.counts.clamp(min=1).float() ** 1.5
    near, value = [], []
    for items in torch.arange(I, device=clicks.device).split(block):
        start = torch.zeros(I, len(items), device=clicks.device)
        start[items, torch.arange(len(items), device=clicks.device)] = 1
        walk = propagate(clicks.T, propagate(clicks, start / per_item[:, None]) / per_user[:, None]).T       # (block, I)
        best = walk.scatter(1, items[:, None], 0).topk(min(k, I), dim=1)
        near.append(best.indices)
        value.append(best.values)
    near, value = torch.cat(near)[clicks.col.long()], torch.cat(value)[clicks.col.long()]                    # (E, k)
    row = clicks.row_of
    rows = torch.cat([row, row.repeat_interleave(near.shape[1])])
    cols = torch.cat([clicks.col.long(), near.flatten()])
    x = torch.cat([clicks.weight, torch.zeros(near.numel(), device=row.device)])
    score = torch.cat([torch.zeros_like(clicks.weight), value.flatten()])
    pattern, scores = (Graph.from_edges(rows, cols, (U, I), w) for w in (x, score))
    most = torch.zeros(U, device=row.device).scatter_reduce(0, scores.row_of, scores.weight, "amax")
    return pattern, scores.weight / most.clamp(min=1e-12)[scores.row_of]
