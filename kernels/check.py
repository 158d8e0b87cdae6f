"""The compile gate: every kernel, every launch that can occur, compiled for GPUs that are not here.

    python -m kernels.check                         fails on spills, too much shared memory, narrow loads, atomics, TF32 ...
    python -m kernels.check --update                also rewrites tests/compile_budget.json, to be reviewed as a diff
    python -m kernels.check --target=sm_90 --only=propagate

What a row reports is read from the compiled binary by the `cuobjdump` inside the Triton package (for gfx942, from the
assembly). Registers may grow by 15 % over the budget of this Triton version; everything else is a hard rule.
"""
import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODULES = ("graph", "ranking", "attention", "attribution", "pointwise")
BUDGET = Path(__file__).resolve().parent.parent / "tests" / "compile_budget.json"
SHARED_KIB = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
GROWTH = 1.15                # registers over budget that a change may cost unnoticed


def cases(only, targets):
    """(case, target) for every row of the kernels' own tables that was asked for."""
    for name in MODULES:
        if importlib.util.find_spec(f"kernels.{name}") is None:
            continue
        for case in getattr(importlib.import_module(f"kernels.{name}"), "compile_cases", tuple)():
            for target in case["targets"]:
                if only in case["name"] and (not targets or target in targets):
                    yield case, target


def compile_case(case, target):
    """The compiled kernel, with the hints the launcher would give: pointers and sizes that are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = case["kernel"].real()
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        kind = case["signature"].get(name, "constexpr")
        if kind.endswith(":16"):
            attributes[(position,)] = [["tt.divisibility", 16]]
        signature[name] = kind.removesuffix(":16")
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    constants = {name: value for name, value in case["constants"].items()}
    source = ASTSource(function, signature, constants, attributes)
    options = {"num_warps": case["num_warps"], "num_stages": case.get("num_stages", 3), "enable_fp_fusion": True}
    return triton.compile(source, target=gpu, options=options)


def dump(binary, flag):
    """What cuobjdump says about a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def measure(compiled, target):
    """{registers, stack, shared_kib, wide_loads, narrow_loads, matrix, atomics, tf32} of a compiled kernel."""
    shared = compiled.metadata.shared / 1024
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        number = lambda key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1])  # noqa: E731
        return {"registers": number("vgpr_count"), "stack": number("vgpr_spill_count"), "shared_kib": shared,
                "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)), "narrow_loads": 0,
                "matrix": len(re.findall(r"v_mfma", text)), "atomics": len(re.findall(r"_atomic_", text)), "tf32": False}
    usage, sass = dump(compiled.asm["cubin"], "--dump-resource-usage"), dump(compiled.asm["cubin"], "--dump-sass")
    stack = int(re.search(r"STACK:(\d+)", usage)[1]) + len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return {"registers": int(re.search(r"REG:(\d+)", usage)[1]), "stack": stack, "shared_kib": shared,
            "wide_loads": len(re.findall(r"LDG\.E[.\w]*\.128|LDG\.E\.128|UBLKCP|LDGSTS[.\w]*\.128", sass)),
            "narrow_loads": len(re.findall(r"LDG\.E\.[US](?:8|16)\b", sass)),
            "matrix": len(re.findall(r"\b(?:HMMA|HGMMA|DMMA|QGMMA|UTC\w*MMA|OMMA)", sass)),
            "atomics": len(re.findall(r"\b(?:ATOM|ATOMG|RED)\b", sass)), "tf32": "tf32" in compiled.asm.get("ptx", "")}


def complaints(case, target, seen, budget):
    """Every rule the row breaks, in words."""
    name = f"{case['name']} {target}"
    if seen["stack"]:
        yield f"spills: {seen['stack']} bytes of stack or local loads and stores"
    if seen["shared_kib"] > SHARED_KIB[target]:
        yield f"{seen['shared_kib']:.0f} KiB of shared memory; a block has {SHARED_KIB[target]}"
    if seen["atomics"]:
        yield f"{seen['atomics']} atomics: the same input would not give the same bits"
    if case["kind"] == "product" and not seen["matrix"]:
        yield "no matrix instruction in a kernel that is a product"
    if case["kind"] == "bandwidth" and not seen["wide_loads"] and not case.get("narrow"):
        yield "no 16-byte load in a kernel that is limited by bandwidth"
    if seen["tf32"] and not case.get("tf32"):
        yield "TF32 arithmetic where float32 was promised"
    allowed = budget.get(name, seen["registers"]) * GROWTH
    if seen["registers"] > allowed:
        yield f"{seen['registers']} registers; the budget is {budget[name]}"


def source_hash(case, target):
    """Names everything a measurement depends on: kernel sources, signature, constants, target, Triton version."""
    import triton

    folder = Path(__file__).parent
    text = "".join(path.read_text() for path in sorted(folder.glob("*.py")) if path.stem in ("__init__", *MODULES))
    key = f"{triton.__version__} {target} {case['name']} {case['signature']} {case['constants']} {case['num_warps']} {text}"
    return hashlib.sha256((key + Path(__file__).read_text()).encode()).hexdigest()[:24]


def main():
    parser = argparse.ArgumentParser(prog="python -m kernels.check", description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help="rewrite the register budget of this Triton version")
    parser.add_argument("--target", action="append", help="only this target, e.g. sm_90; may be repeated")
    parser.add_argument("--only", default="", help="only kernels whose name holds this text")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: unset TRITON_INTERPRET: interpreted and compiled kernels cannot share a process")
    import triton

    budgets = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    version = ".".join(triton.__version__.split(".")[:2])
    budget, cache = budgets.setdefault(version, {}), Path(tempfile.gettempdir()) / "septet-compile-check"
    cache.mkdir(exist_ok=True)
    began, bad, rows = time.time(), 0, 0
    print(f"triton {triton.__version__}\n{'kernel':42}{'target':>8}{'regs':>6}{'stack':>7}{'KiB':>6}{'16B loads':>11}{'mma':>5}{'s':>6}")
    for case, target in cases(options.only, options.target):
        start, kept = time.time(), cache / f"{source_hash(case, target)}.json"
        seen = json.loads(kept.read_text()) if kept.exists() else measure(compile_case(case, target), target)
        kept.write_text(json.dumps(seen))
        rows += 1
        print(f"{case['name']:42}{target:>8}{seen['registers']:6}{seen['stack']:7}{seen['shared_kib']:6.0f}"
              f"{seen['wide_loads']:11}{seen['matrix']:5}{time.time() - start:6.1f}", flush=True)
        for words in complaints(case, target, seen, {} if options.update else budget):
            print(f"  FAIL {words}")
            bad += 1
        if options.update:
            budget[f"{case['name']} {target}"] = seen["registers"]
    if options.update:
        BUDGET.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
    print(f"{rows} rows, {bad} complaints, {time.time() - began:.0f} s")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
