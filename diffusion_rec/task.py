"""Training and judging LD4MRec and its rivals: one configuration, one protocol, one ranking code.

    python train.py ld4mrec                                                       # the built-in shop
    python train.py ld4mrec --paper=tiktok --root=FOLDER                          # a real data set
    python train.py ld4mrec --ablate --seeds=3                                    # every part and every rival
"""
import dataclasses
import time
from dataclasses import dataclass

import torch

from data import parallel
from data.batches import batch_rows, generator, train_quietly
from data.interactions import load
from data.metrics import ranking, roc_auc
from data.options import check_ranges, check_words
from data.pictures import curves, panels
from diffusion_rec import rivals
from diffusion_rec.ld4mrec import LD4MRec
from diffusion_rec.lightgcn import LightGCN
from kernels.graph import Graph
from kernels.ranking import rank_of_targets, top_k

MODELS = {"ld4mrec": LD4MRec, "diffrec": rivals.DiffRec, "autoencoder": rivals.Autoencoder, "lightgcn": LightGCN,
          "popularity": rivals.Popularity}
WORDS = {"model": tuple(MODELS), "inference": ("forward_free", "one_step", "chain"), "order": ("BDBG", "BGBD", "single"),
         "cond": ("add", "film", "concat"), "modality_weights": ("personal", "uniform"), "collab": ("svd", "raw", "lightgcn"),
         "soft_target": ("user_level", "positive_only", "neighbour", "off"), "t_sampling": ("importance", "uniform"),
         "weighting": ("none", "snr"), "acts_on": ("clicks", "state"), "noise": ("latent", "dense"), "objective": ("mse", "ce"),
         "guides_see": ("whole", "shown"), "loss": ("closed", "dense")}
RANGES = {"T": (1, 10_000), "p": (0, 1), "gamma": (0, 0.499), "rho": (0, 1), "fake": (0, 10), "dropout": (0, 0.99),
          "dropout_in": (0, 0.99), "width": (1, 10**5), "time_width": (2, 10**4), "layers": (1, 100), "svd": (1, 10**4)}


