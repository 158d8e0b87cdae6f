"""LightGCN (He et al., SIGIR 2020): the graph rival, and an encoder of the collaborative signal (--collab=lightgcn)."""
import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from data import parallel
from data.batches import generator
from kernels.graph import Graph, mix_hops


class LightGCN(nn.Module):
    """Mean of `hops` + 1 propagated embeddings, BPR with one uniform negative a click. Behind the calls of LD4MRec."""

    def __init__(self, cfg, users, items, train, features=None):
        super().__init__()
        self.cfg, self.users, self.items = cfg, users, items
        self.clicks = Graph.from_edges(train[:, 0], train[:, 1], (users, items))
        self.graph = Graph.bipartite(train[:, 0], train[:, 1], users, items)
        self.embedding = nn.Parameter(torch.empty(users + items, cfg.width, device=train.device))
        nn.init.xavier_uniform_(self.embedding)

    def propagated(self):
        x = mix_hops(self.graph, self.embedding, [1 / (self.cfg.hops + 1)] * (self.cfg.hops + 1))
        return x.split([self.users, self.items])

    def loss(self, users):
        """BPR over all clicks of the batch's users, mean over clicks."""
        rows, mine = self.clicks.rows(users), parallel.shard(users)
        negative = torch.randint(self.items, (rows.nnz,), device=users.device)         # for the global batch: ranks agree
        first = parallel.rank() * len(mine)
        local = (rows.row_of >= first) & (rows.row_of < first + len(mine))
        user, positive, negative = users[rows.row_of[local]], rows.col[local].long(), negative[local]
        u, i = self.propagated()
        u, p, n = F.embedding(user, u), F.embedding(positive, i), F.embedding(negative, i)
        clicks = rows.nnz / parallel.world()
        decay = 0.5 * (u.square().sum() + p.square().sum() + n.square().sum())
        return (-F.logsigmoid((u * (p - n)).sum(1)).sum() + self.cfg.reg * decay) / clicks

    def encode(self, users, inference=None, steps=None):
        return self.propagated()[0][users]

    def table(self):
        return self.propagated()[1]


def item_embeddings(cfg, clicks, steps=200, batch=1024):
    """Items of a LightGCN trained at start-up, width cfg.svd; the same numbers every time.   clicks Graph (U, I) -> (I, k)"""
    edges, (users, items) = torch.stack([clicks.row_of, clicks.col.long()], 1), clicks.shape
    active = edges[:, 0].unique()
    with torch.random.fork_rng(devices=[clicks.device] if clicks.device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(0)
        model = LightGCN(dataclasses.replace(cfg, width=cfg.svd), users, items, edges)
        adam, draw = torch.optim.Adam(model.parameters(), lr=5e-3), generator(0, 23)
        for _ in range(steps):
            chosen = active[torch.randint(len(active), (batch,), generator=draw).to(active.device)]
            adam.zero_grad()
            model.loss(chosen).backward()
            adam.step()
    return model.table().detach()
