"""data/metrics.py against pencil and paper, against slow and obvious twins, and against closed forms."""
import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data import metrics


def lists(*relevant_places):
    """One user per tuple of 0-based places of that user's targets -> ranks, users."""
    ranks = [r for places in relevant_places for r in places]
    owner = [u for u, places in enumerate(relevant_places) for _ in places]
    return torch.tensor(ranks), torch.tensor(owner)


# -- ranking -------------------------------------------------------------------------------------------------


def test_a_hand_made_list_with_fewer_targets_than_places():
    """K = 5, two targets at places 2 and 4 of the list (counted from 1): all four scores on paper."""
    found = metrics.ranking(*lists((3, 1)), ks=(5,))
    assert found["Recall@5"] == pytest.approx(1.0)
    assert found["Precision@5"] == pytest.approx(2 / 5)
    dcg = 1 / math.log2(3) + 1 / math.log2(5)
    assert found["NDCG@5"] == pytest.approx(dcg / (1 + 1 / math.log2(3)))
    assert found["MAP@5"] == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_a_hand_made_list_with_more_targets_than_places():
    """K = 2, four targets, at places 1, 3, 4, 9: the ideal list and MAP's denominator hold min(K, n) = 2."""
    found = metrics.ranking(*lists((8, 0, 3, 2)), ks=(2,))
    assert found["Recall@2"] == pytest.approx(1 / 4)
    assert found["Precision@2"] == pytest.approx(1 / 2)
    assert found["NDCG@2"] == pytest.approx(1 / (1 + 1 / math.log2(3)))
    assert found["MAP@2"] == pytest.approx(1 / 2)


def test_a_target_on_the_last_place_counts_and_the_next_one_does_not():
    assert metrics.ranking(*lists((19,)), ks=(20,))["Recall@20"] == 1
    assert metrics.ranking(*lists((20,)), ks=(20,))["Recall@20"] == 0


def test_scores_are_means_over_users_not_over_targets():
    found = metrics.ranking(*lists((0,), (100, 101, 102)), ks=(10,))
    assert found["Recall@10"] == pytest.approx(0.5)               # over targets it would be 0.25


def by_the_book(hits, n, k):
    """The four formulas with Python loops. hits: 0/1 of a full list."""
    h = hits[:k]
    ideal = sum(1 / math.log2(r + 1) for r in range(1, min(k, n) + 1))
    return {"Recall": sum(h) / n, "Precision": sum(h) / k,
            "NDCG": sum(x / math.log2(r + 1) for r, x in enumerate(h, 1)) / ideal,
            "MAP": sum(x * sum(h[:r]) / r for r, x in enumerate(h, 1)) / min(k, n)}


def test_random_lists_agree_with_loops():
    rng = np.random.default_rng(0)
    ranks, users, expected = [], [], []
    for user in (7, 2, 40, 13, 5):                                # ids in any order, with gaps
        n = int(rng.integers(1, 80))
        places = rng.permutation(100)[:n]
        ranks += places.tolist()
        users += [user] * n
        expected.append({k: by_the_book([int(r in set(places)) for r in range(100)], n, k) for k in metrics.KS})
    shuffle = rng.permutation(len(ranks))
    found = metrics.ranking(torch.tensor(ranks)[shuffle].int(), torch.tensor(users)[shuffle])
    for k in metrics.KS:
        for name in ("Recall", "NDCG", "Precision", "MAP"):
            assert found[f"{name}@{k}"] == pytest.approx(np.mean([e[k][name] for e in expected]), abs=1e-12), (name, k)


@pytest.mark.parametrize(("ranks", "users", "words"), [
    ([], [], "the split is empty"), ([1, 1], [0, 0], "share a rank"), ([-1], [0], "count from 0"),
    ([1, 2], [0], "both be"),
])
def test_impossible_ranks_are_refused(ranks, users, words):
    with pytest.raises(ValueError, match=words):
        metrics.ranking(torch.tensor(ranks, dtype=torch.long), torch.tensor(users, dtype=torch.long))


def test_chance_is_what_every_possible_list_gives_on_average():
    """All orders of a list of 5 places with 2 targets, and of 4 places with 3, enumerated."""
    total = {}
    for places, n in ((5, 2), (4, 3)):
        orders = list(permutations(range(places)))
        for order in orders:
            found = metrics.ranking(torch.tensor(order[:n]), torch.zeros(n, dtype=torch.long), ks=(3, 10))
            for key, value in found.items():
                total[key] = total.get(key, 0) + value / len(orders) / 2
    chance = metrics.ranking_chance(torch.tensor([0, 0, 1, 1, 1]), 9, torch.tensor([4, 5]), ks=(3, 10))
    assert chance == pytest.approx(total)
    assert chance["Recall@10"] == pytest.approx(1)               # ten places hold every list of five


# -- distances -----------------------------------------------------------------------------------------------


