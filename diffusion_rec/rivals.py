"""What LD4MRec argues against, under the same protocol and behind the same three calls: loss, encode, table.

DiffRec        unconditional chain (Wang et al., SIGIR 2023): noise, a one-layer network, many reverse steps
Autoencoder    the same network without diffusion: one clean pass (denoising by dropout alone)
LightGCN       the graph rival of the robustness curve (He et al., SIGIR 2020), ten lines on the shared kernel
Popularity     most clicked first;   Walk: three steps user -> item -> user -> item; nothing is learnt by either
"""
import torch
from torch import nn
from torch.nn import functional as F

from data import parallel
from diffusion_rec.ld4mrec import LD4MRec
from kernels.graph import Graph, mix_hops, propagate


class DiffRec(LD4MRec):
    """Chain over the whole behaviour vector without conditions; x_0 is predicted by one hidden layer.

    x_hat = V tanh(W_in^T x_t + W_t code(t) + b) + bias. Both ends are linear, so LD4MRec's noise, loss and chain fit as they
    are; --noise=dense --acts_on=state is the official code's own arithmetic, dropout and normalisation on x_t.
    """

    def conditions(self, features):
        self.widths = {}

    def network(self):
        d = self.cfg.time_width
        self.time = nn.Linear(d, d)                          # the official code's emb_layer
        self.t_in = nn.Parameter(torch.zeros(d))
        self.given = nn.Linear(d, self.cfg.width, bias=False)

    def guidance(self, rows, users):
        return None

    def forward(self, entered, tau, guidance):
        return torch.tanh(entered + self.bias_in + self.given(tau))


class Autoencoder(DiffRec):
    """Denoising autoencoder: with rho = 1 nothing is corrupted, and time is not an input."""

    def forward(self, entered, tau, guidance):
        return torch.tanh(entered + self.bias_in)


class LightGCN(nn.Module):
    """Mean of `hops` + 1 propagated embeddings, BPR with one uniform negative a click."""

    def __init__(self, cfg, users, items, train, features):
        super().__init__()
        self.cfg, self.users, self.items = cfg, users, items
        self.clicks = Graph.from_edges(train[:, 0], train[:, 1], (users, items))
        self.graph = Graph.bipartite(train[:, 0], train[:, 1], users, items)
        self.embedding = nn.Parameter(torch.empty(users + items, cfg.width))
        nn.init.xavier_uniform_(self.embedding)

    def propagated(self):
        x = mix_hops(self.graph, self.embedding, [1 / (self.cfg.hops + 1)] * (self.cfg.hops + 1))
        return x.split([self.users, self.items])

    def loss(self, users):
        """BPR over all clicks of the batch's users."""
        rows, mine = self.clicks.rows(users), parallel.shard(users)
        negative = torch.randint(self.items, (rows.nnz,), device=users.device)         # for the global batch: ranks agree
        first = parallel.rank() * len(mine)
        local = (rows.row_of >= first) & (rows.row_of < first + len(mine))
        user, positive, negative = users[rows.row_of[local]], rows.col[local].long(), negative[local]
        u, i = self.propagated()
        u, p, n = F.embedding(user, u), F.embedding(positive, i), F.embedding(negative, i)
        nodes = torch.cat([user, positive + self.users, negative + self.users])
        decay = F.embedding(nodes, self.embedding).square().sum() / len(mine)
        per_user = -F.logsigmoid((u * (p - n)).sum(1)).sum() / len(mine)
        return per_user + self.cfg.weight_decay * decay

    def encode(self, users, inference=None, steps=None):
        return self.propagated()[0][users]

    def table(self):
        return self.propagated()[1]


class Popularity(nn.Module):
    """Most clicked first, the same list for everybody."""

    def __init__(self, cfg, users, items, train, features):
        super().__init__()
        self.register_buffer("count", torch.bincount(train[:, 1], minlength=items)[:, None].float())

    def encode(self, users, inference=None, steps=None):
        return torch.ones(len(users), 1, device=users.device)

    def table(self):
        return self.count


class Walk(nn.Module):
    """Three-step random walk from a user's items back to items: s = x_0 D_i^-1 R^T D_u^-1 R. A linear model without training.

    It has no low-rank factors: `scores` gives whole rows (n, I) instead of `encode` and `table`.
    """

    def __init__(self, cfg, users, items, train, features):
        super().__init__()
        self.clicks = Graph.from_edges(train[:, 0], train[:, 1], (users, items))

    def scores(self, users):
        per_item, per_user = (g.counts.clamp(min=1)[:, None].float() for g in (self.clicks.T, self.clicks))
        start = self.clicks.rows(users).dense().T / per_item                            # (I, n)
        return propagate(self.clicks.T, propagate(self.clicks, start) / per_user).T     # (n, I)
