"""What is measured, and how exactly: rankings, distances between sets of pictures, retrieval, edits, answers.

Functions take plain tensors and return plain numbers. The chance level or the baseline of a score stands beside it, and a
distance between pictures carries the name of its features and both sample counts, without which it means nothing.
"""
from typing import NamedTuple

import torch
from torch.nn import functional as F

KS = (5, 10, 20, 50)


# -- recommendation (all-ranking protocol of MMRec) ----------------------------------------------------------


def ranking(ranks, users, ks=KS):
    """Recall, NDCG, Precision and MAP at each K as MMRec defines them, averaged over users with a target.

    ranks    (T,) int, place of target t in its user's list of all items but those of training, 0 = first.
             Other targets stay in the list, so two targets of one user never share a rank
    users    (T,) int, whose target it is, in any order
    returns  {"Recall@20": float, ...}, not rounded (MMRec rounds to 4 digits before it compares epochs)
    raises   ValueError if there is no target, a rank is negative, or two targets of a user share one

    With n targets and hits h_r in {0, 1} at places r = 1, 2, ...; sums run over r <= K unless they say more:
        Recall = sum h_r / n        NDCG = sum h_r / log2(r + 1)  /  sum_{r <= min(K, n)} 1 / log2(r + 1)
        Precision = sum h_r / K     MAP = sum h_r Precision@r / min(K, n)
    """
    if ranks.shape != users.shape or ranks.dim() != 1:
        raise ValueError(f"ranks {tuple(ranks.shape)} and users {tuple(users.shape)} must both be (T,)")
    if not len(ranks):
        raise ValueError("there is no target to rank: the split is empty")
    keys, order = (users.long() * (int(ranks.max()) + 1) + ranks.long()).sort()
    if ranks.min() < 0 or (keys[1:] == keys[:-1]).any():
        raise ValueError("ranks count from 0, and two targets of one user cannot share a rank: count rivals")
    ranks = ranks.long()[order]
    row, n = torch.unique_consecutive(users[order], return_inverse=True, return_counts=True)[1:]   # (T,), (n)
    nth = torch.arange(len(row), device=row.device) - (n.cumsum(0) - n)[row] + 1      # hits so far, 1, 2, ...
    gain = 1 / torch.log2(ranks.double() + 2)
    scores = {}
    for k in ks:
        hit, most = (ranks < k).double(), n.clamp(max=k)
        parts = {"Recall": hit / n[row], "NDCG": hit * gain / ideal(most)[row], "Precision": hit / k,
                 "MAP": hit * nth / (ranks + 1) / most[row]}
        scores |= {f"{name}@{k}": float(x.sum()) / len(n) for name, x in parts.items()}
    return scores


def ideal(hits):
    """DCG of a list that starts with so many hits.   (rows,) int >= 1 -> (rows,) float64"""
    places = torch.arange(int(hits.max()), device=hits.device, dtype=torch.float64)
    return (1 / torch.log2(places + 2)).cumsum(0)[hits - 1]


def ranking_chance(users, items, seen, ks=KS):
    """What `ranking` gives on average when every list is shuffled, in closed form.

    users (T,) owner of each target; items I; seen (U,) how many training items are taken out of each user's list.
    With M = I - seen places:  P(h_r = 1) = n / M,  E[hits before r | h_r = 1] = (r - 1) (n - 1) / (M - 1).
    """
    owner, n = torch.unique(users, return_counts=True)
    places = (items - seen.to(owner.device)[owner]).double()[:, None]                           # (rows, 1): M
    scores = {}
    for k in ks:
        r = torch.arange(1, k + 1, device=owner.device, dtype=torch.float64)                      # (K,)
        hit = n[:, None] / places * (r <= places)                                                 # (rows, K)
        before = (r - 1) * (n[:, None] - 1) / (places - 1).clamp(min=1)
        most = n.clamp(max=k)
        parts = {"Recall": hit.sum(1) / n, "NDCG": (hit / torch.log2(r + 1)).sum(1) / ideal(most),
                 "Precision": hit.sum(1) / k, "MAP": (hit * (1 + before) / r).sum(1) / most}
        scores |= {f"{name}@{k}": float(x.mean()) for name, x in parts.items()}
    return scores


# -- distances between sets of pictures ----------------------------------------------------------------------


class Distance(NamedTuple):
    """A distance with what it depends on; `float(d)` is the value, `print(d)` says it all."""
    value: float
    kind: str
    features: str               # name of the feature extractor
    counts: tuple               # pictures on either side

    def __float__(self):
        return self.value

    def __str__(self):
        ours, theirs = self.counts
        return f"{self.kind} {self.value:.4g} ({self.features} features, {ours:,} against {theirs:,})"


