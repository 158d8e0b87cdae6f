"""Training and judging MGCN and its rivals: one configuration, one protocol, one ranking code.

    python train.py mvgcn                                                         # the built-in shop
    python train.py mvgcn --paper=tiktok --root=FOLDER                            # a real data set
    python train.py mvgcn --ablate --seeds=3                                      # every switch and every rival
"""
import dataclasses
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from data import parallel
from data.batches import generator, train_quietly
from data.interactions import load
from data.metrics import ranking
from data.options import check_words
from data.pictures import curves, histogram
from gcn import baselines, fast, mgcn
from kernels.ranking import rank_of_targets, top_k

MODELS = {"mgcn": mgcn.MGCN, "lightgcn": baselines.LightGCN, "vbpr": baselines.VBPR,
          **dict.fromkeys(baselines.COUNTED, baselines.Counted)}
WORDS = {"fuser": ("baf", "mean", "concat", "shared_only"), "fusion": ("code", "paper"), "exact": ("fast", "full")}


@dataclass
class Config:
    """MGCN on a multimodal shop (defaults: the built-in data; the paper's values by --paper=baby, sports, clothing)."""

    model: str = "mgcn"              # mgcn, lightgcn, vbpr, popularity or itemknn
    data: str = "builtin"            # builtin, or the name of the files in --root (baby for baby.inter)
    root: str = ""                   # folder of the real data
    data_seed: int = 0               # seed of the built-in shop, and of the split of a table without x_label
    repair: bool = False             # keep the first of repeated pairs, give zero or NaN feature rows the mean row
    modalities: tuple = ()           # which *_feat.npy to use, such as image,text; empty: all; none: no content
    seed: int = 0                    # random seed
    steps: int = 400                 # optimiser steps
    eval_every: int = 25             # steps between evaluations
    patience: int = 0                # evaluations without improvement before stopping (the paper: 20); 0: never
    batch: int = 512                 # clicks in a step, B (the paper: 2048)
    dim: int = 64                    # embedding width, d
    ui_layers: int = 2               # hops in the user-item view, L_ui
    item_layers: int = 1             # hops in the item-item view, L_ii
    k: int = 10                      # neighbours kept per item and modality, the item itself included
    lr: float = 5e-3                 # Adam step size (the paper: 1e-3); times 0.96^(epoch / 50)
    reg: float = 1e-2                # weight of the embeddings' squared norm, lambda_E (the paper: 1e-4)
    cl_loss: float = 0.01            # weight of the contrastive loss, lambda_C
    tau: float = 0.2                 # contrastive temperature (the official code's live value)
    purify: bool = True              # behaviour-guided purifier; off: projected content walks
    item_view: bool = True           # item-item view; off: S_m is the identity
    fuser: str = "baf"               # baf (the paper), mean, concat, or shared_only
    fusion: str = "code"             # scales of Eq. 15 as in the official code, or as in the paper
    cl: bool = True                  # contrastive loss
    train_features: bool = True      # content features train on from their initial values
    exact: str = "fast"              # fast: only the batch's rows; full: the naive page. Same loss, same gradients

    def __post_init__(self):
        check_words(self, model=MODELS, **WORDS)
        if self.model in baselines.COUNTED:                  # nothing to train: one step of nothing, one evaluation
            self.steps = self.eval_every = 1


def paper(name):
    """Published sizes as overrides. baby, sports, clothing: the paper's Sec. 4; tiktok: ours, tuned on validation."""
    shared = {"batch": 2048, "lr": 1e-3, "reg": 1e-4, "cl_loss": 0.01, "patience": 20}
    clicks = {"baby": 118_551, "sports": 218_409, "clothing": 197_338, "tiktok": 59_541}
    if name not in clicks:
        raise ValueError(f"--paper={name} is unknown; there are {', '.join(clicks)}")
    epoch = round(clicks[name] / shared["batch"])            # evaluated once an epoch, at most 1,000 epochs
    settings = shared | {"data": name, "eval_every": epoch, "steps": 1000 * epoch}
    if name == "tiktok":                                     # the best of some fifteen on validation, see README.md
        return settings | {"modalities": ("image", "audio"), "cl_loss": 1e-3, "reg": 1e-3, "ui_layers": 4, "patience": 60}
    return settings | {"modalities": ("image", "text")}


