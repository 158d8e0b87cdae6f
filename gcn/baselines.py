"""What MGCN argues against, under the same protocol: LightGCN, VBPR, item-kNN, popularity.

All are built like MGCN and answer model() -> users (U, D), items (I, D), so that one ranking code serves them; the trained
ones also have a loss(model, batch, local).
"""
import torch
from torch import nn
from torch.nn import functional as F

from gcn.mgcn import MGCN, bpr, half_square


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
    """Item-based neighbours: a user's score for i is the sum of cosines between i and their items, k kept per item.

    Cosine = shared users / sqrt(users of one * users of the other).   -> users (U, I) clicks, items (I, I) cosines:
    dense tables, so for catalogues of some ten thousand items
    """
    clicks = torch.zeros(items, users, device=train.device)
    clicks[train[:, 1], train[:, 0]] = 1.0
    unit = F.normalize(clicks, dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(0)                                  # (I, I)
    value, near = cosine.topk(min(k, items), 1)
    return clicks.T.contiguous(), torch.zeros_like(cosine).scatter_(1, near, value)     # row i: what i takes from others


COUNTED = {"popularity": popularity, "itemknn": item_knn}


class Counted(nn.Module):
    """A rival without parameters, cfg.model of COUNTED."""

    def __init__(self, cfg, users, items, train, features=None):
        super().__init__()
        self.tables = COUNTED[cfg.model](train, users, items)

    def forward(self):
        return self.tables