def two_sets(a, b):
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"need two sets of features (N >= 2, C) of one width, got {tuple(a.shape)} and {tuple(b.shape)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("the features of at least one picture are not finite: there is no distance")
    return a.double(), b.double()


def frechet_distance(a, b, features):
    """Frechet distance of two sets of features, each taken as a Gaussian (FID if they are Inception's).

    a (N, C), b (M, C) -> Distance. It is biased upwards for few samples: compare only at equal counts and features.
    """
    x, y = two_sets(a, b)
    value = frechet_of_moments(x.mean(0), torch.cov(x.T).reshape(x.shape[1], -1), y.mean(0),
                               torch.cov(y.T).reshape(x.shape[1], -1))
    return Distance(value, "Frechet distance", features, (len(a), len(b)))


def frechet_of_moments(mean_a, cov_a, mean_b, cov_b):
    """|mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr (S_a^1/2 S_b S_a^1/2)^1/2.   (C,), (C, C), twice -> float

    The eigenvalues under the last root are the squared singular values of S_a^1/2 S_b^1/2. Taking these instead of squaring and
    then taking the root keeps all digits where covariances have no full rank; roots come from symmetric eigen-decompositions,
    never from a general matrix square root with its complex remainders.
    """
    def root(cov):
        values, vectors = torch.linalg.eigh(cov.double())
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    shared = torch.linalg.svdvals(root(cov_a) @ root(cov_b)).sum()
    apart = (mean_a.double() - mean_b.double()).square().sum()
    return max(0.0, float(apart + cov_a.double().trace() + cov_b.double().trace() - 2 * shared))


def kernel_distance(a, b, features, block=2048):
    """Unbiased squared maximum mean discrepancy, k(x, y) = (x . y / C + 1)^3 (KID): 0 on average if equal.

    a (N, C), b (M, C) -> Distance; can be slightly negative. Unlike Frechet's it does not depend on N in expectation.
    """
    x, y = two_sets(a, b)

    def total(p, q):                                # in blocks of rows: nothing of size N x M is held
        return sum(float(((rows @ q.T / p.shape[1] + 1) ** 3).sum()) for rows in p.split(block))

    def within(p):                                  # over distinct pairs: the diagonal would bias it
        own = float(((p.square().sum(1) / p.shape[1] + 1) ** 3).sum())
        return (total(p, p) - own) / (len(p) * (len(p) - 1))

    value = within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y))
    return Distance(value, "kernel distance", features, (len(a), len(b)))


# -- pictures and sentences ----------------------------------------------------------------------------------


def r_precision(images, texts, candidates=100, generator=None, groups=None):
    """Share of pictures whose own sentence is the most similar (cosine) among `candidates`, the rest drawn.

    images, texts (N, D): row i of both belong together; groups (N,) int: rows of one group say the same, so they are never
    drawn as a wrong answer. Ties share the point. Chance is 1 / candidates exactly.
    """
    n = len(images)
    groups = torch.arange(n) if groups is None else groups.cpu()
    allowed = groups[:, None] != groups
    fewest = int(allowed.sum(1).min()) + 1 if n else 0
    if len(texts) != n or not 2 <= candidates <= fewest:
        raise ValueError(f"{n} pictures, {len(texts)} sentences, {candidates} candidates: need as many sentences as pictures, "
                         f"and 2 to {fewest} candidates")
    keys = torch.rand(n, n, generator=generator).masked_fill(~allowed, 2)        # the smallest keys are drawn
    others = keys.topk(candidates - 1, largest=False).indices.to(images.device)
    similarity = F.normalize(images.double(), dim=1) @ F.normalize(texts.double(), dim=1).T           # (N, N)
    own, rivals = similarity.diagonal()[:, None], similarity.gather(1, others)
    level = (rivals - own).abs() < 1e-9                # equal up to the order of summation: not a difference
    return float(((level | (rivals < own)).all(1) / (1 + level.sum(1))).mean())


# -- edits: what must not change -----------------------------------------------------------------------------


def l1_outside(a, b, mask=None):
    """Mean |a - b| where the mask is 0.   a, b (B, C, H, W), mask (B, 1, H, W), 1 = may change -> (B,)

    A picture whose mask covers everything gets NaN: average with `nanmean`.
    """
    keep = torch.ones_like(a[:, :1]) if mask is None else (mask < 0.5).to(a.dtype)
    return ((a - b).abs().mean(1, keepdim=True) * keep).sum((1, 2, 3)) / keep.sum((1, 2, 3))


