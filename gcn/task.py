"""Training and judging MGCN and its rivals: one configuration, one protocol, one ranking code.

    python train.py mvgcn                                                         # the built-in shop
    python train.py mvgcn --paper=tiktok --root=FOLDER                            # a real data set
    python train.py mvgcn --ablate --seeds=3                                      # every switch and every rival
"""
import dataclasses
import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from data import parallel
from data.batches import generator, seed_from
from data.interactions import load
from data.metrics import ranking, ranking_chance
from data.pictures import curves, histogram
from gcn import baselines, fast, mgcn
from kernels.ranking import rank_of_targets, top_k

MODELS = {"mgcn": mgcn.MGCN, "lightgcn": baselines.LightGCN, "vbpr": baselines.VBPR,
          "popularity": baselines.popularity, "itemknn": baselines.item_knn}
COUNTED = ("popularity", "itemknn")


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
        if self.model not in MODELS:
            raise ValueError(f"--model={self.model} is unknown; choose {', '.join(MODELS)}")
        if self.exact not in ("fast", "full"):
            raise ValueError(f"--exact={self.exact} is unknown; choose fast or full")
        if self.model in COUNTED:                            # nothing to train: one step of nothing, one evaluation
            self.steps = self.eval_every = 1


def paper(name):
    """Published sizes as overrides. baby, sports, clothing: the paper's Sec. 4; tiktok: ours, tuned on validation."""
    shared = {"batch": 2048, "lr": 1e-3, "reg": 1e-4, "cl_loss": 0.01, "patience": 20}
    clicks = {"baby": 118_551, "sports": 218_409, "clothing": 197_338, "tiktok": 59_541}
    if name not in clicks:
        raise ValueError(f"--paper={name} is unknown; there are {', '.join(clicks)}")
    epoch = round(clicks[name] / shared["batch"])            # evaluated once an epoch, at most 1,000 epochs
    settings = shared | {"data": name, "eval_every": epoch, "steps": 1000 * epoch}
    if name == "tiktok":                                     # lr and the weights: best of some ten on validation, see README.md
        return settings | {"modalities": ("image", "audio"), "cl_loss": 1e-3, "reg": 1e-3}
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
                raise ValueError(f"the {m} features are those of another catalogue: {len(wrong)} of {len(mine)} items differ from "
                                 f"the ones it was trained on, item {int(wrong[0])} first")