@dataclass
class Config:
    """LD4MRec on a multimodal shop (defaults: the built-in data; --paper=tiktok: tuned by us, the paper's are unknown)."""

    model: str = "ld4mrec"           # ld4mrec, diffrec, autoencoder, lightgcn or popularity
    data: str = "builtin"            # builtin, or the name of the files in --root (tiktok for tiktok.inter)
    root: str = ""                   # folder of the real data
    data_seed: int = 0               # seed of the built-in shop, and of the split of a table without x_label
    repair: bool = False             # keep the first of repeated pairs, give zero or NaN feature rows the mean row
    modalities: tuple = ()           # which *_feat.npy to use, such as image,text; empty: all; none: no content
    fake: float = 0.0                # fake clicks injected into training, as a share of its clicks (0.2: 20 % more)
    seed: int = 0                    # random seed
    steps: int = 300                 # optimiser steps
    eval_every: int = 20             # steps between evaluations
    patience: int = 0                # evaluations without improvement before stopping; 0: never
    batch: int = 512                 # users in a step, B
    lr: float = 2e-3                 # Adam step size
    width: int = 64                  # latent width of C-Net, d
    layers: int = 2                  # pairs of blocks, L
    order: str = "BDBG"              # denoise then guide; BGBD: guide first; single: no BG, preference enters BD
    cond: str = "add"                # how time and collaborative signal enter BD: add, film or concat
    time_width: int = 16             # width of the time representation, d_t
    dropout: float = 0.5             # inside BD
    dropout_in: float = 0.7          # share of the input's clicks forgotten in training (DiffRec: 0.5)
    normalise: bool = False          # input rows get length 1
    acts_on: str = "clicks"          # what the two above act on: clicks (exact shortcuts hold) or state (x_t, as DiffRec)
    guide_collab: bool = True        # collaborative signal c_u
    collab: str = "svd"              # encoder of c_u: svd of R_hat, raw (svd of R), or lightgcn (trained at start-up)
    svd: int = 64                    # width of c_u, k_svd
    smooth: float = 2.0              # added to every degree of R_hat before the svd; 0: R_hat as it is
    guide_modality: bool = True      # modality preference p_um
    modality_weights: str = "personal"   # a_m per user, or uniform
    befa: bool = False               # BeFA's adapter rebuilds content under the items' behaviour rows
    guides_see: str = "whole"        # conditions are computed from all clicks, or from those left by dropout_in (shown)
    T: int = 10                      # diffusion steps
    scale: float = 1e-2              # noise scale s
    low: float = 1e-3                # a_min of the schedule
    high: float = 1e-2               # a_max of the schedule (1: the other reading of eq. 3)
    first_beta: float = 0.0          # replaces beta_1 (DiffRec: 1e-5); 0: as computed
    t_sampling: str = "importance"   # or uniform
    weighting: str = "none"          # of the loss at t: none or snr
    rho: float = 0.25                # share of users fed as they are, with tau_in; 0: forward-free inference uses t = 0
    soft_target: str = "user_level"  # user_level, positive_only, neighbour or off
    p: float = 0.2                   # soft probability
    gamma: float = 0.05              # smoothing intensity
    neighbours: int = 20             # items near each click in the neighbour form
    objective: str = "mse"           # squared error, or ce: cross-entropy over items (its scores are no x_0, so no chain)
    click_weight: float = 10.0       # weight of a click's squared error beside a zero's
    inference: str = "forward_free"  # forward_free, one_step (version 1) or chain
    corrupt: int = 0                 # steps of noise before a chain (or one_step: 1 at least)
    noise: str = "latent"            # latent: drawn in d dimensions; dense: in I, the naive twin
    loss: str = "closed"             # closed: no users x items matrix; dense: the naive twin. Same value, same gradient
    hops: int = 2                    # of lightgcn
    reg: float = 1e-2                # of lightgcn: weight of the embeddings' squared norm

    def __post_init__(self):
        check_words(self, **WORDS)
        check_ranges(self, **RANGES, corrupt=(0, self.T))
        if self.acts_on == "state" and self.noise == "latent":
            raise ValueError("--acts_on=state needs x_t written out: pass --noise=dense as well")
        if self.objective == "ce" and self.inference == "chain":
            raise ValueError("--objective=ce learns scores, not x_0, so a chain has no state to go to: pass --objective=mse")
        if self.model == "popularity":                       # nothing to train: one step of nothing, one evaluation
            self.steps = self.eval_every = 1


def paper(name):
    """tiktok: tuned by us on validation. The paper's own settings are UNVERIFIED, so there is no other preset."""
    if name != "tiktok":
        raise ValueError(f"--paper={name} is unknown; there is tiktok")
    return {"data": "tiktok", "modalities": ("image", "audio"), "batch": 1024, "steps": 400, "eval_every": 50, "patience": 3,
            "soft_target": "neighbour", "p": 1.0, "gamma": 0.45, "neighbours": 30,
            "dropout": 0.3, "dropout_in": 0.3, "click_weight": 1.0}


DIFFREC = {"model": "diffrec", "rho": 0.0, "inference": "chain", "soft_target": "off", "objective": "mse"}
OFFICIAL = DIFFREC | {"noise": "dense", "acts_on": "state", "normalise": True, "dropout_in": 0.5, "click_weight": 1.0,
                      "weighting": "snr", "T": 5, "scale": 1e-4, "low": 5e-4, "high": 5e-3, "first_beta": 1e-5}  # its example


