"""A model folder in forty lines: noisy linear regression, to test train.py without waiting for a paper."""
from dataclasses import dataclass

import torch

from data import parallel
from data.batches import batch_rows, generator


@dataclass
class Config:
    """Noisy linear regression."""

    data: str = "builtin"    # only the built-in data
    root: str = ""           # unused
    seed: int = 0            # random seed
    steps: int = 60          # optimiser steps
    eval_every: int = 20     # steps between evaluations
    patience: int = 0        # evaluations without improvement before stopping; 0: never
    width: int = 4           # inputs
    lr: float = 0.05         # Adam step size
    noise: bool = True       # add noise to every batch
    explode: int = -1        # the step whose loss becomes NaN
    taps: tuple = (1, 2)     # a tuple of whole numbers


def paper(name):
    """Published sizes."""
    if name != "wide":
        raise ValueError(f"--paper={name} is unknown; there is: wide")
    return {"width": 8}


class Task:
    headline, better = "error", "lower"
    ablations = {"full": {}, "w/o noise": {"noise": False}}
    published = {"full": {"error": 0.1}}

    def __init__(self, cfg, device):
        self.cfg, self.device, self.chance, self.next = cfg, device, {"error": 1.0}, "python train.py toy --eval"
        rows = generator(7)
        self.x = torch.randn(64, cfg.width, generator=rows)
        self.y = self.x.sum(1) / cfg.width**0.5
        self.model = torch.nn.Linear(cfg.width, 1).to(device)         # Eq. 1
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=cfg.lr)
        self.saved = {"model": self.model, "optimiser": self.optimiser}

    def batches(self, seed, start, stop):
        for t in range(start, stop):
            yield batch_rows(64, 16, seed, t)

    def update(self, batch, step):
        noise = torch.randn(len(batch), self.cfg.width) * 0.1 * self.cfg.noise
        rows, noise = parallel.shard(batch), parallel.shard(noise)
        loss = (self.model(self.x[rows] + noise)[:, 0] - self.y[rows]).square().mean()
        if step == self.cfg.explode:
            loss = loss * float("nan")
        parallel.descend(self.optimiser, loss)
        return {"loss": loss.detach()}

    def evaluate(self, split):
        return {"error": (self.model(self.x)[:, 0] - self.y).square().mean()}

    def sample(self, folder):
        (folder / "sample.txt").write_text("seen")
