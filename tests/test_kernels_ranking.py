"""Ranks by counting against a sorted list, on both paths."""
import pytest
import torch

import kernels
from data.metrics import ranking
from kernels import ranking as ranking_kernels
from kernels.graph import Graph
from kernels.ranking import rank_of_targets, tile, top_k

PATHS = ["reference", "triton"]


def slow_rank(users, items, u, i, seen):
    scores = [float(users[u].double() @ items[j].double()) for j in range(len(items))]
    order = sorted((j for j in range(len(items)) if j not in seen or j == i), key=lambda j: (-scores[j], j))
    return order.index(i)


def clicks(users, items, count, g):
    return torch.unique(torch.stack([torch.randint(n, (count,), generator=g) for n in (users, items)], 1), dim=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("targets, count, width, block", [(1, 1, 3, 8), (33, 70, 16, 8), (40, 25, 64, None),
                                                          (20, 300, 33, 7)])
def test_ranks_equal_a_sorted_list_with_ties(path, targets, count, width, block, device):
    g = torch.Generator().manual_seed(0)
    users = torch.randint(-2, 3, (9, width), generator=g).float()         # integers: exact products, many ties
    items = torch.randint(-1, 2, (count, width), generator=g).float()
    history = clicks(8, count, 60, g)                                     # user 8 has no history
    seen = Graph.from_edges(*history.T, (9, count)).to(device)
    user, target = torch.randint(9, (targets,), generator=g), torch.randint(count, (targets,), generator=g)
    of = {u: {int(i) for w, i in history if w == u} for u in range(9)}    # some targets are themselves seen
    on_device = [x.to(device) for x in (users, items, user, target)]
    with kernels.use(path):
        ranks = rank_of_targets(*on_device, seen, block)
        without = rank_of_targets(*on_device, None, block)
        narrow = rank_of_targets(*(x.bfloat16() for x in on_device[:2]), *on_device[2:], seen)
        assert torch.equal(rank_of_targets(*on_device, seen, block), ranks) and ranks.dtype == torch.int32
    pairs = list(zip(user.tolist(), target.tolist(), strict=True))
    assert ranks.tolist() == [slow_rank(users, items, u, i, of[u]) for u, i in pairs]
    assert without.tolist() == [slow_rank(users, items, u, i, set()) for u, i in pairs]
    assert torch.equal(narrow, ranks)                                     # small integers are exact in bf16 too


@pytest.mark.parametrize("path", PATHS)
def test_ranks_equal_the_float64_order_on_random_numbers(path, device):
    g = torch.Generator().manual_seed(3)
    users, wide = torch.randn(40, 64, generator=g), torch.randn(700, 100, generator=g)
    items, target = wide[:, 20:84], torch.randint(700, (40,), generator=g)                 # a slice of a wider table
    right = (users.double() @ items.double().T).argsort(1, descending=True).argsort(1)
    with kernels.use(path):
        ranks = rank_of_targets(users.to(device), wide.to(device)[:, 20:84], torch.arange(40, device=device), target.to(device))
    assert torch.equal(ranks.cpu().long(), right.gather(1, target[:, None])[:, 0])


@pytest.mark.parametrize("path", PATHS)
def test_a_model_full_of_nan_ranks_last_and_equal_items_rank_by_id(path, device):
    items, user, target = (torch.ones(20, 4, device=device), torch.zeros(5, dtype=torch.long, device=device),
                           torch.arange(5, device=device) * 3)
    seen = Graph.from_edges(torch.tensor([0, 0]), torch.tensor([0, 7]), (1, 20)).to(device)
    with kernels.use(path):
        assert rank_of_targets(items[:1] * float("nan"), items, user, target).tolist() == [19] * 5
        assert rank_of_targets(items[:1], items, user, target).tolist() == [0, 3, 6, 9, 12]
        assert rank_of_targets(items[:1], items, user, target, seen).tolist() == [0, 2, 5, 7, 10]


@pytest.mark.parametrize("path", PATHS)
def test_a_single_broken_target_ranks_last_for_everybody(path, device):
    users, items = torch.ones(2, 4, device=device), torch.ones(40, 4, device=device)
    items[7] = float("nan")
    with kernels.use(path):
        ranks = rank_of_targets(users, items, torch.tensor([0, 1, 1], device=device), torch.tensor([7, 7, 3], device=device))
    assert ranks.tolist() == [39, 39, 4]                                                   # and it stands above all others


@pytest.mark.parametrize("path", PATHS)
def test_rows_that_share_memory_are_read_as_they_stand(path, device):
    one = torch.randn(1, 8, generator=torch.Generator().manual_seed(5)).to(device)
    items, user = one.expand(30, 8), torch.zeros(2, dtype=torch.long, device=device)
    with kernels.use(path):
        assert rank_of_targets(items[:1], items, user, user + 9).tolist() == [9, 9]        # overlapping: all items equal


def test_float32_scores_are_three_products_and_a_grid_is_never_too_long(monkeypatch):
    seen = {}

    class Count:
        def __getitem__(self, grid):
            return lambda *tensors, **options: seen.update(options, grid=grid)
    monkeypatch.setattr(ranking_kernels, "_count_kernel", Count())
    monkeypatch.setattr(ranking_kernels, "tile", lambda _: 1024)
    one = torch.zeros(1, dtype=torch.long)
    with kernels.use("triton"):
        rank_of_targets(torch.ones(1, 1), torch.ones(1, 1).expand(2 ** 30, 1), one, one)
    assert seen["PRECISION"] == "tf32x3" and seen["grid"][1] == kernels.GRID


@pytest.mark.gpu
@pytest.mark.slow
def test_a_table_beyond_two_to_the_31_numbers():
    items = torch.zeros(2 ** 25 + 3, 64, device="cuda", dtype=torch.bfloat16)              # 4.3 GB
    items[-1], one = 1, torch.zeros(1, dtype=torch.long, device="cuda")
    with kernels.use("triton"):
        assert rank_of_targets(torch.ones_like(items[:1]), items, one, one + len(items) - 1).tolist() == [0]


def test_counting_and_listing_give_the_same_metrics():
    g = torch.Generator().manual_seed(1)
    users, items = torch.randn(12, 8, generator=g), torch.randn(90, 8, generator=g)
    history = clicks(12, 90, 80, g)[torch.randperm(75, generator=g)]
    seen, targets = Graph.from_edges(*history[:50].T, (12, 90)), history[50:]
    counted = ranking(rank_of_targets(users, items, *targets.T, seen), targets[:, 0], ks=(5, 20))
    ids, _ = top_k(users, items, torch.arange(12), 90, seen)
    listed = torch.tensor([ids[u].tolist().index(int(i)) for u, i in targets])
    assert ranking(listed, targets[:, 0], ks=(5, 20)) == counted


def test_a_list_never_holds_a_seen_item_and_ends_in_minus_one():
    users, items = torch.randn(2, 4), torch.randn(5, 4)
    seen = Graph.from_edges(torch.tensor([0, 0, 0]), torch.tensor([1, 2, 4]), (2, 5))
    ids, scores = top_k(users, items, torch.tensor([0, 1]), 5, seen)
    assert set(ids[0, :2].tolist()) == {0, 3} and ids[0, 2:].tolist() == [-1] * 3
    assert sorted(ids[1].tolist()) == [0, 1, 2, 3, 4] and scores[0, 2:].isinf().all()
    tied, _ = top_k(torch.ones(1, 1), torch.ones(6, 1), torch.tensor([0]), 4)
    assert tied.tolist() == [[0, 1, 2, 3]]


def test_nothing_to_rank_gives_nothing():
    users, items, none = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(0, dtype=torch.long)
    assert rank_of_targets(users, items, none, none).shape == (0,) and top_k(users, items, none, 2)[0].shape == (0, 2)


@pytest.mark.parametrize("change, sentence", [
    ({"items": torch.randn(5, 2)}, "one width"), ({"target": torch.tensor([0, 1])}, "one length"),
    ({"target": torch.tensor([5])}, r"targets 0 \.\. 4"), ({"user": torch.tensor([-1])}, r"user ids must be 0 \.\. 2"),
    ({"items": torch.randn(5, 4).double()}, "floating-point type"), ({"user": torch.tensor([0.0])}, "vectors of integers"),
    ({"user": torch.tensor([True])}, "of torch.bool"), ({"target": torch.tensor([0j])}, "vectors of integers"),
    ({"seen": Graph.from_edges(torch.tensor([0]), torch.tensor([0]), (3, 6))}, r"seen is a graph \(3, 6\)")])
@pytest.mark.parametrize("path", PATHS)
def test_bad_input_is_answered_with_a_sentence(path, change, sentence):
    good = {"users": torch.randn(3, 4), "items": torch.randn(5, 4), "user": torch.tensor([0]), "target": torch.tensor([0])}
    with kernels.use(path), pytest.raises(ValueError, match=sentence):
        rank_of_targets(**{**good, **change})


def test_a_list_refuses_another_shops_clicks():
    users, items, user = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0])
    with pytest.raises(ValueError, match=r"seen is a graph \(3, 4\)"):
        top_k(users, items, user, 2, Graph.from_edges(torch.tensor([0]), torch.tensor([0]), (3, 4)))
    with pytest.raises(ValueError, match="of torch.bool"):
        top_k(users, items, user.bool(), 2)


def test_too_long_a_list_and_too_wide_a_tile_are_refused():
    with pytest.raises(ValueError, match="k=6 of 5 items"):
        top_k(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0]), 6)
    wide, one = torch.randn(5, 200), torch.tensor([0])
    assert rank_of_targets(wide, wide, one, one).shape == (1,)                             # auto takes the reference
    with kernels.use("triton"), pytest.raises(ValueError, match="tiles end at width 64"):
        rank_of_targets(wide, wide, one, one)
    assert tile(8) == 32 and tile(9) == 64