def ssim(a, b, mask=None):
    """Structural similarity (Wang et al. 2004): 11 x 11 Gaussian windows of sigma 1.5, no padding.

    a, b (B, C, H, W) in [-1, 1], at least 11 x 11 -> (B,) in [-1, 1]
    mask (B, 1, H, W), 1 = may change: only windows that touch no changed pixel count; NaN if there is none.
    """
    if a.shape != b.shape or min(a.shape[2:]) < 11:
        raise ValueError(f"need two batches of one shape, at least 11 x 11, got {tuple(a.shape)} and {tuple(b.shape)}")
    taps = torch.exp(-torch.arange(-5, 6, device=a.device, dtype=torch.float64) ** 2 / (2 * 1.5**2))
    down, right = (torch.eye(n).to(taps).unfold(0, 11, 1) @ (taps / taps.sum()) for n in a.shape[2:])      # (H - 10, H), ...
    a, b = a.double(), b.double()
    mu_a, mu_b, aa, bb, ab = (down @ x @ right.T for x in (a, b, a * a, b * b, a * b))
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2                  # 2: from the least to the largest value
    alike = ((2 * mu_a * mu_b + c1) * (2 * (ab - mu_a * mu_b) + c2)
             / ((mu_a**2 + mu_b**2 + c1) * (aa - mu_a**2 + bb - mu_b**2 + c2))).mean(1, keepdim=True)
    touched = torch.zeros_like(alike) if mask is None else F.max_pool2d((mask >= 0.5).double(), 11, 1)
    keep = 1 - touched
    return (alike * keep).sum((1, 2, 3)) / keep.sum((1, 2, 3))


# -- answers -------------------------------------------------------------------------------------------------


def accuracy_by_type(predicted, true, types, train_true, train_types):
    """{type: (accuracy, accuracy of the type's most frequent training answer, questions)}, and "all" of them.

    predicted, true (N,) int, types N names; train_* the training questions that the majority answers come from. A type that
    training never asked has majority accuracy 0. Ties between answers: the lower id.
    """
    if not len(true):
        raise ValueError("there is no question to answer: the split is empty")
    predicted, true, train_true = predicted.cpu(), true.cpu(), train_true.cpu()
    majority = {}
    for kind in set(train_types):
        rows = torch.tensor([t == kind for t in train_types])
        majority[kind] = int(torch.bincount(train_true[rows]).argmax())
    right = (predicted == true).double()
    guessed = (torch.tensor([majority.get(t, -1) for t in types]) == true).double()
    scores = {}
    for kind in [*sorted(set(types)), "all"]:
        rows = torch.tensor([kind in (t, "all") for t in types])
        scores[kind] = (float(right[rows].mean()), float(guessed[rows].mean()), int(rows.sum()))
    return scores


def roc_auc(scores, labels):
    """Probability that a positive scores above a negative, ties half: area under the ROC curve. Chance 0.5.

    scores (N,), labels (N,) bool -> float;   raises ValueError without a positive or without a negative
    """
    labels = labels.bool()
    positive, negative = scores[labels].double(), scores[~labels].double().sort().values
    if not len(positive) or not len(negative):
        raise ValueError(f"an ROC curve needs both kinds, not {len(positive)} against {len(negative)} rows")
    below, upto = (torch.searchsorted(negative, positive, right=right) for right in (False, True))
    return float((below + upto).double().mean()) / 2 / len(negative)


# -- evidence: python -m data.metrics ------------------------------------------------------------------------


def ladder(count, seed=0):
    """Distances of `count` renders from renders of another seed and from ever worse pictures, in the reader's features.

    -> {what the pictures are: (Frechet distance, kernel distance)}
    """
    from data import reader, world
    look, rng = reader.reader(), torch.Generator().manual_seed(seed)

    def painted(seed, split="test"):
        return world.render(world.scenes(range(count), seed, split), 64)[0]

    def shuffled(pictures, block):                  # the blocks of each picture in another order
        cells = F.unfold(pictures, block, stride=block)                                                # (B, 3 block^2, n)
        order = torch.rand(count, cells.shape[2], generator=rng).argsort(1)[:, None].expand_as(cells)
        return F.fold(cells.gather(2, order), pictures.shape[2:], block, stride=block)

    renders = painted(seed)
    sets = {"renders of another seed": painted(seed + 1), "combinations never trained on": painted(seed, "unseen"),
            "renders in grey": renders.mean(1, keepdim=True).expand_as(renders), "blocks of 16 shuffled": shuffled(renders, 16),
            "pixels shuffled": shuffled(renders, 1), "noise": torch.rand(renders.shape, generator=rng) * 2 - 1}

    @torch.no_grad()
    def features(pictures):
        return torch.cat([look.features(part) for part in pictures.split(100)])

    ours = features(renders)
    return {name: tuple(distance(ours, features(pictures), "reader") for distance in (frechet_distance, kernel_distance))
            for name, pictures in sets.items()}


if __name__ == "__main__":
    for name, distances in ladder(2000).items():
        print(f"{name:32}", *distances, sep="  ")