class Task:
    """One recommender on one data set; see STYLE of the contract in train.py."""

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
        features = {m: x.to(device) for m, x in data.features.items()}
        if cfg.model in COUNTED:
            self.model = baselines.Counted(MODELS[cfg.model](self.train, data.users, data.items))
            self.saved = {"model": self.model}
        else:
            self.model = self.build(features).to(device)
            self.optimiser = torch.optim.Adam(self.groups(), lr=cfg.lr, fused=True)     # dense Adam in one pass over memory
            self.saved = {"model": self.model, "optimiser": self.optimiser, "catalogue": Catalogue(data.features)}
        clicked = torch.bincount(data.train[:, 0], minlength=data.users)
        self.chance = ranking_chance(users=data.test[:, 0], items=data.items, seen=clicked)
        self.next = f"python -m gcn.recommend --user {int(data.test[len(data.test) // 2, 0])} --top 10 --why"
        self.cost = {"steps": 0, "step_s": 0.0, "step_cpu_s": 0.0, "evaluations": 0, "eval_s": 0.0, "eval_cpu_s": 0.0}

    def read_data(self):
        cfg = self.cfg
        wanted = [] if cfg.modalities == ("none",) else list(cfg.modalities) or None
        return load(cfg.data, cfg.root, cfg.data_seed, wanted, cfg.repair)

    def build(self, features):
        return MODELS[self.cfg.model](self.cfg, self.data.users, self.data.items, self.train, features)

    def groups(self):
        """Parameters for Adam, and what multiplies their step size."""
        return [{"params": [p for p in self.model.parameters() if p.requires_grad], "scale": 1.0}]

    def batches(self, seed, start, stop):
        """Users, positives, negatives of global batch t, each (B,); every rank draws the same."""
        sampler = self.data.sampler(self.device) if self.cfg.model not in COUNTED else None
        for t in range(start, stop):
            yield sampler.batch(seed, t, self.cfg.batch) if sampler else ()

    def loss(self, batch, local=slice(None)):
        """Eq. 19 for MGCN, its BPR part for the rivals, by the fast page or the naive one."""
        if self.cfg.model == "vbpr":
            return baselines.loss(self.model, batch, local)
        return (fast if self.cfg.exact == "fast" else mgcn).loss(self.model, batch, local)

    def update(self, batch, step):
        """One step of Adam. A rank's anchors are its shard; contrastive candidates come from the whole batch."""
        cfg, began = self.cfg, (time.perf_counter(), time.process_time())
        if cfg.model in COUNTED:
            return {"loss": torch.zeros(())}
        epoch = step * cfg.batch // len(self.data.train)
        for group in self.optimiser.param_groups:
            group["lr"] = group["scale"] * cfg.lr * 0.96 ** (epoch / 50)
        self.model.train()
        mine = parallel.shard(range(cfg.batch))
        # Under --amp the tables stay float32: their rows are what is ranked, and gathering them is not the cost.
        with torch.autocast(self.device.type, enabled=False):
            loss = self.loss(batch, slice(mine.start, mine.stop))
            parallel.descend(self.optimiser, loss)
        self.count("step", began)
        return {"loss": loss.detach()}

    def count(self, what, began):
        """Add wall and CPU seconds since `began`; the run prints them at its end."""
        self.cost["steps" if what == "step" else "evaluations"] += 1
        self.cost[f"{what}_s"] += time.perf_counter() - began[0]
        self.cost[f"{what}_cpu_s"] += time.process_time() - began[1]

    @torch.no_grad()
    def evaluate(self, split):
        """Full ranking over all items, training items left out, validation items not (the paper's protocol)."""
        began = time.perf_counter(), time.process_time()
        self.model.eval()                                    # dropout of an adapter (gcn/befa.py)
        scores = ranking(self.ranks(split).cpu(), getattr(self.data, split)[:, 0])
        self.count("eval", began)
        return scores

    def ranks(self, split):
        """Rank of every held-out item in its user's list, 0 = best.   -> (T,)"""
        users, items = self.model()
        user, target = getattr(self.data, split).to(self.device).T
        return rank_of_targets(users, items, user, target, self.seen)

    # -- what a person looks at ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, folder):
        """recall.png (for whom and for what it works), views.png (attention, agreement of the views), rankings.txt."""
        if self.cfg.model not in COUNTED:
            print(self.speed())
        popular = baselines.popularity(self.train, self.data.users, self.data.items)
        tables = {self.cfg.model: self.model(), "popularity": popular}
        curves(folder / "recall.png", [
            (f"Recall@20 by {what}", {name: self.recall_by(column, *t) for name, t in tables.items()}, {})
            for column, what in ((0, "the user's activity"), (1, "the item's popularity"))],
            xlabel="groups of equal size, fewest training clicks first")
        if self.cfg.model == "mgcn" and self.model.modalities:
            self.draw_views(folder / "views.png")
        (folder / "rankings.txt").write_text("\n".join([*self.planted(), *self.lists(5)]) + "\n")

    def speed(self):
        """Milliseconds a step, seconds an epoch and an evaluation, as measured in this process."""
        c, epoch = self.cost, len(self.data.train) / self.cfg.batch
        steps, evaluations = max(c["steps"], 1), max(c["evaluations"], 1)
        return (f"speed: {1000 * c['step_s'] / steps:.1f} ms a step of {self.cfg.batch:,} clicks ({1000 * c['step_cpu_s'] / steps:.1f} "
                f"CPU-ms), {epoch * c['step_s'] / steps:.2f} s an epoch of {epoch:.0f} steps, {c['eval_s'] / evaluations:.3f} s a "
                f"full evaluation ({c['eval_cpu_s'] / evaluations:.3f} CPU-s)")

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

    def lists(self, count, k=10):
        """The first test users' past items and top-k lists, hits marked."""
        users, items = self.model()
        some = self.data.test[:, 0].unique()[:count]
        best, scores = top_k(users, items, some.to(self.device), k, self.seen)
        name = self.data.titles or [f"item {i}" for i in range(self.data.items)]
        lines = []
        for user, row, score in zip(some.tolist(), best.tolist(), scores.tolist(), strict=True):
            wanted = set(self.data.test[self.data.test[:, 0] == user, 1].tolist())
            past = self.data.train[self.data.train[:, 0] == user, 1].tolist()
            lines += ["", f"user {user} clicked: " + "; ".join(name[i] for i in past[:12])]
            lines += [f"  {place:2}  {s:7.3f}  {name[i]}{'   <- the held-out item' if i in wanted else ''}"
                      for place, (i, s) in enumerate(zip(row, score, strict=True), 1)]
        return lines

    def rivals(self):
        """Test metrics of popularity, and of LightGCN on the same batches for as many steps, chosen on validation too."""
        if self.cfg.model in COUNTED or self.cfg.model == "lightgcn" or parallel.world() > 1:
            return {}
        counted = Task(dataclasses.replace(self.cfg, model="popularity"), self.device, self.data)
        behaviour = train_quietly(dataclasses.replace(self.cfg, model="lightgcn"), self.device, Task, self.data)
        return {"popularity": counted.evaluate("test"), "LightGCN": behaviour.evaluate("test")}


def train_quietly(cfg, device, make=Task, data=None):
    """Train without files or a bar, exactly as train.py would.   -> the task at its best validation step"""
    torch.manual_seed(seed_from(cfg.seed))
    task, best, stale, state = make(cfg, device, data), -1.0, 0, {}
    for step, batch in enumerate(task.batches(cfg.seed, 0, cfg.steps), 1):
        torch.manual_seed(seed_from(cfg.seed, step - 1))
        task.update(batch, step - 1)
        if step % cfg.eval_every == 0 or step == cfg.steps:
            score, stale = task.evaluate("valid")[Task.headline], stale + 1
            if score > best:
                best, stale = score, 0
                state = {name: x.clone() for name, x in task.model.state_dict().items()}
            if 0 < cfg.patience <= stale:
                break
    task.model.load_state_dict(state)
    return task
