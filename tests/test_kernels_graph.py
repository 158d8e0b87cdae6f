"""Sparse propagation: reference and kernel against float64, on every shape that could go wrong."""
from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional as F

import kernels
from kernels import graph as kernels_graph
from kernels import jit
from kernels.graph import PIECE, Graph, knn, mix_hops, propagate, row_offset

if TYPE_CHECKING:
    import triton.language as tl

PATHS = ["reference", "triton"]


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody wrote is NaN, so a row that a kernel forgot cannot look right by chance."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def edges(rows, cols, count, seed=0, hub=0):
    g = torch.Generator().manual_seed(seed)
    row, col = torch.randint(rows, (count,), generator=g), torch.randint(cols, (count,), generator=g)
    row[:hub] = min(2, rows - 1)
    return row, col


def dense(row, col, shape, weight=None):
    """The oracle: entry by entry into a float64 matrix."""
    a = torch.zeros(shape, dtype=torch.float64)
    for e in range(len(row)):
        a[row[e], col[e]] += 1.0 if weight is None else float(weight[e])
    return a


def error(a, truth):
    """Relative error of the whole and of the worst row, NaN counting as infinite."""
    a = a.detach().cpu().double()
    if not a.isfinite().all():
        return float("inf"), float("inf")
    row = (a - truth).norm(dim=1) / truth.norm(dim=1).clamp(min=1e-6 * float(truth.norm()) + 1e-30)
    return float((a - truth).norm() / truth.norm().clamp(min=1e-30)), float(row.max()) if len(row) else 0.0


