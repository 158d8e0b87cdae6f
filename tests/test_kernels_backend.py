"""Which path runs, what is said when it cannot, and the rules of the compile gate."""
from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

import kernels
from kernels import attention, attribution, backend, dot, interpreting, jit, matrix_units, pointwise, ranking
from kernels.bench import OPS, attribution_cases, cpu_clock, measure, page, pointwise_cases, verdict
from kernels.check import BUDGET, MODULES, SHARED_KIB, cases, complaints
from kernels.graph import Graph, mix_hops, propagate

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


def test_a_gpu_older_than_triton_takes_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    x = SimpleNamespace(is_cuda=True, is_cpu=False, dtype=torch.float32, device="cuda")
    for capability, path in ((6, 1), "reference"), ((7, 0), "reference"), ((7, 5), "triton"), ((12, 0), "triton"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        kernels._say.cache_clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert [backend(x), backend(x)] == [path, path]
        assert [("7.5, this GPU has" in str(w.message)) for w in said] == [True] * (path == "reference")     # once
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    with kernels.use("triton"), pytest.raises(ValueError, match="needs compute capability 7.5, this GPU has 6.1"):
        backend(x)


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
    assert {name.split()[0] for name, _ in table} == {"propagate", "ranks", "attention", "cosine_map", "grad_cam", "show",
                                                      "df_block", "de_combine"}
    for (name, target), case in table.items():
        function = origin(case["kernel"])
        arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
        assert set(case["signature"]) | set(case["constants"]) == set(arguments), (name, set(arguments))
        assert (case["kind"] in ("bandwidth", "product") and {*case.get("also", ())} <= {*SHARED_KIB}
                and target in SHARED_KIB and case["num_warps"] in (1, 2, 4, 8))


def test_every_kernel_has_a_row_whose_sizes_are_all_one():
    """The launcher turns a size of 1 into a constant; only compiling it shows a kernel that asks it for a method."""
    table = cases()
    ones = [case["kernel"].__name__ for (name, _), case in table.items() if name.endswith(" ones")]
    assert sorted(ones) == sorted({case["kernel"].__name__ for case in table.values()}) and set(cases()) == set(table)
    assert not any(kind.startswith("i32") for (name, _), case in table.items() if name.endswith(" ones")
                   for kind in case["signature"].values())


def origin(kernel):
    """The Python function behind a kernel, launched or not."""
    return kernel.function if hasattr(kernel, "function") else kernel.fn


def name_of(kernel):
    return origin(kernel).__name__


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_what_is_launched_is_what_the_gate_compiles(capability, monkeypatch):
    """Every operation as on a GPU of this capability: tile, warps, stages and precision are those of a row."""
    launched = []

    class Recorder:
        def __init__(self, kernel):
            self.name = name_of(kernel)

        def __getitem__(self, grid):
            return lambda *tensors, **options: launched.append((self.name, options))

    rows = {}
    for (_, target), case in cases().items():
        if target == f"sm_{capability[0]}{capability[1]}" or (target == "sm_90" and case["kind"] == "bandwidth"):
            rows.setdefault(name_of(case["kernel"]), []).append({"num_stages": 3, **case["constants"], **case})
        module = importlib.import_module(origin(case["kernel"]).__module__)
        monkeypatch.setattr(module, name_of(case["kernel"]), Recorder(case["kernel"]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    usual = attention._tile
    monkeypatch.setattr(attention, "_tile", lambda kind, x, keys: usual(
        kind, SimpleNamespace(is_cuda=True, device="cuda", shape=x.shape, element_size=x.element_size), keys))
    tile = ranking.tile
    monkeypatch.setattr(ranking, "tile", lambda _: tile(capability[0]))
    graph = Graph.from_edges(torch.tensor([0] * 40 + [1]), torch.arange(41), (41, 41), torch.rand(41))
    one = torch.zeros(1, dtype=torch.long)
    with kernels.use("triton"):
        for dtype in torch.float16, torch.bfloat16, torch.float32:
            x = lambda *shape: torch.zeros(shape, dtype=dtype, requires_grad=True)  # noqa: B023, E731
            for out in (attention.cross_attention(x(1, 9, 2, 40), x(1, 77, 2, 40), x(1, 77, 2, 40))
                        if dtype != torch.float32 else None,
                        attention.frame_story_attention(x(1, 4, 2, 40), *[x(1, 1, 77, 2, 40)] * 2, *[x(1, 8, 2, 40)] * 2, 0.5,
                                                        (1, 1), (2, 2)) if dtype != torch.float32 else None,
                        pointwise.df_block(x(1, 3, 32, 32), *[x(1, 3)] * 4), pointwise.df_block(x(1, 3, 8, 8), *[x(1, 3)] * 4),
                        pointwise.de_combine(*[x(1, 3, 32, 32)] * 2, *[x(1, 3)] * 3, *[x(1, 1, 32, 32)] * 2)):
                if out is not None:
                    out.sum().backward()
            attention.attention_map(x(1, 9, 2, 40), x(1, 77, 2, 40))
            for width in 16, 32, 64, 100:
                mix_hops(graph, x(41, width).detach(), [0.5, 0.5]), propagate(graph, x(41, width).detach())
            attribution.cosine_map(x(1, 9, 16), x(1, 16))
            attribution.show((x(1, 9, 16, 16), x(1, 9, 16, 16)), x(1, 3, 32, 32))
            ranking.rank_of_targets(x(1, 64), x(9, 64), one, one, Graph.from_edges(one, one, (1, 9)))
    shape = re.compile("BLOCK|^ROWS$|^UNROLL$|^PRECISION$|^num_warps$|^num_stages$")
    assert {name for name, _ in launched} == set(rows)
    for name, options in launched:
        wanted = {key: value for key, value in {"num_stages": 3, **options}.items() if shape.search(key)}
        assert options["enable_fp_fusion"] is True
        assert any(all(row[key] == value for key, value in wanted.items()) for row in rows[name]), (name, wanted)


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
    case = {"case": "sum", "text": "", "limit": 1e-6, "copied": 128, "gathered": 0, "launches": 1,
            "truth": lambda: x.double().sum(0),
            "functions": {"ours": lambda: x.sum(0), "loop": lambda: sum(x), "wrong": lambda: x.sum(0) + 1}}
    top = {"copy": 64.0, "gather": 1.0, "product": 1.0, "launch": 0.5}
    row = measure(case, cpu_clock, top, 3)
    assert (row["best"] == "loop" and row["bound"] == "copy" and row["floor"] == 2.0
            and row["ratio"] == row["best_us"] / row["ours"])
    assert "wrong: error" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="sum: our result is wrong"):
        measure({**case, "functions": {"ours": lambda: x.sum(0) * 2, "loop": lambda: x.sum(0)}}, cpu_clock, top, 3)
    op = {"device": "a CPU", "versions": {"python": "3", "torch": "2"}, "seed": 0, "command": "run", "ceilings": top,
          "rows": [row]}
    text = page({"cpu": {"ranking": op}})
    assert "| sum | " in text and "*not yet measured*" in text.split("## GPU")[1]
    assert "Ours is slower than the best rival in" in text
    assert {"propagate", "mix_hops", "ranking", "attention", "story", "attribution", "pointwise"} == set(OPS)


def test_the_benchmark_ends_with_a_verdict_on_what_is_on_probation():
    def row(case, ours, compiler, clock="graph"):
        times = {"ours": {clock: ours}, "eager": {clock: 50.0}, "compiled": {clock: compiler}}
        return {"case": case, "ratio": min(50.0, compiler) / ours, "clock": clock, "times": times}

    said = list(verdict([row("df_block 32x64x224 forward", 3.0, 2.0), row("df_block 32x64x224 both", 6.0, 8.0),
                         row("df_block 32x512x8 both", 2.0, 1.0), row("de_combine 32x32x256 both", 9.0, 8.0)]))
    assert said[0] == ("Ours is slower than the best rival in 3 of 4 cases: df_block 32x64x224 forward, df_block 32x512x8 both, "
                       "de_combine 32x32x256 both.")
    assert "2 blocks take 8 us, torch.compile's 9 us: keep it" in said[1] and "9 us, torch.compile's 8 us: delete it" in said[2]
    assert "none, a GPU is needed" in list(verdict([row("df_block 4x64x64 both", 1.0, 2.0, "eager")]))[1]
    assert "not decided" in list(verdict([{**row("df_block both", 1.0, 2.0), "times": {"ours": {"graph": 1.0}}}]))[1]
    sizes = [case["case"] for case in pointwise_cases(torch.device("meta"), False)]
    assert sizes == [f"{name} 4x64x64 {passes}" for name in ("df_block", "de_combine") for passes in ("forward", "both")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU brings its own compiler")
def test_without_a_compiler_the_benchmark_still_has_a_rival(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    for cases_of in pointwise_cases, attribution_cases:
        for case in cases_of(torch.device("cpu"), True):
            assert set(case["functions"]) == {"ours", "eager"}, case["case"]
