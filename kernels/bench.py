"""What the kernels cost, beside the best PyTorch way and beside what the machine allows.

    python -m kernels.bench                       every operation, on the GPU if there is one: the command for a GPU owner
    python -m kernels.bench propagate --quick     one operation, small sizes; writes nothing
    python -m kernels.bench --cpu                 the reference paths, one thread, process time

Ceilings are measured first, in the same run: copy, gather of 256-byte rows from a table that fits L2, a large
product, an empty launch; every floor is computed from them. Each function is checked against float64 before it is
timed (a wrong one prints no time); then all rivals take turns. On a GPU: wall time of an eager call (what a training
step feels) and the replay of a CUDA graph after flushing L2 (what the GPU does). The last lines say where ours loses and,
for what is on probation, keep or delete. Writes RESULTS.json, RESULTS.md and RESULTS.png beside this file; a run replaces
only the operations it measured, on its kind of machine.

A new operation is one function `name_cases(device, quick)` that yields dictionaries, entered in OPS:
    case, text  what is measured                          functions   {"ours": f, rival: f, ...}, each () -> tensor
    truth       () -> float64 tensor, or None             limit       relative error that is still right
    copied, gathered, flops, launches                     what it must move, compute and launch at least (0)
"""
import argparse
import contextlib
import importlib.metadata
import json
import platform
import shutil
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from kernels import attention, attribution, pointwise
from kernels.graph import Graph, mix_hops, propagate
from kernels.ranking import rank_of_targets

HERE = Path(__file__).resolve().parent
SEED = 0
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
PATIENCE = 3e6                # microseconds of CPU time for one case: slow cases take fewer turns, at least three


# -- clocks --------------------------------------------------------------------------------------------------


def cpu_clock(functions, repeats):
    """{name: {"eager": median microseconds of this process's CPU time}}, taking turns."""
    times, spent, turn = {name: [] for name in functions}, 0, 0
    while turn < repeats + 2 and (turn < 5 or spent < PATIENCE):
        for name, function in functions.items():
            start = time.process_time_ns()
            function()
            used = (time.process_time_ns() - start) / 1e3
            spent += used
            if turn > 1:                                             # the first two turns warm caches and allocator
                times[name].append(used)
        turn += 1
    return {name: {"eager": statistics.median(t)} for name, t in times.items()}


def gpu_clock(functions, repeats):
    """{name: {"eager": wall us of a call, "graph": of a replay with cold L2, "warm": without flush}}, medians."""
    flush, replays = torch.empty(2**28, dtype=torch.uint8, device="cuda"), {}
    times = {name: {"eager": [], "graph": [], "warm": []} for name in functions}
    for name, function in functions.items():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):                              # warm up beside the main stream, as capture wants
            for _ in range(3):
                function()
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
            replays[name] = graph.replay
        except RuntimeError:                                         # a rival that synchronises: eager time only
            torch.cuda.synchronize()
    for _ in range(repeats):
        for name, function in functions.items():
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            function()
            torch.cuda.synchronize()
            times[name]["eager"].append((time.perf_counter_ns() - start) / 1e3)
            for kind in ("graph", "warm") if name in replays else ():
                if kind == "graph":
                    flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                replays[name]()
                end.record()
                torch.cuda.synchronize()
                times[name][kind].append(begin.elapsed_time(end) * 1e3)
    return {name: {kind: statistics.median(t) for kind, t in kinds.items() if t} for name, kinds in times.items()}


