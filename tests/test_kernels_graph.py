"""Sparse propagation: reference and kernel against float64, on every shape that could go wrong."""
import subprocess
import sys

import pytest
import torch

import kernels
from kernels.graph import Graph, knn, mix_hops, propagate

PATHS = ["reference", "triton"]


def edges(rows, cols, count, seed=0, hub=0):
    g = torch.Generator().manual_seed(seed)
    row, col = torch.randint(rows, (count,), generator=g), torch.randint(cols, (count,), generator=g)
    row[:hub] = min(2, rows - 1)
    return row, col


def dense(row, col, shape, weight=None, dtype=torch.float64):
    weight = torch.ones(len(row), dtype=dtype) if weight is None else weight.to(dtype)
    return torch.zeros(shape, dtype=dtype).index_put_((row, col), weight, accumulate=True)


def error(a, truth):
    """Relative error of the whole and of the worst row against its own norm, NaN counting as infinite."""
    a = a.double()
    if not a.isfinite().all():
        return float("inf"), float("inf")
    row = (a - truth).norm(dim=1) / truth.norm(dim=1).clamp(min=1e-6 * float(truth.norm()) + 1e-30)
    return float((a - truth).norm() / truth.norm().clamp(min=1e-30)), float(row.max()) if len(row) else 0.0