def orthogonal(n, seed):
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def test_frechet_of_commuting_covariances_has_a_closed_form():
    """S_a and S_b share eigenvectors: |mu|^2 + sum (sqrt(a) - sqrt(b))^2, in exact fractions."""
    roots_a = [Fraction(k, 7) for k in range(12)]                                  # one of them zero
    roots_b = [Fraction(k * k + 1, 5) for k in range(12)]
    shift = [Fraction(k, 3) for k in range(12)]
    truth = float(sum((p - q) ** 2 for p, q in zip(roots_a, roots_b, strict=True)) + sum(s * s for s in shift))
    turn = orthogonal(12, 0)
    cov_a, cov_b = (turn @ torch.diag(torch.tensor([float(r * r) for r in roots], dtype=torch.float64)) @ turn.T
                    for roots in (roots_a, roots_b))
    mean = turn @ torch.tensor([float(s) for s in shift], dtype=torch.float64)
    assert metrics.frechet_of_moments(mean, cov_a, torch.zeros(12), cov_b) == pytest.approx(truth, rel=1e-13)


def newton_root(matrix):
    """Square root of a symmetric positive matrix by the Denman-Beavers iteration, in long double."""
    def inverse(m):
        n = len(m)
        both = np.concatenate([m, np.eye(n, dtype=np.longdouble)], 1)
        for i in range(n):
            pivot = i + int(np.abs(both[i:, i]).argmax())
            both[[i, pivot]] = both[[pivot, i]]
            both[i] /= both[i, i]
            for j in range(n):
                if j != i:
                    both[j] -= both[j, i] * both[i]
        return both[:, n:]

    y, z = matrix.copy(), np.eye(len(matrix), dtype=np.longdouble)
    for _ in range(40):
        y, z = (y + inverse(z)) / 2, (z + inverse(y)) / 2
    return y


def test_frechet_agrees_with_long_double_arithmetic():
    """General covariances that do not commute; tr (S_a S_b)^1/2 by an unrelated iteration."""
    rng = np.random.default_rng(3)
    a, b = (rng.normal(size=(40, 6)) @ np.diag(scale) for scale in ([1, 2, 3, 1, 1, 5], [4, 1, 1, 2, 1, 1]))
    wide_a, wide_b = a.astype(np.longdouble), b.astype(np.longdouble) + np.longdouble(0.25)
    mean_a, mean_b = wide_a.mean(0), wide_b.mean(0)
    cov_a, cov_b = ((x - m).T @ (x - m) / (len(x) - 1) for x, m in ((wide_a, mean_a), (wide_b, mean_b)))
    root = newton_root(cov_a)
    truth = float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * newton_root(root @ cov_b @ root)))
    found = metrics.frechet_distance(torch.from_numpy(a), torch.from_numpy(b + 0.25), "numbers")
    assert found.value == pytest.approx(truth, rel=1e-11)


def test_frechet_survives_fewer_samples_than_dimensions():
    """Covariances without full rank: equal sets stay at 0 to eight digits."""
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    assert metrics.frechet_distance(x, x, "numbers").value < 1e-8


def test_a_distance_says_what_it_was_computed_from():
    x = torch.randn(2500, 3, generator=torch.Generator().manual_seed(0))
    found = metrics.frechet_distance(x, x[:1200], "small CLIP")
    assert "small CLIP features, 2,500 against 1,200" in str(found) and float(found) == found.value


@pytest.mark.parametrize("distance", [metrics.frechet_distance, metrics.kernel_distance])
def test_distances_order_same_shifted_and_noise(distance):
    rng = torch.Generator().manual_seed(1)
    spread = torch.linspace(0.2, 1.5, 16)
    same, again = (torch.randn(400, 16, generator=rng) * spread for _ in range(2))
    near, noise = again + 0.4, 2 * torch.randn(400, 16, generator=rng)
    values = [float(distance(same, other, "numbers")) for other in (again, near, noise)]
    assert values[0] < values[1] < values[2]
    assert abs(values[0]) < 0.1 * values[2]


