"""What MGCN argues against, under the same protocol: LightGCN, VBPR, item-kNN, popularity.

The trained ones answer to the same three calls as MGCN: model() -> users (U, D), items (I, D), and loss(model, batch, local).
The counted ones return users and items too, so that one ranking code serves all.
"""
import torch
from torch import nn
from torch.nn import functional as F

from gcn.mgcn import MGCN, bpr, half_square, user_item_graph
from kernels.graph import Graph, propagate


class LightGCN(MGCN):
    """Simplifying and Powering Graph Convolution Network (He et al., SIGIR 2020): MGCN's user-item view alone, Eq. 3-5."""

    def __init__(self, cfg, users, items, train, features=None):
        super().__init__(cfg, users, items, train, {})


class VBPR(nn.Module):
    """Visual Bayesian Personalized Ranking (He & McAuley, AAAI 2016): an ID factor beside a projection of content.

    score(u, i) = gamma_u . gamma_i + theta_u . (X_i W + b), all modalities side by side in X, no graph.
    Official code: item and visual bias terms as well; left out here as MMRec does, whose numbers the MGCN paper prints.
    """

    def __init__(self, cfg, users, items, train, features):
        super().__init__()
        self.cfg, self.users, self.items = cfg, users, items
        if not features:
            raise ValueError("VBPR needs at least one modality; without content use --model=lightgcn")
        self.register_buffer("features", torch.cat(list(features.values()), 1), persistent=False)     # (I, sum d_m)
        self.user = nn.Embedding(users, 2 * cfg.dim)          # gamma_u, theta_u
        self.item = nn.Embedding(items, cfg.dim)              # gamma_i
        self.project = nn.Linear(self.features.shape[1], cfg.dim)
        for table in (self.user, self.item, self.project):
            nn.init.xavier_uniform_(table.weight)

    def forward(self):
        return self.user.weight, torch.cat([self.item.weight, self.project(self.features)], 1)


def loss(model, batch, local=slice(None)):
    """BPR and the regulariser of the embeddings in the batch, for models without a contrastive part."""
    users, items = model()
    user, positive, negative = (F.embedding(ids[local], table) for ids, table in zip(batch, (users, items, items), strict=True))
    score = bpr((user * positive).sum(1), (user * negative).sum(1))
    return score + model.cfg.reg * half_square(user, positive, negative)


def popularity(train, users, items):
    """Most clicked first, the same list for everybody.   -> users (U, 1), items (I, 1)"""
    return torch.ones(users, 1, device=train.device), torch.bincount(train[:, 1], minlength=items)[:, None].float()


def item_knn(train, users, items, k=20):
    """Item-based nearest neighbours: a user's score is the sum of their items' cosines to i, the k largest per item kept.

    Cosine of two items = shared users / sqrt(users of one * users of the other).   -> users (U, I), items (I, I) = identity,
    so for small catalogues only: the score table is dense.
    """
    clicks = torch.zeros(items, users, device=train.device).index_put_((train[:, 1], train[:, 0]), torch.ones((), device=train.device))
    clicks = F.normalize(clicks, dim=1)
    cosine = (clicks @ clicks.T).fill_diagonal_(0)                              # (I, I)
    value, near = cosine.topk(min(k, items), 1)
    cosine = torch.zeros_like(cosine).scatter_(1, near, value)                  # row i: what item i takes from others
    graph = Graph.from_edges(train[:, 0], train[:, 1], (users, items))
    return propagate(graph, cosine.T.contiguous()), torch.eye(items, device=train.device)


__all__ = ["LightGCN", "VBPR", "item_knn", "loss", "popularity", "user_item_graph"]