class Catalogue:
    """A checkpoint's memory of whose features it was trained on: one random projection of every row, never a model's input.

    Features of the same shape from another catalogue, or in another order, would load without a word otherwise. Compared
    with a tolerance, because the same encoder rounds differently on another machine.
    """

    def __init__(self, features):
        self.sketch = {m: x @ torch.randn(x.shape[1], generator=generator(0, x.shape[1])) for m, x in features.items()}

    def state_dict(self):
        return self.sketch

    def load_state_dict(self, state):
        for m, mine in self.sketch.items():
            theirs = state[m]
            if theirs.shape == mine.shape and (wrong := ((theirs - mine).abs() > 1e-2 * mine.std()).nonzero()).numel():
                raise ValueError(f"the {m} features are those of another catalogue: {len(wrong)} of {len(mine)} items "
                                 f"differ from the ones it was trained on, item {int(wrong[0])} first")


class Task:
    """One recommender on one data set; see the contract in train.py."""

    headline, better = "Recall@20", "higher"
    table = ("Recall@20", "NDCG@20", "Recall@10", "NDCG@10")
    ablations = {
        "full": {}, "w/o purifier": {"purify": False}, "w/o item-item view": {"item_view": False},
        "mean fuser": {"fuser": "mean"}, "concat fuser": {"fuser": "concat"}, "shared part only": {"fuser": "shared_only"},
        "w/o contrastive": {"cl": False}, "fusion as printed": {"fusion": "paper"}, "frozen features": {"train_features": False},
        "LightGCN": {"model": "lightgcn"}, "VBPR": {"model": "vbpr"}, "item-kNN": {"model": "itemknn"},
        "popularity": {"model": "popularity"},
    }
    published = {"full": {"Recall@20 on Baby": 0.0964}, "LightGCN": {"Recall@20 on Baby": 0.0754},
                 "VBPR": {"Recall@20 on Baby": 0.0663}}     # Table 2 of the paper; its ablation numbers are UNVERIFIED

    def __init__(self, cfg, device, data=None):
        self.cfg, self.device = cfg, device
        self.data = data = data or self.read_data()          # given: rivals of a run share what it has read
        self.train = data.train.to(device)                   # (E, 2) the only clicks any graph, table or negative sees
        self.seen = mgcn.user_item_graph(self.train, data.users, data.items).R
        self.model = self.build({m: x.to(device) for m, x in data.features.items()}).to(device)
        self.saved = {"model": self.model}
        if cfg.model not in baselines.COUNTED:
            learnt = [p for p in self.model.parameters() if p.requires_grad]
            self.optimiser = torch.optim.Adam(learnt, lr=cfg.lr, fused=True)            # dense Adam in one pass over memory
            self.saved |= {"optimiser": self.optimiser, "catalogue": Catalogue(data.features)}
        self.chance = data.chance()
        self.next = f"python -m gcn.recommend --user {int(data.test[len(data.test) // 2, 0])} --top 10 --why"

    def read_data(self):
        cfg = self.cfg
        return load(cfg.data, cfg.root, cfg.data_seed, cfg.modalities, cfg.repair)

    def build(self, features):
        return MODELS[self.cfg.model](self.cfg, self.data.users, self.data.items, self.train, features)

    def batches(self, seed, start, stop):
        """Users, positives, negatives of global batch t, each (B,); every rank draws the same."""
        sampler = self.data.sampler(self.device) if self.cfg.model not in baselines.COUNTED else None
        for t in range(start, stop):
            yield sampler.batch(seed, t, self.cfg.batch) if sampler else ()

    def update(self, batch, step):
        """One step of Adam. A rank's anchors are its shard; contrastive candidates come from the whole batch."""
        cfg = self.cfg
        if cfg.model in baselines.COUNTED:
            return {"loss": torch.zeros(())}
        epoch = step * cfg.batch // len(self.data.train)
        self.optimiser.param_groups[0]["lr"] = cfg.lr * 0.96 ** (epoch / 50)
        self.model.train()
        mine = parallel.shard(range(cfg.batch))
        page = baselines if not isinstance(self.model, mgcn.MGCN) else fast if cfg.exact == "fast" else mgcn
        # Under --amp the tables stay float32: their rows are what is ranked, and gathering them is not the cost.
        with torch.autocast(self.device.type, enabled=False):
            loss = page.loss(self.model, batch, slice(mine.start, mine.stop))
            parallel.descend(self.optimiser, loss)
        return {"loss": loss.detach()}

    @torch.no_grad()
    def evaluate(self, split):
        """Full ranking over all items, training items left out, validation items not (the paper's protocol)."""
        self.model.eval()                                    # dropout of an adapter (gcn/befa.py)
        user, target = getattr(self.data, split).to(self.device).T
        ranks = rank_of_targets(*self.model(), user, target, self.seen)
        return ranking(ranks.cpu(), user.cpu())

    # -- what a person looks at ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, folder):
        """recall.png (for whom and for what it works), views.png (attention, agreement of the views), rankings.txt."""
        popular = baselines.popularity(self.train, self.data.users, self.data.items)
        tables = {self.cfg.model: self.model(), "popularity": popular}
        curves(folder / "recall.png", [
            (f"Recall@20 by {what}", {name: self.recall_by(column, *t) for name, t in tables.items()}, {})
            for column, what in ((0, "the user's activity"), (1, "the item's popularity"))],
            xlabel="groups of equal size, fewest training clicks first")
        if self.cfg.model == "mgcn" and self.model.modalities:
            self.draw_views(folder / "views.png")
        some = self.data.test[:, 0].unique()[:5]
        lists = self.data.lists(some, *top_k(*tables[self.cfg.model], some.to(self.device), 10, self.seen))
        (folder / "rankings.txt").write_text("\n".join([*self.planted(), *lists]) + "\n")

    def recall_by(self, column, users, items, groups=5):
        """Recall@20 of test targets in `groups` equal groups by training clicks of their user (0) or item (1).   -> xs, ys"""
        user, target = self.data.test.to(self.device).T
        hit = (rank_of_targets(users, items, user, target, self.seen) < 20).float()
        clicks = torch.bincount(self.train[:, column])
        order = F.pad(clicks, (0, max(users.shape[0], items.shape[0])))[(user, target)[column]].argsort(stable=True)
        return list(range(1, groups + 1)), [float(part.mean()) for part in hit[order].tensor_split(groups)]

    def draw_views(self, path):
        """Histograms: cosine of C and M for the same node and for strangers; attention to a modality, Eq. 11-12."""
        model, (behaviour, content) = self.model, self.model.views()
        strangers = content[torch.randperm(len(content), device=content.device)]
        panels = [("cosine of behaviour and content", {
            "same node": F.cosine_similarity(behaviour, content), "strangers": F.cosine_similarity(behaviour, strangers)})]
        if hasattr(model, "query"):
            a = model.attention(model.content())[:, 0]                          # (N,)
            panels.append((f"attention to {model.modalities[0]}", {"users": a[: model.users], "items": a[model.users :]}))
        histogram(path, panels)

    def planted(self):
        """What the built-in shop knows and the model was never told: accidental clicks, tastes for picture or title."""
        noise, weight = self.data.noise, self.data.truth.get("weight")
        if noise is None or weight is None:
            return []
        users, items = (x.cpu() for x in self.model())
        user, item = self.data.train.T
        meant = torch.zeros(len(users), len(items), dtype=torch.bool)
        meant[user[~noise], item[~noise]] = True
        slips = user[noise]
        scores = users[slips] @ items.T                                         # (slips, I)
        beaten = (meant[slips] & (scores > scores.gather(1, item[noise, None]))).sum() / meant[slips].sum()
        lines = [f"accidental clicks: a click the user meant scores higher in {100 * beaten:.0f} % of pairs (50 % is chance)"]
        if self.cfg.model == "mgcn" and "image" in self.model.modalities and hasattr(self.model, "query"):
            a = self.model.attention(self.model.content())[: len(users), self.model.modalities.index("image")].cpu()
            r = torch.corrcoef(torch.stack([a, weight]))[0, 1]
            lines.append(f"taste for pictures: the user's attention to images correlates {r:+.2f} with the planted weight")
        return lines

    def rivals(self):
        """Test metrics of popularity, and of LightGCN on the same batches for as many steps, chosen on validation too."""
        if self.cfg.model in (*baselines.COUNTED, "lightgcn") or parallel.world() > 1:
            return {}

        def trained(model):
            return train_quietly(lambda cfg: Task(cfg, self.device, self.data), dataclasses.replace(self.cfg, model=model))

        return {"popularity": trained("popularity").evaluate("test"), "LightGCN": trained("lightgcn").evaluate("test")}

