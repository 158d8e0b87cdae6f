"""What is measured, and how exactly: rankings, distances between picture sets, retrieval, edits, answers.

Every function takes plain tensors and returns plain numbers; the chance level of a score stands beside it.
"""
import torch
from torch.nn import functional as F

KS = (5, 10, 20, 50)


# -- recommendation (all-ranking protocol of MMRec) -------------------------------------------------------------------------


def ranking(ranks, users, ks=KS):
    """Recall, NDCG, Precision and MAP at K, averaged over the users that have a target.

    ranks  (T,) int, 0 = best: place of each target in its user's list (train items removed, other targets kept)
    users  (T,) int: whose target it is; with h_r = 1 where place r = 1, 2, ... holds a target, n targets, m = min(K, n):
        Recall = sum h_r / n      Precision = sum h_r / K      NDCG = [sum h_r / log2(r + 1)] / [sum_{r<=m} 1 / log2(r + 1)]
        MAP = [sum h_r Precision@r] / m                                  all sums over r <= K
    returns {"Recall@20": ..., ...}; raises ValueError if there is no target
    """
    if not len(ranks):
        raise ValueError("there is no target to rank: the split is empty")
    order = (users.long() * (int(ranks.max()) + 1) + ranks.long()).argsort()
    ranks, (_, owner, n) = ranks.long()[order], torch.unique(users[order], return_inverse=True, return_counts=True)
    nth = torch.arange(len(ranks), device=ranks.device) - (n.cumsum(0) - n)[owner] + 1    # hits up to this one
    gain = 1 / torch.log2(ranks.double() + 2)
    ideal = (1 / torch.log2(torch.arange(2, max(ks) + 2, device=ranks.device).double())).cumsum(0)

    def total(values):
        return torch.zeros(len(n), dtype=torch.float64, device=ranks.device).index_add_(0, owner, values)

    result = {}
    for k in ks:
        hit, most = (ranks < k).double(), n.clamp(max=k)
        result |= {f"Recall@{k}": (total(hit) / n).mean(), f"NDCG@{k}": (total(hit * gain) / ideal[most - 1]).mean(),
                   f"Precision@{k}": (total(hit) / k).mean(), f"MAP@{k}": (total(hit * nth / (ranks + 1)) / most).mean()}
    return {key: float(value) for key, value in result.items()}


def ranking_chance(users, items, seen, ks=KS):
    """What a random order of each user's unseen items scores in expectation, in closed form.

    users (T,) owner of each target, items I, seen (U,) number of items left out of each user's list
    A target is at each of the I - seen places equally often: Recall@K = min(1, K / (I - seen)), and so on for NDCG.
    """
    owner, n = torch.unique(users, return_counts=True)
    places = (items - seen[owner]).double()
    gain = (1 / torch.log2(torch.arange(2, max(ks) + 2).double())).cumsum(0).to(places.device)
    result = {}
    for k in ks:
        inside = places.clamp(max=k)
        ideal = gain[n.clamp(max=k) - 1]
        result |= {f"Recall@{k}": (inside / places).mean(), f"Precision@{k}": (n * inside / places / k).mean(),
                   f"NDCG@{k}": (n / places * gain[inside.long() - 1] / ideal).mean()}
    return {key: float(value) for key, value in result.items()}


# -- distances between sets of pictures ---------------------------------------------------------------------------------------


