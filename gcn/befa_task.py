"""Training hosts with and without BeFA on the same seeds, and measuring what the adapter does to their features.

    python train.py befa                                       # MGCN on the built-in shop, three pairs of runs
    python train.py befa --host=vbpr --pairs=5                 # another host
    python train.py befa --ablate --seeds=3 --rows="VBPR;VBPR + BeFA"
"""
import dataclasses
import math
import statistics
from dataclasses import dataclass

from data.options import plain
from data.pictures import panels
from data.weights import save_checkpoint
from gcn import attribution, baselines, befa, fast, mgcn, task


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
    adapter_lr: float = 1.0          # step size of the adapter as a multiple of --lr
    adapt: tuple = ()                # which modalities get an adapter; empty: all
    encoder: str = "stored"          # image features: stored, or histogram, random made from the pictures
    pairs: int = 3                   # seeds compared with and without the adapter at the end of a run

    def __post_init__(self):
        befa.check_switches(self)
        if self.encoder not in attribution.ENCODERS:
            raise ValueError(f"--encoder={self.encoder} is unknown; choose {', '.join(attribution.ENCODERS)}")


def paper(name):
    """The hosts' published sizes; the adapter's settings per table are UNVERIFIED, width and dropout are this repository's."""
    return task.paper(name)


class Task(task.Task):
    """One host with one adapter; see gcn/task.py for data, batches and evaluation."""

    ablations = {
        "BeFA": {}, "w/o adapter": {"adapter": "host"}, "linear": {"adapter": "linear"}, "none": {"adapter": "none"},
        "compact form": {"adapter": "compact"}, "depth 2": {"depth": 2}, "depth 4": {"depth": 4}, "width 1": {"width": 1},
        "width 4": {"width": 4}, "no dropout": {"dropout": 0.0}, "dropout .1": {"dropout": 0.1}, "dropout .5": {"dropout": 0.5},
        "dropout .7": {"dropout": 0.7}, "w/o tanh": {"tanh": False}, "sum": {"join": "sum"}, "mask on content": {"join": "content"},
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
        self.next = f"python -m gcn.recommend --item {int(self.data.test[0, 1])} --why" if drawn else "python train.py befa --eval"

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

    def groups(self):
        """Parameters for Adam; the adapter's step size may differ (--adapter_lr)."""
        own = {id(p) for p in self.model.adapters.parameters()}
        learnt = [p for p in self.model.parameters() if p.requires_grad]
        parts = [{"params": [p for p in learnt if (id(p) in own) == mine], "scale": scale}
                 for mine, scale in ((False, 1.0), (True, self.cfg.adapter_lr))]
        return [part for part in parts if part["params"]]

    def build(self, features):
        return befa.build(self.cfg, self.data.users, self.data.items, self.train, features)

    def loss(self, batch, local=slice(None)):
        if self.cfg.host in ("vbpr", "lightgcn"):
            return baselines.loss(self.model, batch, local)
        return (fast if self.cfg.exact == "fast" else mgcn).loss(self.model, batch, local)

    # -- with and without ------------------------------------------------------------------------------------------------

    def twins(self):
        """`pairs` seeds of (without, with), this run among them, each chosen on validation.   -> [(Task, Task), ...]"""
        if not hasattr(self, "trained"):
            self.trained = []
            for seed in range(self.cfg.seed, self.cfg.seed + max(self.cfg.pairs, 1)):
                cfg = dataclasses.replace(self.cfg, seed=seed)
                without = task.train_quietly(dataclasses.replace(cfg, adapter="host"), self.device, Task, self.data)
                with_ = self if seed == self.cfg.seed else task.train_quietly(cfg, self.device, Task, self.data)
                self.trained.append((without, with_))
        return self.trained

    def rivals(self):
        """Test metrics of the same host, seed and batches without the adapter, and of popularity."""
        if self.cfg.adapter in ("host", "none") or task.parallel.world() > 1:
            return {}
        return {"popularity": task.Task(task.Config(model="popularity"), self.device, self.data).evaluate("test"),
                f"{self.cfg.host} without BeFA": self.twins()[0][0].evaluate("test")}

    def sample(self, folder):
        """pairs.md (both halves of every pair), host.pt (the half without), and where there are pictures attribution.png,
        attribution.csv and words.png."""
        print(self.speed())
        if self.cfg.adapter in ("host", "none") or task.parallel.world() > 1:
            return
        pairs = self.twins()
        host = pairs[0][0]
        save_checkpoint(folder / "host.pt", {"name": "befa", "config": plain(host.cfg), "state": {
            key: host.saved[key].state_dict() for key in ("model", "catalogue")}})
        lines = [*ranking_lines(self, pairs), *cost_lines(pairs)]
        if self.data.pictures is not None and "image" in self.model.modalities and self.data.truth:
            lines += self.attribution_lines(folder, pairs)
        print("\n".join(lines))
        (folder / "pairs.md").write_text("\n".join(lines) + "\n")

    def attribution_lines(self, folder, pairs):
        """Draw the panel of this run's pair, write the scores of all items; seed means of drift and omission."""
        explorer = attribution.Explorer(self.data, self.cfg.encoder)
        lines, first = ["", f"{'maps, seed means':22} {'drift':>15} {'omission':>15} {'pointing':>15} {'flat maps':>15}"], {}
        for variant in "AB":
            sides = {"projection, without": (0, "projection"), "without BeFA": (0, "content"), "with BeFA": (1, "content")}
            for label, (side, stage) in sides.items():
                runs = [explorer.scores(pair[side].model, variant=variant, stage=stage) for pair in pairs]
                first[variant, label] = runs[0]
                cells = [spread([float(run[k].nanmean()) for run in runs]) for k in ("drift", "omission", "pointing", "flat")]
                lines.append(f"{f'{variant}  {label}':22} " + " ".join(f"{c:>15}" for c in cells))
        area = float(first["A", "with BeFA"]["area"].mean())
        lines.append(f"{'an even map':22} {1 - area:15.3f} {'-':>15} {area:15.3f}")
        lines += ["", f"{'neighbours that share (0: chance)':34} {'without':>15} {'with BeFA':>15} {'encoder':>15}"]
        tables = [[attribution.features_table(t.model, self.data, self.cfg.data_seed) for t in pair] for pair in pairs]
        for (m, space), row in tables[0][0].items():
            for a in row if space == "host" else ():
                cells = [spread([pair[side][m, "host"][a] for pair in tables]) for side in (0, 1)]
                lines.append(f"{f'{m}: {a}':34} {cells[0]:>15} {cells[1]:>15} {tables[0][0][m, 'encoder'][a]:15.3f}")
        before, after = (t.model for t in pairs[0])
        self.draw(folder, explorer, first["A", "without BeFA"], before, after)
        names = [(f"{k} {label}", x[k]) for (v, label), x in first.items() if v == "A" for k in ("drift", "omission")]
        rows = zip(*(x.tolist() for _, x in names), strict=True)
        (folder / "attribution.csv").write_text("item," + ",".join(n for n, _ in names) + "\n" + "".join(
            f"{i}," + ",".join(f"{x:.4f}" for x in row) + "\n" for i, row in enumerate(rows)))
        return lines

    def draw(self, folder, explorer, scores, before, after):
        """attribution.png: items whose map drifts most, omits most, and does neither (without BeFA); words.png: one title."""
        fine = -(scores["drift"] + scores["omission"])
        items = [int(i) for s in (scores["drift"], scores["omission"], fine) for i in s.nan_to_num(-9).topk(2).indices]
        panels(folder / "attribution.png", [explorer.row(i, before, after) for i in items], 92,
               "picture | host without BeFA | with BeFA | nearest items by the encoder | by the adapted feature. Two items with the "
               "highest drift, two with the highest omission, two with neither")
        if "text" in after.modalities and self.data.titles:
            attribution.draw_words(folder / "words.png", explorer, items[0], before, after)


def spread(values):
    """mean +- standard deviation, as words."""
    values = [x for x in values if x == x]                    # a seed all of whose maps are flat has no score
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values) if len(values) > 1 else 0:.3f}" if values else "-"