SHAPES = [(1, 1, 1, 1), (2, 2, 3, 7), (50, 30, 400, 33), (30, 50, 200, 64), (70, 70, 40, 100), (20, 20, 300, 128),
          (9, 9, 60, 192), (5, 4, 0, 8)]                     # out, in, entries, D; empty rows, rectangular, empty graph


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows, cols, count, width", SHAPES)
def test_propagate_is_as_accurate_as_pytorch_and_so_is_its_gradient(path, rows, cols, count, width, device):
    row, col = edges(rows, cols, count, hub=count // 2)             # half of all edges on one hub row, with duplicates
    weight = numbers(count, seed=1).abs() + 0.5
    graph = Graph.from_edges(row.to(device), col.to(device), (rows, cols), weight.to(device))
    x, dy = numbers(cols, width, seed=2).to(device).requires_grad_(), numbers(rows, width, seed=3).to(device)
    truth = dense(row, col, (rows, cols), weight)
    with kernels.use(path):
        y = propagate(graph, x)
        (dx,) = torch.autograd.grad(y, x, dy)
    for ours, a, b in ((y, truth, x.detach().cpu()), (dx, truth.T, dy.cpu())):
        right = a @ b.double()
        eager, _ = error(a.float().to_sparse() @ b if count else right.float(), right)
        whole, worst = error(ours, right)
        assert whole <= 2 * eager + 1e-7 and whole < 1e-6 and worst < 2e-5, (whole, eager, worst)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype, limit", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float64, 1e-15)])
def test_sums_are_wide_for_narrow_numbers(path, dtype, limit, device):
    row, col = edges(40, 40, 900, hub=400)
    weight = torch.rand(900, dtype=torch.float64)
    graph = Graph.from_edges(row, col, (40, 40), weight if dtype == torch.float64 else weight.float()).to(device)
    a, x = graph.dense().cpu().double(), numbers(40, 64).to(dtype)
    with kernels.use(path):
        y, z = propagate(graph, x.to(device)), mix_hops(graph, x.to(device), [0.3, 0.3, 0.4])
    assert y.dtype == z.dtype == dtype and error(y, a @ x.double())[0] < limit
    assert error(z, 0.3 * x.double() + 0.3 * a @ x.double() + 0.4 * a @ a @ x.double())[0] < 2 * limit


@pytest.mark.parametrize("count", [0, 31, PIECE, PIECE + 1, 65, PIECE**2 + 1])
def test_rows_are_cut_into_pieces_without_loss(count, device):
    graph = Graph.from_edges(torch.zeros(count, dtype=torch.long), torch.arange(count), (2, max(count, 1))).to(device)
    levels = graph.pieces
    assert int(levels[0][0][:, 1].sum()) == count and all(int(table[:, 1].max()) <= PIECE for table, _ in levels)
    assert len(levels) == 1 + (count > PIECE) + (count > PIECE**2) and [slots for _, slots in levels][-1] == 0
    for (_, slots), (table, _) in zip(levels, levels[1:], strict=False):
        assert int(table[:, 1].sum()) == slots                      # the slots of a level are the entries of the next
    with kernels.use("triton"):
        assert propagate(graph, torch.ones(max(count, 1), 3, device=device)).tolist() == [[count] * 3, [0] * 3]


def test_the_sum_does_not_depend_on_how_rows_are_cut(monkeypatch, device):
    row, col = edges(30, 30, 500, hub=200)
    x, results = numbers(30, 20).double().to(device), []
    for piece, tile in ((8, 256), (16, 1024), (32, 512)):
        monkeypatch.setattr("kernels.graph.PIECE", piece)
        monkeypatch.setattr("kernels.graph.TILE", tile)
        with kernels.use("triton"):
            results.append(propagate(Graph.from_edges(row, col, (30, 30)).to(device), x))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


@pytest.mark.parametrize("path", PATHS)
def test_any_layout_of_x_gives_the_same_bits(path, device):
    row, col = edges(20, 25, 120)
    graph, wide = Graph.from_edges(row, col, (20, 25)).to(device), numbers(25, 40).to(device)
    with kernels.use(path):
        plain = propagate(graph, wide[:, 3:20].contiguous())
        assert torch.equal(plain, propagate(graph, wide[:, 3:20]))                        # a column slice, odd start
        assert torch.equal(plain, propagate(graph, wide[:, 3:20].T.contiguous().T))       # column-major
        flat = wide[:1, :17].expand(25, 17)                                               # overlapping: stride 0
        assert torch.equal(propagate(graph, flat), propagate(graph, flat.contiguous()))
        assert propagate(graph, wide[:, :0]).shape == (20, 0)
        square, part = Graph.from_edges(*edges(25, 25, 120), (25, 25)).to(device), wide[:, 3:20]
        assert torch.equal(mix_hops(square, part, [0.5, 0.3, 0.2]), mix_hops(square, part.contiguous(), [0.5, 0.3, 0.2]))


@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits_every_time_and_for_any_order_of_edges(path, device):
    row, col = edges(50, 50, 600, hub=200)
    x, graph, order = numbers(50, 64).to(device), Graph.from_edges(row, col, (50, 50)).to(device), torch.randperm(600)
    with kernels.use(path):
        y = propagate(graph, x)
        assert torch.equal(y, propagate(graph, x))
        assert torch.equal(y, propagate(Graph.from_edges(row[order], col[order], (50, 50)).to(device), x))


@pytest.mark.parametrize("path", PATHS)
def test_renaming_nodes_renames_rows(path, device):
    """In float64, on small integers, where every sum is exact, bit for bit."""
    row, col = edges(40, 40, 300, hub=70)
    name, x = torch.randperm(40), torch.randint(-8, 9, (40, 6)).double()
    renamed = torch.empty_like(x)
    renamed[name] = x
    with kernels.use(path):
        y = propagate(Graph.from_edges(row, col, (40, 40)).to(device), x.to(device))
        z = propagate(Graph.from_edges(name[row], name[col], (40, 40)).to(device), renamed.to(device))
    assert torch.equal(y, z[name.to(device)])


@pytest.mark.parametrize("path", PATHS)
def test_gradients_to_second_order(path):
    graph = Graph.from_edges(*edges(3, 4, 6), (3, 4), torch.rand(6))
    square = Graph.from_edges(*edges(3, 3, 5), (3, 3), torch.rand(5))
    x = torch.randn(4, 1, dtype=torch.double, requires_grad=True)
    with kernels.use(path):
        assert torch.autograd.gradcheck(lambda x: propagate(graph, x).sin(), x)
        assert torch.autograd.gradgradcheck(lambda x: propagate(graph, x).sin(), x)
        assert torch.autograd.gradcheck(lambda x: propagate(graph.rows(torch.tensor([2, 0, 2])), x), x)
        assert torch.autograd.gradcheck(lambda x: mix_hops(square, x, [0.5, 0.3, 0.2]), x[:3].detach().requires_grad_())


@pytest.mark.parametrize("path", PATHS)
def test_the_transpose_is_the_adjoint(path, device):
    graph = Graph.from_edges(*edges(30, 20, 200), (30, 20), torch.rand(200)).to(device)
    x, y = numbers(20, 4).double().to(device), numbers(30, 4).double().to(device)
    with kernels.use(path):
        torch.testing.assert_close((propagate(graph, x) * y).sum(), (x * propagate(graph.T, y)).sum())
    assert torch.equal(graph.T.dense(), graph.dense().T) and graph.T.T is graph


def test_a_bipartite_graph_is_symmetric_normalised_and_bounded():
    pairs = torch.unique(torch.stack(edges(20, 15, 90)), dim=1)
    graph = Graph.bipartite(*pairs, 21, 15)                                                # user 20 has no edge
    a = graph.dense().double()
    degree = (a > 0).sum(1).double()
    expected = torch.where(a > 0, (degree[:, None] * degree).clamp(min=1).rsqrt(), 0.0)
    torch.testing.assert_close(a, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(a, a.T) and torch.linalg.eigvalsh(a).abs().max() <= 1 + 1e-6 and graph.T is graph
    assert torch.equal(graph.R.dense(), graph.dense()[:21, 21:]) and torch.equal(graph.RT.dense(), graph.dense()[21:, :21])
    assert graph.R.T is graph.RT and graph.RT.T is graph.R
    assert graph.RT.col.data_ptr() == graph.col[graph.R.nnz :].data_ptr()                  # a view, not a copy
    with pytest.raises(ValueError, match="blocks of Graph.bipartite"):
        graph.R.R  # noqa: B018


@pytest.mark.parametrize("path", PATHS)
def test_an_isolated_node_keeps_its_own_share_of_the_hops(path, device):
    graph = Graph.bipartite(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 3, 2).to(device)       # user 2 has no edge
    x = numbers(5, 6).to(device)
    with kernels.use(path):
        torch.testing.assert_close(mix_hops(graph, x, [0.4, 0.3, 0.3])[2], 0.4 * x[2])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layers", range(4))
def test_horner_equals_the_polynomial(path, layers, device):
    graph = Graph.from_edges(*edges(12, 12, 80, hub=40), (12, 12), torch.rand(80) / 4).to(device)    # directed, a hub
    x, a = numbers(12, 3).to(device).requires_grad_(), graph.dense().cpu().double()
    weights = [0.5, 0.25, 0.2, 0.05][: layers + 1]
    polynomial = sum(w * torch.linalg.matrix_power(a, n) for n, w in enumerate(weights))
    with kernels.use(path):
        y = mix_hops(graph, x, weights)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert error(y, polynomial @ x.detach().cpu().double())[0] < 1e-6
    assert error(dx, polynomial.T @ torch.ones(12, 3).double())[0] < 1e-6


def test_backward_takes_the_path_of_forward():
    graph, x = Graph.from_edges(*edges(6, 6, 9), (6, 6)), torch.ones(6, 2, requires_grad=True)
    with kernels.use("triton"):
        y = propagate(graph, x)
    assert y.grad_fn.path == "triton"
    with kernels.use("reference"):
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], graph.dense().sum(0)[:, None].expand(6, 2))


