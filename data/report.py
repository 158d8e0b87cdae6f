"""What a run tells its reader: the log, curve.png, ablation.md, --profile, --summary, and how much memory something takes."""
import inspect
import json
import math
import re
import statistics
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.pictures import curves


def read_log(folder, upto=math.inf):
    """Whole lines of log.jsonl up to a step; a kill may have left half a line, or lines that will be written again."""
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    lines = [json.loads(line) for line in lines if line.endswith("}")]
    return [line for line in lines if line["step"] <= upto]


def draw_curve(folder, headline, chance):
    """curve.png: every loss on the left, the validation headline with its chance level on the right."""
    losses, valid = {}, ([], [])
    for line in read_log(folder):
        for key in sorted(line.keys() - {"step", "seconds", "steps_per_s"}):
            if key.startswith("valid ") and key != f"valid {headline}":
                continue
            xs, ys = valid if key.startswith("valid ") else losses.setdefault(key, ([], []))
            xs.append(line["step"])
            ys.append(line[key])
    level = {"chance": chance[headline]} if headline in chance else {}
    curves(folder / "curve.png", [("training loss", losses, {}),
                                  (f"validation {headline}", {headline: valid} if valid[0] else {}, level)])


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def ablation_table(results, headline, shown, published, command):
    """Rows of runs -> Markdown: mean +- std over seeds, the paired difference to the first row, chance, the paper.

    results    {row: [result.json of seed 0, 1, ...]}, the first row is what the others are compared with
    published  {row: {metric: the paper's number}}
    """
    first = next(iter(results.values()))
    about = first[0]
    seeds = f"seeds {first[0]['seed']}-{first[-1]['seed']}"
    clock, unit = ("cpu_seconds", "CPU-s") if about["device"] == "cpu" else ("seconds", "s")
    head = ["row", *shown, f"difference in {headline}", f"{unit} a run"] + ["paper"] * bool(published)
    lines = [f"# {about['model']}: ablation and comparison", "", f"`{command}`", "",
             f"Data {about['data']}, {seeds}, {about['device']}, torch {about['torch']}. Test split: mean +- standard "
             "deviation over seeds; the difference to the first row is paired by seed, +- its standard error.", "",
             "| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for row, runs in results.items():
        columns = {key: [run["metrics"][key] for run in runs] for key in {*shown, headline}}
        cells = [row] + [f"{statistics.mean(columns[key]):.4f} +- {spread(columns[key]):.4f}" for key in shown]
        gaps = [x - run["metrics"][headline] for x, run in zip(columns[headline], first, strict=False)]
        error = spread(gaps) / math.sqrt(len(gaps))
        cells.append("-" if runs is first else f"{statistics.mean(gaps):+.4f} +- {error:.4f}")
        cells.append(f"{statistics.mean(run[clock] for run in runs):.1f}")
        if published:
            cells.append(", ".join(f"{key} {value}" for key, value in published.get(row, {}).items()) or "-")
        lines.append("| " + " | ".join(cells) + " |")
    chance = [f"{about['chance'][key]:.4f}" if key in about["chance"] else "-" for key in shown]
    lines.append("| " + " | ".join(["chance", *chance, "-", "-"] + ["-"] * bool(published)) + " |")
    return "\n".join(lines) + "\n"


def profile(task, seed, rows):
    """Print the slowest operations of ten training steps, after three to warm up."""
    batches = list(task.batches(seed, 0, 13))
    for step, batch in enumerate(batches[:3]):
        task.update(batch, step)
    cuda = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=kinds) as profiler:
        for step, batch in enumerate(batches[3:], 3):
            task.update(batch, step)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=rows, max_name_column_width=40))


class Peak(TorchDispatchMode):
    """`with Peak() as peak: ...`, then peak.bytes: the most that tensors made inside held at one time, on any device."""

    def __init__(self):
        super().__init__()
        self.live, self.bytes = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def blocks(tree):
            return {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}

        out = function(*args, **(kwargs or {}))
        old = blocks((args, kwargs)).keys() | self.live.keys()           # a view or an in-place operation makes nothing new
        for place, storage in blocks(out).items():
            if place not in old:
                self.live[place] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, place, None)
        self.bytes = max(self.bytes, sum(self.live.values()))
        return out


def shape_of(value):
    """Shape of the first tensor among a module's inputs or outputs."""
    values = value if isinstance(value, tuple | list) else [value]
    first = next((v for v in values if torch.is_tensor(v)), None)
    return "-" if first is None else "x".join(map(str, first.shape)) or "scalar"


def section_of(parent, part, attribute):
    """Section or equation named where `self.attribute` is set, or in the module's own docstring."""
    ours = type(parent).__module__.split(".")[0] != "torch"
    line = re.search(rf"self\.{re.escape(attribute)}\b[^\n]*#([^\n]*)", inspect.getsource(type(parent))) if ours else None
    text = (line[1] if line else "") + " " + (type(part).__doc__ or "").split("\n")[0]
    found = re.search(r"(?:Eqs?|Secs?|Fig|Table)\. ?[\d.\-, ]*\d", text)
    return found[0] if found else ""


def summary(task, seed):
    """Print each module with its shapes in one training step, its parameters and the paper's section."""
    rows, hooks = {}, []
    for key, network in task.saved.items():
        if not isinstance(network, torch.nn.Module):
            continue
        modules = dict(network.named_modules())
        for path, part in modules.items():
            outer, _, attribute = path.rpartition(".")
            rows[f"{key}.{path}".rstrip(".")] = row = [
                type(part).__name__, "-", "-", sum(p.numel() for p in part.parameters()),
                section_of(modules[outer], part, attribute) if path else section_of(task, part, key)]
            hooks.append(part.register_forward_hook(
                lambda _, x, y, row=row: row.__setitem__(slice(1, 3), [shape_of(x), shape_of(y)])))
    task.update(next(iter(task.batches(seed, 0, 1))), 0)
    for hook in hooks:
        hook.remove()
    print(f"{'module':36} {'type':18} {'in':>16} {'out':>16} {'parameters':>12}  paper")
    for path, (kind, x, y, count, where) in rows.items():
        print(f"{path:36} {kind:18} {x:>16} {y:>16} {count:12,}  {where}")
