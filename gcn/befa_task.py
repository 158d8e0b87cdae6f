"""Training hosts with and without BeFA on the same seeds, and measuring what the adapter does to their features.

    python train.py befa                                       # MGCN on the built-in shop, three pairs of runs
    python train.py befa --host=vbpr --pairs=5                 # another host
    python train.py befa --ablate --seeds=3 --rows="VBPR;VBPR + BeFA"
"""
import dataclasses
import math
import statistics
from dataclasses import dataclass

from data import parallel
from data.batches import train_quietly
from data.options import check_ranges, check_words, plain
from data.pictures import panels
from data.weights import save_checkpoint
from gcn import attribution, befa, task


@dataclass
class Config(task.Config):
    """BeFA on one of four hosts (defaults: the built-in data; --paper=tiktok for real clicks)."""

    model: str = "befa"              # always befa here; the rivals are python train.py mvgcn, lightgcn, vbpr
    host: str = "mgcn"               # who wears the adapter: mgcn, lattice (the released host), vbpr, lightgcn
    adapter: str = "befa"            # befa, compact (the printed form), linear, none (bare projection), host (its own step)
    width: int = 2                   # t: hidden layers of the adapter have t * dim units (released grid: 1, 2, 4, 8)
    depth: int = 3                   # linear layers of the adapter
    dropout: float = 0.3             # dropout inside the adapter (released grid: .1, .3, .5, .7)
    tanh: bool = True                # tanh after the first hidden layer, as released
    join: str = "product"            # how mask g meets behaviour E: product E*g, sum E+g, content P*g
    adapter_weight: float = 1.0      # Z = host + weight (adapted - host)
    adapt: tuple = ()                # which modalities get an adapter; empty: all
    encoder: str = "stored"          # image features: stored, or histogram, random made from the pictures
    pairs: int = 3                   # seeds compared with and without the adapter at the end of a run

    def __post_init__(self):
        check_words(self, host=befa.HOSTS, adapter=befa.ADAPTERS, join=befa.JOINS, encoder=attribution.ENCODERS, **task.WORDS)
        check_ranges(self, width=(1, 64), depth=(1, 64), dropout=(0, 0.99))


paper = task.paper          # the hosts' sizes; the adapter's in each table are UNVERIFIED, width and dropout are ours


