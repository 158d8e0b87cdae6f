"""MGCN: Multi-View Graph Convolutional Network for Multimedia Recommendation (Yu, Tan, Lu, Bao, MM 2023).

    purifier             content decides how much of each item's ID embedding to keep         Eq. 1-2
    user-item view       parameter-free propagation of IDs over the interaction graph         Eq. 3-5
    item-item views      one kNN graph of content per modality; users inherit from items      Eq. 6-10
    behaviour-aware fuser  shared part by attention, specific parts gated by behaviour        Eq. 11-14
    prediction           F = C + M, score(u, i) = F_u . F_i                                   Eq. 15, 17-18
    losses               BPR + regulariser + contrastive tie of M and C                       Eq. 16, 19

Equation numbers are the paper's as quoted by secondary sources (UNVERIFIED). Any number and names of modalities.
Shape letters: U users, I items, N = U + I nodes, D width, m modality, B batch, n chosen rows.
"""
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from kernels.graph import Graph, knn, mix_hops, propagate

REG_BATCH = 2048        # Official code: the regulariser is divided by the configured batch size, not the actual one


class Views(NamedTuple):
    """Embeddings of some nodes, all (n, D)."""

    behaviour: torch.Tensor       # C of Eq. 5
    content: torch.Tensor         # M of Eq. 15, the official code's "side" embeddings
    attention: torch.Tensor       # (n, modalities) weights a of Eq. 11
    gates: list                   # per modality: preference G_m of Eq. 13
    parts: list                   # per modality: E_m

    @property
    def final(self):
        """F = C + M, Eq. 15."""
        return self.behaviour + self.content


def item_graph(features, k):
    """Frozen item-item graph S_m of one modality, Eq. 6-7.   (I, C) -> Graph (I, I), k entries a row, self included

    S_ij = s_ij / sqrt(g_i g_j) with cosine s and g_i the sum of row i's kept entries. Directed: never symmetrised,
    although both factors use row sums.
    """
    neighbours, similarity = knn(features, min(k, len(features)))
    degree = similarity.sum(1).clamp(min=1e-12).rsqrt()
    return Graph.from_knn(neighbours, similarity * degree[:, None] * degree[neighbours])


class Fuse(torch.autograd.Function):
    """Two-modality fuser in closed form: M = (E_2 + c D) / 3, D = E_1 - E_2, c = G_1 + a (1 - G_1 - G_2).

    The same numbers as Eq. 12-15 from a fifth of the traffic; saves its inputs, recomputes the rest backwards.
    e1, e2, g1, g2 (n, D), a (n, 1) weight of modality 1
    """

    @staticmethod
    def forward(ctx, e1, e2, g1, g2, a, share):
        ctx.save_for_backward(e1, e2, g1, g2, a)
        ctx.share = share
        return share * torch.addcmul(e2, g1 + a * (1 - g1 - g2), e1 - e2)

    @staticmethod
    def backward(ctx, dm):
        e1, e2, g1, g2, a = ctx.saved_tensors
        g, rest = dm * ctx.share, 1 - g1 - g2
        d = g * (g1 + a * rest)                                    # dD
        c = g * (e1 - e2)                                          # dc
        return d, g - d, (1 - a) * c, -a * c, (c * rest).sum(1, keepdim=True), None


