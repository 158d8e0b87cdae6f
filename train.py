"""Train any of the seven models:  python train.py NAME [--option=value ...]       python train.py lists them.

This file owns *when*: options, the loop, logging, evaluating, saving, resuming, ablating. A folder's task.py owns *what*:
`Config` (each field's comment is its --help line) and `Task` (data, networks, one step of the paper, metrics, samples).
A run leaves runs/NAME-TAG/ with config.json, log.jsonl, last.pt, best.pt, curve.png, samples and result.json.
"""
import dataclasses
import difflib
import importlib
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data import parallel, report
from data.batches import seed_from
from data.options import fields, from_plain, page, parse, plain, show_help
from data.weights import load_checkpoint, load_parts, save_checkpoint

MODELS = {  # name: (module, Config overrides, paper, what it does, CPU-minutes)
    "mvgcn": ("gcn.task", {"model": "mgcn"}, "MGCN, MM 2023", "multi-view graphs for multimedia recommendation", 1),
    "befa": ("gcn.befa_task", {}, "BeFA, AAAI 2025", "behaviour-driven feature adapter, attribution analysis", 1),
    "ld4mrec": ("diffusion_rec.task", {}, "LD4MRec", "light diffusion over a user's behaviour", 1),
    "galip": ("gan.task", {}, "GALIP, CVPR 2023", "text to image, CLIP in generator and discriminator", 15),
    "denet": ("edit.task", {}, "DE-Net, AAAI 2023", "text-guided editing by dynamic composition", 15),
    "storyimager": ("story.task", {}, "StoryImager, ECCV 2024", "visualise, continue and complete stories", 12),
    "dualvgr": ("videoqa.task", {}, "DualVGR, TMM 2021", "graph reasoning for video question answering", 3),
}
HELPERS = {  # rivals and pretraining: the same command, the same files
    "lightgcn": ("gcn.task", {"model": "lightgcn"}, "LightGCN, SIGIR 2020", "rival of mvgcn: behaviour only", 1),
    "vbpr": ("gcn.task", {"model": "vbpr"}, "VBPR, AAAI 2016", "rival of mvgcn: content without graphs", 1),
    "popularity": ("gcn.task", {"model": "popularity"}, "-", "rival of mvgcn: most clicked first", 1),
    "clip": ("data.pretrain", {}, "CLIP, ICML 2021", "trains what is shipped in data/weights/", 26),
}
ALIASES = {"mgcn": "mvgcn"}
MAY_CHANGE = {"steps", "eval_every", "patience", "root"}    # may differ between a checkpoint and the run resuming it


@dataclasses.dataclass
class Run:
    """Options of every run."""

    out: str = "runs"        # folder that holds all runs
    tag: str = "default"     # name of this run; its files go to OUT/NAME-TAG/
    seed: int = 0            # every random choice follows from it
    device: str = "auto"     # auto (CUDA if there is one, else CPU), cpu, cuda, cuda:1, mps
    amp: bool = False        # bfloat16 autocast
    save_every: int = 0      # steps between saves of last.pt; 0: at every evaluation
    log_every: int = 20      # steps between lines of log.jsonl
    fresh: bool = False      # start over even if there is a checkpoint
    paper: str = ""          # published sizes, e.g. --paper=baby
    eval: bool = False       # evaluate best.pt (or --ckpt) on the test split, train nothing
    ckpt: str = ""           # another checkpoint for --eval
    ablate: bool = False     # train the paper's ablation and comparison rows, write ablation.md
    seeds: int = 3           # seeds per row of --ablate
    rows: str = ""           # only these rows of --ablate, separated by ';' (the first is compared with)
    profile: int = 0         # print this many of the slowest operations of ten steps, then stop
    summary: bool = False    # print modules, shapes, parameters and paper sections, then stop
    debug: bool = False      # show the traceback of an error