@pytest.mark.parametrize("path", PATHS)
def test_autocast_changes_neither_the_type_nor_the_bits(path, device):
    graph, x = Graph.from_edges(*edges(9, 9, 30), (9, 9)).to(device), numbers(9, 5).to(device)
    with kernels.use(path):
        plain = propagate(graph, x)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert torch.equal(propagate(graph, x), plain)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("most", [True, False])
def test_rows_of_a_graph_may_repeat_and_be_empty(path, most, device, monkeypatch):
    monkeypatch.setattr("kernels.graph.Rows.most", most)                                   # both ways to the product
    graph = Graph.from_edges(*edges(10, 8, 12), (10, 8)).to(device)
    index, x = torch.tensor([3, 3, 9, 0], device=device), numbers(8, 5).to(device).requires_grad_()
    with kernels.use(path):
        y, dense_rows = propagate(graph.rows(index), x), graph.dense()[index]
        torch.testing.assert_close(y, dense_rows @ x)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], dense_rows.sum(0)[:, None].expand(8, 5))
        assert propagate(graph.rows(index[:0]), x).shape == (0, 5)
    assert torch.equal(graph.rows(index).dense(), dense_rows) and graph.rows(index[:0]).dense().shape == (0, 8)
    assert graph.rows(index).T.dense().shape == (8, 4)


