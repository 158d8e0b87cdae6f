"""Ranks by counting against a sorted list."""
import pytest
import torch

from data.metrics import ranking
from kernels.graph import Graph
from kernels.ranking import rank_of_targets, top_k


def slow_rank(users, items, u, i, seen):
    scores = [float(users[u].double() @ items[j].double()) for j in range(len(items))]
    order = sorted((j for j in range(len(items)) if j not in seen or j == i), key=lambda j: (-scores[j], j))
    return order.index(i)


@pytest.mark.parametrize("targets, count, width, block", [(1, 1, 3, 8), (33, 70, 16, 8), (40, 25, 64, 1024)])
def test_ranks_equal_a_sorted_list_with_ties(targets, count, width, block):
    g = torch.Generator().manual_seed(0)
    users = torch.randint(-2, 3, (9, width), generator=g).float()        # integers: exact products, many ties
    items = torch.randint(-1, 2, (count, width), generator=g).float()
    clicks = torch.unique(torch.stack([torch.randint(8, (60,), generator=g), torch.randint(count, (60,), generator=g)], 1), dim=0)
    seen = Graph.from_edges(clicks[:, 0], clicks[:, 1], (9, count))       # user 8 has no history
    user, target = torch.randint(9, (targets,), generator=g), torch.randint(count, (targets,), generator=g)
    ranks = rank_of_targets(users, items, user, target, seen, block)
    history = {u: {int(i) for w, i in clicks if w == u} for u in range(9)}
    assert ranks.tolist() == [slow_rank(users, items, u, i, history[u]) for u, i in zip(user.tolist(), target.tolist(), strict=True)]
    assert ranks.dtype == torch.int32
    without = rank_of_targets(users, items, user, target, None, block)
    assert (without >= ranks).all()


def test_counting_and_listing_give_the_same_metrics():
    g = torch.Generator().manual_seed(1)
    users, items = torch.randn(12, 8, generator=g), torch.randn(90, 8, generator=g)
    clicks = torch.unique(torch.stack([torch.randint(12, (80,), generator=g), torch.randint(90, (80,), generator=g)], 1), dim=0)
    seen, targets = Graph.from_edges(*clicks[:50].T, (12, 90)), clicks[50:]
    counted = ranking(rank_of_targets(users, items, *targets.T, seen), targets[:, 0], ks=(5, 20))
    ids, _ = top_k(users, items, torch.arange(12), 90, seen)
    listed = torch.tensor([ids[u].tolist().index(int(i)) for u, i in targets])
    assert ranking(listed, targets[:, 0], ks=(5, 20)) == counted


def test_a_list_never_holds_a_seen_item_and_ends_in_minus_one():
    users, items = torch.randn(2, 4), torch.randn(5, 4)
    seen = Graph.from_edges(torch.tensor([0, 0, 0]), torch.tensor([1, 2, 4]), (2, 5))
    ids, scores = top_k(users, items, torch.tensor([0, 1]), 5, seen)
    assert set(ids[0, :2].tolist()) == {0, 3} and ids[0, 2:].tolist() == [-1] * 3 and sorted(ids[1].tolist()) == [0, 1, 2, 3, 4]
    assert scores[0, 2:].isinf().all()
    tied, _ = top_k(torch.ones(1, 1), torch.ones(6, 1), torch.tensor([0]), 6)
    assert tied.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_bad_input_is_answered_with_a_sentence():
    users, items, one = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0])
    assert rank_of_targets(users, items, one[:0], one[:0]).shape == (0,)
    for call, sentence in ((lambda: rank_of_targets(users, items[:, :2], one, one), "one width"),
                           (lambda: rank_of_targets(users, items, one, torch.tensor([5])), r"targets 0 \.\. 4"),
                           (lambda: rank_of_targets(users, items, torch.tensor([-1]), one), r"user ids must be 0 \.\. 2"),
                           (lambda: top_k(users, items, one, 6), "k=6 of 5 items")):
        with pytest.raises(ValueError, match=sentence):
            call()
