"""Rank unseen items for one user with a trained model, and say which of their clicks carried each item.

    python -m diffusion_rec.recommend --user 42 --top 10 --why [--ckpt runs/ld4mrec-default/best.pt]

What a click carried is the fall of the score when this one click is taken out of the row: one call on as many rows as there are
clicks. The network is not linear, so the parts need not add up to the score.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from data.options import from_plain, parse, show_help
from data.pictures import bars
from data.weights import load_checkpoint
from diffusion_rec.ld4mrec import LD4MRec
from diffusion_rec.task import Config, Task
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
    checkpoint = load_checkpoint(ckpt)
    config = checkpoint.get("config", {})
    if "soft_target" not in config:
        raise ValueError(f"{ckpt} holds '{checkpoint.get('name')}', not a model of diffusion_rec; point --ckpt at a run of ld4mrec")
    task = Task(from_plain(Config, config | ({"root": root} if root else {})), torch.device("cpu"))
    try:
        task.model.load_state_dict(checkpoint["state"]["model"])
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{ckpt} does not fit the data in --root={task.cfg.root or 'builtin'}: {reason}") from None
    return task


def check_user(task, user):
    """Their training clicks.   raises ValueError for an unknown user or one without a training click"""
    history = task.train[task.train[:, 0] == user, 1]
    if not 0 <= user < task.data.users:
        raise ValueError(f"there is no user {user}: ids run from 0 to {task.data.users - 1}; pass one with --user")
    if not len(history):
        known = int(task.train[len(task.train) // 2, 0])
        raise ValueError(f"user {user} has no training click, so nothing is known to recommend from; try --user {known}")
    return history


@torch.no_grad()
def carried(model, user, history, items):
    """Fall of x_hat at `items` (n,) when one click of the history (H,) is forgotten.   -> (H, n)"""
    users, table = torch.full_like(history, user), model.table()[items].T
    rows = model.clicks.rows(users)
    kept = ~torch.eye(len(history), dtype=torch.bool)                            # row k: all clicks but the k-th
    fewer = Graph(rows.ptr, rows.col, rows.weight * kept.flatten(), rows.shape)
    return (model.encode(users) - model.encode(users, rows=fewer)) @ table


def main(argv):
    if "--help" in argv or "-h" in argv:
        return show_help("python -m diffusion_rec.recommend", Options)
    options = Options(**parse(argv, Options, command="python -m diffusion_rec.recommend"))
    task = restore(options.ckpt, options.root)
    history = check_user(task, options.user)
    if options.top < 1:
        raise ValueError(f"--top={options.top}: ask for at least one item")
    if options.inference not in ("", "forward_free", "one_step", "chain"):
        raise ValueError(f"--inference={options.inference} is unknown; choose forward_free, one_step or chain")
    if options.why and not isinstance(task.model, LD4MRec):
        raise ValueError(f"--why explains ld4mrec, diffrec and autoencoder; {task.cfg.model} has no row to take a click from")
    titles = task.data.titles
    def name(i):
        return f"{titles[i]} (#{i})" if titles else f"item {i}"

    users, items = task.encoded(options.inference or None)
    best, scores = top_k(users, items, torch.tensor([options.user]), min(options.top, task.data.items), task.seen)
    best, scores = best[best >= 0], scores[best >= 0]
    print(f"user {options.user} clicked {len(history)} items: " + "; ".join(name(i) for i in history[:8].tolist()))
    why = carried(task.model, options.user, history, best).T if options.why else [None] * len(best)
    for place, (item, score, parts) in enumerate(zip(best.tolist(), scores.tolist(), why, strict=True), 1):
        print(f"{place:3}  {score:8.3f}  {name(item)}")
        if parts is not None:
            order = parts.argsort(descending=True)[:3].tolist()
            print("      past items that carried it  " + ", ".join(f"{name(int(history[k]))} {float(parts[k]):+.3f}" for k in order))
    if options.why:
        path = Path(options.out or Path(options.ckpt).with_name(f"user-{options.user}.png"))
        bars(path, {f"without {name(int(history[k]))}": -float(why[0][k]) for k in why[0].argsort(descending=True).tolist()},
             f"user {options.user}: change of the score {scores[0]:.3f} of {name(int(best[0]))} when one click is forgotten")
        print(f"-> {path}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
