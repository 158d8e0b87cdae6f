"""Training the recommenders of this folder: one step of the paper, the all-ranking evaluation, pictures."""
from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F

from data import parallel, pictures
from data.interactions import load
from data.metrics import ranking, ranking_chance
from gcn.baselines import VBPR, ItemKNN, LightGCN, Popularity
from gcn.mgcn import MGCN, CountedNCE, bpr, info_nce, regulariser
from kernels.graph import Graph
from kernels.ranking import rank_of_targets, top_k

NETWORKS = {"mgcn": MGCN, "lightgcn": LightGCN, "vbpr": VBPR, "popularity": Popularity, "itemknn": ItemKNN}


@dataclass
class Config:
    """MGCN and its rivals on a multimodal shop (defaults: the built-in data; --paper=baby for published settings)."""

    model: str = "mgcn"          # mgcn, lightgcn, vbpr, popularity, itemknn
    data: str = "builtin"        # builtin, or the name of the files in --root, e.g. tiktok, baby
    root: str = ""               # folder of NAME.inter and its *_feat.npy
    modalities: str = ""         # which content, e.g. image,text; empty: all there is; "none" of them: use lightgcn
    seed: int = 0                # random seed
    steps: int = 600             # optimiser steps
    batch: int = 1024            # pairs per step, over all processes
    eval_every: int = 60         # steps between evaluations
    patience: int = 0            # evaluations without improvement before stopping; 0: never
    dim: int = 64                # embedding width D
    lr: float = 4e-3             # Adam step size
    decay: float = 0.96          # the step size is lr * decay^(epoch / 50)
    reg: float = 1e-4            # weight of the regulariser, lambda_E
    cl: float = 0.1              # weight of the contrastive loss, lambda_C; 0: without (ablation)
    tau: float = 0.2             # contrastive temperature
    ui_layers: int = 2           # hops of the user-item view, L_ui
    ii_layers: int = 1           # hops of the item-item views, L_ii
    k: int = 10                  # neighbours per item and modality, self included
    purifier: bool = True        # behaviour-guided purifier; false: raw content (ablation)
    item_view: bool = True       # item-item graphs; false: none (ablation)
    fuser: str = "baf"           # baf (behaviour-aware), mean, concat, shared
    fusion: str = "code"         # Eq. 15: code (whole sum / 3) or paper (specific parts / 2)
    train_features: bool = True  # feature tables are trained, as in the official code
    exact: bool = False          # train on the naive forward over all nodes: same numbers, slower


PAPER = {
    "baby": {"data": "baby", "batch": 2048, "lr": 1e-3, "cl": 0.01, "steps": 58 * 200, "eval_every": 58, "patience": 20},
    "sports": {"data": "sports", "batch": 2048, "lr": 1e-3, "cl": 0.01, "steps": 107 * 200, "eval_every": 107, "patience": 20},
    "clothing": {"data": "clothing", "batch": 2048, "lr": 1e-3, "cl": 0.01, "steps": 97 * 200, "eval_every": 97, "patience": 20},
}


def paper(name):
    """Published settings as Config overrides; the data sets themselves are downloads (--root)."""
    if name not in PAPER:
        raise ValueError(f"--paper={name} is unknown; there are: {', '.join(PAPER)}")
    return PAPER[name]