SHAPES = [(1, 1, 1, 1), (2, 2, 3, 7), (50, 30, 700, 33), (30, 50, 200, 64), (70, 70, 40, 100), (20, 20, 300, 128), (9, 9, 60, 192), (5, 4, 0, 8)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows, cols, count, width", SHAPES)
def test_propagate_is_a_matrix_product(path, rows, cols, count, width, device):
    row, col = edges(rows, cols, count, hub=count // 2)             # half of all edges on one hub row
    weight = torch.rand(count, generator=torch.Generator().manual_seed(1)) + 0.5
    graph = Graph.from_edges(row.to(device), col.to(device), (rows, cols), weight.to(device))
    x = torch.randn(cols, width, generator=torch.Generator().manual_seed(2)).to(device).requires_grad_()
    dy = torch.randn(rows, width, generator=torch.Generator().manual_seed(3)).to(device)
    truth = dense(row, col, (rows, cols), weight)
    with kernels.use(path):
        y = propagate(graph, x)
        (dx,) = torch.autograd.grad(y, x, dy)
    for ours, right in ((y, truth @ x.detach().cpu().double()), (dx, truth.T @ dy.cpu().double())):
        whole, worst = error(ours.detach().cpu(), right)
        assert whole < 1e-6 and worst < 2e-5, (whole, worst)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype, limit", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float64, 1e-7)])
def test_sums_are_wide_for_narrow_numbers(path, dtype, limit, device):
    row, col = edges(40, 40, 900, hub=400)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with kernels.use(path):
        y = propagate(Graph.from_edges(row, col, (40, 40)).to(device), x.to(device))
    assert y.dtype == dtype and error(y.cpu(), dense(row, col, (40, 40)) @ x.double())[0] < limit


@pytest.mark.parametrize("count, levels", [(31, 1), (32, 1), (33, 2), (64, 2), (1024, 2), (1025, 3)])
def test_rows_are_cut_into_pieces_without_loss(count, levels, device):
    row, col = torch.zeros(count, dtype=torch.long), torch.arange(count)
    graph = Graph.from_edges(row, col, (2, count)).to(device)
    assert len(graph.pieces) == levels
    table, slots = graph.pieces[0]
    assert int(table[:, 1].sum()) == count and int(table[:, 1].max()) <= 32 and (slots > 0) == (count > 32)
    with kernels.use("triton"):
        y = propagate(graph, torch.ones(count, 3, device=device))
    assert y.tolist() == [[count] * 3, [0] * 3]


@pytest.mark.parametrize("path", PATHS)
def test_any_layout_of_x_gives_the_same_bits(path, device):
    row, col = edges(20, 25, 120)
    graph = Graph.from_edges(row, col, (20, 25)).to(device)
    wide = torch.randn(25, 40, generator=torch.Generator().manual_seed(0)).to(device)
    with kernels.use(path):
        plain = propagate(graph, wide[:, 3:20].contiguous())
        assert torch.equal(plain, propagate(graph, wide[:, 3:20]))                        # a column slice, odd start
        assert torch.equal(plain, propagate(graph, wide[:, 3:20].T.contiguous().T))       # column-major


@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits_every_time(path, device):
    row, col = edges(50, 50, 800, hub=300)
    x, graph = torch.randn(50, 64, device=device), Graph.from_edges(row, col, (50, 50)).to(device)
    with kernels.use(path):
        assert torch.equal(propagate(graph, x), propagate(graph, x))
    order = torch.randperm(800)                                                            # edges in any order
    with kernels.use(path):
        assert torch.equal(propagate(graph, x), propagate(Graph.from_edges(row[order], col[order], (50, 50)).to(device), x))


@pytest.mark.parametrize("path", PATHS)
def test_gradients_to_second_order(path):
    row, col = edges(6, 5, 14)
    graph = Graph.from_edges(row, col, (6, 5), torch.rand(14))
    square = Graph.from_edges(*edges(5, 5, 12), (5, 5), torch.rand(12))
    x = torch.randn(5, 3, dtype=torch.double, requires_grad=True)
    with kernels.use(path):
        assert torch.autograd.gradcheck(lambda x: propagate(graph, x).sin(), x)
        assert torch.autograd.gradgradcheck(lambda x: propagate(graph, x).sin(), x)
        assert torch.autograd.gradcheck(lambda x: propagate(graph.rows(torch.tensor([4, 0, 4])), x).sin(), x)
        assert torch.autograd.gradcheck(lambda x: mix_hops(square, x, [0.5, 0.3, 0.2]), x)


def test_the_transpose_is_the_adjoint():
    row, col = edges(30, 20, 200)
    graph = Graph.from_edges(row, col, (30, 20), torch.rand(200))
    x, y = torch.randn(20, 4).double(), torch.randn(30, 4).double()
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
    x = torch.randn(36, 5)
    torch.testing.assert_close(mix_hops(graph, x, [0.4, 0.3, 0.3])[20], 0.4 * x[20])        # isolated: only its own share


@pytest.mark.parametrize("layers", range(4))
def test_horner_equals_the_polynomial(layers):
    row, col = edges(12, 12, 40)
    graph, x = Graph.from_edges(row, col, (12, 12), torch.rand(40)), torch.randn(12, 3).double()
    a, weights = graph.dense().double(), [0.5, 0.25, 0.2, 0.05][: layers + 1]
    slow = sum(w * torch.linalg.matrix_power(a, n) @ x for n, w in enumerate(weights))
    torch.testing.assert_close(mix_hops(graph, x, weights), slow)


def test_rows_of_a_graph_may_repeat_and_be_empty():
    row, col = edges(10, 8, 12)
    graph, index = Graph.from_edges(row, col, (10, 8)), torch.tensor([3, 3, 9, 0])
    assert torch.equal(graph.rows(index).dense(), graph.dense()[index])
    assert graph.rows(torch.zeros(0, dtype=torch.long)).dense().shape == (0, 8)


@pytest.mark.parametrize("block", [7, 64, 2048])
def test_knn_finds_the_nearest_and_breaks_ties_by_index(block):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (60, 4), generator=g) * 2.0 - 1                                # norm 2: cosines are exact
    x[::3] *= torch.eye(4)[torch.randint(4, (20,), generator=g)]                           # norm 1: many ties
    ids, values = knn(x, 7, block)
    unit = x / x.norm(dim=1, keepdim=True)
    right, order = (unit @ unit.T).sort(dim=1, descending=True, stable=True)               # stable: lower index first
    assert torch.equal(values, right[:, :7]) and torch.equal(ids, order[:, :7])
    with pytest.raises(ValueError, match="feature row 4 is zero"):
        knn(torch.cat([x[:4], torch.zeros(1, 4)]), 2)
    with pytest.raises(ValueError, match="k=61 neighbours in features"):
        knn(x, 61)


@pytest.mark.parametrize("call, sentence", [
    (lambda: Graph.from_edges(torch.tensor([0, 5]), torch.tensor([0, 0]), (3, 3)), r"row\[1\] is 5, outside 0 .. 2"),
    (lambda: Graph.from_edges(torch.tensor([0, 1]), torch.tensor([0, -1]), (3, 3)), r"col\[1\] is -1"),
    (lambda: Graph.from_edges(torch.tensor([0.0]), torch.tensor([0]), (3, 3)), "must be integers"),
    (lambda: Graph.from_edges(torch.tensor([0]), torch.tensor([0, 1]), (3, 3)), "one length"),
    (lambda: Graph.from_edges(torch.tensor([0]), torch.tensor([0]), (3, 3), torch.ones(1, requires_grad=True)), "constants here"),
    (lambda: propagate(Graph.from_edges(torch.tensor([0]), torch.tensor([0]), (3, 3)), torch.ones(4, 2)), r"needs \(3, D\)"),
    (lambda: propagate(Graph.from_edges(torch.tensor([0]), torch.tensor([0]), (3, 3)), torch.ones(3, 2).int()), "floating-point"),
    (lambda: mix_hops(Graph.from_edges(torch.tensor([0]), torch.tensor([0]), (3, 4)), torch.ones(4, 2), [1.0]), "square graph"),
])
def test_bad_input_is_answered_with_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_importing_kernels_does_not_import_triton():
    script = ("import sys, torch, kernels.graph as g\n"
              "g.propagate(g.Graph.from_edges(torch.tensor([0]), torch.tensor([1]), (2, 2)), torch.ones(2, 2))\n"
              "assert 'triton' not in sys.modules")
    subprocess.run([sys.executable, "-c", script], check=True, cwd=__file__.rsplit("tests", 1)[0])
