"""Rank unseen items for one user with a trained model, and say which of their clicks carried each item.

    python -m diffusion_rec.recommend --user 42 --top 10 --why [--ckpt runs/ld4mrec-default/best.pt]

What a click carried is the fall of the score when this one click is taken out of the row: one call on as many rows as there are
clicks. The network is not linear, so the parts need not add up to the score.
"""
from dataclasses import dataclass
from pathlib import Path

import torch

from data.options import check_words, from_plain, options_of, run
from data.pictures import bars
from data.weights import load_parts, open_run
from diffusion_rec.ld4mrec import LD4MRec
from diffusion_rec.task import WORDS, Config, Task
from kernels.graph import Graph
from kernels.ranking import top_k


@dataclass
class Options:
    """Recommend items to one user."""

    user: int = -1                                # id of the user, 0 and up
    top: int = 10                                 # length of the list
    why: bool = False                             # name the clicks that carried each item, draw the first one's
    inference: str = ""                           # forward_free, one_step or chain; empty: as in training
    ckpt: str = "runs/ld4mrec-default/best.pt"    # a checkpoint that train.py wrote
    root: str = ""                                # folder of the real data, if it is not where it was in training
    out: str = ""                                 # where to write the picture; empty: user-ID.png beside the checkpoint


def restore(ckpt, root=""):
    """The task a checkpoint describes, with its weights.   raises ValueError or FileNotFoundError, one sentence"""
    config, state = open_run(ckpt, "ld4mrec")
    task = Task(from_plain(Config, config | ({"root": root} if root else {})), torch.device("cpu"))
    load_parts(task.saved, state, f"{ckpt} does not fit the data in --root={task.cfg.root or 'builtin'}")
    return task


@torch.no_grad()
def carried(model, user, history, items):
    """Fall of x_hat at `items` (n,) when one click of the history (H,) is forgotten.   -> (H, n)"""
    users, table = torch.full_like(history, user), model.table()[items].T
    rows = model.clicks.rows(users)
    kept = ~torch.eye(len(history), dtype=torch.bool)                            # row k: all clicks but the k-th
    fewer = Graph(rows.ptr, rows.col, rows.weight * kept.flatten(), rows.shape)
    return (model.encode(users) - model.encode(users, rows=fewer)) @ table


def main(argv):
    options = options_of(argv, Options, "python -m diffusion_rec.recommend")
    if options.top < 1:
        raise ValueError(f"--top={options.top}: ask for at least one item")
    if options.inference:
        check_words(options, inference=WORDS["inference"])
    task = restore(options.ckpt, options.root)
    history, name, user = task.data.history(options.user), task.data.name, options.user
    if options.why and not isinstance(task.model, LD4MRec):
        raise ValueError(f"--why explains ld4mrec, diffrec and autoencoder; {task.cfg.model} has no row to take a click from")
    users, items = task.encoded(options.inference or None)
    best, scores = top_k(users, items, torch.tensor([user]), min(options.top, task.data.items), task.seen)
    best, scores = best[best >= 0], scores[best >= 0]
    print(f"user {user} clicked {len(history)} items: " + "; ".join(map(name, history[:8].tolist())))
    why = carried(task.model, user, history, best).T if options.why else None                  # (n, H)
    for n, (item, score) in enumerate(zip(best.tolist(), scores.tolist(), strict=True)):
        print(f"{n + 1:3}  {score:8.3f}  {name(item)}")
        if options.why:
            parts = [f"{name(int(history[k]))} {float(why[n, k]):+.3f}" for k in why[n].argsort(descending=True)[:3]]
            print("      past items that carried it  " + ", ".join(parts))
    if options.why:
        path = Path(options.out or Path(options.ckpt).with_name(f"user-{user}.png"))
        bars(path, {f"without {name(int(history[k]))}": -float(why[0, k]) for k in why[0].argsort(descending=True)},
             f"user {user}: change of the score {scores[0]:.3f} of {name(int(best[0]))} when one click is forgotten")
        print(f"-> {path}")


if __name__ == "__main__":
    run(main)
