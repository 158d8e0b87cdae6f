"""Every model of the list: the same promises, kept through train.py itself, on sizes that take seconds."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from data.options import fields
from tests.test_train import same

ROOT = Path(__file__).resolve().parent.parent
HERE = [name for name, (module, *_) in train.MODELS.items() if train.module_file(module).exists()]
SMALL = {"galip": ["--batch=4"], "denet": ["--batch=4", "--lessons=8", "--alone=0"], "storyimager": ["--batch=4"],
         "dualvgr": ["--batch=8", "--videos=40"]}
every_model = pytest.mark.parametrize("name", HERE)


def words(name, steps, every, *more):
    return [name, f"--steps={steps}", f"--eval_every={every}", *SMALL.get(name, []), *more]


def state(folder, name, tag="default"):
    return torch.load(folder / f"runs/{name}-{tag}/last.pt", weights_only=True)["state"]


@every_model
def test_every_option_has_a_line_of_help(name, capsys):
    module = train.find_model(name)[1]
    train.main([name, "--help"])
    lines = {line.split("=")[0].strip(" -"): line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")}
    for field in fields(module.Config):
        assert field in lines and len(lines[field].split(maxsplit=1)[1]) > 8, f"--{field} of {name} is not explained"


@every_model
def test_the_contract_of_a_task_is_kept(name):
    task = train.find_model(name)[1].Task
    assert task.better in ("higher", "lower") and next(iter(task.ablations.values())) == {}
    module, overrides = train.find_model(name)[1:]
    for row in task.ablations.values():
        module.Config(**overrides | row)                    # every row is a legal configuration


@pytest.mark.slow
@every_model
def test_four_steps_equal_two_then_two(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(words(name, 4, 2, "--tag=whole", "--device=cpu"))
    train.main(words(name, 2, 2, "--device=cpu"))
    train.main(words(name, 4, 2, "--device=cpu"))
    assert same(state(tmp_path, name, "whole"), state(tmp_path, name))
    results = [json.loads((tmp_path / f"runs/{name}-{tag}/result.json").read_text()) for tag in ("whole", "default")]
    one, two = ({k: x for k, x in r["metrics"].items() if not k.startswith("ms ")} for r in results)      # times differ
    assert one == two and list((tmp_path / f"runs/{name}-default").glob("*.png"))


FIRST_GRADIENT = """
import sys
import torch
import train
from data import parallel
from data.batches import seed_from
from data.options import parse

name, module, fixed = train.find_model(sys.argv[1])
task, _ = train.build(module, module.Config(**fixed | parse(sys.argv[3:], module.Config)), train.Run(device="cpu"))
optimisers = [part for part in task.saved.values() if isinstance(part, torch.optim.Optimizer)]
for step, batch in enumerate(task.batches(0, 0, 1 + (name == "dualvgr"))):
    for optimiser in optimisers:
        torch._foreach_zero_([state["exp_avg"] for state in optimiser.state.values()] or [torch.zeros(1)])
    torch.manual_seed(seed_from(0, step))
    task.update(batch, step)
if parallel.rank() == 0:                                     # Adam's running mean, if it was zero, is the gradient, scaled
    torch.save([torch.cat([state["exp_avg"].flatten() for state in optimiser.state.values()])
                for optimiser in optimisers if optimiser.state], sys.argv[2])
parallel.stop()
"""


@pytest.mark.slow
@pytest.mark.parametrize("words", [*([name] for name in HERE), ["storyimager", "--base_steps=0"]], ids=" ".join)
def test_two_processes_have_the_gradient_of_one_at_the_same_global_batch(words, tmp_path):
    """Compared by gradients: Adam's first steps are signs, and where a gradient is nearly 0 rounding decides about them.

    DualVGR by its second: at first padding meets a bias of zero, and the normalisation behind has a slope of 1e12 there.
    """
    name, *more = words
    script = tmp_path / "first_gradient.py"
    script.write_text(FIRST_GRADIENT)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for tag, command in (("one", [sys.executable]), ("two", torchrun)):
        done = subprocess.run([*command, str(script), name, tag, *SMALL.get(name, []), *more], cwd=tmp_path, env=env,
                              capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / tag, weights_only=True) for tag in ("one", "two"))
    assert one
    for a, b in zip(one, two, strict=True):
        assert (a - b).norm() < 1e-3 * a.norm(), f"the gradient is off by {float((a - b).norm() / a.norm()):.1e} of its norm"