def ceilings(device, clock):
    """What this machine does when it only copies, gathers, multiplies or launches: bytes, operations a us, and us."""
    gpu = device.type == "cuda"
    source = torch.randn(2**28 if gpu else 2**23, device=device)                     # 1 GiB, or 32 MiB
    table = torch.randn((24 if gpu else 4) * 2**20 // 256, 64, device=device)        # 256-byte rows that fit L2
    rows = torch.randint(len(table), (2**20 if gpu else 2**16,), device=device)
    bags = torch.arange(0, len(rows), 32, device=device)
    size, dtype = (8192, torch.bfloat16) if gpu else (768, torch.float32)
    a, one = torch.randn(size, size, device=device, dtype=dtype), torch.zeros(1, device=device)
    out, gathered = torch.empty_like(source), torch.empty(len(rows), 64, device=device)
    times = clock({"copy": lambda: out.copy_(source),
                   "gather": lambda: torch.index_select(table, 0, rows, out=gathered),
                   "gather and add": lambda: F.embedding_bag(rows, table, bags, mode="sum"),
                   "product": lambda: a @ a, "launch": lambda: [one.add_(1) for _ in range(100)]}, 20)
    us = {name: t.get("warm", t["eager"]) for name, t in times.items()}
    return {"copy": 8 * len(source) / us["copy"], "product": 2 * size**3 / us["product"], "launch": us["launch"] / 100,
            "gather": 256 * len(rows) / min(us["gather"], us["gather and add"])}


# -- operations ----------------------------------------------------------------------------------------------


def zipf(count, n, exponent):
    """n ids below count, P(rank r) ~ r^-exponent, shuffled so that hubs are no neighbours.   (n,) int64, CPU"""
    mass = torch.arange(1, count + 1, dtype=torch.float64).pow(-exponent).cumsum(0)
    picked = torch.searchsorted(mass, torch.rand(n, dtype=torch.float64) * mass[-1]).clamp(max=count - 1)
    return torch.randperm(count)[picked]


SIZES = {"TikTok": (9_308, 6_710, 59_541), "Baby": (19_445, 7_050, 118_551), "Sports": (35_598, 18_357, 218_409),
         "Clothing": (39_387, 23_033, 197_338), "20 M": (1_000_000, 400_000, 10_000_000),
         "200 M": (7_000_000, 3_000_000, 100_000_000)}                               # users, items, clicks


def graphs(device, quick):
    """Synthetic graphs of the real sizes: users Zipf(0.5), items Zipf(0.9).   name, graph, text"""
    for name in ("TikTok",) if quick else SIZES if device.type == "cuda" else ("TikTok", "Baby", "Sports", "Clothing"):
        users, items, clicks = SIZES[name]
        graph = Graph.bipartite(zipf(users, clicks, 0.5), zipf(items, clicks, 0.9), users, items).to(device)
        hub = int(graph.counts.max())
        yield name, graph, f"{name} size, {graph.shape[0]:,} nodes, {graph.nnz:,} entries, hub {hub:,}"


def formats(graph, dtype):
    """The same matrix as PyTorch stores it: {name: sparse tensor}."""
    wide, weight = (graph.ptr.long(), graph.col.long()), graph.weight.to(dtype)
    return {"CSR int64": torch.sparse_csr_tensor(*wide, weight, graph.shape, check_invariants=False),
            "CSR int32": torch.sparse_csr_tensor(graph.ptr, graph.col, weight, graph.shape, check_invariants=False),
            "COO": torch.sparse_coo_tensor(torch.stack([graph.row_of, wide[1]]), weight, graph.shape, is_coalesced=True,
                                           check_invariants=False)}


def gather_add(graph, x):
    """The textbook way: a message for every edge, added up."""
    weight = graph.weight[:, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, graph.row_of, x[graph.col] * weight)


def both_of(function, leaves, upstream):
    """() -> gradient of the first leaf: forward and backward, as a training step does; the other gradients come along."""
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)[0]


def hop_cases(device, quick, functions_of, truth_of, title, hops):
    """Cases of propagate and mix_hops: every graph, D 64 and 128, float32 and bf16, forward and both passes."""
    gpu = device.type == "cuda"
    for name, graph, text in graphs(device, quick):
        wide, dense = formats(graph, torch.float64)["CSR int64"], graph.shape[0] * 4
        for width in (64, 128) if gpu and not quick and graph.nnz < 10**8 else (64,):
            for dtype in (torch.float32, torch.bfloat16) if gpu else (torch.float32,):
                x, dy = (torch.randn(graph.shape[0], width, device=device).to(dtype) for _ in range(2))
                functions, leaf = functions_of(graph, dtype), x.clone().requires_grad_()
                size = x.element_size() * width                      # bytes of a row
                numbers = {"limit": LIMITS[dtype], "gathered": hops * graph.nnz * size, "launches": hops,
                           "copied": hops * (2 * size * graph.shape[0] + 8 * graph.nnz + dense)}
                label = f"{title} {name} D={width} {'fp32' if dtype == torch.float32 else 'bf16'}"
                yield {"case": f"{label} forward", "text": text, **numbers,
                       "truth": lambda a=wide, x=x: truth_of(a, x.double()),
                       "functions": {key: (lambda f=f, x=x: f(x)) for key, f in functions.items()}}
                numbers = {key: v if key == "limit" else 2 * v for key, v in numbers.items()}
                yield {"case": f"{label} both", "text": text, **numbers,
                       "truth": lambda a=wide, dy=dy: truth_of(a, dy.double()),      # A is symmetric: dx = p(A) dy
                       "functions": {key: both_of(f, [leaf], dy) for key, f in functions.items()}}


