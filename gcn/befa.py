"""BeFA: A General Behavior-driven Feature Adapter for Multimedia Recommendation (Fan, Yu, Tan, Bao, Lu; AAAI 2025).

A pre-trained encoder describes the whole picture, and users react to a part of it. Two failures have names: a feature
drifts to what nobody buys for (information drift), or misses what people do buy for (information omission). The adapter
sits between a recommender's projection of content and the rest, and lets behaviour decide what of it goes on:

    decouple   P_m = X_m W_m + b_m                            the host's own projection
    rebuild    g   = sigmoid(MLP(P_m))                        a mask over the D dimensions of behaviour
    filter     Z_m = E_i * g                                  what the host receives in place of its own content

`Adapter` is the released form; --adapter=compact is the form printed in the paper (both: Sec. "adapter"; the PDF was not
at hand, its equation numbers and the compact form's last line are UNVERIFIED). Below it the hosts that can wear it.
What the adapter changes in the features is measured in attribution.py.
"""
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from data.safe import read_arrays
from data.weights import load_checked, read_state
from gcn.mgcn import LETTERS, MGCN, linear, mean_of_hops, official_tables, renamed, size, user_item_graph

ADAPTERS = ("befa", "compact", "linear", "none", "host")
JOINS = ("product", "sum", "content")


class Adapter(nn.Module):
    """Content and behaviour of an item -> the content vector a host goes on with.   (.., D), (.., D) -> (.., D)

    cfg   adapter   befa: mask from a deep network.   linear: from one layer, MGCN's purifier.   compact: see `forward`
          width     t: hidden layers have t D units;   depth: linear layers in all (released: 3; 1 is `linear`)
          dropout, tanh, join   product: E * g (released).   sum: E + g.   content: P * g, the mask on content itself
    Neither form sees E inside the network: behaviour enters by the product, and through its gradient.
    """

    def __init__(self, cfg):
        super().__init__()
        D, hidden = cfg.dim, cfg.width * cfg.dim
        depth = 1 if cfg.adapter in ("linear", "compact") else cfg.depth
        layers = []
        for n in range(depth - 1):
            # Official code: tanh comes after ReLU and dropout, so it only squeezes [0, inf) into [0, 1), and only once.
            squeeze = [nn.Tanh()] if cfg.tanh and n == 0 else []
            layers += [nn.Linear(hidden if n else D, hidden), nn.ReLU(), nn.Dropout(cfg.dropout), *squeeze]
        self.mask = nn.Sequential(*layers, nn.Linear(hidden if layers else D, D), nn.Sigmoid())
        self.join = "product" if cfg.adapter == "compact" else cfg.join
        if cfg.adapter == "compact":
            self.rebuild = nn.Sequential(nn.Linear(D, D), nn.Tanh())

    def forward(self, content, behaviour):
        """g = mask(P), Z = E * g.   Paper: x'' = e * sigmoid(W2 x' + b2), then "rebuilt": Z = tanh(W3 x'' + b3), UNVERIFIED."""
        g = self.mask(content)
        z = behaviour * g if self.join == "product" else behaviour + g if self.join == "sum" else content * g
        return self.rebuild(z) if hasattr(self, "rebuild") else z


def content_vector(model, m, features, behaviour):
    """What a host goes on with for modality m: its own step, or the adapter's.   (.., d_m), (.., D) -> (.., D)

    The same function serves training (all items) and attribution (one place of a picture, one word of a title).
    """
    projected = model.project[m](features)
    if m not in model.adapters:
        return own_step(model, m, projected, behaviour)
    z, weight = model.adapters[m](projected, behaviour), model.cfg.adapter_weight
    return z if weight == 1 else torch.lerp(own_step(model, m, projected, behaviour), z, weight)


def own_step(model, m, projected, behaviour):
    """The host without BeFA: MGCN's purifier, the released host's E * P, or the projection as it is.   -> (.., D)"""
    if hasattr(model, "gate"):
        return behaviour * torch.sigmoid(model.gate[m](projected))
    # Official code: taking the network out of the released host leaves the product with the bare projection.
    return behaviour * projected if model.cfg.host == "lattice" and model.cfg.adapter != "none" else projected


def adapters(cfg, features):
    """One adapter for each adapted modality; none where the host keeps its own step.   -> ModuleDict

    raises ValueError for a host without content, or a modality that is not there
    """
    if not features:
        raise ValueError("befa adapts content features, and --modalities=none leaves none; name at least one, or train "
                         "the host alone with python train.py lightgcn")
    for m in cfg.adapt:
        if m not in features:
            raise ValueError(f"--adapt={m}: there is no such modality; there are {', '.join(features)}")
    chosen = () if cfg.adapter in ("host", "none") else cfg.adapt or tuple(features)
    return nn.ModuleDict({m: Adapter(cfg) for m in chosen})


# ---- hosts -------------------------------------------------------------------------------------------------------------


class GraphHost(MGCN):
    """MGCN (host=mgcn), or the released host (host=lattice), with adapters in the purifier's place.

    Official code: called LATTICE, but it learns no item graph: it is MGCN's skeleton with a mean for the fuser and without
    the contrastive loss. Followed. The LATTICE of the literature (Zhang et al., MM 2021) is another model and not here.
    """

    def __init__(self, cfg, users, items, train, features):
        lattice = {"fuser": "mean", "cl": False, "purify": False} if cfg.host == "lattice" else {}
        super().__init__(dataclasses.replace(cfg, **{"purify": cfg.adapter != "none"} | lattice), users, items, train, features)
        self.adapters = adapters(cfg, features)               # drawn last: both halves of a pair start from one state
        if cfg.adapter_weight == 1 and len(self.adapters) == len(features) and hasattr(self, "gate"):
            del self.gate

    def purify(self, m):
        return content_vector(self, m, self.features[m], self.item.weight)


