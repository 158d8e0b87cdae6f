"""Full-ranking evaluation by counting: the rank of a target is the number of items that score above it.

    rank(u, i) = #{ j not seen by u : s_uj > s_ui, or s_uj = s_ui and j < i }         s_uj = users[u] . items[j]

All metrics of a ranked list follow from the ranks of its targets, so no sorted list and no users x items matrix is kept:
one block of scores at a time, counted and forgotten. Seen items are counted too and taken off again by a gather.
"""
import torch


def rank_of_targets(users, items, user, target, seen=None, block=1024):
    """Rank of each target among the items its user has not seen, 0 = best; ties: lower id first.

    users (U, D), items (I, D)   embeddings
    user, target (T,) int        the pairs to rank, any order, several per user allowed
    seen                         Graph (U, I) whose edges are left out, usually the training clicks; None: nothing
    returns                      (T,) int32
    raises                       ValueError for other shapes or indices out of range
    """
    if users.dim() != 2 or items.dim() != 2 or users.shape[1] != items.shape[1] or user.shape != target.shape:
        raise ValueError(f"users {tuple(users.shape)} and items {tuple(items.shape)} need one width, user "
                         f"{tuple(user.shape)} and target {tuple(target.shape)} one length")
    if len(user) and (user.min() < 0 or user.max() >= len(users) or target.min() < 0 or target.max() >= len(items)):
        raise ValueError(f"user ids must be 0 .. {len(users) - 1} and targets 0 .. {len(items) - 1}")
    ids = torch.arange(len(items), device=items.device)
    ranks = [torch.zeros(0, dtype=torch.int64, device=items.device)]
    for u, i in zip(user.split(block), target.split(block), strict=True):
        scores = users[u] @ items.T                                                       # (block, I)
        own = scores.gather(1, i[:, None])                                                # (block, 1)
        above = (scores > own).sum(1)
        tied = ((scores == own).sum(1) > 1).nonzero()[:, 0]
        above[tied] += ((scores[tied] == own[tied]) & (ids < i[tied, None])).sum(1)
        if seen is not None:
            rows = seen.rows(u)
            row, col = rows.row_of, rows.col.long()
            score = scores[row, col]
            beats = (score > own[row, 0]) | ((score == own[row, 0]) & (col < i[row]))
            above -= torch.zeros_like(above).index_add_(0, row, beats.long())
        ranks.append(above)
    return torch.cat(ranks).int()


def top_k(users, items, user, k, seen=None, block=1024):
    """The k best unseen items of each user, best first; ties: lower id first.   -> ids (T, k) int64, scores (T, k)

    Where a user has fewer than k unseen items the rest of the row is -1 with score -inf.
    """
    if not 1 <= k <= len(items):
        raise ValueError(f"k={k} of {len(items)} items: choose 1 to {len(items)}")
    ids, values = [], []
    for u in user.split(block):
        scores = users[u] @ items.T
        if seen is not None:
            rows = seen.rows(u)
            scores[rows.row_of, rows.col.long()] = -torch.inf
        best, index = scores.sort(dim=1, descending=True, stable=True)
        ids.append(index[:, :k].masked_fill(best[:, :k] == -torch.inf, -1))
        values.append(best[:, :k])
    return torch.cat(ids), torch.cat(values)
