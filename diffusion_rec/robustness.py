"""Recall against injected fake clicks: LD4MRec beside its rivals, every model trained anew at every level.

    python -m diffusion_rec.robustness --seeds=3 [--out=runs/robustness]          # robustness.png, robustness.json
    python -m diffusion_rec.robustness --pack=FOLDER                              # the same data for other folders' models:
    python train.py mvgcn --data=shop --root=FOLDER/fake-20
"""
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.batches import train_quietly
from data.interactions import SPLITS, load
from data.options import options_of, run
from data.pictures import curves
from diffusion_rec.task import Config, Task, inject

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4)
ROWS = {"LD4MRec": "full", "DiffRec": "DiffRec", "autoencoder": "autoencoder", "LightGCN": "LightGCN"}


@dataclass
class Options:
    """Recall@20 on clean test clicks against the share of fake clicks added to training."""

    seeds: int = 3                # runs per point
    steps: int = 300              # optimiser steps of every run
    out: str = "runs/robustness"  # folder of the picture and the numbers
    pack: str = ""                # write the data with fake clicks to FOLDER/fake-0 ... fake-40 and stop


def pack(folder):
    """The built-in shop at every level as an .npz pack with its features, for `--data=shop --root=FOLDER/fake-20`."""
    clean = load("builtin")
    for level in LEVELS:
        data, where = inject(clean, level), Path(folder) / f"fake-{round(100 * level)}"
        where.mkdir(parents=True, exist_ok=True)
        pairs = {split: getattr(data, split).numpy() for split in SPLITS}
        np.savez(where / "shop.npz", n_users=data.users, n_items=data.items, **pairs)
        for name, x in data.features.items():
            np.save(where / f"{name}_feat.npy", x.numpy())
        print(f"-> {where}: {data}")


def recall(row, level, seed, steps):
    """Recall@20 of a row of --ablate on a share of fake clicks."""
    cfg = Config(**{"steps": steps, "fake": level, "seed": seed} | Task.ablations[row])
    return train_quietly(lambda cfg: Task(cfg, torch.device("cpu")), cfg).evaluate("test")["Recall@20"]


def main(argv):
    options = options_of(argv, Options, "python -m diffusion_rec.robustness")
    if options.pack:
        return pack(options.pack)
    folder, found = Path(options.out), {name: [] for name in ROWS}
    for level in LEVELS:
        for name, row in ROWS.items():
            found[name].append([recall(row, level, seed, options.steps) for seed in range(options.seeds)])
            print(f"{100 * level:3.0f} % fake  {name:12} Recall@20 " + " ".join(f"{x:.4f}" for x in found[name][-1]), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "robustness.json").write_text(json.dumps({"levels": LEVELS, "Recall@20": found}, indent=1))
    means, share = {name: [*map(statistics.mean, rows)] for name, rows in found.items()}, [round(100 * level) for level in LEVELS]
    left = {name: (share, [100 * x / row[0] for x in row]) for name, row in means.items()}
    curves(folder / "robustness.png", [
        ("Recall@20 on clean test clicks", {name: (share, row) for name, row in means.items()}, {}),
        ("what is left of the Recall@20 without fakes, %", left, {})], xlabel="fake clicks added to training, %")
    print(f"-> {folder / 'robustness.png'}")


if __name__ == "__main__":
    run(main)