class MGCN(nn.Module):
    """Users and items embedded by behaviour and content; rank by the dot product.

    features  {modality: (I, d_m)}; edges (E, 2) TRAINING pairs (user, item), from which every graph is built
    purifier  False: raw projected content enters the graphs (ablation)      item_view  False: no item-item graphs
    fuser     "baf" (the paper), "mean", "concat" or "shared": ablations     fusion     "code" or "paper", Eq. 15
    """

    def __init__(self, users, items, edges, features, dim=64, ui_layers=2, ii_layers=1, k=10, purifier=True, item_view=True,
                 fuser="baf", fusion="code", train_features=True):
        super().__init__()
        self.users, self.items, self.ui_layers, self.ii_layers = users, items, ui_layers, ii_layers
        self.purifier, self.fuser, self.fusion = purifier, fuser, fusion
        self.modalities = list(features)
        self.user, self.item = nn.Embedding(users, dim), nn.Embedding(items, dim)
        nn.init.xavier_uniform_(self.user.weight)
        nn.init.xavier_uniform_(self.item.weight)
        # Paper: features are given. Official code: trainable tables that start from them; followed, with a switch.
        self.features = nn.ParameterDict({m: nn.Parameter(x.clone(), requires_grad=train_features) for m, x in features.items()})
        self.project = nn.ModuleDict({m: nn.Linear(x.shape[1], dim) for m, x in features.items()})
        self.gate = nn.ModuleDict({m: nn.Linear(dim, dim) for m in features})                          # Eq. 1
        self.prefer = nn.ModuleDict({m: nn.Linear(dim, dim) for m in features})                        # Eq. 13
        self.query = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1, bias=False))      # Eq. 11
        if fuser == "concat":
            self.mix = nn.Linear(dim * len(features), dim)
        self.ui = Graph.bipartite(edges[:, 0], edges[:, 1], users, items)
        self.ii = {m: item_graph(x, k) for m, x in features.items()} if item_view else {}

    def _apply(self, fn, recurse=True):
        """`model.to(device)` takes the graphs along."""
        super()._apply(fn, recurse)
        device = self.user.weight.device
        self.ui, self.ii = self.ui.to(device), {m: g.to(device) for m, g in self.ii.items()}
        return self

    def purify(self, m):
        """Behaviour-guided purifier, Eq. 1-2: Z_m = E_i * sigmoid(W_2 (W_1 x + b_1) + b_2).   -> (I, D)

        Paper: "content is purified by behaviour". Algebraically the ID embedding is gated by content; raw content never
        enters the sum.
        """
        content = self.project[m](self.features[m])
        return self.item.weight * torch.sigmoid(self.gate[m](content)) if self.purifier else content

    def user_item_view(self):
        """Behaviour view C: mean of layers 0..L of propagated IDs, Eq. 3-5.   -> (N, D)"""
        h = torch.cat([self.user.weight, self.item.weight])
        return mix_hops(self.ui, h, [1 / (self.ui_layers + 1)] * (self.ui_layers + 1))

    def item_item_view(self, m):
        """Content view of items: S_m^L Z_m, Eq. 8-9.   -> (I, D)"""
        z = self.purify(m)
        for _ in range(self.ii_layers if m in self.ii else 0):
            z = propagate(self.ii[m], z)
        return z

    def fuse(self, behaviour, parts):
        """Behaviour-aware fuser, Eq. 11-15, row by row.   behaviour (n, D), parts [(n, D)] -> Views

        With one modality the official authors' answer applies: M = G * E.
        """
        logits = torch.cat([self.query(e) for e in parts], dim=1)                                       # Eq. 11
        attention = logits.softmax(1)                                                                   # (n, modalities)
        gates = [torch.sigmoid(self.prefer[m](behaviour)) for m in self.modalities]                     # Eq. 13
        shared = sum(attention[:, j : j + 1] * e for j, e in enumerate(parts))                          # Eq. 12
        if self.fuser == "mean":
            content = sum(parts) / len(parts)
        elif self.fuser == "concat":
            content = self.mix(torch.cat(parts, dim=1))
        elif self.fuser == "shared":
            content = shared
        elif len(parts) == 1:
            content = gates[0] * parts[0]
        else:
            specific = sum(g * (e - shared) for g, e in zip(gates, parts, strict=True))                 # Eq. 14
            # Paper: E_s + (specific parts) / |M|. Official code: the whole sum / (|M| + 1); followed.
            content = shared + specific / len(parts) if self.fusion == "paper" else (shared + specific) / (len(parts) + 1)
        return Views(behaviour, content, attention, gates, parts)

    def forward(self):
        """Everything for every node: the page to read.   -> Views of (N, D)"""
        behaviour = self.user_item_view()
        parts = []
        for m in self.modalities:
            items = self.item_item_view(m)
            parts.append(torch.cat([propagate(self.ui.R, items), items]))                               # Eq. 10: [Y_m; Z_m]
        return self.fuse(behaviour, parts)

    # -- the same numbers for the rows of a batch: the loss needs no others

    def rows(self, users, items):
        """Views of chosen users, then chosen items.   (b,), (c,) int64 -> Views of (b + c, D)

        The last user-item hop, the users' inheritance and the fuser run on these rows only; modalities share one walk.
        `forward()` is its oracle in the tests.
        """
        nodes, width = torch.cat([users, items + self.users]), self.item.weight.shape[1]
        h, share = torch.cat([self.user.weight, self.item.weight]), 1 / (self.ui_layers + 1)
        behaviour = h[nodes] * share
        if self.ui_layers:
            inner = mix_hops(self.ui, h, [share] * self.ui_layers)                                      # all but the last hop
            behaviour = behaviour + propagate(self.ui.rows(nodes), inner)
        content = torch.cat([self.item_item_view(m) for m in self.modalities], dim=1)                   # (I, modalities D)
        both = torch.cat([propagate(self.ui.R.rows(users), content), content[items]])
        parts = both.split(width, dim=1)
        if self.fuser != "baf" or len(parts) != 2:
            return self.fuse(behaviour, parts)
        logits = self.query(both.unflatten(1, (2, width)))[..., 0]                                      # (n, 2)
        attention = logits.softmax(1)
        gates = [torch.sigmoid(self.prefer[m](behaviour)) for m in self.modalities]
        if self.fusion == "paper":
            return self.fuse(behaviour, parts)
        return Views(behaviour, Fuse.apply(*parts, *gates, attention[:, :1], 1 / 3), attention, gates, parts)