def ranking_lines(run, pairs):
    """Both halves of every pair on test, their mean difference and its standard error."""
    scores = [[t.evaluate("test") for t in pair] for pair in pairs]
    lines = [f"{run.cfg.host} without and with BeFA, {len(pairs)} paired seeds, {run.data.source}, test",
             f"{'':12} {'without':>20} {'with BeFA':>20} {'difference':>22} {'better in':>10}"]
    for key in run.table:
        without, with_ = ([pair[side][key] for pair in scores] for side in (0, 1))
        gaps = [b - a for a, b in zip(without, with_, strict=True)]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        cells = [f"{statistics.mean(x):.4f} +- {statistics.stdev(x) if len(x) > 1 else 0:.4f}" for x in (without, with_)]
        lines.append(f"{key:12} {cells[0]:>20} {cells[1]:>20} {statistics.mean(gaps):+.4f} +- {error:.4f}     "
                     f"{sum(g > 0 for g in gaps)} of {len(gaps)}")
    return lines


def cost_lines(pairs):
    """What the adapter adds: parameters, multiply-adds of forward and backward, CPU-milliseconds a step."""
    without, with_ = pairs[-1]
    sizes = [sum(p.numel() for p in t.model.parameters()) for t in (without, with_)]
    weights = sum(p.numel() for p in with_.model.adapters.parameters() if p.dim() == 2)
    ms = [1000 * statistics.mean(t.cost["step_cpu_s"] / max(t.cost["steps"], 1) for t in side) for side in zip(*pairs, strict=True)]
    return [f"cost: {sizes[1]:,} parameters with, {sizes[0]:,} without; adapters {3 * 2 * weights * with_.data.items / 1e9:.2f} "
            f"GFLOP a step; {ms[0]:.1f} -> {ms[1]:.1f} CPU-ms a step"]
