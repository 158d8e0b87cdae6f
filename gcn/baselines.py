"""The rivals MGCN argues against, under the same protocol: LightGCN, VBPR, popularity, item kNN.

Each gives embeddings whose dot product ranks: `forward() -> users (U, D), items (I, D)`, and, where it is trained,
`rows(users, items)` for the rows of a batch.
"""
import torch
from torch import nn

from kernels.graph import Graph, mix_hops, propagate


class LightGCN(nn.Module):
    """LightGCN (He et al., SIGIR 2020): the mean of propagated ID embeddings, behaviour only."""

    def __init__(self, users, items, edges, features=None, dim=64, layers=2):
        super().__init__()
        self.users, self.layers = users, layers
        self.user, self.item = nn.Embedding(users, dim), nn.Embedding(items, dim)
        nn.init.xavier_uniform_(self.user.weight)
        nn.init.xavier_uniform_(self.item.weight)
        self.ui = Graph.bipartite(edges[:, 0], edges[:, 1], users, items)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.ui = self.ui.to(self.user.weight.device)
        return self

    def forward(self):
        """Mean of layers 0..L (Eq. 3, 7).   -> (U, D), (I, D)"""
        h = torch.cat([self.user.weight, self.item.weight])
        h = mix_hops(self.ui, h, [1 / (self.layers + 1)] * (self.layers + 1))
        return h[: self.users], h[self.users :]

    def rows(self, users, items):
        """The same for chosen rows: the last hop runs on these only.   -> (b + c, D)"""
        nodes, h, share = torch.cat([users, items + self.users]), torch.cat([self.user.weight, self.item.weight]), 1 / (self.layers + 1)
        if not self.layers:
            return h[nodes]
        return h[nodes] * share + propagate(self.ui.rows(nodes), mix_hops(self.ui, h, [share] * self.layers))


class VBPR(nn.Module):
    """VBPR (He and McAuley, AAAI 2016) as the toolbox has it: an item is its ID vector beside its projected content."""

    def __init__(self, users, items, edges=None, features=None, dim=64):
        super().__init__()
        if not features:
            raise ValueError("VBPR needs content features; train lightgcn on data without them")
        content = torch.cat(list(features.values()), dim=1)
        self.register_buffer("content", content, persistent=False)
        self.user, self.item = nn.Embedding(users, 2 * dim), nn.Embedding(items, dim)
        nn.init.xavier_uniform_(self.user.weight)
        nn.init.xavier_uniform_(self.item.weight)
        self.project = nn.Linear(content.shape[1], dim)

    def forward(self):
        return self.user.weight, torch.cat([self.item.weight, self.project(self.content)], dim=1)

    def rows(self, users, items):
        return torch.cat([self.user(users), torch.cat([self.item(items), self.project(self.content[items])], dim=1)])


class Popularity(nn.Module):
    """Most clicked first, the same list for everybody."""

    def __init__(self, users, items, edges, features=None, dim=1):
        super().__init__()
        self.register_buffer("clicks", torch.bincount(edges[:, 1], minlength=items).float()[:, None])
        self.users = users

    def forward(self):
        return self.clicks.new_ones(self.users, 1), self.clicks


class ItemKNN(nn.Module):
    """Item-based kNN: score(u, i) = sum over u's clicks j of |users of i and j| / sqrt(d_i d_j), the k largest a row.

    Its embeddings are wide (D = I) but small sets only need a moment; a yardstick without training.
    """

    def __init__(self, users, items, edges, features=None, dim=1, k=50):
        super().__init__()
        clicks = torch.zeros(users, items).index_put_((edges[:, 0], edges[:, 1]), torch.ones(len(edges)))
        similarity = clicks.T @ clicks
        scale = similarity.diagonal().clamp(min=1).rsqrt()
        similarity = (similarity * scale[:, None] * scale).fill_diagonal_(0)
        least = similarity.topk(min(k, items), dim=1).values[:, -1:]
        self.register_buffer("similarity", torch.where(similarity >= least, similarity, 0), persistent=False)
        self.register_buffer("clicks", clicks, persistent=False)

    def forward(self):
        return self.clicks, self.similarity