class Task(task.Task):
    """One host with one adapter; see gcn/task.py for data, batches and evaluation."""

    ablations = {
        "BeFA": {}, "w/o adapter": {"adapter": "host"}, "linear": {"adapter": "linear"}, "none": {"adapter": "none"},
        "compact form": {"adapter": "compact"}, "depth 2": {"depth": 2}, "depth 4": {"depth": 4}, "width 1": {"width": 1},
        "width 4": {"width": 4}, "no dropout": {"dropout": 0.0}, "dropout .1": {"dropout": 0.1}, "dropout .5": {"dropout": 0.5},
        "dropout .7": {"dropout": 0.7}, "w/o tanh": {"tanh": False},
        "sum": {"join": "sum"}, "mask on content": {"join": "content"},
        "image only": {"adapt": ("image",)}, "text only": {"adapt": ("text",)}, "half weight": {"adapter_weight": 0.5},
        "frozen features": {"train_features": False},
        "frozen, w/o adapter": {"train_features": False, "adapter": "host"},
    } | {f"{name}{with_}": {"host": host} | own for host, name in
         (("mgcn", "MGCN"), ("lattice", "released host"), ("vbpr", "VBPR"), ("lightgcn", "LightGCN + content"))
         for with_, own in (("", {"adapter": "host"}), (" + BeFA", {}))
    } | {f"{encoder}{with_}": {"encoder": encoder} | own for encoder in ("histogram", "random")
         for with_, own in (("", {"adapter": "host"}), (" + BeFA", {}))}
    published = {}

    def __init__(self, cfg, device, data=None):
        super().__init__(cfg, device, data)
        drawn = self.data.pictures is not None and "image" in self.data.features
        item = int(self.data.test[0, 1])
        self.next = f"python -m gcn.recommend --item {item} --why" if drawn else "python train.py befa --eval"

    def read_data(self):
        """The data set, its image features replaced where --encoder asks for it."""
        data = super().read_data()
        if self.cfg.encoder == "stored":
            return data
        if data.pictures is None or "image" not in data.features:
            raise ValueError(f"--encoder={self.cfg.encoder} looks at pictures, and {data.source} has none to look at; "
                             "leave it out to use the features as stored")
        whole = attribution.look(data.pictures(range(data.items)), self.cfg.encoder)[1]
        return dataclasses.replace(data, features=data.features | {"image": whole})

    def build(self, features):
        return befa.HOSTS[self.cfg.host](self.cfg, self.data.users, self.data.items, self.train, features)

    # -- with and without ------------------------------------------------------------------------------------------------

    def twins(self):
        """`pairs` seeds of (without, with), this run among them, each chosen on validation.   -> [(Task, Task), ...]"""
        def trained(seed, adapter):
            cfg = dataclasses.replace(self.cfg, seed=seed, adapter=adapter)
            return self if cfg == self.cfg else train_quietly(lambda cfg: Task(cfg, self.device, self.data), cfg)

        if not hasattr(self, "pairs"):
            seeds = range(self.cfg.seed, self.cfg.seed + max(self.cfg.pairs, 1))
            self.pairs = [(trained(seed, "host"), trained(seed, self.cfg.adapter)) for seed in seeds]
        return self.pairs

    def rivals(self):
        """Test metrics of the same host, seed and batches without the adapter, and of popularity."""
        if self.cfg.adapter in ("host", "none") or parallel.world() > 1:
            return {}
        return {"popularity": task.Task(task.Config(model="popularity"), self.device, self.data).evaluate("test"),
                f"{self.cfg.host} without BeFA": self.twins()[0][0].evaluate("test")}

    def sample(self, folder):
        """pairs.md (both halves of every pair), host.pt (the half without), and where there are pictures attribution.png,
        attribution.csv and words.png."""
        if self.cfg.adapter in ("host", "none") or parallel.world() > 1:
            return
        pairs = self.twins()
        host = pairs[0][0]
        save_checkpoint(folder / "host.pt", {"name": "befa", "config": plain(host.cfg), "state": {
            key: host.saved[key].state_dict() for key in ("model", "catalogue")}})
        lines = [*ranking_lines(pairs), cost_line(pairs)]
        if self.data.pictures is not None and "image" in self.model.modalities and self.data.truth:
            explorer = attribution.Explorer(self.data, self.cfg.encoder)
            scores = map_scores(explorer, pairs)
            lines += [*map_lines(scores), *neighbour_lines(pairs)]
            draw(folder, explorer, {label: runs[0] for (variant, label), runs in scores.items() if variant == "A"}, *pairs[0])
        print("\n".join(lines))
        (folder / "pairs.md").write_text("\n".join(lines) + "\n")


# -- what is told about pairs: [(Task without, Task with), ...] -------------------------------------------------------------


def spread(values, digits=3):
    """mean +- standard deviation, as words."""
    values = [x for x in values if x == x]                    # a seed all of whose maps are flat has no score
    deviation = statistics.stdev(values) if len(values) > 1 else 0
    return f"{statistics.mean(values):.{digits}f} +- {deviation:.{digits}f}" if values else "-"


def ranking_lines(pairs):
    """Both halves of every pair on test, their mean difference and its standard error."""
    run, scores = pairs[0][1], [[t.evaluate("test") for t in pair] for pair in pairs]
    lines = [f"{run.cfg.host} without and with BeFA, {len(pairs)} paired seeds, {run.data.source}, test",
             f"{'':12} {'without':>20} {'with BeFA':>20} {'difference':>22} {'better in':>10}"]
    for key in run.table:
        without, with_ = ([pair[side][key] for pair in scores] for side in (0, 1))
        gaps = [b - a for a, b in zip(without, with_, strict=True)]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        lines.append(f"{key:12} {spread(without, 4):>20} {spread(with_, 4):>20} {statistics.mean(gaps):+.4f} +- {error:.4f}     "
                     f"{sum(g > 0 for g in gaps)} of {len(gaps)}")
    return lines


