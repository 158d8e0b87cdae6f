"""The compile gate: every kernel, every launch that can occur, compiled for GPUs that are not here.

    python -m kernels.check                    fails on spills, too much shared memory, narrow loads, atomics, TF32 ...
    python -m kernels.check --update           also rewrites tests/compile_budget.json, to be reviewed as a diff
    python -m kernels.check --target=sm_90 --only=propagate

A kernel module lists its rows in compile_cases(), dictionaries of
    name, kernel, num_warps, num_stages;   targets (all that are listed below)
    signature    argument -> type; "*fp32:16" and "i32:16" carry the launcher's hint: a multiple of 16
    constants    every tl.constexpr
    kind         "bandwidth", or "product": it has matrix instructions on chips with tensor cores (8.0 and newer)
    wide         16-byte loads it must have at least (1): hot loads move 16 bytes
    also         other chips that run the very same tile, whose shared memory must hold it too
    tf32         True where TF32 was asked for
Of every kernel the first row is compiled once more with all its sizes 1: the launcher makes such an argument a constant, which
has no methods, and neither the interpreter nor an ordinary row would notice.
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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

MODULES = ("graph", "ranking", "attention", "attribution", "pointwise")
BUDGET = Path(__file__).resolve().parent.parent / "tests" / "compile_budget.json"
SHARED_KIB = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
GROWTH = 1.15                # registers over budget that a change may cost unnoticed


def cases():
    """{(row name, target): case} of every kernel module, in order."""
    table, met = {}, set()
    for module in MODULES:
        for case in importlib.import_module(f"kernels.{module}").compile_cases():
            table |= {(case["name"], target): case for target in case.get("targets", SHARED_KIB)}
            if case["kernel"].__name__ not in met:
                met.add(case["kernel"].__name__)
                sizes = [name for name, kind in case["signature"].items() if kind.startswith("i32")]
                ones = {"name": f"{case['name']} ones", "kind": "bandwidth", "wide": 0,
                        "signature": {name: kind for name, kind in case["signature"].items() if name not in sizes},
                        "constants": {**case["constants"], **dict.fromkeys(sizes, 1)}}
                table[ones["name"], "sm_90"] = {**case, **ones}
    return table


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
    source = ASTSource(function, signature, dict(case["constants"]), attributes)
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
    """{registers, stack, shared_kib, wide_loads, matrix, atomics, tf32} of a compiled kernel."""
    shared, asm = compiled.metadata.shared / 1024, compiled.asm
    if target.startswith("gfx"):
        text = asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count"))
        return {"registers": registers, "stack": spilled, "shared_kib": shared,
                "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
                "matrix": len(re.findall(r"v_mfma", text)), "atomics": len(re.findall(r"_atomic_", text)), "tf32": False}
    usage, sass = dump(asm["cubin"], "--dump-resource-usage"), dump(asm["cubin"], "--dump-sass")
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass))            # the LOCAL field reads 0 even when a kernel spills
    return {"registers": int(re.search(r"REG:(\d+)", usage)[1]), "shared_kib": shared,
            "stack": int(re.search(r"STACK:(\d+)", usage)[1]) + local,
            "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.E[.\w]*\.128|\bUBLKCP", sass)),
            "matrix": len(re.findall(r"\b(?:HMMA|HGMMA|DMMA|QGMMA|OMMA|UTC\w*MMA)", sass)),
            "atomics": len(re.findall(r"\b(?:ATOM|ATOMG|RED)\b", sass)), "tf32": "tf32" in asm["ptx"]}


def complaints(case, target, seen, budget):
    """Every rule the row breaks, in words. AMD is held to spills, shared memory and atomics: it compiles, no more."""
    amd, wide = target.startswith("gfx"), case.get("wide", 1)
    shared, chip = min((SHARED_KIB[name], name) for name in (target, *case.get("also", ())))
    if seen["stack"]:
        yield f"spills: {seen['stack']} bytes of stack, or local loads and stores"
    if seen["shared_kib"] > shared:
        yield f"{seen['shared_kib']:.0f} KiB of shared memory; a block of {chip} has {shared}"
    if seen["atomics"]:
        yield f"{seen['atomics']} atomics: the same input would not give the same bits"
    if case["kind"] == "product" and not seen["matrix"]:
        yield "no matrix instruction in a kernel that is a product"
    if seen["wide_loads"] < wide and not amd:
        yield f"{seen['wide_loads']} 16-byte loads; the tile has {wide}"
    if seen["tf32"] and not case.get("tf32"):
        yield "TF32 arithmetic where float32 was promised"
    if seen["registers"] > budget * GROWTH:
        yield f"{seen['registers']} registers; the budget is {budget}"


def row(name, target):
    """Measurement of one row, from the cache if nothing it depends on has changed, and its seconds."""
    import triton

    case, start = cases()[name, target], time.time()
    kernel = case["kernel"]
    origin = getattr(kernel, "function", None) or kernel.fn
    text = "".join(Path(p).read_text() for p in (__file__, importlib.import_module("kernels").__file__,
                                                 origin.__code__.co_filename))
    key = (triton.__version__, target, name, text, *(str(case.get(k)) for k in ("signature", "constants", "num_warps",
                                                                                 "num_stages")))
    kept = Path(tempfile.gettempdir()) / "septet-compile-check" / (hashlib.sha256(repr(key).encode()).hexdigest()[:24])
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        seen = json.dumps(measure(compile_case(case, target), target))
        aside = kept.with_suffix(f".{os.getpid()}")
        aside.write_text(seen)
        aside.replace(kept)
    return json.loads(kept.read_text()), time.time() - start


def options_of(arguments):
    parser = argparse.ArgumentParser(prog="python -m kernels.check", description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help="rewrite the register budget of this Triton version")
    parser.add_argument("--target", action="append", choices=list(SHARED_KIB), help="only this GPU; may be repeated")
    parser.add_argument("--only", default="", help="only kernels whose name holds this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = options_of(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: unset TRITON_INTERPRET: interpreted and compiled kernels cannot share a process")
    import triton

    budgets = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    version = ".".join(triton.__version__.split(".")[:2])
    budget, began, bad, table = budgets.setdefault(version, {}), time.time(), 0, cases()
    chosen = [key for key in table if options.only in key[0] and key[1] in (options.target or SHARED_KIB)]
    if not chosen:
        sys.exit(f"error: no kernel called {options.only!r}; there are {', '.join(sorted({n for n, _ in table}))}")
    print(f"triton {triton.__version__}\n{'kernel':42}{'target':>8}{'regs':>6}{'stack':>7}{'KiB':>6}{'16B':>5}{'mma':>5}{'s':>7}")
    with ProcessPoolExecutor(options.jobs) as pool:
        for (name, target), (seen, seconds) in zip(chosen, pool.map(row, *zip(*chosen, strict=True)), strict=True):
            print(f"{name:42}{target:>8}{seen['registers']:6}{seen['stack']:7}{seen['shared_kib']:6.0f}"
                  f"{seen['wide_loads']:5}{seen['matrix']:5}{seconds:7.1f}", flush=True)
            if options.update:
                budget[f"{name} {target}"] = seen["registers"]
            for words in complaints(table[name, target], target, seen, budget.get(f"{name} {target}", seen["registers"])):
                print(f"  FAIL {words}")
                bad += 1
    if options.update:
        known = {f"{n} {t}" for n, t in table}
        budgets[version] = {key: value for key, value in budget.items() if key in known}
        BUDGET.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
    print(f"{len(chosen)} rows, {bad} complaints, {time.time() - began:.0f} s")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