def list_models():
    """Every model: paper, what it does, minutes, and the headline of its run in runs/, if there is one."""
    lines = ["python train.py NAME [--option=value ...]       NAME --help lists the options\n"]
    for group in (MODELS, HELPERS):
        for name, (module, _, paper, line, minutes) in group.items():
            here = f"{minutes:2} CPU-minutes" if module_file(module).exists() else "not here yet"
            done = Path("runs") / f"{name}-default" / "result.json"
            if done.exists():
                result = json.loads(done.read_text())
                here += f", yours: {result['headline']} {result['metrics'][result['headline']]:.4f}"
            lines.append(f"  {name:12} {paper:23} {line:55} {here}")
        lines.append("")
    page(lines)


def module_file(module):
    return Path(__file__).parent / (module.replace(".", "/") + ".py")


def find_model(name):
    """Name on the command line -> (name, module, Config overrides).   raises ValueError with a suggestion"""
    name, known = ALIASES.get(name, name), MODELS | HELPERS
    if name not in known:
        near = difflib.get_close_matches(name, [*known, *ALIASES], 1)
        hint = f"did you mean {near[0]}?" if near else "python train.py lists the models"
        raise ValueError(f"unknown model '{name}'; {hint}")
    module, overrides = known[name][:2]
    if not module_file(module).exists():
        raise ValueError(f"{name} is not here yet; python train.py lists the models that are")
    return name, importlib.import_module(module), overrides


def pick_device(name):
    """auto -> CUDA if there is one, else the CPU.   raises ValueError for a device this machine lacks"""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device={name} is not available here ({reason}); try --device=cpu") from None


def peak_mib(device):
    """Peak memory in MiB: the GPU's allocations, or the process's resident set (not a number where unknown)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:                                     # Windows has no getrusage
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), 1)


class Interrupt:
    """Ctrl-C or SIGTERM lets the current step finish and saves; a second one stops at once."""

    def __enter__(self):
        self.asked, signals = False, (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.ask) for number in signals}
        return self

    def ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# -- what lies in a run's folder --------------------------------------------------------------------------------------


def write_text(path, text):
    """Write aside, then rename: a reader sees the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    os.replace(aside, path)


def claim(folder):
    """An open file that locks the folder against a second run; the system unlocks it even after a kill.

    raises ValueError if another run has it. Windows has no such lock: nothing is claimed there.
    """
    file = open(folder / "lock", "w")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        file.close()
        raise ValueError(f"another run is writing {folder}; wait for it, or pass --tag=NAME to run beside it") from None
    return file


