"""Rank unseen items for one user with a trained model, and say why; or look at one item as behaviour sees it.

    python -m gcn.recommend --user 42 --top 10 --why [--ckpt runs/mvgcn-default/best.pt]
    python -m gcn.recommend --item 7 --why [--ckpt runs/befa-default/best.pt]           # where its features look, BeFA's analysis

Every explanation is exact arithmetic on the score F_u . F_i, no approximation: the parts add up to it.
    F = C + M                     score = C.C + C.M + M.C + M.M                     (user first, item second)
    M = sum_m T_m E_m             T_m is what the fuser does to modality m at this node (attention and gates)
    C_u, E_u                      are sums over the user's past items, so each past item carries a part of the score
    E_i = sum_n S_in Z_n          is a sum over look-alikes, so each neighbour carries a part too
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from data.options import from_plain, parse, show_help
from data.pictures import bars, panels
from data.weights import load_checkpoint
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
    checkpoint = load_checkpoint(ckpt)
    config = checkpoint.get("config", {})
    if "model" not in config or "fuser" not in config:
        raise ValueError(f"{ckpt} holds '{checkpoint.get('name')}', not a model of gcn; point --ckpt at a run of mvgcn or befa")
    module = befa_task if config["model"] == "befa" else mgcn_task
    restored = module.Task(from_plain(module.Config, config | ({"root": root} if root else {})), torch.device("cpu"), data)
    for key, part in restored.saved.items():
        if not isinstance(part, torch.optim.Optimizer):
            try:
                part.load_state_dict(checkpoint["state"][key])
            except (RuntimeError, KeyError, ValueError) as error:
                reason = " ".join(str(error).split())[:300]
                raise ValueError(f"{ckpt} does not fit the data in --root={restored.cfg.root or 'builtin'}: {reason}") from None
    restored.model.eval()
    return restored


def check_user(task, user):
    """raises ValueError for an unknown user or one without a training click"""
    history = task.train[task.train[:, 0] == user, 1]
    if not 0 <= user < task.data.users:
        raise ValueError(f"there is no user {user}: ids run from 0 to {task.data.users - 1}; pass one with --user")
    if not len(history):
        known = int(task.train[len(task.train) // 2, 0])
        raise ValueError(f"user {user} has no training click, so nothing is known to recommend from; try --user {known}")
    return history


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
    node, N = model.users + item, model.users + model.items
    behaviour, content = model.user_item_view(), model.content()
    fused = model.fuse(behaviour, content) if content else torch.zeros_like(behaviour)
    (c_u, c_i), (m_u, m_i) = behaviour[[user, node]], fused[[user, node]]
    f_u, f_i = c_u + m_u, c_i + m_i
    parts = {"C.C": c_u @ c_i, "C.M": c_u @ m_i, "M.C": m_u @ c_i, "M.M": m_u @ m_i}
    at_user, at_item = ([], []) if not content else (mixing(model, n, behaviour, content) for n in (user, node))
    modalities, neighbours, L = {}, {}, model.cfg.ui_layers
    degree = torch.bincount(model.train_edges[:, 1], minlength=model.items)[history]
    weight = (degree * len(history)).float().rsqrt()                            # (H,) a_uj of the user's items
    hops = mix_hops(model.ui, torch.cat([model.user.weight, model.item.weight]), [1 / (L + 1)] * L) if L else fused.new_zeros(N, 1)
    carried = weight * (hops[model.users + history] @ f_i) if L else torch.zeros(len(history))
    for k, m in enumerate(model.modalities):
        x = content[k]
        modalities[m] = (c_u + m_u / 2) @ at_item[k] @ x[node] + (c_i + m_i / 2) @ at_user[k] @ x[user]
        carried = carried + weight * (x[model.users + history] @ at_user[k].T @ f_i)
        if model.cfg.item_view and model.cfg.item_layers:
            near, s = (t[item] for t in model.look_alikes[m])                   # (k,), (k,)
            before = model.item_item_view(m, model.purify(m), hops=model.cfg.item_layers - 1)[near]
            neighbours[m] = dict(zip(near.tolist(), (s * (before @ at_item[k].T @ f_u)).tolist(), strict=True))
    score = f_u @ f_i
    return {"score": float(score), "parts": {name: float(x) for name, x in parts.items()},
            "modalities": {m: float(x) for m, x in modalities.items()}, "own": float(score - carried.sum()),
            "past": dict(zip(history.tolist(), carried.tolist(), strict=True)), "neighbours": neighbours}


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
    panels(paths[0], [row], 112, "picture | host without BeFA | with BeFA | nearest items by the encoder | by the adapted feature")
    print("\n".join(caption for _, caption in row[:3]))
    for place, (_, caption) in enumerate(row[3:]):
        print(f"  {caption}  {explorer.title(int(caption.split('#')[1].split(',')[0]))}" if place < 6 else "")
    if "text" in with_.model.modalities and with_.data.titles:
        paths.append(paths[0].with_name(f"{paths[0].stem}-words.png"))
        attribution.draw_words(paths[1], explorer, options.item, without.model, with_.model, **how)
    return paths


def main(argv):
    if "--help" in argv or "-h" in argv:
        return show_help("python -m gcn.recommend", Options)
    typed = parse(argv, Options, command="python -m gcn.recommend")
    options = Options(**typed)
    if "item" in typed:
        if "user" in typed or not options.why:
            raise ValueError("--item ID --why explores one item, --user ID ranks for one user: pass one of the two")
        for path in explore(options):
            print(f"-> {path}")
        return
    ckpt = options.ckpt or "runs/mvgcn-default/best.pt"
    task = restore(ckpt, options.root)
    history = check_user(task, options.user)
    if options.top < 1:
        raise ValueError(f"--top={options.top}: ask for at least one item")
    titles = task.data.titles
    def name(i):
        return f"{titles[i]} (#{i})" if titles else f"item {i}"

    with torch.no_grad():
        users, items = task.model()
        best, scores = top_k(users, items, torch.tensor([options.user]), min(options.top, task.data.items), task.seen)
    print(f"user {options.user} clicked {len(history)} items: " + "; ".join(name(i) for i in history[:8].tolist()))
    if options.why and not isinstance(task.model, MGCN):
        raise ValueError(f"--why explains mgcn and lightgcn; {getattr(task.cfg, 'host', task.cfg.model)} has no views to take "
                         "apart, leave --why out")
    for place, (item, score) in enumerate(zip(best[0].tolist(), scores[0].tolist(), strict=True), 1):
        if item < 0:
            break
        print(f"{place:3}  {score:8.3f}  {name(item)}")
        if options.why:
            why = explain(task.model, options.user, item, history)
            print("\n".join(tell(why, name)))
            if place == 1:
                path = Path(options.out or Path(ckpt).with_name(f"user-{options.user}.png"))
                draw(path, why, f"user {options.user}: why {name(item)} comes first ({why['score']:.3f})", name)
    if options.why:
        print(f"-> {path}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