class PlainHost(nn.Module):
    """Hosts without item graphs.   host=vbpr: score = gamma_u . gamma_i + sum_m theta_um . Z_im, content side by side.
    host=lightgcn: items start from E_i + mean_m Z_im, so content walks the click graph together with behaviour.

    VBPR's behaviour vector is gamma_i. Unlike gcn.baselines.VBPR each modality has a projection and a user factor of its
    own, with and without adapters, so that the two halves of a pair differ in the adapter alone.
    """

    def __init__(self, cfg, users, items, train, features):
        super().__init__()
        self.cfg, self.users, self.items, self.modalities = cfg, users, items, tuple(features)
        self.train_edges, self.ui = train, user_item_graph(train, users, items)
        self.user = nn.Embedding(users, cfg.dim * (1 + len(features) if cfg.host == "vbpr" else 1))
        self.item = nn.Embedding(items, cfg.dim)
        for table in (self.user, self.item):
            nn.init.xavier_uniform_(table.weight)
        self.project = nn.ModuleDict({m: nn.Linear(x.shape[1], cfg.dim) for m, x in features.items()})
        self.features = nn.ParameterDict({m: nn.Parameter(x.clone(), cfg.train_features) for m, x in features.items()})
        self.adapters = adapters(cfg, features)

    def purify(self, m):
        return content_vector(self, m, self.features[m], self.item.weight)

    def forward(self):
        content = [self.purify(m) for m in self.modalities]                     # M x (I, D)
        if self.cfg.host == "vbpr":
            return self.user.weight, torch.cat([self.item.weight, *content], 1)
        nodes = torch.cat([self.user.weight, self.item.weight + sum(content) / len(content)])
        return mean_of_hops(self.ui, nodes, self.cfg.ui_layers).split([self.users, self.items])


HOSTS = {"mgcn": GraphHost, "lattice": GraphHost, "vbpr": PlainHost, "lightgcn": PlainHost}



# ---- the authors' weights ------------------------------------------------------------------------------------------------

LAYERS = (0, 4, 7)                                           # Linear layers of the released Sequential, and of `mask`
UNUSED = {"query_common.0.weight", "query_common.0.bias", "query_common.2.weight"}     # stored and never called


def from_official(state):
    """State dict of the released BeFA on LATTICE -> state dict of GraphHost(host=lattice, width=t), image and text.

    t is the first layer's rows / D. Graphs are rebuilt from the data.
    raises ValueError that lists missing, unknown and misshapen entries by name
    """
    names, D = official_tables(state)
    for m, letter in LETTERS.items():
        hidden = size(state, f"BeFA_{letter}.0.weight")[0]
        for n, shape in zip(LAYERS, ((hidden, D), (hidden, hidden), (D, hidden)), strict=True):
            names |= linear(f"BeFA_{letter}.{n}", f"adapters.{m}.mask.{n}", *shape)
    return renamed(names, {name: x for name, x in state.items() if name not in UNUSED}, "the released BeFA state dict")


class Exported(nn.Module):
    """What the released code exports for attribution: the ID table, and projection and gate of both modalities.

    No users and no graph, so nothing can be recommended, but `content_vector` and attribution.py work on it.
    folder  gate_v_*.pt, gate_t_*.pt, image_trs_*.pt, text_trs_*.pt (state dicts of single modules) and
            item_id_embedding_*.npy; a gate of one layer is MGCN's, one of three is BeFA's
    raises  FileNotFoundError, ValueError
    """

    def __init__(self, folder):
        super().__init__()
        def one(pattern):
            found = sorted(Path(folder).glob(pattern))
            if len(found) != 1:
                raise FileNotFoundError(f"{folder} holds {len(found)} files {pattern}; the released export has one of each of "
                                        "gate_v_*.pt, gate_t_*.pt, image_trs_*.pt, text_trs_*.pt, item_id_embedding_*.npy")
            return found[0]

        table = torch.from_numpy(read_arrays(one("item_id_embedding_*.npy"))).float()
        D, self.item, self.modalities = table.shape[1], nn.Embedding.from_pretrained(table), tuple(LETTERS)
        self.project, self.adapters = nn.ModuleDict(), nn.ModuleDict()
        for m, letter in LETTERS.items():
            projection, gate = one(f"{m}_trs_*.pt"), one(f"gate_{letter}_*.pt")
            state, mask = read_state(projection)[0], read_state(gate)[0]
            self.project[m] = load_checked(nn.Linear(size(state, "weight")[1], D), state, projection)
            self.cfg = SimpleNamespace(dim=D, adapter="befa" if "7.weight" in mask else "linear", depth=3, dropout=0.0, tanh=True,
                                       width=size(mask, "0.weight")[0] // D, join="product", adapter_weight=1.0, host="lattice")
            self.adapters[m] = Adapter(self.cfg)
            load_checked(self.adapters[m].mask, mask, gate)
        self.requires_grad_(False).eval()