def propagate_cases(device, quick):
    """y = A x against every sparse format, bags and the textbook gather."""
    def functions(graph, dtype):
        table = {name: (lambda x, m=m: m @ x) for name, m in formats(graph, dtype).items()}
        bag = lambda x: F.embedding_bag(graph.col, x, graph.ptr, mode="sum", include_last_offset=True,  # noqa: E731
                                        per_sample_weights=graph.weight.to(dtype))
        if graph.nnz < 10**8:                                        # E x D messages would not fit beyond
            table["gather, index_add"] = lambda x: gather_add(graph, x)
            if device.type == "cuda":
                table["gather, index_add, compiled"] = compiled(table["gather, index_add"])
        return {"ours": lambda x: propagate(graph, x), **table, "embedding_bag": bag}
    yield from hop_cases(device, quick, functions, lambda m, x: m @ x, "propagate", 1)


def mix_hops_cases(device, quick):
    """LightGCN's mean of layers 0..2 against the usual loop, stack and mean."""
    def functions(graph, dtype):
        def usual(m, x):
            layers = [x, m @ x]
            return torch.stack([*layers, m @ layers[1]], 1).mean(1)
        rivals = {f"{name}, stack, mean": (lambda x, m=m: usual(m, x)) for name, m in formats(graph, dtype).items()}
        return {"ours": lambda x: mix_hops(graph, x, [1 / 3] * 3), **rivals}
    yield from hop_cases(device, quick, functions, lambda m, x: (x + m @ x + m @ (m @ x)) / 3, "mix_hops", 2)