def log(folder, progress, **line):
    """Append one JSON object to log.jsonl."""
    if parallel.rank() == 0:
        with open(folder / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": progress["step"], "seconds": round(progress["seconds"], 3)} | line) + "\n")


def keep(path, name, cfg, task, progress, **extra):
    """Save a checkpoint. last.pt holds optimisers too and leaves the one before as previous.pt: a damaged file costs little."""
    if parallel.rank():
        return
    whole = path.name == "last.pt"
    state = {k: v.state_dict() for k, v in task.saved.items() if whole or not isinstance(v, torch.optim.Optimizer)}
    checkpoint = {"name": name, "config": plain(cfg), "progress": dict(progress), "state": state} | extra
    save_checkpoint(path, checkpoint, path.with_name("previous.pt") if whole else None)


def load_run(path, device="cpu"):
    """A checkpoint that `keep` wrote.   raises FileNotFoundError or ValueError"""
    checkpoint = load_checkpoint(path, device)
    if missing := {"name", "config", "progress", "state"} - checkpoint.keys():
        raise ValueError(f"{path} is no checkpoint of a run: it lacks {', '.join(sorted(missing))}")
    return checkpoint


def newest_checkpoint(folder, device):
    """The newest readable checkpoint of a run, or None if it has none.   raises ValueError if all are damaged"""
    paths = [path for path in (folder / "last.pt", folder / "previous.pt") if path.exists()]
    for path in paths:
        try:
            return load_run(path, device)
        except ValueError as error:
            print(f"{error}; trying the one saved before it")
    if paths:
        raise ValueError(f"no readable checkpoint is left in {folder}; pass --fresh to start over")
    return None


def restore(task, checkpoint, path, optimisers=True):
    """Load a checkpoint into task.saved.   raises ValueError where it does not fit"""
    load_parts(task.saved, checkpoint["state"], f"{path} does not fit this model", optimisers)


def check_same_config(checkpoint, cfg, path):
    """Refuse to continue a run under another configuration, naming the first field that differs."""
    for key, value in plain(cfg).items():
        was = checkpoint["config"].get(key)
        if key not in MAY_CHANGE and was != value:
            raise ValueError(f"checkpoint {path} was trained with {key}={was}, this run asks for {key}={value};\n"
                             f"pass --fresh to start over or --tag=NAME to keep both")


# -- one run ------------------------------------------------------------------------------------------------------------


def build(module, cfg, run):
    """The task on its device, from the run's seed alone."""
    device = parallel.start(pick_device(run.device))
    torch.manual_seed(seed_from(run.seed))
    return module.Task(cfg, device), device


def begin(name, module, run, cfg):
    """Build the task, find the checkpoint to go on from, prepare the folder.   -> task, device, folder, progress, lock"""
    folder = Path(run.out) / f"{name}-{run.tag}"
    checkpoint = None if run.fresh else newest_checkpoint(folder, "cpu")
    if checkpoint:
        check_same_config(checkpoint, cfg, folder / "last.pt")
    task, device = build(module, cfg, run)
    progress = {"step": 0, "best": -math.inf, "best_step": 0, "stale": 0, "seconds": 0.0, "cpu_seconds": 0.0,
                "eval_seconds": 0.0}
    if checkpoint:
        restore(task, checkpoint, folder / "last.pt")
        progress |= checkpoint["progress"]
    lock = None
    if parallel.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        lock = claim(folder)
        for old in () if checkpoint else ("last.pt", "previous.pt", "best.pt", "result.json", "log.jsonl"):
            (folder / old).unlink(missing_ok=True)
        write_text(folder / "config.json", json.dumps({"name": name} | plain(cfg), indent=1))
        lines = report.read_log(folder, progress["step"])
        write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return task, device, folder, progress, lock


def check_finite(recent):
    """Look at the losses of the steps since the last look, in one go.   raises ValueError at NaN or infinity"""
    for step, losses in recent:
        if not all(math.isfinite(value) for value in losses.values()):
            shown = ", ".join(f"{key} {float(value):g}" for key, value in losses.items())
            raise ValueError(f"step {step}: the loss is not finite ({shown}). last.pt keeps the last good state; "
                             "try a smaller --lr")
    recent.clear()


def evaluate(task, split):
    with torch.no_grad():
        return {key: float(value) for key, value in task.evaluate(split).items()}


def validate(name, cfg, task, folder, progress):
    """Evaluate on the validation split, keep the best as best.pt, count evaluations without improvement."""
    began = time.perf_counter()
    metrics = evaluate(task, "valid")
    progress["eval_seconds"] += time.perf_counter() - began
    score = parallel.broadcast(metrics[task.headline] * (1 if task.better == "higher" else -1))
    progress["stale"] += 1
    if score > progress["best"]:
        progress.update(best=score, best_step=progress["step"], stale=0)
        keep(folder / "best.pt", name, cfg, task, progress, metrics=metrics)
    log(folder, progress, **{f"valid {key}": round(value, 6) for key, value in metrics.items()})
    if hasattr(task, "watch") and parallel.rank() == 0:
        task.watch(folder, progress["step"])                # optional: a picture while training, such as samples-000250.png


def loop(name, run, cfg, task, device, folder, progress):
    """Steps until cfg.steps, the end of patience or an interrupt.   -> True if the run is complete"""
    def complete():
        return progress["step"] >= cfg.steps or 0 < getattr(cfg, "patience", 0) <= progress["stale"]

    recent, save_every = [], run.save_every or cfg.eval_every
    began, timed = (time.perf_counter(), time.process_time()), (time.perf_counter(), progress["step"])
    before = progress["seconds"], progress["cpu_seconds"]

    def tick():
        progress.update(seconds=before[0] + time.perf_counter() - began[0],
                        cpu_seconds=before[1] + time.process_time() - began[1])

    bar = tqdm(total=cfg.steps, initial=progress["step"], desc=f"{name} {run.tag}", disable=parallel.rank() > 0)
    with Interrupt() as interrupt, bar:
        for batch in () if complete() else task.batches(run.seed, progress["step"], cfg.steps):
            torch.manual_seed(seed_from(run.seed, progress["step"]))
            with torch.autocast(device.type, torch.bfloat16, enabled=run.amp):
                losses = task.update(batch, progress["step"])
            recent.append((progress["step"], losses))
            progress["step"] = step = progress["step"] + 1
            tick()
            bar.update()
            last, look = step == cfg.steps or interrupt.asked, step % cfg.eval_every == 0 or step == cfg.steps
            if last or look or device.type == "cpu" or step % run.log_every == 0:
                check_finite(recent)                        # one device sync; never saved before it is checked
            if last or step % run.log_every == 0:
                values = {key: round(float(value), 6) for key, value in losses.items()}
                rate = (step - timed[1]) / (time.perf_counter() - timed[0])
                log(folder, progress, **values, steps_per_s=round(rate, 2))
                bar.set_postfix_str(" ".join(f"{key} {value:.4g}" for key, value in values.items()))
                timed = time.perf_counter(), step
            if look:
                validate(name, cfg, task, folder, progress)
                tick()
                timed = time.perf_counter(), step
            if last or complete() or step % save_every == 0:
                keep(folder / "last.pt", name, cfg, task, progress)
            if last or complete():
                break
    return complete()


def fit(name, module, run, cfg, brief=False):
    """Train, keep the best on validation, test once.   -> the content of result.json, or None if interrupted

    brief leaves out samples and rivals (the rows of an ablation)
    """
    task, device, folder, progress, lock = begin(name, module, run, cfg)
    try:
        if loop(name, run, cfg, task, device, folder, progress):
            return finish(name, run, cfg, task, device, folder, progress, brief)
        if parallel.rank() == 0:
            print(f"stopped at step {progress['step']} and saved; the same command goes on from there")
    finally:
        if lock:
            lock.close()


def finish(name, run, cfg, task, device, folder, progress, brief):
    """Test the best of validation once, write result.json, pictures and the closing lines.   -> result.json's content"""
    if (folder / "best.pt").exists():
        restore(task, load_checkpoint(folder / "best.pt", "cpu"), folder / "best.pt", optimisers=False)
    training = progress["seconds"] - progress["eval_seconds"]
    networks = [part for part in task.saved.values() if isinstance(part, torch.nn.Module)]
    result = {
        "model": name, "data": getattr(cfg, "data", ""), "device": str(device), "seed": run.seed,
        "steps": progress["step"], "best_step": progress["best_step"], "seconds": round(progress["seconds"], 2),
        "cpu_seconds": round(progress["cpu_seconds"], 2), "eval_seconds": round(progress["eval_seconds"], 2),
        "ms_per_step": round(1000 * training / max(progress["step"], 1), 3), "split": "test", "metrics": evaluate(task, "test"),
        "chance": task.chance, "parameters": sum(p.numel() for part in networks for p in part.parameters()),
        "peak_mib": peak_mib(device), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "headline": task.headline, "config": plain(cfg),
    }
    if parallel.rank() == 0:
        report.draw_curve(folder, task.headline, task.chance)
        if not brief:
            task.sample(folder)
            result["rivals"] = task.rivals() if hasattr(task, "rivals") else {}
        write_text(folder / "result.json", json.dumps(result, indent=1))
        if not brief:
            closing_lines(folder, result, getattr(task, "next", ""))
    return result


def closing_lines(folder, result, after):
    """Headline, split, chance, rivals, minutes, and the next command to type."""
    metric = result["headline"]
    chance = f"chance {result['chance'][metric]:.4f}, " if metric in result["chance"] else ""
    print(f"{result['model']}: {metric} {result['metrics'][metric]:.4f} on test ({chance}best of validation at step "
          f"{result['best_step']}); {result['seconds'] / 60:.1f} min, {result['ms_per_step']:.1f} ms a step, "
          f"peak {result['peak_mib']} MiB -> {folder}/")
    for rival, metrics in result["rivals"].items():
        print(f"  against {rival}: {metrics[metric]:.4f}")
    if after:
        print(f"next:  {after}")


# -- other modes ----------------------------------------------------------------------------------------------------------


def evaluate_checkpoint(name, module, run, typed):
    """--eval: rebuild the model that a checkpoint describes and print its test metrics beside chance."""
    path = run.ckpt or f"{run.out}/{name}-{run.tag}/best.pt"
    checkpoint = load_run(path)
    if checkpoint["name"] != name:
        raise ValueError(f"{path} holds '{checkpoint['name']}'; type python train.py {checkpoint['name']} --eval")
    moved = {key: value for key, value in typed.items() if key in ("data", "root")}
    task, _ = build(module, from_plain(module.Config, checkpoint["config"] | moved), run)
    restore(task, checkpoint, path, optimisers=False)
    for key, value in evaluate(task, "test").items():
        chance = f"   chance {task.chance[key]:.4f}" if key in task.chance else ""
        print(f"{key:24} {value:.4f}{chance}")


def ablate(name, module, run, typed, configure):
    """--ablate: every row of Task.ablations over the seeds; finished runs are read again, not repeated."""
    task, wanted = module.Task, [row.strip() for row in run.rows.split(";") if row.strip()]
    for row in wanted:
        if row not in task.ablations:
            raise ValueError(f"--rows: there is no row '{row}'; the rows are {'; '.join(task.ablations)}")
    folder, results = Path(run.out) / f"{name}-{run.tag}", {}
    for row in wanted or task.ablations:
        slug = re.sub(r"[^a-z0-9]+", "-", row.lower()).strip("-")
        for seed in range(run.seed, run.seed + run.seeds):
            cfg = configure(typed | task.ablations[row] | {"seed": seed})
            one = dataclasses.replace(run, seed=seed, tag=f"{run.tag}-{slug}-s{seed}")
            done = folder.with_name(f"{name}-{one.tag}") / "result.json"
            result = json.loads(done.read_text()) if done.exists() and not run.fresh else {}
            if result.get("config") != plain(cfg):
                result = fit(name, module, dataclasses.replace(one, fresh=True), cfg, brief=True)
            if result is None:
                return
            results.setdefault(row, []).append(result)
        if parallel.rank() == 0:
            shown = getattr(task, "table", list(result["metrics"])[:4])
            command = "python train.py " + " ".join(sys.argv[1:])
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "ablation.json", json.dumps(results, indent=1))
            write_text(folder / "ablation.md", report.ablation_table(
                results, task.headline, shown, getattr(task, "published", {}), command))
    if parallel.rank() == 0:
        print((folder / "ablation.md").read_text() + f"-> {folder / 'ablation.md'}")


