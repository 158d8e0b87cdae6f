"""What a machine does to a run: kills, full disks, folders that cannot be written, two runs at once."""
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from tests.test_train import same

ROOT = Path(__file__).resolve().parent.parent
START = """
import os, sys, torch
import train
torch.set_num_threads(1)
train.MODELS['toy'] = ('tests.toy', {}, '-', 'toy', 1)
sys.argv = ['train.py', *sys.argv[1:]]
try:
    train.main(sys.argv[1:])
except (ValueError, OSError, RuntimeError, MemoryError) as error:
    sys.exit(f'error: {train.explain(error)}')
"""


def start(folder, *words, **options):
    """`python train.py WORDS` as a process of its own, in `folder`, with the toy model known."""
    return subprocess.Popen([sys.executable, "-c", START, *words], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def final(folder, name):
    return torch.load(folder / f"runs/{name}-default/last.pt", weights_only=True)["state"]


def kill_until_done(folder, kills, seed, *words):
    """Kill -9 at random moments, start again, let the last one finish.   -> how many kills met a running process"""
    rng, met = random.Random(seed), 0
    for _ in range(kills):
        process = start(folder, *words)
        log = folder / f"runs/{words[0]}-default/log.jsonl"
        began = time.time()
        while process.poll() is None and not log.exists() and time.time() - began < 60:
            time.sleep(0.02)                                 # the first steps have begun
        time.sleep(rng.random())
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            met += 1
        process.communicate()
    process = start(folder, *words)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-2000:]
    return met


def test_a_kill_at_any_moment_changes_no_bit(tmp_path):
    words = "toy", "--steps=1500", "--save_every=3", "--eval_every=50"     # it saves nearly all the time
    for name in "ab":
        (tmp_path / name).mkdir()
    met = kill_until_done(tmp_path / "a", 2, 0, *words)
    whole = start(tmp_path / "b", *words)
    whole.communicate()
    assert met >= 1 and same(final(tmp_path / "a", "toy"), final(tmp_path / "b", "toy"))


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ("toy", "--steps=6000", "--save_every=2", "--eval_every=100"),
    ("mvgcn", "--steps=60", "--save_every=4", "--eval_every=20", "--data_seed=3"),
    ("ld4mrec", "--steps=40", "--save_every=4", "--eval_every=20"),
], ids=lambda words: words[0])
def test_many_kills_change_no_bit(tmp_path, words):
    """Ten kills a model, thirty in all."""
    for name in "ab":
        (tmp_path / name).mkdir()
    met = kill_until_done(tmp_path / "a", 10, 1, *words)
    out, err = start(tmp_path / "b", *words).communicate()
    assert met >= 5 and same(final(tmp_path / "a", words[0]), final(tmp_path / "b", words[0])), err


def test_a_full_disk_gets_a_sentence_and_keeps_the_last_checkpoint(tmp_path):
    start(tmp_path, "toy", "--steps=20").communicate()
    before = (tmp_path / "runs/toy-default/last.pt").read_bytes()

    def no_room():                                           # writing past 2,000 bytes of a file fails, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    process = start(tmp_path, "toy", "--steps=40", preexec_fn=no_room)
    out, err = process.communicate()
    assert process.returncode == 1 and "Traceback" not in err and "error: " in err and "File too large" in err, err
    assert (tmp_path / "runs/toy-default/last.pt").read_bytes() == before
    out, err = start(tmp_path, "toy", "--steps=40").communicate()
    assert "toy: error" in out, err


def test_a_folder_that_cannot_be_written_gets_a_sentence(tmp_path):
    (tmp_path / "runs").mkdir(mode=0o555)
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(0o755)
    nobody = (lambda: os.setuid(65534)) if os.getuid() == 0 else None      # root may write anywhere
    try:
        process = start(tmp_path, "toy", preexec_fn=nobody)
    except PermissionError:
        pytest.skip("the user nobody may not run this python")
    out, err = process.communicate()
    assert process.returncode == 1 and "Permission denied" in err and "Traceback" not in err, err


def test_a_file_in_the_place_of_the_run_folder_gets_a_sentence(tmp_path):
    (tmp_path / "runs").write_text("not a folder")
    out, err = start(tmp_path, "toy").communicate()
    assert "error: " in err and "Traceback" not in err and (tmp_path / "runs").read_text() == "not a folder", err


def test_two_runs_cannot_write_one_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.MODELS, "toy", ("tests.toy", {}, "-", "toy", 1))
    train.main(["toy", "--steps=20"])
    before = Path("runs/toy-default/last.pt").read_bytes()
    with train.claim(Path("runs/toy-default")), pytest.raises(ValueError, match="another run is writing .* --tag=NAME"):
        train.main(["toy", "--steps=40"])
    assert Path("runs/toy-default/last.pt").read_bytes() == before
    train.main(["toy", "--steps=40"])
    assert json.loads(Path("runs/toy-default/result.json").read_text())["steps"] == 40


def test_memory_that_runs_out_is_answered_with_the_option_to_change():
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")):
        assert "--batch" in train.explain(error)
    assert train.explain(RuntimeError("a bug")) is None and train.explain(ValueError("which file")) == "which file"