class Task:
    headline, better = "Recall@20", "higher"
    table = ["Recall@10", "Recall@20", "NDCG@10", "NDCG@20"]
    ablations = {
        "full": {}, "w/o purifier": {"purifier": False}, "w/o item view": {"item_view": False}, "w/o contrastive": {"cl": 0.0},
        "fuser: mean": {"fuser": "mean"}, "fuser: concat": {"fuser": "concat"}, "fuser: shared only": {"fuser": "shared"},
        "fusion as printed": {"fusion": "paper"}, "frozen features": {"train_features": False},
        "LightGCN": {"model": "lightgcn"}, "VBPR": {"model": "vbpr"}, "item kNN": {"model": "itemknn", "steps": 0},
        "popularity": {"model": "popularity", "steps": 0},
    }

    def __init__(self, cfg, device, data=None):
        if cfg.model not in NETWORKS:
            raise ValueError(f"--model={cfg.model} is unknown; there are: {', '.join(NETWORKS)}")
        wanted = tuple(m.strip() for m in cfg.modalities.split(",") if m.strip()) or None
        self.cfg, self.device = cfg, device
        self.data = data or load(cfg.data, cfg.root, modalities=wanted)
        if cfg.model in ("mgcn", "vbpr") and not self.data.features:
            raise ValueError(f"{self.data.source} has no content features; MGCN and VBPR need some, lightgcn does not")
        edges = self.data.train
        sizes = (self.data.users, self.data.items, edges)
        if cfg.model == "mgcn":
            switches = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name in (
                "dim", "ui_layers", "ii_layers", "k", "purifier", "item_view", "fuser", "fusion", "train_features")}
            self.model = MGCN(*sizes, self.data.features, **switches)
        else:
            self.model = NETWORKS[cfg.model](*sizes, self.data.features, dim=cfg.dim)
        self.model.to(device)
        self.seen = Graph.from_edges(edges[:, 0], edges[:, 1], (self.data.users, self.data.items)).to(device)
        self.saved = {"model": self.model}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if trained:
            self.sampler = self.data.sampler(device)
            self.optimiser = torch.optim.Adam(trained, lr=cfg.lr, fused=device.type in ("cpu", "cuda"))
            self.saved["optimiser"] = self.optimiser
        elif cfg.steps:
            raise ValueError(f"{cfg.model} has nothing to train: pass --steps=0")
        self.chance = ranking_chance(self.data.test[:, 0], self.data.items, self.seen.ptr.diff().cpu())
        self.next = f"python -m gcn.recommend --user {int(self.data.test[0, 0])} --top 10 --why"

    def batches(self, seed, start, stop):
        """Global batch t: users, positives, one uniform negative each, (B,) on the device."""
        for t in range(start, stop):
            yield self.sampler.batch(seed, t, self.cfg.batch)

    def update(self, batch, step):
        """One step of Eq. 19: BPR + reg + cl * contrastive, on the rows of the batch alone."""
        cfg = self.cfg
        epoch = step * cfg.batch // len(self.data.train)
        for group in self.optimiser.param_groups:
            group["lr"] = cfg.lr * cfg.decay ** (epoch / 50)
        losses = self.losses(*batch)
        parallel.descend(self.optimiser, losses["bpr"] + cfg.reg * losses["reg"] + cfg.cl * losses["cl"])
        return {name: loss.detach() for name, loss in losses.items()}

    def losses(self, users, positives, negatives):
        """The three terms, on each node of the batch once.   `exact` runs the naive twin: all nodes, rows repeated."""
        cfg, zero = self.cfg, torch.zeros((), device=self.device)
        if cfg.exact and cfg.model == "mgcn":
            return self.losses_exactly(users, positives, negatives)
        user_ids, u = torch.unique(users, return_inverse=True)
        item_ids, i = torch.unique(torch.cat([positives, negatives]), return_inverse=True)
        p, n = i.split(len(users))
        views = self.model.rows(user_ids, item_ids)
        final = views.final if cfg.model == "mgcn" else views
        who, what = final[: len(user_ids)], final[len(user_ids) :]
        triple = [F.embedding(parallel.shard(ids), table) for ids, table in ((u, who), (p, what), (n, what))]
        cl = zero
        if cfg.model == "mgcn" and cfg.cl:
            cl = self.contrast(views, u, 0, len(user_ids)) + self.contrast(views, p, len(user_ids), len(item_ids))
        return {"bpr": bpr(*triple), "reg": regulariser(*triple) * parallel.world(), "cl": cl}

    def contrast(self, views, ids, start, count):
        """Eq. 16 for users or positives: anchors are this process's share, candidates everybody's."""
        everybody, mine = (torch.bincount(x, minlength=count) for x in (ids, parallel.shard(ids)))
        there = everybody.nonzero()[:, 0]
        content, behaviour = (F.normalize(F.embedding(there + start, x), dim=1) for x in (views.content, views.behaviour))
        return CountedNCE.apply(content, behaviour, mine[there].float(), everybody[there].float(), self.cfg.tau)

    def losses_exactly(self, users, positives, negatives):
        """The same numbers as the page reads: forward over all nodes, every row of the batch written out."""
        whole, cfg = self.model(), self.cfg
        nodes = [users, positives + self.data.users, negatives + self.data.users]
        triple = [whole.final[parallel.shard(x)] for x in nodes]
        cl = torch.zeros((), device=self.device)
        if cfg.cl:
            mine = parallel.shard(torch.arange(len(users), device=self.device))
            cl = sum(info_nce(whole.content[x][mine], whole.behaviour[x], cfg.tau, mine) for x in nodes[:2])
        return {"bpr": bpr(*triple), "reg": regulariser(*triple) * parallel.world(), "cl": cl}

    @torch.no_grad()
    def embeddings(self):
        """Final users (U, D) and items (I, D)."""
        if self.cfg.model != "mgcn":
            return self.model()
        final = self.model().final
        return final[: self.data.users], final[self.data.users :]

    def ranks(self, split):
        """0-based rank of every target of a split among the items its user has not clicked in training."""
        pairs = getattr(self.data, split).to(self.device)
        return rank_of_targets(*self.embeddings(), pairs[:, 0], pairs[:, 1], self.seen), pairs

    def evaluate(self, split):
        ranks, pairs = self.ranks(split)
        return ranking(ranks, pairs[:, 0])

    def rivals(self):
        """Popularity at once, LightGCN trained on the same data for as many steps, both tested the same way."""
        if self.cfg.model != "mgcn":
            return {}
        cfg = Config(**{f.name: getattr(self.cfg, f.name) for f in fields(self.cfg)})
        cfg.model, cfg.steps = "popularity", 0
        result = {"popularity": Task(cfg, self.device, self.data).evaluate("test")}
        cfg.model, cfg.steps = "lightgcn", self.cfg.steps
        rival, best = Task(cfg, self.device, self.data), (-1.0, {})
        for t, batch in enumerate(rival.batches(cfg.seed, 0, cfg.steps), 1):
            rival.update(batch, t - 1)
            if t % cfg.eval_every == 0 or t == cfg.steps:
                best = max(best, (rival.evaluate("valid")["Recall@20"], rival.evaluate("test")), key=lambda pair: pair[0])
        return result | {"LightGCN": best[1]}

    def sample(self, folder):
        """recall.png: who is served well; attention.png: what the fuser listens to; rankings.txt: five users' lists."""
        ranks, pairs = self.ranks("test")
        hit, clicks = (ranks < 20).double(), self.seen.T.ptr.diff()[pairs[:, 1]]
        edges = torch.quantile(clicks.double(), torch.linspace(0, 1, 6, dtype=torch.float64, device=clicks.device)).long().unique()
        bins = {}
        for a, b in zip(edges[:-1], edges[1:], strict=True):
            inside = (clicks >= a) & ((clicks < b) | (b == edges[-1]))
            bins[f"{int(a)}-{int(b) if b == edges[-1] else int(b) - 1} clicks"] = float(hit[inside].mean()) if inside.any() else 0.0
        pictures.bars(folder / "recall.png", bins, "test hit rate at 20 by popularity of the item in training")
        if self.cfg.model == "mgcn" and len(self.model.modalities) > 1:
            with torch.no_grad():
                attention = self.model().attention[:, 0]
            counts = torch.histc(attention, bins=20, min=0, max=1)
            lines = {"nodes": (((torch.arange(20) + 0.5) / 20).tolist(), (counts / counts.sum()).tolist())}
            pictures.curves(folder / "attention.png", [(f"attention to '{self.model.modalities[0]}', share of users and items", lines, {})])
        users = pairs[:, 0].unique()[:5]
        ids, scores = top_k(*self.embeddings(), users, min(10, self.data.items), self.seen)
        names = self.data.titles or [f"item {i}" for i in range(self.data.items)]
        with open(folder / "rankings.txt", "w") as file:
            for u, row, values in zip(users.tolist(), ids.tolist(), scores.tolist(), strict=True):
                wanted = set(pairs[pairs[:, 0] == u, 1].tolist())
                file.write(f"user {u}\n" + "".join(f"  {value:7.3f}  {'* ' if i in wanted else '  '}{names[i]}\n"
                                                   for i, value in zip(row, values, strict=True) if i >= 0))
            file.write("* the user did click this in the test split\n")
