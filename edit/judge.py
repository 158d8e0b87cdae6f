"""How DE-Net's edits are judged: was the change made, was the rest kept.

The attribute reader says what it sees in an edit (`verdict`); distances to the source and to the known result, CLIP and the
critic say the rest (`measure`). None of it is a training signal.
"""
import torch

from data import edits, views
from data.metrics import frechet_distance, l1_outside, ssim
from data.reader import agree


def measure(part, data, rows, task):
    """What is measured on each of some edits.   -> {name: (B,)}, and features of the judge"""
    source, edited = part["source"], part["edited"].clamp(-1, 1)
    found = {"L2": (edited - source).square().mean((1, 2, 3)), "features": task.judge.features(edited)}
    if task.read.clip:
        found["CLIP score"] = task.read.agreement(edited, part["asked"])[0]
        found["MP"] = (1 - found["L2"]) * found["CLIP score"]                  # manipulative precision as published
    sentence = task.read(part["asked"])                      # does the critic tell true from false on real pictures?
    found["matched"] = (task.critic(source, task.read(part["true"])) > task.critic(source, sentence)).float()
    if not task.known:
        found["asked"] = (task.critic(edited, sentence) > task.critic(source, sentence)).float()
    if "target" in part:
        found["real"] = task.judge.features(part["target"])
        found["error"] = (edited - part["target"]).abs().mean((1, 2, 3))
    if data.mask:
        mask = data.mask(rows).to(edited.device)
        found |= {"kept L1": l1_outside(edited, source, mask), "kept SSIM": ssim(edited, source, mask)}
    if data.view:
        found |= verdict(task.judge(edited), data.view(rows))
    return found


def verdict(reading, view):
    """What the reader says of edits.   -> changed, rest: (B,) in {0, 1}

    changed  the one thing the sentence asks for is there. Added: shape, colour and texture, anywhere (the size is
             relative); removed: as many things as should be left, the other one among them
    rest     everything else the reader can read is as it was, so nothing else was changed
    """
    before, after, kind, rows = view["before"], view["after"], view["kind"], torch.arange(len(view["kind"]))
    reading = {name: x.cpu() for name, x in reading.items()}
    placed, anywhere, slot = agree(reading, after), agree(reading, after, where=False), view["object"].clamp(min=0)
    changed, rest = torch.zeros(2, len(rows), dtype=torch.bool)
    for name, attribute in views.CHANGES.items():
        now = kind == views.EDITS.index(name)
        others = [placed[a] | ~after["present"] for a in ("found", "shape", "colour", "texture")]
        alone = torch.stack([x if a != attribute else x.scatter(1, slot[:, None], True)
                             for a, x in zip(("found", "shape", "colour", "texture"), others, strict=True)])
        changed = torch.where(now, placed[attribute][rows, slot], changed)
        rest = torch.where(now, alone.all(0).all(1) & placed["background"] & placed["count"], rest)
    whole = torch.stack([placed[a] | ~before["present"] for a in ("found", "shape", "colour", "texture")]).all(0)
    now = kind == views.EDITS.index("background")
    changed, rest = torch.where(now, placed["background"], changed), torch.where(now, whole.all(1) & placed["count"], rest)
    now = kind == edits.ADD
    there = torch.stack([anywhere[a][:, 1] for a in ("found", "shape", "colour", "texture")]).all(0)
    changed, rest = torch.where(now, there & placed["count"], changed), torch.where(now, whole[:, 0] & placed["background"], rest)
    now = kind == edits.ADD + 1
    changed = torch.where(now, placed["found"][:, 0] & placed["count"], changed)
    other = torch.stack([placed[a][:, 0] for a in ("shape", "colour", "texture")]).all(0)
    rest = torch.where(now, other & placed["background"], rest)
    return {"changed": changed.float(), "rest": rest.float()}


def summarise(parts, task):
    """Means over all edits and, where kinds differ, for each kind; the Frechet distance with its features' name."""
    kinds = [kind for part in parts for kind in part["kind"]]
    found = {name: torch.cat([part[name].float().cpu() for part in parts]) for name in parts[0] if name != "kind"}
    features, real = found.pop("features"), found.pop("real", None)
    if "changed" in found:
        found["success"] = found["changed"] * found["rest"]
    scores = {name: float(x.nanmean()) for name, x in found.items()}
    if real is None:
        rows = range(min(len(task.data["test"]), len(features)))
        real = task.judge.features(task.data["test"].source(rows).to(task.device)).cpu()
    scores["Frechet"] = float(frechet_distance(features, real, "reader"))
    for kind in dict.fromkeys(kinds) if task.known else ():
        mine = torch.tensor([k == kind for k in kinds])
        scores |= {f"{kind} {name}": float(found[name][mine].nanmean())
                   for name in ("changed", "rest", "kept L1", "kept SSIM", "MP", "matched")}
    if task.known:                                           # kinds count alike, however many of each were drawn
        scores["changed"] = sum(scores[f"{kind} changed"] for kind in views.EDITS) / len(views.EDITS)
    return scores