def ranking_cases(device, quick):
    """Ranks of the targets against blocks of scores, masked, sorted down to 50."""
    big = {"50 k x 1 M": (50_000, 1_000_000, 300_000)} if device.type == "cuda" else {}
    for name, (users, items, clicks) in ({"TikTok": SIZES["TikTok"]} if quick else
                                         {k: SIZES[k] for k in ("TikTok", "Baby", "Clothing")} | big).items():
        seen = Graph.from_edges(zipf(users, clicks, 0.5), zipf(items, clicks, 0.9), (users, items)).to(device)
        u, i = torch.randn(users, 64, device=device), torch.randn(items, 64, device=device)
        count = min(users, 50_000 if device.type == "cuda" else 4_096)
        user, target = torch.randperm(users)[:count].to(device), torch.randint(items, (count,)).to(device)

        def listed(u=u, i=i, user=user, seen=seen):
            best = []
            for part in user.split(max(1, min(2048, 2**28 // len(i)))):
                scores, rows = u[part] @ i.T, seen.rows(part)
                scores[rows.row_of, rows.col.long()] = -1e10
                best.append(scores.topk(50).indices)
            return torch.cat(best)
        yield {"case": f"ranks {name}", "text": f"{count:,} targets x {items:,} items, D=64", "truth": None, "limit": 0,
               "functions": {"ours": lambda u=u, i=i, user=user, target=target, seen=seen:
                             rank_of_targets(u, i, user, target, seen), "blocks, mask, topk 50": listed},
               "copied": 256 * (count + items), "gathered": 0, "flops": 2 * count * items * 64, "launches": 2}


def compiled(function):
    """torch.compile, or None where it has no compiler to call; compiled at the first call."""
    return torch.compile(function, dynamic=False) if torch.cuda.is_available() or shutil.which("g++") else None


def softmax_by_hand(q, k, v, keep=None):
    """What a textbook writes: scores, mask, softmax, product; (B, H, Q, K) is stored."""
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    s = s if keep is None else s.masked_fill(~keep[:, None, None], -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v)


def sdpa(backend, q, k, v, mask=None):
    """PyTorch's attention, held to one backend on a GPU ("flash", "efficient", "cudnn", "math")."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    chosen = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
              "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}.get(backend)
    with sdpa_kernel(chosen) if chosen else contextlib.nullcontext():
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)


def flex(lengths, B, Q, K, device):
    """FlexAttention, compiled; its block mask is made before the clock runs.   -> function of q, k, v"""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    mask = None if lengths is None else create_block_mask(lambda b, h, i, j: j < lengths[b], B, None, Q, K, device=device)
    fused = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: fused(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)


def eager_map(q, k):
    """attention_map in one line, through (B, H, Q, K)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return (torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5).softmax(-1).mean(1)


def attention_cases(device, quick):
    """Stable Diffusion's cross-attention layers, 77 words: no mask, ragged captions, forward and both passes; the map."""
    gpu = device.type == "cuda"
    dtype, B, H, K = (torch.bfloat16, 20, 8, 77) if gpu else (torch.float32, 1, 8, 77)
    sizes = ((4096, 40), (1024, 80), (1024, 64), (256, 160)) if gpu else ((1024, 40), (256, 80))
    for Q, D in sizes[:1] if quick else sizes:
        q, k, v = inputs = [torch.randn(B, n, H, D, device=device).to(dtype) for n in (Q, K, K)]
        lengths = torch.randint(8, K + 1, (B,), device=device)
        keep = torch.arange(K, device=device) < lengths[:, None]                          # (B, K)
        row, pairs = q.element_size() * H * D, B * H * Q * K                              # bytes of a token, scores
        numbers = {"limit": LIMITS[dtype], "gathered": 0, "text": f"B={B} H={H} Q={Q} K={K} D={D} {dtype}"}
        for label, seen in ("no mask", None), ("ragged", keep):
            mask = None if seen is None else seen[:, None, None]                          # (B, 1, 1, K)
            functions = {"ours": partial(attention.cross_attention, lengths=None if seen is None else lengths),
                         "softmax by hand": partial(softmax_by_hand, keep=seen)}
            functions |= {f"SDPA {name}".strip(): partial(sdpa, name, mask=mask)
                          for name in (("flash", "efficient", "cudnn", "math") if gpu else ("",))}
            if mask is not None:
                functions["SDPA, expanded mask"] = partial(sdpa, "", mask=mask.expand(B, H, Q, K).contiguous())
            if gpu:
                functions["softmax by hand, compiled"] = compiled(functions["softmax by hand"])
                functions["FlexAttention"] = flex(None if seen is None else lengths, B, Q, K, device)
            name, right = f"attention {Q}x{K} D={D} {label}", functions["softmax by hand"]
            yield from two_cases(name, right, functions, inputs, numbers,
                                 {"copied": B * (2 * Q + 2 * K) * row, "flops": 4 * pairs * D, "launches": 1},
                                 {"copied": B * (5 * Q + 6 * K) * row, "flops": 14 * pairs * D, "launches": 3})
        yield {"case": f"attention_map {Q}x{K} D={D}", **numbers, "limit": 1e-5,
               "truth": partial(eager_map, q.double(), k.double()),
               "functions": {"ours": partial(attention.attention_map, q, k), "eager": partial(eager_map, q, k)},
               "copied": B * (Q + K) * row + 4 * B * Q * K, "flops": 2 * pairs * D, "launches": 1}


def two_cases(name, right, functions, inputs, numbers, forward, both):
    """A forward case and one of both passes; `right`, in float64, is the truth of each."""
    leaves, upstream = [x.clone().requires_grad_() for x in inputs], torch.randn_like(inputs[0])
    double = [x.double().requires_grad_() for x in inputs]
    yield {"case": f"{name} forward", **numbers, **forward, "truth": lambda: right(*double).detach(),
           "functions": {key: partial(f, *inputs) for key, f in functions.items()}}
    yield {"case": f"{name} both", **numbers, **both, "truth": both_of(right, double, upstream.double()),
           "functions": {key: both_of(f, leaves, upstream) for key, f in functions.items()}}


def story_cases(device, quick):
    """StoryImager's layers: a board of 2 x 2 frames, 77 words a frame and 8 story tokens; 1 and 8 stories on a GPU."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    for B in (1, 8) if gpu and not quick else (1,):
        for side, D in ((64, 40), (32, 80), (16, 160)) if gpu and not quick else ((32, 40),):
            inputs = [torch.randn(B, *n, 8, D, device=device).to(dtype) for n in ((side**2,), (4, 77), (4, 77), (8,), (8,))]
            board = {"gate": torch.tensor(0.5, device=device), "cells": (2, 2), "board": (side, side)}
            usual = partial(attention.frame_story_reference, **board)
            size, pairs = inputs[0].element_size() * 8 * D * B * side**2, B * 8 * side**2 * 85    # bytes of q, scores
            numbers = {"limit": LIMITS[dtype], "gathered": 0, "text": f"B={B}, board {side} x {side}, D={D} {dtype}"}
            yield from two_cases(f"story B={B} {side}x{side} D={D}", usual,
                                 {"ours": partial(attention.frame_story_attention, **board), "cut, two SDPA, paste": usual},
                                 inputs, numbers, {"copied": 2 * size, "flops": 4 * pairs * D, "launches": 1},
                                 {"copied": 5 * size, "flops": 14 * pairs * D, "launches": 5})


def with_compiled(reference, ours):
    """{"ours", "eager", "compiled"}; on a CPU ours is eager, and where no compiler is at hand nothing is compiled."""
    return {name: f for name, f in {"ours": ours, "eager": reference, "compiled": compiled(reference)}.items() if f}


def attribution_cases(device, quick):
    """From activation and gradient to picture, a batch and one picture; cosine maps."""
    def chain(a, g, image):
        return attribution.show_reference(attribution.grad_cam_reference(a, g), image)[1]

    def ours(a, g, image):
        return attribution.show((a, g), image)[1]

    for B, C in ((1, 512),) if quick or device.type == "cpu" else ((32, 512), (1, 512)):
        a, g = (torch.randn(B, C, 16, 16, device=device) for _ in range(2))
        image, z = torch.rand(B, 3, 224, 224, device=device), torch.randn(B, 256, C, device=device)
        t = torch.randn(B, C, device=device)
        yield {"case": f"show {B}x{C}x16x16 to 224", "text": "Grad-CAM, upsample, colour, blend", "limit": 1e-5, "gathered": 0,
               "truth": partial(chain, a, g, image), "launches": 2, "copied": 8 * a.numel() + 8 * image.numel() + 4 * B * 224**2,
               "functions": {n: partial(f, a, g, image) for n, f in with_compiled(chain, ours).items()}}
        both = with_compiled(attribution.cosine_map_reference, attribution.cosine_map)
        yield {"case": f"cosine_map {B}x256x{C}", "text": "256 places", "limit": 1e-5, "gathered": 0, "launches": 1,
               "truth": partial(F.cosine_similarity, z.double(), t.double()[:, None], dim=2), "copied": 4 * z.numel(),
               "functions": {n: partial(f, z, t) for n, f in both.items()}}


def pointwise_cases(device, quick):
    """The six generator blocks of GALIP and of DE-Net, 32 pictures: channels and side of each. `verdict` adds them up."""
    gpu = device.type == "cuda"
    for name, maps, sizes in (("df_block", 0, ((512, 8), (512, 16), (512, 32), (256, 64), (128, 128), (64, 224))),
                              ("de_combine", 2, ((256, 8), (256, 16), (256, 32), (128, 64), (64, 128), (32, 256)))):
        for C, side in ((64, 64),) if quick or not gpu else sizes:
            B = 32 if gpu and not quick else 4
            x = [torch.randn(B, C, side, side, device=device) for _ in range(2 if maps else 1)]
            x += [torch.randn(B, C, device=device) for _ in range(3 if maps else 4)]
            x += [torch.randn(B, 1, side, side, device=device) for _ in range(maps)]
            right, one = getattr(pointwise, f"{name}_reference"), 4 * x[0].numel()
            yield from two_cases(f"{name} {B}x{C}x{side}", right, with_compiled(right, getattr(pointwise, name)), x,
                                 {"limit": 1e-5, "gathered": 0, "text": f"{B} x {C} x {side} x {side} float32"},
                                 {"copied": (3 if maps else 2) * one, "launches": 1},
                                 {"copied": (6 if maps else 5) * one, "launches": 3})


OPS = {"propagate": propagate_cases, "mix_hops": mix_hops_cases, "ranking": ranking_cases, "attention": attention_cases,
       "story": story_cases, "attribution": attribution_cases, "pointwise": pointwise_cases}


# -- one table -----------------------------------------------------------------------------------------------


def measure(case, clock, top, repeats):
    """One row: who is right, how long everybody takes, what the floor is."""
    truth = None if case["truth"] is None else case["truth"]()
    right = {}
    for name, function in case["functions"].items():
        try:
            y = function()
        except (RuntimeError, ValueError) as problem:                # out of memory, or no such path in PyTorch
            print(f"    {name}: {str(problem).splitlines()[0][:100]}", file=sys.stderr)
            continue
        error = 0.0 if truth is None else float((y.double() - truth).norm() / truth.norm())
        if error <= (case["limit"] if name == "ours" else 4 * case["limit"]):       # eager bf16 rounds every product
            right[name] = function
        else:
            print(f"    {name}: error {error:.1e}, no time", file=sys.stderr)
    if "ours" not in right:
        raise SystemExit(f"{case['case']}: our result is wrong")
    times = clock(right, repeats)
    kind = "graph" if all("graph" in t for t in times.values()) else "eager"
    floors = {"copy": case["copied"] / top["copy"], "gather": case["gathered"] / top["gather"],
              "product": case.get("flops", 0) / top["product"], "launch": case["launches"] * top["launch"]}
    bound, ours = max(floors, key=floors.get), times["ours"][kind]
    rivals = {name: t[kind] for name, t in times.items() if name != "ours"}
    best = min(rivals, key=rivals.get)
    return {"case": case["case"], "text": case["text"], "times": times, "clock": kind, "ours": ours, "best": best,
            "best_us": rivals[best], "ratio": rivals[best] / ours, "bound": bound, "floor": floors[bound],
            "share": floors[bound] / ours, "gb_s": max(case["gathered"], case["copied"]) / ours / 1e3}


def verdict(rows):
    """The closing lines: where ours loses, and for each block on probation, keep or delete.   -> sentences"""
    lost = [row["case"] for row in rows if row["ratio"] < 1]
    named = ": " + ", ".join(lost) if lost else ""
    yield f"Ours is slower than the best rival in {len(lost)} of {len(rows)} cases{named}."
    for name in ("df_block", "de_combine"):
        blocks = [row for row in rows if row["case"].startswith(name) and row["case"].endswith("both")]
        if blocks and any("graph" in row["times"]["ours"] for row in blocks):
            ours, compiler = (sum(row["times"].get(who, {}).get(row["clock"], float("nan")) for row in blocks)
                              for who in ("ours", "compiled"))
            decision = "keep it" if ours <= compiler else "delete it" if ours > compiler else "not decided, measure again"
            yield (f"Verdict on {name}: forward and backward of {len(blocks)} blocks take {ours:,.0f} us, torch.compile's "
                   f"{compiler:,.0f} us: {decision}.")
        elif blocks:
            yield f"Verdict on {name}: none, a GPU is needed; here its definition ran, not its kernel."


def run(device, names, quick):
    """Yield (op, {"device", "versions", "command", "ceilings", "rows": [...]}), one after the other."""
    gpu = device.type == "cuda"
    torch.manual_seed(SEED)
    clock, repeats = (gpu_clock if gpu else cpu_clock), 5 if quick else 20
    what = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, one thread, process time"
    top = ceilings(device, clock)
    print(f"{what}, torch {torch.__version__}\nceilings: copy {top['copy'] / 1e3:.1f} GB/s, gather "
          f"{top['gather'] / 1e3:.1f} GB/s, product {top['product'] / 1e6:.3f} TFLOP/s, launch {top['launch']:.1f} us")
    print(f"{'case':42}{'ours us':>11}{'best rival us':>15}{'ratio':>7}{'floor us':>11}{'of it':>7}  which, bound by")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if gpu:
        versions["triton"] = importlib.metadata.version("triton")
    for name in names:
        rows = []
        try:
            for case in OPS[name](device, quick):
                row = measure(case, clock, top, repeats)
                rows.append(row)
                print(f"{row['case']:42}{row['ours']:11.1f}{row['best_us']:15.1f}{row['ratio']:7.2f}{row['floor']:11.1f}"
                      f"{row['share']:7.0%}  {row['best']}, {row['bound']}", flush=True)
        except torch.OutOfMemoryError:                               # what fits is kept, the next operation starts anew
            print(f"    {name}: out of memory, its remaining cases are left out", file=sys.stderr)
            torch.cuda.empty_cache()
        print(*verdict(rows), sep="\n", flush=True)
        yield name, {"device": what, "versions": versions, "seed": SEED, "ceilings": top,
                     "command": " ".join(["python -m kernels.bench", *sys.argv[1:]]), "rows": rows}


def page(results):
    """RESULTS.md out of RESULTS.json."""
    text = ["# Measured by `python -m kernels.bench`", "", "Written by the program. Ratio: best rival's time over ours. "
            "Floor: what the slowest of copies, gathers, products and launches allows, by that run's ceilings.", ""]
    for kind, title in (("cpu", "CPU: the reference paths"), ("cuda", "GPU: the kernels")):
        text += [f"## {title}", ""]
        if kind not in results:
            text += ["*not yet measured*: run `python -m kernels.bench` on a machine with an NVIDIA GPU; it fills this part.", ""]
            continue
        rows = [row for op in results[kind].values() for row in op["rows"]]
        text += [line for words in verdict(rows) for line in (words, "")]
        for name, op in results[kind].items():
            versions = ", ".join(f"{k} {v}" for k, v in op["versions"].items())
            ceilings = ", ".join(f"{k} {v:,.0f}" for k, v in op["ceilings"].items())
            text += [f"### {name}", "", f"{op['device']}; {versions}; seed {op['seed']}; `{op['command']}`; ceilings {ceilings} "
                     "(bytes or operations a us, us).", "",
                     "| case | ours us | best rival us | ratio | floor us (bound) | of floor | GB/s | all us |",
                     "| --- | --- | --- | --- | --- | --- | --- | --- |"]
            text += [f"| {w['case']} | {w['ours']:.1f} | {w['best_us']:.1f} ({w['best']}) | {w['ratio']:.2f} | "
                     f"{w['floor']:.1f} ({w['bound']}) | {w['share']:.0%} | {w['gb_s']:.1f} | "
                     + ", ".join(f"{n} {t[w['clock']]:.0f}" for n, t in w["times"].items()) + " |" for w in op["rows"]] + [""]
    return "\n".join(text)


def chart(path, results):
    """A bar per case: how many times faster than the best rival; the line is 1."""
    from PIL import Image, ImageDraw, ImageFont

    rows = [(kind, row) for kind in ("cpu", "cuda") if kind in results
            for op in results[kind].values() for row in op["rows"]]
    font, left, height, longest = ImageFont.load_default(15), 360, 22, max(row["ratio"] for _, row in rows)
    image = Image.new("RGB", (left + 490, height * len(rows) + 72), "white")
    draw, scale = ImageDraw.Draw(image), 420 / max(longest, 1)
    draw.text((8, 8), "best rival's time / ours: process time on the CPU, CUDA graphs on a GPU", "black", font)
    for n, (kind, row) in enumerate(rows):
        y = 52 + n * height
        draw.text((left - 8, y), row["case"] if kind == "cpu" else f"GPU {row['case']}", "black", font, anchor="ra")
        colour = (0, 114, 178) if row["ratio"] >= 1 else (213, 94, 0)                # told apart by every eye
        draw.rectangle((left, y, left + row["ratio"] * scale, y + height - 6), fill=colour)
        draw.text((left + max(row["ratio"], 1) * scale + 6, y), f"{row['ratio']:.2f}", "black", font)
    draw.line((left + scale, 46, left + scale, 56 + len(rows) * height), "black", 1)
    draw.text((left + scale, 44), "1 = level", "black", font, anchor="mb")
    image.save(path)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.split("\n")[0])
    parser.add_argument("ops", nargs="*", help=f"operations to measure, of {', '.join(OPS)}; none: all")
    parser.add_argument("--cpu", action="store_true", help="the reference paths on one thread, even if there is a GPU")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats; writes nothing")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.ops if name not in OPS]
    if unknown:
        parser.error(f"no operation {unknown[0]!r}; there are {', '.join(OPS)}")
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    kept = HERE / "RESULTS.json"
    for name, found in run(device, options.ops or list(OPS), options.quick):
        if options.quick or not found["rows"]:
            continue
        results = json.loads(kept.read_text()) if kept.exists() else {}              # saved after every operation
        measured = {**results.get(device.type, {}), name: found}
        results[device.type] = {op: measured[op] for op in OPS if op in measured}
        kept.write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "RESULTS.md").write_text(page(results))
        chart(HERE / "RESULTS.png", results)
        print(f"wrote {name} to {HERE.name}/RESULTS.json, RESULTS.md and RESULTS.png")


if __name__ == "__main__":
    main()
