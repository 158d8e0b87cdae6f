"""Recall against injected fake clicks: LD4MRec beside its rivals, every model trained anew at every level.

    python -m diffusion_rec.robustness --seeds=3 [--out=runs/robustness]          # robustness.png, robustness.json
    python -m diffusion_rec.robustness --pack=FOLDER                              # the same data for other folders' models:
    python train.py mvgcn --data=shop --root=FOLDER/fake-20
"""
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.interactions import load
from data.options import parse, show_help
from data.pictures import curves
from diffusion_rec.task import Config, Task, inject, train_quietly

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
        np.savez(where / "shop.npz", n_users=data.users, n_items=data.items, **{s: getattr(data, s).numpy() for s in ("train", "valid", "test")})
        for name, x in data.features.items():
            np.save(where / f"{name}_feat.npy", x.numpy())
        print(f"-> {where}: {data}")


def main(argv):
    if "--help" in argv or "-h" in argv:
        return show_help("python -m diffusion_rec.robustness", Options)
    options = Options(**parse(argv, Options, command="python -m diffusion_rec.robustness"))
    if options.pack:
        return pack(options.pack)
    folder, found = Path(options.out), {name: [] for name in ROWS}
    for level in LEVELS:
        for name, row in ROWS.items():
            runs = [train_quietly(Config(**{"steps": options.steps, "fake": level, "seed": seed} | Task.ablations[row]), torch.device("cpu"))
                    for seed in range(options.seeds)]
            found[name].append([run["Recall@20"] for run in runs])
            print(f"{100 * level:3.0f} % fake  {name:12} Recall@20 " + " ".join(f"{x:.4f}" for x in found[name][-1]), flush=True)
    means = {name: [statistics.mean(values) for values in rows] for name, rows in found.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "robustness.json").write_text(json.dumps({"levels": LEVELS, "Recall@20": found}, indent=1))
    share = [round(100 * level) for level in LEVELS]
    curves(folder / "robustness.png", [
        ("Recall@20 on clean test clicks", {name: (share, row) for name, row in means.items()}, {}),
        ("what is left of the Recall@20 without fakes, %", {name: (share, [100 * x / row[0] for x in row]) for name, row in means.items()}, {})],
        xlabel="fake clicks added to training, %")
    print(f"-> {folder / 'robustness.png'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
