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
SMALL = {"galip": ["--batch=4"], "denet": ["--batch=4"], "storyimager": ["--batch=4"], "dualvgr": ["--batch=8", "--videos=40"]}
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


@pytest.mark.slow
@every_model
def test_two_processes_agree_with_one_at_the_same_global_batch(name, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for tag, command in (("one", [sys.executable]), ("two", torchrun)):
        options = words(name, 3, 3, f"--tag={tag}", "--device=cpu")
        done = subprocess.run([*command, str(ROOT / "train.py"), *options], cwd=tmp_path, env=env, capture_output=True, text=True,
                              timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = state(tmp_path, name, "one"), state(tmp_path, name, "two")
    # Adam divides a gradient by its own size: where it is nearly 0, rounding decides, hence a share of all numbers and not each.
    far = [(~torch.isclose(two[part][key], value, rtol=1e-3, atol=2e-5)).flatten() for part in one if "optimiser" not in part
           for key, value in one[part].items() if torch.is_tensor(value) and value.is_floating_point()]
    assert torch.cat(far).float().mean() < 5e-3, f"{int(torch.cat(far).sum())} of {len(torch.cat(far))} numbers differ"
