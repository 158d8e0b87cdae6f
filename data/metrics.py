"""Every score of the project, each with its chance level or baseline where one exists.

Ranking (MGCN, BeFA, LD4MRec), generated pictures (GALIP, DE-Net, StoryImager), answers (DualVGR).
"""
import torch

# ---- ranking ---------------------------------------------------------------------------------------------------------


def _check_ranks(ranks, users):
    if ranks.shape != users.shape or ranks.dim() != 1:
        raise ValueError(f"ranks {tuple(ranks.shape)} and users {tuple(users.shape)} must both be (T,), one row a target")
    if not len(ranks):
        raise ValueError("there is no target to rank: the split is empty")
    if ranks.min() < 0:
        raise ValueError(f"rank {int(ranks.min())} is negative; ranks count from 0, the best")


def ranking(ranks, users, ks=(5, 10, 20, 50)):
    """Recall, NDCG, Precision and MAP at each K, averaged over users with at least one target (MMRec's definitions).

    ranks    (T,) int, place of target t in its user's full list with the training items taken out, 0 = first. Other
             targets stay in the list, so two targets of one user never share a rank
    users    (T,) int, whose target it is, in any order
    returns  {"Recall@20": float, ...}, not rounded (MMRec rounds to 4 digits before it compares epochs)

    With n targets, hits h_r at places r = 1, 2, ...:     Recall = sum_{r<=K} h_r / n     Precision = sum h_r / K
    NDCG = sum_{r<=K} h_r / log2(r+1) / sum_{r<=min(K,n)} 1 / log2(r+1)     MAP = sum_{r<=K} h_r Precision@r / min(K,n)
    """
    _check_ranks(ranks, users)
    ranks, users = ranks.long(), users.long()
    order = (users * (int(ranks.max()) + 1) + ranks).argsort()
    ranks, users = ranks[order], users[order]
    if ((ranks[1:] == ranks[:-1]) & (users[1:] == users[:-1])).any():
        raise ValueError("two targets of one user share a rank: ranks must count the other targets as well")
    _, row, n = torch.unique_consecutive(users, return_inverse=True, return_counts=True)     # (T,), (rows,)
    place = torch.arange(len(row), device=row.device) - (n.cumsum(0) - n)[row] + 1           # 1 = the user's best target
    r = ranks.double() + 1
    scores = {}
    for k in ks:
        hit = (ranks < k).double()
        total = {"Recall": hit / n[row], "Precision": hit / k,
                 "NDCG": hit / torch.log2(r + 1) / ideal(n, k)[row],
                 "MAP": hit * place / r / n.clamp_max(k)[row]}
        scores |= {f"{name}@{k}": float(x.sum()) / len(n) for name, x in total.items()}
    return scores


def ideal(n, k):
    """DCG of a list that starts with its min(n, K) targets.   n (rows,) int -> (rows,) float64"""
    gain = 1 / torch.log2(torch.arange(k, device=n.device, dtype=torch.float64) + 2)
    return gain.cumsum(0)[n.clamp_max(k) - 1]


def ranking_chance(users, seen, items, ks=(5, 10, 20, 50)):
    """What `ranking` gives on average when each list is shuffled: expectations in closed form, nothing is drawn.

    users  (T,) as in `ranking`.   seen (U,) training items of every user.   items  the number of items I
    With M = I - seen places, P(h_r = 1) = n / M, and P(another hit at an earlier place | h_r) = (n - 1) / (M - 1).
    """
    ids, n = torch.unique(users, return_counts=True)
    m, n = (items - seen[ids]).double(), n.double()                                          # (rows,)
    scores = {}
    for k in ks:
        r = torch.arange(1, k + 1, device=users.device, dtype=torch.float64)                 # (K,)
        p = (n / m)[:, None] * (r <= m[:, None])                                             # (rows, K): P(h_r = 1)
        before = (r - 1) * ((n - 1) / (m - 1).clamp_min(1))[:, None]                         # expected earlier hits
        expected = {"Recall": p.sum(1) / n, "Precision": p.sum(1) / k,
                    "NDCG": (p / torch.log2(r + 1)).sum(1) / ideal(n.long(), k),
                    "MAP": (p * (1 + before) / r).sum(1) / n.clamp_max(k)}
        scores |= {f"{name}@{k}": float(x.mean()) for name, x in expected.items()}
    return scores