def cost_line(pairs):
    """What the adapter adds: parameters, multiply-adds of forward and backward."""
    without, with_ = pairs[0]
    sizes = [sum(p.numel() for p in t.model.parameters()) for t in (without, with_)]
    weights = sum(p.numel() for p in with_.model.adapters.parameters() if p.dim() == 2)
    return (f"cost: {sizes[1]:,} parameters with, {sizes[0]:,} without; adapters {3 * 2 * weights * with_.data.items / 1e9:.2f} "
            "GFLOP a step")


def map_scores(explorer, pairs):
    """Drift, omission and pointing of every item's map.   -> {(variant, label): [attribution.score_maps of each pair]}"""
    sides = {"projection, without": (0, "projection"), "without BeFA": (0, "content"), "with BeFA": (1, "content")}
    return {(variant, label): [explorer.scores(pair[side].model, variant=variant, stage=stage) for pair in pairs]
            for variant in "AB" for label, (side, stage) in sides.items()}


def map_lines(scores):
    """Means over items, their spread over seeds."""
    lines = ["", f"{'maps, seed means':22} {'drift':>15} {'omission':>15} {'pointing':>15} {'flat maps':>15}"]
    for (variant, label), runs in scores.items():
        cells = [spread([float(run[k].nanmean()) for run in runs]) for k in ("drift", "omission", "pointing", "flat")]
        lines.append(f"{f'{variant}  {label}':22} " + " ".join(f"{c:>15}" for c in cells))
    area = float(runs[0]["area"].mean())
    return [*lines, f"{'an even map':22} {1 - area:15.3f} {'-':>15} {area:15.3f}"]


def neighbour_lines(pairs):
    """What neighbours share in the features of both halves, and in the encoder's."""
    tables = [[attribution.features_table(t.model, t.data, t.cfg.data_seed) for t in pair] for pair in pairs]
    lines = ["", f"{'neighbours that share (0: chance)':34} {'without':>15} {'with BeFA':>15} {'encoder':>15}"]
    for m in pairs[0][1].model.modalities:
        for attribute, encoder in tables[0][0][m, "encoder"].items():
            without, with_ = (spread([pair[side][m, "host"][attribute] for pair in tables]) for side in (0, 1))
            lines.append(f"{f'{m}: {attribute}':34} {without:>15} {with_:>15} {encoder:15.3f}")
    return lines


def draw(folder, explorer, scores, without, with_):
    """attribution.csv: drift and omission of all items. attribution.png: the items whose map drifts most, omits most, and does
    neither, without BeFA. words.png: the title of the first.   scores {label: attribution.score_maps}"""
    columns = {f"{k} {label}": x[k].tolist() for label, x in scores.items() for k in ("drift", "omission")}
    rows = [f"{i}," + ",".join(f"{x:.4f}" for x in row) for i, row in enumerate(zip(*columns.values(), strict=True))]
    (folder / "attribution.csv").write_text("\n".join(["item," + ",".join(columns), *rows]) + "\n")
    drift, omission = (scores["without BeFA"][k] for k in ("drift", "omission"))
    items = [int(i) for s in (drift, omission, -(drift + omission)) for i in s.nan_to_num(-9).topk(2).indices]
    panels(folder / "attribution.png", [explorer.row(i, without.model, with_.model) for i in items], 92,
           f"{attribution.COLUMNS}. Two items with the highest drift, two with the highest omission, two with neither")
    if "text" in with_.model.modalities and with_.data.titles:
        attribution.draw_words(folder / "words.png", with_.data, items[0], without.model, with_.model)
