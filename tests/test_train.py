"""The contract of train.py, on a toy folder: options, resuming, faults, modes, two processes."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from data import options, report
from data.batches import train_quietly
from data.options import parse
from tests import toy

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def a_toy_model(monkeypatch, tmp_path):
    monkeypatch.setitem(train.MODELS, "toy", ("tests.toy", {}, "-", "toy", 1))
    monkeypatch.chdir(tmp_path)


def run(*words, tag="default"):
    train.main(["toy", f"--tag={tag}", *words])
    return json.loads(Path(f"runs/toy-{tag}/result.json").read_text())


def weights(tag, file="last.pt"):
    return torch.load(f"runs/toy-{tag}/{file}", weights_only=True)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_a_run_leaves_everything_the_contract_names(capsys):
    result = run()
    folder = Path("runs/toy-default")
    for file in ("config.json", "log.jsonl", "last.pt", "best.pt", "curve.png", "sample.txt", "result.json"):
        assert (folder / file).exists(), file
    for key in ("model", "data", "device", "seed", "steps", "seconds", "split", "metrics", "chance", "parameters"):
        assert key in result
    assert result["metrics"]["error"] < 0.5 < result["chance"]["error"]
    out = capsys.readouterr().out
    assert "chance 1.0000" in out and "next:  python train.py toy --eval" in out


def test_a_rival_is_trained_as_the_same_command_would():
    result = run("--eval_every=7")
    rival = train_quietly(lambda cfg: toy.Task(cfg, torch.device("cpu")), toy.Config(eval_every=7))
    assert rival.evaluate("test")["error"].item() == result["metrics"]["error"] and result["best_step"] % 7 == 0


def test_sixty_steps_equal_forty_then_twenty():
    run(tag="whole")
    run("--steps=40", tag="parts")
    run("--steps=60", tag="parts")
    assert same(weights("whole")["state"], weights("parts")["state"])
    steps = [json.loads(line)["step"] for line in Path("runs/toy-parts/log.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in Path("runs/toy-whole/log.jsonl").read_text().splitlines()]


def test_a_checkpoint_of_another_configuration_is_refused_and_kept():
    run("--steps=20")
    before = Path("runs/toy-default/last.pt").read_bytes()
    with pytest.raises(ValueError, match=r"was trained with width=4, this run asks for width=8;\n.*--fresh .*--tag"):
        run("--width=8")
    assert Path("runs/toy-default/last.pt").read_bytes() == before
    assert run("--width=8", "--fresh")["config"]["width"] == 8


def test_a_damaged_checkpoint_falls_back_to_the_one_before(capsys):
    run("--save_every=20", tag="a")
    Path("runs/toy-a/last.pt").write_bytes(b"half a file")
    run(tag="a")
    assert "last.pt is damaged" in capsys.readouterr().out
    run(tag="b")
    assert same(weights("a")["state"], weights("b")["state"])
    torch.save({"weight": torch.zeros(1)}, "runs/toy-a/last.pt")
    Path("runs/toy-a/previous.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="no readable checkpoint .* --fresh"):
        run(tag="a")
    assert "last.pt is no checkpoint of a run: it lacks config, name, progress, state" in capsys.readouterr().out


def test_a_nan_loss_stops_at_once_and_keeps_the_last_good_state():
    with pytest.raises(ValueError, match=r"step 25: the loss is not finite \(loss nan\)"):
        run("--explode=25")
    assert weights("default")["progress"]["step"] == 20
    assert all(torch.isfinite(t).all() for t in weights("default")["state"]["model"].values())


def test_patience_stops_early_and_stays_stopped():
    first = run("--lr=0.0", "--patience=2", "--steps=400", tag="p")
    assert first["steps"] == 60 and first["best_step"] == 20
    assert run("--lr=0.0", "--patience=2", "--steps=400", tag="p")["steps"] == 60


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    script = ("import sys, train, tests.toy as toy, time\n"
              "train.MODELS['toy'] = ('tests.toy', {}, '-', 'toy', 1)\n"
              "plain = toy.Task.update\n"
              "toy.Task.update = lambda self, b, s: (time.sleep(0.02), plain(self, b, s))[1]\n"
              "train.main(['toy', '--steps=200'])\n")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    log = tmp_path / "runs/toy-default/log.jsonl"
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") >= 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "the same command goes on from there" in out, err
    stopped = weights("default")["progress"]["step"]
    assert 20 <= stopped < 200
    run("--steps=200")
    run("--steps=200", tag="whole")
    assert same(weights("default")["state"], weights("whole")["state"])


def test_eval_prints_the_result_of_the_best_checkpoint(capsys):
    result = run()
    capsys.readouterr()
    train.main(["toy", "--eval"])
    assert f"{result['metrics']['error']:.4f}   chance 1.0000" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="train first"):
        train.main(["toy", "--eval", "--tag=none"])


def test_ablate_writes_means_differences_chance_and_the_papers_numbers(capsys):
    train.main(["toy", "--ablate", "--seeds=2", "--steps=20"])
    text = Path("runs/toy-default/ablation.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert {"row", "full", "w/o noise", "chance"} <= rows.keys()
    assert "error 0.1" in rows["full"] and "1.0000" in rows["chance"] and "seeds 0-1" in text
    stamp = Path("runs/toy-default-full-s1/result.json").stat().st_mtime_ns
    train.main(["toy", "--ablate", "--seeds=2", "--steps=20"])
    assert Path("runs/toy-default-full-s1/result.json").stat().st_mtime_ns == stamp, "a finished row was repeated"
    with pytest.raises(ValueError, match="no row 'nothing'; the rows are full; w/o noise"):
        train.main(["toy", "--ablate", "--rows=nothing"])


def test_peak_counts_what_lives_at_one_time():
    weight = torch.zeros(1000)                               # made outside: not counted, nor are views and in-place results
    with report.Peak() as peak:
        a = [weight + n for n in range(5)]
        b = torch.cat(a).view(50, 100)
        del a
        b.mul_(2)
        assert peak.bytes == 4 * 10_000                      # five pieces and what they were joined to
        b = b * 2 + weight[:100]
    assert peak.bytes == 4 * 15_000                          # the pieces are gone: b, 2 b and their sum


def test_summary_and_profile_print_tables(capsys):
    train.main(["toy", "--summary"])
    out = capsys.readouterr().out
    assert "Linear" in out and "16x4" in out and "Eq. 1" in out
    train.main(["toy", "--profile=5"])
    assert "aten::" in capsys.readouterr().out


def test_paper_sizes_are_reached_by_name():
    assert run("--paper=wide", "--steps=2")["config"]["width"] == 8
    with pytest.raises(ValueError, match="there is: wide"):
        run("--paper=tall")


@pytest.mark.parametrize("words, sentence", [
    (["--wdth=3"], "unknown option --wdth; did you mean --width?"),
    (["--steps=many"], "--steps=many should be a whole number, such as --steps=60"),
    (["--noise=maybe"], "--noise=maybe should be true or false"),
    (["--lr"], "--lr needs a value, such as --lr=0.05"),
    (["steps=3"], "cannot read 'steps=3': options look like --steps=100"),
    (["--taps=1,x"], "--taps=x should be a whole number"),
    (["--device=cuda:99"], "--device=cuda:99 is not available here"),
])
def test_a_mistyped_command_line_is_answered_with_a_sentence(words, sentence):
    with pytest.raises(ValueError) as error:
        run(*words)
    assert sentence in str(error.value)
    assert not Path("runs").exists()


def test_options_take_both_forms_and_keep_their_types():
    typed = parse(["--steps", "3", "--noise", "--taps=4,5", "--lr=1e-2", "--eval-every=7"], toy.Config)
    assert typed == {"steps": 3, "noise": True, "taps": (4, 5), "lr": 0.01, "eval_every": 7}


def test_help_shows_every_field_with_its_comment(capsys):
    train.main(["toy", "--help"])
    out = capsys.readouterr().out
    assert "--width=4" in out and "inputs" in out and "--amp=False" in out and "bfloat16 autocast" in out


def test_help_that_nobody_reads_to_the_end_ends_quietly():
    """`... --help | head -1`: the reader is gone before the page is printed."""
    script = "import sys; sys.stdin.read(); from data import options; options.page(['a line'] * 100_000)"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    process.stdin.close()
    assert (process.stderr.read(), process.wait()) == ("", 0)


def test_a_verb_takes_words_first_and_answers_mistakes_with_a_sentence(capsys, monkeypatch):
    assert options.words_first(["a b", "c", "--width=3"]) == (["a b", "c"], ["--width=3"])
    assert options.options_of(["--width=3"], toy.Config, "python -m toy").width == 3
    with pytest.raises(SystemExit):
        options.options_of(["--width=3", "-h"], toy.Config, "python -m toy")
    assert "python -m toy" in capsys.readouterr().out

    def main(argv):
        options.check_words(toy.Config(data="shop"), data=("builtin", "pack"))

    monkeypatch.setattr(sys, "argv", ["toy"])
    with pytest.raises(SystemExit, match="error: --data=shop is unknown; choose builtin, pack"):
        options.run(main)
    with pytest.raises(ValueError, match="--width=4 is out of range: choose 5 to 9"):
        options.check_ranges(toy.Config(), width=(5, 9))


def test_the_list_names_all_seven_models(capsys):
    train.main([])
    out = capsys.readouterr().out
    for name in ("mvgcn", "befa", "ld4mrec", "galip", "denet", "storyimager", "dualvgr"):
        assert name in out
    with pytest.raises(ValueError, match="did you mean mvgcn"):
        train.main(["mvgnc"])


def test_two_processes_agree_with_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text("import sys, train\ntrain.MODELS['toy'] = ('tests.toy', {}, '-', 'toy', 1)\n"
                      "train.main(['toy', '--tag=two', '--device=cpu'])\n")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    run("--device=cpu", tag="one")
    one, two = weights("one")["state"]["model"], weights("two")["state"]["model"]
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-6)