def frechet_distance(a, b):
    """Frechet distance of two sets of features taken as Gaussians (FID when the features are Inception's).

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2), symmetric eigen-decompositions in float64.
    a (N, C), b (M, C) -> float >= 0. Name the features and both counts wherever the number is shown: it is biased
    upwards for few samples. raises ValueError for fewer than two samples or another width
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"need two sets (N >= 2, C) of one width, got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.double(), b.double()
    s_a, s_b = (torch.atleast_2d(torch.cov(x.T)) for x in (a, b))
    values, vectors = torch.linalg.eigh(s_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_b @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float((a.mean(0) - b.mean(0)).square().sum() + s_a.trace() + s_b.trace() - 2 * cross))


def kernel_distance(a, b):
    """Unbiased squared maximum mean discrepancy with the kernel (x . y / C + 1)^3 (KID); about 0 for equal sets."""
    a, b = a.double(), b.double()
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # noqa: E731
    aa, bb, n, m = kernel(a, a), kernel(b, b), len(a), len(b)
    return float((aa.sum() - aa.trace()) / (n * (n - 1)) + (bb.sum() - bb.trace()) / (m * (m - 1)) - 2 * kernel(a, b).mean())


# -- pictures and sentences ---------------------------------------------------------------------------------------------------


def r_precision(images, texts, candidates=100, generator=None):
    """Share of pictures whose own sentence is the most similar among `candidates`, the others drawn at random.

    images, texts (N, E), row i of both belong together. Chance is 1 / candidates. Ties count against the picture.
    """
    if not 2 <= candidates <= len(images):
        raise ValueError(f"{candidates} candidates of {len(images)} pairs: choose 2 to {len(images)}")
    similarity = F.normalize(images.double(), dim=1) @ F.normalize(texts.double(), dim=1).T          # (N, N)
    own = similarity.diagonal()[:, None]
    keys = torch.rand(len(images), len(images), generator=generator).fill_diagonal_(2)
    others = keys.argsort(dim=1)[:, : candidates - 1].to(images.device)
    return float((similarity.gather(1, others) < own).all(1).double().mean())


def attribute_accuracy(predicted, true):
    """{attribute: share of right values} for dicts of (N,) int tensors; a true value of -1 is not asked for."""
    result = {}
    for name, values in true.items():
        asked = values >= 0
        if asked.any():
            result[name] = float((predicted[name] == values)[asked].double().mean())
    return result


def l1_outside(a, b, mask):
    """Mean absolute difference of pictures outside a mask.   a, b (B, 3, H, W), mask (B, 1, H, W) in {0, 1} -> float"""
    keep = (1 - mask.double()).expand_as(a)
    return float(((a - b).abs() * keep).sum() / keep.sum().clamp(min=1))


def ssim(a, b, outside=None, window=7, spread=2.0):
    """Structural similarity of pictures in [-1, 1], with uniform windows; mean over pixels, outside a mask if given.

    a, b (B, 3, H, W), outside (B, 1, H, W) -> float <= 1
    """
    mean = lambda x: F.avg_pool2d(x, window, 1, window // 2, count_include_pad=False)  # noqa: E731
    a, b = a.double(), b.double()
    m_a, m_b = mean(a), mean(b)
    v_a, v_b, v_ab = mean(a * a) - m_a**2, mean(b * b) - m_b**2, mean(a * b) - m_a * m_b
    c1, c2 = (0.01 * spread) ** 2, (0.03 * spread) ** 2
    value = (2 * m_a * m_b + c1) * (2 * v_ab + c2) / ((m_a**2 + m_b**2 + c1) * (v_a + v_b + c2))
    keep = torch.ones_like(value) if outside is None else (1 - outside.double()).expand_as(value)
    return float((value * keep).sum() / keep.sum().clamp(min=1))


# -- answers --------------------------------------------------------------------------------------------------------------------


def accuracy_by_type(predicted, true, types, train_true, train_types):
    """{type: (accuracy, accuracy of the type's most frequent training answer, questions)} and "all" over everything.

    predicted, true (N,) int; types list of N names; train_* the training questions that the majority answer comes from
    """
    majority = {}
    for kind in set(train_types):
        answers = train_true[torch.tensor([t == kind for t in train_types])]
        majority[kind] = int(torch.bincount(answers).argmax())
    result, right, guessed = {}, predicted == true, torch.tensor([majority.get(t, -1) for t in types]).to(true.device) == true
    for kind in [*sorted(set(types)), "all"]:
        rows = torch.tensor([kind in (t, "all") for t in types], device=true.device)
        result[kind] = (float(right[rows].double().mean()), float(guessed[rows].double().mean()), int(rows.sum()))
    return result


def roc_auc(scores, labels):
    """Chance that a positive scores above a negative, ties half (area under the ROC curve).   (N,), (N,) bool -> float"""
    positive, negative = scores[labels.bool()].double(), scores[~labels.bool()].double()
    if not len(positive) or not len(negative):
        return float("nan")
    order = torch.cat([positive, negative]).sort().values
    place = lambda x: (torch.searchsorted(order, x) + torch.searchsorted(order, x, right=True) + 1).double() / 2  # noqa: E731
    wins = place(positive).sum() - len(positive) * (len(positive) + 1) / 2
    return float(wins / (len(positive) * len(negative)))