class Task:
    """One recommender on one data set; see the contract in train.py."""

    headline, better = "Recall@20", "higher"
    table = ("Recall@20", "NDCG@20", "Recall@10", "NDCG@10", "ms per 1,000 users")
    ablations = {
        "full": {}, "w/o collaborative signal": {"guide_collab": False}, "w/o modality preference": {"guide_modality": False},
        "w/o soft target": {"soft_target": "off"},
        "soft target from neighbours": {"soft_target": "neighbour", "p": 0.5, "gamma": 0.2},
        "w/o corruption (rho=1)": {"rho": 1.0}, "one step (version 1)": {"inference": "one_step"},
        "chain T=5": {"inference": "chain", "T": 5, "objective": "mse"},
        "chain T=20": {"inference": "chain", "T": 20, "objective": "mse"},
        "BeFA adapter": {"befa": True}, "DiffRec": DIFFREC, "DiffRec, its own settings": OFFICIAL,
        "autoencoder": {"model": "autoencoder", "rho": 1.0, "soft_target": "off"}, "LightGCN": {"model": "lightgcn", "lr": 5e-3},
        "popularity": {"model": "popularity"},
    }
    published = {}                                           # the tables of both versions are UNVERIFIED

    def __init__(self, cfg, device):
        self.cfg, self.device = cfg, device
        self.data = data = inject(load(cfg.data, cfg.root, cfg.data_seed, cfg.modalities, cfg.repair), cfg.fake)
        self.train = data.train.to(device)                   # (E, 2) the only clicks anything is computed from
        self.seen = Graph.from_edges(self.train[:, 0], self.train[:, 1], (data.users, data.items))
        self.active = data.train[:, 0].unique()              # users with a history
        features = {m: x.to(device) for m, x in data.features.items()}
        self.model = MODELS[cfg.model](cfg, data.users, data.items, self.train, features).to(device)
        self.saved = {"model": self.model}
        if cfg.model != "popularity":
            self.saved["optimiser"] = self.optimiser = torch.optim.Adam(self.model.parameters(), lr=cfg.lr, fused=True)
        self.chance = data.chance()
        self.next = f"python -m diffusion_rec.recommend --user {int(data.test[len(data.test) // 2, 0])} --top 10"

    def batches(self, seed, start, stop):
        """User ids of global batch t (B,); rows are users, not clicks."""
        for t in range(start, stop):
            yield self.active[batch_rows(len(self.active), self.cfg.batch, seed, t)].to(self.device)

    def update(self, users, step):
        """One step of Adam. Sums over the catalogue stay in float32 under --amp: they cancel."""
        if self.cfg.model == "popularity":
            return {"loss": torch.zeros(())}
        self.model.train()
        with torch.autocast(self.device.type, enabled=False):
            loss = self.model.loss(users)
            parallel.descend(self.optimiser, loss)
        return {"loss": loss.detach()}

    @torch.no_grad()
    def encoded(self, inference=None, steps=None):
        """All users and items in one space.   -> (U, d + 1), (I, d + 1)"""
        self.model.eval()
        everyone = torch.arange(self.data.users, device=self.device)
        return torch.cat([self.model.encode(u, inference, steps) for u in everyone.split(4096)]), self.model.table()

    def evaluate(self, split, inference=None, steps=None):
        """Full ranking over all items, training items left out, validation items not (MGCN's protocol)."""
        user, target = getattr(self.data, split).to(self.device).T
        ranks = rank_of_targets(*self.encoded(inference, steps), user, target, self.seen)
        scores = ranking(ranks.cpu(), user.cpu())
        return scores | ({"ms per 1,000 users": self.latency(inference, steps)} if split == "test" else {})

    @torch.no_grad()
    def latency(self, inference=None, steps=None, count=1000, rounds=5):
        """Milliseconds from the clicks of 1,000 users to their scores of all items, the best of 5 rounds; CPU time on a CPU."""
        users = self.active[torch.arange(count) % len(self.active)].to(self.device)
        clock, spent = time.perf_counter if self.device.type == "cuda" else time.process_time, []
        self.model.eval()
        for _ in range(rounds):
            began = clock()
            scores = self.model.encode(users, inference, steps) @ self.model.table().T
            float(scores[-1, -1])                            # waits for a GPU
            spent.append(clock() - began)
        return 1000 * min(spent) * 1000 / count

    # -- what a person looks at ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, folder):
        """steps.png, times.png, behaviour.png (with pictures), rankings.txt."""
        some = self.data.test[:, 0].unique()[:5]
        lists = self.data.lists(some, *top_k(*self.encoded(), some.to(self.device), 10, self.seen))
        (folder / "rankings.txt").write_text("\n".join([*self.planted(), *lists]) + "\n")
        if not isinstance(self.model, LD4MRec):
            return
        if self.cfg.objective == "mse":
            self.draw_steps(folder / "steps.png")
        p, loss = self.model.times.probabilities(), self.model.times.loss_history.mean(1)
        times = list(range(1, self.cfg.T + 1))
        curves(folder / "times.png", [
            ("mean of the last 10 losses at t", {"loss": (times, loss.tolist())}, {}),
            ("probability of drawing t", {"p": (times, p.tolist())}, {"uniform": 1 / self.cfg.T})], xlabel="t")
        if self.data.pictures:
            self.draw_behaviour(folder / "behaviour.png")

    def draw_steps(self, path):
        """Accuracy and latency of the reverse chain against its steps, forward-free inference as a level."""
        steps = sorted({1, 2, 3, 5, 10, self.cfg.T} & set(range(1, self.cfg.T + 1)))
        chain = [self.evaluate("test", "chain", n) for n in steps]
        free = self.evaluate("test", "forward_free")
        curves(path, [(title, {"chain": (steps, [m[key] for m in chain])}, {"forward-free": free[key]})
                      for title, key in (("Recall@20 on test", "Recall@20"), ("ms per 1,000 users", "ms per 1,000 users"))],
               xlabel="reverse steps at inference")

    def draw_behaviour(self, path, most=8):
        """One user's row before (what was clicked) and after (x_hat): the clicks and the best unseen items, with pictures."""
        data, (users, items) = self.data, self.encoded()
        user = int(data.test[len(data.test) // 2, 0])
        scores, mine = (items @ users[user]).cpu(), data.train[:, 0] == user
        accidents = set(data.train[mine & data.noise, 1].tolist())
        wanted = set(data.test[data.test[:, 0] == user, 1].tolist())
        clicked = data.train[mine, 1]
        clicked = clicked[scores[clicked].argsort(descending=True)]
        best = top_k(users, items, torch.tensor([user], device=self.device), most, self.seen)[0][0].cpu()

        def cells(ids, before, marked, mark):
            return [(picture, f"{data.titles[i]}: {before} -> {scores[i]:.2f}{mark * (i in marked)}")
                    for picture, i in zip(data.pictures(ids), ids.tolist(), strict=True)]

        rows = [cells(clicked, 1, accidents, " (accident)"), cells(best, 0, wanted, " (held out)")]
        rows = [row[n : n + most] for row in rows for n in range(0, len(row), most)]
        panels(path, rows, title=f"User {user}: behaviour before -> after one call. First the clicks, then the best unseen items")

    def planted(self):
        """What the built-in shop knows and the model was never told: which clicks were accidents."""
        if self.data.noise is None:
            return []
        users, items = (x.cpu() for x in self.encoded())
        user, item = self.data.train.T
        scores = (users[user] * items[item]).sum(1)
        lowest = roc_auc(-scores, self.data.noise)
        return [f"denoising: an accidental click comes back lower than a meant one in {100 * lowest:.0f} % of pairs "
                "(50 % is chance)"]

    def rivals(self):
        """Test metrics of popularity and of DiffRec's chain on the same batches for as many steps, chosen on validation too."""
        if self.cfg.model != "ld4mrec" or parallel.world() > 1:
            return {}
        rivals = {name: dataclasses.replace(self.cfg, **self.ablations[name]) for name in ("popularity", "DiffRec")}
        return {name: train_quietly(lambda cfg: Task(cfg, self.device), cfg).evaluate("test") for name, cfg in rivals.items()}


def inject(data, share):
    """Add round(share E) fake training clicks, marked as noise: a click's user, a uniform item in none of the user's splits."""
    if not share:
        return data
    draw, (E, I) = generator(0, 17), (len(data.train), data.items)
    real = torch.cat([data.train, data.valid, data.test])
    user = data.train[torch.randint(E, (4 * int(share * E) + 64,), generator=draw), 0]
    keys = user * I + torch.randint(I, (len(user),), generator=draw)
    keys = keys[~torch.isin(keys, real[:, 0] * I + real[:, 1])]
    keys = torch.tensor([*dict.fromkeys(keys.tolist())][: round(share * E)], dtype=torch.int64)   # distinct, in the order drawn
    order = torch.cat([data.train[:, 0] * I + data.train[:, 1], keys]).argsort()
    pairs = torch.cat([data.train, torch.stack([keys // I, keys % I], 1)])[order]
    noise = data.noise if data.noise is not None else torch.zeros(E, dtype=torch.bool)
    noise = torch.cat([noise, torch.ones(len(keys), dtype=torch.bool)])[order]
    return dataclasses.replace(data, train=pairs, noise=noise, source=f"{data.source} + {len(keys):,} fake clicks")
