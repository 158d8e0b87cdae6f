"""Rank unseen items for one user with a trained model, and say why; or look at one item as behaviour sees it.

    python -m gcn.recommend --user 42 --top 10 --why [--ckpt runs/mvgcn-default/best.pt]
    python -m gcn.recommend --item 7 --why [--ckpt runs/befa-default/best.pt]           # where its features look, BeFA's analysis

Every explanation is exact arithmetic on the score F_u . F_i, no approximation: the parts add up to it.
    F = C + M                     score = C.C + C.M + M.C + M.M                     (user first, item second)
    M = sum_m T_m E_m             T_m is what the fuser does to modality m at this node (attention and gates)
    C_u, E_u                      are sums over the user's past items, so each past item carries a part of the score
    E_i = sum_n S_in Z_n          is a sum over look-alikes, so each neighbour carries a part too
"""
from dataclasses import dataclass
from pathlib import Path

import torch

from data.options import from_plain, options_of, run
from data.pictures import bars, panels
from data.weights import load_parts, open_run
from gcn import attribution, befa_task
from gcn import task as mgcn_task
from gcn.mgcn import MGCN, fusion_scales
from kernels.graph import mix_hops
from kernels.ranking import top_k


@dataclass
class Options:
    """Recommend items to one user and explain the scores, or explore one item."""

    user: int = -1                                # id of the user, 0 and up
    item: int = -1                                # id of an item to explore instead, with a run of befa
    top: int = 10                                 # length of the list
    why: bool = False                             # split the scores, name neighbours and past items, draw a picture
    ckpt: str = ""                                # a checkpoint; empty: runs/mvgcn-default/best.pt, befa-default with --item
    root: str = ""                                # folder of the real data, if it is not where it was in training
    behaviour: str = "id"                         # what an item's maps are compared with: id, its own vector, or graph
    variant: str = "A"                            # maps by location cosine (A) or by gradients (B)
    out: str = ""                                 # where to write the picture; empty: beside the checkpoint


def restore(ckpt, root="", data=None):
    """The task a checkpoint describes, with its weights.   raises ValueError or FileNotFoundError, one sentence"""
    config, state = open_run(ckpt, "mvgcn", "befa", "lightgcn", "vbpr", "popularity")
    module = befa_task if config["model"] == "befa" else mgcn_task
    task = module.Task(from_plain(module.Config, config | ({"root": root} if root else {})), torch.device("cpu"), data)
    load_parts(task.saved, state, f"{ckpt} does not fit the data in --root={task.cfg.root or 'builtin'}")
    task.model.eval()
    return task


def mixing(model, node, behaviour, content):
    """T_m of one node: fused content M = sum_m T_m E_m (+ a constant for concat).   -> (M, D, D)

    behaviour (N, D), content M x (N, D). For the paper's fuser T_m = diag(a_m (s - r sum_k G_k) + r G_m), Eq. 11-15.
    """
    cfg, D, M = model.cfg, behaviour.shape[1], len(content)
    if cfg.fuser == "concat":
        return torch.stack(model.mixer.weight.split(D, dim=1))
    gates = torch.zeros(M, D)
    if cfg.fuser == "baf":
        gates = torch.stack([torch.sigmoid(model.preference[m](behaviour[node])) for m in model.modalities])
    if cfg.fuser == "mean" or M == 1:
        return torch.diag_embed(gates if cfg.fuser == "baf" else torch.full((M, D), 1 / M))
    attention = model.attention([x[node, None] for x in content])[0]           # (M,)
    s, r = fusion_scales(cfg.fusion, M)
    return torch.diag_embed(attention[:, None] * (s - r * gates.sum(0)) + r * gates)


@torch.no_grad()
def explain(model, user, item, history):
    """Where F_u . F_i comes from.   -> {"score", "parts", "modalities", "past", "own", "neighbours"}, plain numbers

    parts        C.C, C.M, M.C, M.M, which add up to the score
    modalities   m's share of C.M + M.C + M.M, the M.M term halved between the two sides
    past         {item: what it carried}; with `own`, the user's own vector, they add up to the score
    neighbours   {m: {item: what the look-alike put into the score through S_m}}
    """
    cfg, node, past = model.cfg, model.users + item, model.users + history
    behaviour, content = model.user_item_view(), model.content()
    fused = model.fuse(behaviour, content) if content else torch.zeros_like(behaviour)
    (c_u, c_i), (m_u, m_i) = behaviour[[user, node]], fused[[user, node]]
    f_u, f_i = c_u + m_u, c_i + m_i
    parts = {"C.C": c_u @ c_i, "C.M": c_u @ m_i, "M.C": m_u @ c_i, "M.M": m_u @ m_i}

    degree = torch.bincount(model.train_edges[:, 1], minlength=model.items)[history]
    weight = (degree * len(history)).float().rsqrt()                            # (H,) a_uj of the user's items
    carried = torch.zeros(len(history))
    if cfg.ui_layers:                                                           # C_u: E_u and what is a hop behind the past items
        nodes = torch.cat([model.user.weight, model.item.weight])
        carried = weight * (mix_hops(model.ui, nodes, [1 / (cfg.ui_layers + 1)] * cfg.ui_layers)[past] @ f_i)

    modalities, neighbours = {}, {}
    at_user, at_item = (mixing(model, n, behaviour, content) for n in (user, node)) if content else ((), ())
    for m, x, T_u, T_i in zip(model.modalities, content, at_user, at_item, strict=True):
        modalities[m] = float((c_u + m_u / 2) @ T_i @ x[node] + (c_i + m_i / 2) @ T_u @ x[user])
        carried = carried + weight * (x[past] @ T_u.T @ f_i)
        if cfg.item_view and cfg.item_layers:
            near, s = (t[item] for t in model.look_alikes[m])                   # (k,), (k,)
            before = model.item_item_view(m, model.purify(m), hops=cfg.item_layers - 1)[near]
            neighbours[m] = dict(zip(near.tolist(), (s * (before @ T_i.T @ f_u)).tolist(), strict=True))
    return {"score": float(f_u @ f_i), "parts": {name: float(x) for name, x in parts.items()}, "modalities": modalities,
            "own": float(f_u @ f_i - carried.sum()), "past": dict(zip(history.tolist(), carried.tolist(), strict=True)),
            "neighbours": neighbours}