def test_kernel_distance_agrees_with_loops_and_is_unbiased():
    rng = torch.Generator().manual_seed(2)
    a, b = torch.randn(5, 3, generator=rng), torch.randn(4, 3, generator=rng)
    kernel = lambda x, y: (float(x @ y) / 3 + 1) ** 3  # noqa: E731
    inside = [sum(kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) / len(x) / (len(x) - 1)
              for x in (a, b)]
    across = sum(kernel(x, y) for x in a for y in b) / 20
    assert float(metrics.kernel_distance(a, b, "numbers", block=2)) == pytest.approx(sum(inside) - 2 * across, rel=1e-5)
    draws = [float(metrics.kernel_distance(torch.randn(30, 4, generator=rng), torch.randn(20, 4, generator=rng), "n"))
             for _ in range(400)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 20                        # 0 within four standard errors


def test_renders_are_near_renders_and_far_from_everything_else():
    """The shipped reader's features, 300 pictures; `python -m data.metrics` prints the ladder for 2,000."""
    frechet, kernel = ({name: float(pair[k]) for name, pair in metrics.ladder(300).items()} for k in (0, 1))
    for found in (frechet, kernel):
        again, unseen, *worse = found.values()
        assert abs(again) < 0.05 * found["pixels shuffled"] and unseen < min(worse)
        assert found["blocks of 16 shuffled"] < found["renders in grey"] < min(found["pixels shuffled"], found["noise"])
    assert abs(kernel["renders of another seed"]) < 0.01 * kernel["noise"], "unbiased: zero up to chance"


@pytest.mark.parametrize(("a", "b", "words"), [
    (torch.zeros(1, 3), torch.zeros(5, 3), "N >= 2"), (torch.zeros(5, 3), torch.zeros(5, 4), "one width"),
    (torch.full((5, 3), math.nan), torch.zeros(5, 3), "not finite"),
])
def test_sets_that_cannot_be_compared_are_refused(a, b, words):
    for distance in (metrics.frechet_distance, metrics.kernel_distance):
        with pytest.raises(ValueError, match=words):
            distance(a, b, "numbers")


# -- sentences, edits, answers -------------------------------------------------------------------------------


def test_r_precision_is_one_for_matches_and_chance_for_constants():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert metrics.r_precision(x, 3 * x, 10) == 1
    assert metrics.r_precision(torch.ones(50, 8), torch.ones(50, 8), 10) == pytest.approx(1 / 10)         # ties share


def test_r_precision_of_unrelated_vectors_is_chance():
    rng = torch.Generator().manual_seed(0)
    found = metrics.r_precision(torch.randn(1500, 32, generator=rng), torch.randn(1500, 32, generator=rng), 10, rng)
    assert abs(found - 0.1) < 4 * math.sqrt(0.09 / 1500)


def test_r_precision_never_asks_to_tell_equal_sentences_apart():
    groups = torch.arange(20) % 4
    texts = torch.eye(4)[groups]
    assert metrics.r_precision(texts, texts, 5, groups=groups) == 1
    assert metrics.r_precision(texts, texts, 10) < 1
    with pytest.raises(ValueError, match="2 to 16 candidates"):
        metrics.r_precision(texts, texts, 17, groups=groups)


def test_l1_outside_sees_only_what_is_outside():
    a, b = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    b[:, :, :2] = 1.0                                                # a quarter of the rows changes
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :2] = 1
    assert metrics.l1_outside(a, b, mask).tolist() == pytest.approx([0.0, 0.25])
    assert metrics.l1_outside(a, b, torch.ones(2, 1, 8, 8)).isnan().all()


def test_ssim_agrees_with_loops_over_windows():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1, 1, 13, 14, generator=rng, dtype=torch.float64) * 2 - 1 for _ in range(2))
    weight = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)])
    weight /= weight.sum()
    values = []
    for i in range(3):
        for j in range(4):
            x, y = (t[0, 0, i : i + 11, j : j + 11].numpy() for t in (a, b))
            mx, my = (weight * x).sum(), (weight * y).sum()
            vx, vy, vxy = ((weight * p * q).sum() for p, q in ((x - mx, x - mx), (y - my, y - my), (x - mx, y - my)))
            values.append((2 * mx * my + 0.02**2) * (2 * vxy + 0.06**2)
                          / ((mx**2 + my**2 + 0.02**2) * (vx + vy + 0.06**2)))
    assert float(metrics.ssim(a, b)) == pytest.approx(np.mean(values), rel=1e-9)


def test_ssim_is_one_for_equal_pictures_and_ignores_masked_change():
    rng = torch.Generator().manual_seed(0)
    a = F.interpolate(torch.rand(2, 3, 8, 8, generator=rng) * 2 - 1, scale_factor=4, mode="bilinear")
    b = a.clone()
    b[:, :, 20:28, 20:28] = -1
    mask = torch.zeros(2, 1, 32, 32)
    mask[:, :, 20:28, 20:28] = 1
    assert metrics.ssim(a, a).tolist() == pytest.approx([1, 1])
    assert metrics.ssim(a, b, mask).tolist() == pytest.approx([1, 1])
    assert (metrics.ssim(a, b) < 0.95).all()
    assert metrics.ssim(a, b, torch.ones(2, 1, 32, 32)).isnan().all()


def test_accuracy_by_type_stands_beside_the_majority_answer():
    found = metrics.accuracy_by_type(predicted=torch.tensor([1, 2, 2, 0]), true=torch.tensor([1, 1, 2, 5]),
                                     types=["what", "what", "who", "where"], train_true=torch.tensor([1, 1, 2, 3]),
                                     train_types=["what", "what", "what", "who"])
    assert found == {"what": (0.5, 1.0, 2), "where": (0.0, 0.0, 1), "who": (1.0, 0.0, 1), "all": (0.5, 0.5, 4)}


def test_roc_auc_counts_every_pair_and_ties_half():
    rng = torch.Generator().manual_seed(0)
    scores, labels = torch.randint(5, (60,), generator=rng).float(), torch.rand(60, generator=rng) < 0.4
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels].tolist() for n in scores[~labels].tolist()]
    assert metrics.roc_auc(scores, labels) == pytest.approx(np.mean(pairs))
    assert metrics.roc_auc(torch.ones(6), torch.tensor([0, 1, 0, 1, 1, 0])) == 0.5
    with pytest.raises(ValueError, match="3 against 0"):
        metrics.roc_auc(torch.ones(3), torch.ones(3))