def test_few_rows_are_walked_alone_and_many_with_all():
    graph = Graph.from_edges(*edges(500, 500, 40_000), (500, 500))
    assert not graph.rows(torch.arange(20)).most and graph.rows(torch.arange(400)).most


@pytest.mark.parametrize("block", [7, 64, 2048])
def test_knn_finds_the_nearest_and_breaks_ties_by_index(block):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (60, 4), generator=g) * 2.0 - 1                                # norm 2: cosines are exact
    x[::3] *= torch.eye(4)[torch.randint(4, (20,), generator=g)]                           # norm 1: many ties
    ids, values = knn(x, 7, block)
    unit = x / x.norm(dim=1, keepdim=True)
    right, order = (unit @ unit.T).sort(dim=1, descending=True, stable=True)               # stable: lower index first
    assert torch.equal(values, right[:, :7]) and torch.equal(ids, order[:, :7])
    for bad, k, sentence in ((torch.cat([x[:4], torch.zeros(1, 4)]), 2, "feature row 4 is zero"),
                             (F.pad(x, (0, 1), value=float("nan")), 2, "feature row 0 is zero or not finite"),
                             (x, 61, "k=61 neighbours of 60 rows"), (x, 0, "k=0 neighbours")):
        with pytest.raises(ValueError, match=sentence):
            knn(bad, k)


def test_a_knn_graph_is_directed():
    graph = Graph.from_knn(torch.tensor([[0, 1], [1, 2], [2, 1]]), torch.tensor([[1.0, 0.5], [1.0, 0.25], [1.0, 0.75]]))
    assert graph.dense().tolist() == [[1, 0.5, 0], [0, 1, 0.25], [0, 0.75, 1]] and not graph.symmetric


@jit
def probe(i, stride, out, WIDE: tl.constexpr):
    tl.store(out, row_offset(tl.load(i), stride, WIDE).to(tl.int64))