def main(argv):
    """Read the command line and run one mode."""
    if not argv or argv[0] in ("-h", "--help"):
        return list_models()
    name, module, fixed = find_model(argv[0])
    if "--help" in argv or "-h" in argv:
        return show_help(f"python train.py {name}", module.Config, Run)
    typed = parse(argv[1:], module.Config, Run, command=f"python train.py {name}")
    run = Run(**{key: value for key, value in typed.items() if key in fields(Run)})
    published = module.paper(run.paper) if run.paper else {}

    def configure(options):
        return module.Config(**fixed | published | {k: v for k, v in options.items() if k in fields(module.Config)})

    cfg = configure(typed)
    try:
        if run.eval:
            evaluate_checkpoint(name, module, run, typed)
        elif run.ablate:
            ablate(name, module, run, typed, configure)
        elif run.profile:
            report.profile(build(module, cfg, run)[0], run.seed, run.profile)
        elif run.summary:
            report.summary(build(module, cfg, run)[0], run.seed)
        else:
            fit(name, module, run, cfg)
        parallel.wait()
    finally:
        parallel.stop()


def explain(error):
    """What a user can do about an error that is not a bug, in one sentence; None for a bug."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out of memory; try a smaller --batch (and --amp on a GPU); last.pt keeps the last saved state"
    if isinstance(error, OSError) and error.filename2 is None and not isinstance(error, FileNotFoundError):
        return f"{error.filename or 'the run folder'}: {error.strerror or error}; nothing that was saved is lost"
    return str(error) if isinstance(error, ValueError | OSError) else None


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if "--debug" in sys.argv or not explain(error):
            raise
        sys.exit(f"error: {explain(error)}")