# -- losses ---------------------------------------------------------------------------------------------------------------------


def bpr(users, positives, negatives):
    """Bayesian personalised ranking, Eq. 19's first term: -mean log sigmoid(u.p - u.n).   (B, D) each -> scalar

    Paper: a sum over triples. Official code: the mean; followed.
    """
    return -F.logsigmoid((users * (positives - negatives)).sum(1)).mean()


def regulariser(*embeddings):
    """Half the squared norm of the batch's final embeddings / 2048.   Paper: the norm of all parameters"""
    return sum(e.square().sum() for e in embeddings) / (2 * REG_BATCH)


def info_nce(anchors, candidates, tau, positive=None):
    """Contrastive loss, Eq. 16: row r of `anchors` should be nearest to candidate positive[r] (default r).   -> scalar

    anchors (B, D), candidates (B', D); cosine / tau, one direction, every candidate of the batch a negative, duplicates kept.
    Paper: the denominator runs over all users or items. Official code: over the batch; followed.
    """
    anchors, candidates = F.normalize(anchors, dim=1), F.normalize(candidates, dim=1)
    positive = torch.arange(len(anchors), device=anchors.device) if positive is None else positive
    return F.cross_entropy(anchors @ candidates.T / tau, positive)


# -- official weights -------------------------------------------------------------------------------------------------------------


def official_names(modalities=("image", "text")):
    """{our key: official key}; the official code knows two modalities, v = image and t = text."""
    names = {"user.weight": "user_embedding.weight", "item.weight": "item_id_embedding.weight"}
    for m, letter in zip(modalities, "vt", strict=True):
        official = ("image", "text")["vt".index(letter)]
        names[f"features.{m}"] = f"{official}_embedding.weight"
        for ours, theirs in (("project", f"{official}_trs"), ("gate", f"gate_{letter}.0"), ("prefer", f"gate_{official}_prefer.0")):
            names |= {f"{ours}.{m}.{p}": f"{theirs}.{p}" for p in ("weight", "bias")}
    return names | {f"query.{k}": f"query_common.{k}" for k in ("0.weight", "0.bias", "2.weight")}


def from_official(state_dict, edges, initial_features=None, **switches):
    """MGCN with the weights of an official run.   edges (E, 2) its training pairs

    initial_features  {"image": (I, d), "text": (I, d)} before training: the item graphs come from these; None: from the
                      trained tables, as good as can be had from the file alone
    raises ValueError listing missing, unknown and misshapen keys
    """
    names = official_names()
    missing, unknown = sorted(set(names.values()) - state_dict.keys()), sorted(state_dict.keys() - set(names.values()))
    if missing or unknown:
        raise ValueError(f"not an official MGCN state dict: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")
    tables = {m: state_dict[f"{m}_embedding.weight"].float() for m in ("image", "text")}
    users, dim = state_dict["user_embedding.weight"].shape
    model = MGCN(users, len(tables["image"]), edges, initial_features or tables, dim, **switches)
    wrong = [f"{names[k]} {tuple(state_dict[names[k]].shape)}, expected {tuple(p.shape)}" for k, p in model.state_dict().items()
             if state_dict[names[k]].shape != p.shape]
    if wrong:
        raise ValueError("misshapen keys: " + "; ".join(wrong))
    model.load_state_dict({ours: state_dict[theirs].float() for ours, theirs in names.items()})
    return model
