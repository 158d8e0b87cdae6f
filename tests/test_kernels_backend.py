"""Which path runs, what is said when it cannot, and the rules of the compile gate."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import kernels
from kernels import backend, dot, interpreting, jit, matrix_units
from kernels.bench import OPS, cpu_clock, measure, page
from kernels.check import BUDGET, MODULES, SHARED_KIB, cases, complaints

if TYPE_CHECKING:
    import triton.language as tl

ROOT = Path(__file__).resolve().parent.parent


def test_use_is_a_statement_or_a_block_that_undoes_it():
    x = torch.ones(2)
    with kernels.use("reference"):
        assert backend(x) == "reference"
        with kernels.use("triton"):
            assert backend(x.to("cuda" if torch.cuda.is_available() else "cpu")) == "triton"
        assert backend(x) == "reference"
    assert backend(x) == "reference"                         # auto on a CPU, although the interpreter is there
    with pytest.raises(ValueError, match='choose "auto", "reference" or "triton"'):
        kernels.use("cuda")


def test_an_error_inside_the_block_undoes_it_too():
    with pytest.raises(KeyError), kernels.use("triton"):
        raise KeyError
    assert backend(torch.ones(2)) == "reference"


@pytest.mark.parametrize("x, unless, sentence", [
    (torch.ones(2, dtype=torch.int64), "", "floating-point tensors, this one is torch.int64"),
    (torch.ones(2, device="meta"), "", "no kernel for device meta"),
    (torch.ones(2), "heads are too wide", "heads are too wide; use")])
def test_asking_for_triton_where_it_cannot_run_says_why(x, unless, sentence):
    with kernels.use("triton"), pytest.raises(ValueError, match=sentence):
        backend(x, unless)
    assert backend(x, unless) == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_cpu_tensor_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not interpreting()
    with kernels.use("triton"), pytest.raises(ValueError, match="needs TRITON_INTERPRET=1"):
        backend(torch.ones(2))


def test_without_triton_the_reference_runs(monkeypatch):
    monkeypatch.setattr("kernels._installed", lambda: False)
    assert backend(torch.ones(2)) == "reference" and matrix_units(torch.ones(2)) == ""
    with kernels.use("triton"), pytest.raises(ValueError, match="pip install triton"):
        backend(torch.ones(2))


@jit
def double(a):
    return a + a


@jit
def product(a, b, out, UPCAST: tl.constexpr):
    """A kernel of this file that calls a device function of this file and one of the package."""
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    tl.store(out + at, double(dot(tl.load(a + at), tl.load(b + at), "ieee", UPCAST)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_find_their_device_functions_at_the_first_launch(dtype, device):
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (0, 1))
    out = torch.zeros(16, 16, device=device)
    product[(1,)](a.to(device), b.to(device), out, UPCAST=interpreting())
    torch.testing.assert_close(out.cpu(), 2 * (a.float() @ b.float()), rtol=1e-5, atol=1e-5)   # bf16 sums are float32 too
    assert product.real() is product.real()
    with pytest.raises(TypeError, match=r"launch it with late\[grid\]"):
        jit(late)(1)


def late(a):
    """Never launched."""


def test_every_row_of_the_gate_names_its_kernel_in_full():
    table = cases()
    assert {name.split()[0] for name, _ in table} == {"propagate", "ranks", "attention", "cosine_map", "grad_cam", "show", "df_block",
                                                      "de_combine"}
    for (name, target), case in table.items():
        function = case["kernel"].function if hasattr(case["kernel"], "function") else case["kernel"].fn
        arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
        assert set(case["signature"]) | set(case["constants"]) == set(arguments), (name, set(arguments))
        assert case["kind"] in ("bandwidth", "product") and {*case.get("also", ())} <= {*SHARED_KIB} and target in SHARED_KIB and case["num_warps"] in (1, 2, 4, 8)


def test_every_row_has_a_budget():
    budgets = json.loads(BUDGET.read_text())
    for version, rows in budgets.items():
        missing = {f"{name} {target}" for name, target in cases()} ^ set(rows)
        assert not missing, f"triton {version}: run python -m kernels.check --update, then review {sorted(missing)[:4]}"


@pytest.mark.parametrize("change, words", [
    ({}, None), ({"stack": 8}, "spills"), ({"shared_kib": 228}, "228 KiB"), ({"atomics": 1}, "atomics"),
    ({"wide_loads": 1}, "1 16-byte loads"), ({"tf32": True}, "TF32"), ({"registers": 47}, "47 registers; the budget is 40")])
def test_the_gate_complains_about_each_broken_rule(change, words):
    seen = {"registers": 46, "stack": 0, "shared_kib": 16, "wide_loads": 4, "matrix": 0, "atomics": 0, "tf32": False}
    said = list(complaints({"kind": "bandwidth", "wide": 2}, "sm_90", {**seen, **change}, 40))
    assert len(said) == (words is not None) and all(words in s for s in said)
    assert "matrix instruction" in next(complaints({"kind": "product"}, "sm_90", seen, 40))
    small = list(complaints({"kind": "bandwidth", "also": ["sm_86"]}, "sm_80", {**seen, "shared_kib": 120}, 40))
    assert small == ["120 KiB of shared memory; a block of sm_86 has 99"]


def test_the_gate_refuses_to_run_in_the_interpreter():
    done = subprocess.run([sys.executable, "-m", "kernels.check", "--only=propagate"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 1 and "unset TRITON_INTERPRET" in done.stderr


def test_kernel_modules_are_listed():
    assert {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"__init__", "check", "bench"} == set(MODULES)


def test_the_benchmark_times_only_what_is_right(capsys):
    x = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
    case = {"case": "sum", "text": "", "limit": 1e-6, "copied": 128, "gathered": 0, "launches": 1, "truth": lambda: x.double().sum(0),
            "functions": {"ours": lambda: x.sum(0), "loop": lambda: sum(x), "wrong": lambda: x.sum(0) + 1}}
    top = {"copy": 64.0, "gather": 1.0, "product": 1.0, "launch": 0.5}
    row = measure(case, cpu_clock, top, 3)
    assert row["best"] == "loop" and row["bound"] == "copy" and row["floor"] == 2.0 and row["ratio"] == row["best_us"] / row["ours"]
    assert "wrong: error" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="sum: our result is wrong"):
        measure({**case, "functions": {"ours": lambda: x.sum(0) * 2, "loop": lambda: x.sum(0)}}, cpu_clock, top, 3)
    op = {"device": "a CPU", "versions": {"python": "3", "torch": "2"}, "seed": 0, "command": "run", "ceilings": top, "rows": [row]}
    text = page({"cpu": {"ranking": op}})
    assert "| sum | " in text and "*not yet measured*" in text.split("## GPU")[1]
    assert {"propagate", "mix_hops", "ranking", "attention", "story", "attribution", "pointwise"} == set(OPS)