def test_offsets_beyond_two_to_the_31_need_and_get_the_wide_path(device):
    """One element instead of gigabytes: row 2^20 of a table 2^12 wide starts at 2^32."""
    i, out = torch.tensor([2**20], dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    for wide, expected in ((True, 2**32), (False, 0)):
        probe[(1,)](i, 2**12, out, WIDE=wide)
        assert out.item() == expected


def test_wide_offsets_are_taken_from_the_limit_on_and_change_no_bit(device, monkeypatch):
    graph, x = Graph.from_edges(*edges(100, 100, 150, hub=90), (100, 100)).to(device), numbers(100, 7).to(device)
    launch, flags = kernels_graph._walk_kernel, []

    class Walk:
        def __getitem__(self, grid):
            return lambda *tensors, **options: flags.append(options["WIDE"]) or launch[grid](*tensors, **options)
    monkeypatch.setattr(kernels_graph, "_walk_kernel", Walk())
    results = []
    for limit in 2**31, 701, 700, 1:                                  # x, y and z hold 700 numbers
        monkeypatch.setattr(kernels_graph, "INT32", limit)
        with kernels.use("triton"):
            results.append(mix_hops(graph, x, [0.5, 0.3, 0.2]))
    assert flags == [False] * 8 + [True] * 8 and all(torch.equal(results[0], y) for y in results[1:])      # 2 hops, 2 levels


@pytest.mark.gpu
@pytest.mark.slow
def test_a_table_beyond_two_to_the_31_numbers():
    rows, width = 2**24 + 3, 128
    graph = Graph.from_edges(torch.tensor([0, 1, 1]), torch.tensor([rows - 1, 5, rows - 2]), (2, rows)).to("cuda")
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    x[-1], x[5], x[-2] = 1, 2, 3
    with kernels.use("triton"):
        assert propagate(graph, x).float().mean(1).tolist() == [1, 5]


def one(shape=(3, 3), row=(0,), col=(0,), **more):
    return Graph.from_edges(torch.tensor(row), torch.tensor(col), shape, **more)


@pytest.mark.parametrize("call, sentence", [
    (lambda: one(row=[0, 5], col=[0, 0]), r"row\[1\] is 5, outside 0 .. 2"),
    (lambda: one(row=[0, 1], col=[0, -1]), r"col\[1\] is -1"),
    (lambda: one(row=[0.0]), "must be integers"),
    (lambda: one(row=[0], col=[0, 1]), "one length"),
    (lambda: one(shape=(2**31, 2)), r"fewer than 2\^31"),
    (lambda: one(weight=torch.ones(1, requires_grad=True)), "constants here"),
    (lambda: one(weight=torch.ones(2)), "one length"),
    (lambda: one(weight=torch.ones(1, dtype=int)), "floating-point constants"),
    (lambda: one(weight=torch.ones(1, device="meta")), "one device"),
    (lambda: Graph.from_edges(torch.tensor([0]), torch.tensor([0], device="meta"), (1, 1)), "one device, not on cpu and meta"),
    (lambda: one(row=[True]), "must be integers"),
    (lambda: Graph.from_knn(torch.tensor([0, 1])), r"neighbours \(2,\) must be \(I, k\)"),
    (lambda: one().rows(torch.tensor([True, False, True])), "vector of integers on cpu, not .* of torch.bool"),
    (lambda: mix_hops(one().rows(torch.tensor([2, 1, 0])), torch.ones(3, 2), [0.5, 0.5]), r"not rows\(\) of one"),
    (lambda: knn(torch.ones(4), 1), r"real \(I, C\)"),
    (lambda: Graph.bipartite(torch.tensor([0]), torch.tensor([3]), 2, 3), r"item\[0\] is 3, outside 0 .. 2"),
    (lambda: one().rows(torch.tensor([0, 3])), "rows 0 .. 2 got 0 .. 3"),
    (lambda: one().rows(torch.tensor([[0]])), "vector of integers"),
    (lambda: propagate(one(), torch.ones(4, 2)), r"needs \(3, D\)"),
    (lambda: propagate(one(), torch.ones(3)), r"needs \(3, D\)"),
    (lambda: propagate(one(), torch.ones(3, 2).int()), "floating-point"),
    (lambda: propagate(one(), torch.ones(3, 2, dtype=torch.cfloat)), "floating-point"),
    (lambda: propagate(one(), torch.ones(3, 2, device="meta")), "x is on meta, the graph on cpu"),
    (lambda: mix_hops(one((3, 4)), torch.ones(4, 2), [1.0]), "square graph"),
    (lambda: mix_hops(one(), torch.ones(3, 2), []), "at least one weight"),
    (lambda: mix_hops(one(), torch.ones(3, 2), torch.ones(2)), "numbers here"),
])
@pytest.mark.parametrize("path", PATHS)
def test_bad_input_is_answered_with_a_sentence(path, call, sentence):
    with kernels.use(path), pytest.raises(ValueError, match=sentence):
        call()


def test_importing_kernels_does_not_import_triton():
    script = ("import sys, torch, kernels.graph as g\n"
              "g.propagate(g.Graph.from_edges(torch.tensor([0]), torch.tensor([1]), (2, 2)), torch.ones(2, 2))\n"
              "assert 'triton' not in sys.modules")
    subprocess.run([sys.executable, "-c", script], check=True, cwd=__file__.rsplit("tests", 1)[0])