def strongest(table, name, count=3):
    """The largest entries of {item: number} as words."""
    best = sorted(table.items(), key=lambda pair: -pair[1])[:count]
    return ", ".join(f"{name(i)} {x:+.3f}" for i, x in best) or "none"


def tell(why, name):
    """Lines under one recommended item."""
    lines = ["parts  " + "  ".join(f"{key} {x:+.3f}" for key, x in why["parts"].items())]
    if why["modalities"]:
        lines.append("content by modality  " + "  ".join(f"{m} {x:+.3f}" for m, x in why["modalities"].items()))
    lines.append(f"past items that carried it  {strongest(why['past'], name)}; own vector {why['own']:+.3f}")
    lines += [f"look-alikes by {m}  {strongest(table, name)}" for m, table in why["neighbours"].items()]
    return ["      " + line for line in lines]


def draw(path, why, title, name):
    """Bars for one item: the four parts, the modalities, the five strongest past items and the user's own vector."""
    past = sorted(why["past"].items(), key=lambda pair: -abs(pair[1]))[:5]
    bars(path, {f"{key}  (user, item)": x for key, x in why["parts"].items()}
         | {f"content: {m}": x for m, x in why["modalities"].items()}
         | {f"past: {name(i)}": x for i, x in past} | {"the user's own vector": why["own"]}, title)


def explore(options):
    """Panel and words of one item: what the host's content looks at without and with BeFA.   -> paths written"""
    ckpt = options.ckpt or "runs/befa-default/best.pt"
    with_ = restore(ckpt, options.root)
    if with_.cfg.model != "befa":
        raise ValueError(f"{ckpt} is a run of {with_.cfg.model}, and --item compares a host without and with BeFA; train one "
                         "with python train.py befa")
    if not 0 <= options.item < with_.data.items:
        raise ValueError(f"there is no item {options.item}: ids run from 0 to {with_.data.items - 1}; pass one with --item")
    explorer = attribution.Explorer(with_.data, with_.cfg.encoder)
    host = Path(ckpt).with_name("host.pt")
    if not host.is_file():
        raise FileNotFoundError(f"{host} is missing: the same host without BeFA, which a finished run of befa leaves there")
    without, how = restore(host, options.root, with_.data), {"behaviour": options.behaviour, "variant": options.variant}
    paths = [Path(options.out or Path(ckpt).with_name(f"item-{options.item}.png"))]
    row = explorer.row(options.item, without.model, with_.model, **how)
    panels(paths[0], [row], 112, attribution.COLUMNS)
    print("\n".join(caption for _, caption in row))
    if "text" in with_.model.modalities and with_.data.titles:
        paths.append(paths[0].with_name(f"{paths[0].stem}-words.png"))
        attribution.draw_words(paths[1], with_.data, options.item, without.model, with_.model, **how)
    return paths


@torch.no_grad()
def rank(options):
    """The list of one user, and why.   -> paths written"""
    ckpt, user = options.ckpt or "runs/mvgcn-default/best.pt", options.user
    task = restore(ckpt, options.root)
    history, name, paths = task.data.history(user), task.data.name, []
    if options.top < 1:
        raise ValueError(f"--top={options.top}: ask for at least one item")
    if options.why and not isinstance(task.model, MGCN):
        raise ValueError(f"--why explains mgcn and lightgcn; {getattr(task.cfg, 'host', task.cfg.model)} has no views to take "
                         "apart, leave --why out")
    best, scores = top_k(*task.model(), torch.tensor([user]), min(options.top, task.data.items), task.seen)
    print(f"user {user} clicked {len(history)} items: " + "; ".join(map(name, history[:8].tolist())))
    for place, (item, score) in enumerate(zip(best[best >= 0].tolist(), scores[best >= 0].tolist(), strict=True), 1):
        print(f"{place:3}  {score:8.3f}  {name(item)}")
        if options.why:
            why = explain(task.model, user, item, history)
            print("\n".join(tell(why, name)))
            if place == 1:
                paths = [Path(options.out or Path(ckpt).with_name(f"user-{user}.png"))]
                draw(paths[0], why, f"user {user}: why {name(item)} comes first ({why['score']:.3f})", name)
    return paths


def main(argv):
    options = options_of(argv, Options, "python -m gcn.recommend")
    if options.item >= 0 and (options.user >= 0 or not options.why):
        raise ValueError("--item ID --why explores one item, --user ID ranks for one user: pass one of the two")
    for path in explore(options) if options.item >= 0 else rank(options):
        print(f"-> {path}")


if __name__ == "__main__":
    run(main)
