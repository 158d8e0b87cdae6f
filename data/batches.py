"""Batches as pure functions of (seed, t): resuming needs no saved random state.

Every random choice of a run is drawn from a generator made of integers that name it: (seed, step), (seed, epoch), ...
Sixty steps are therefore bit for bit forty steps, a kill, and twenty more.
"""
import copy
import functools

import torch


def seed_from(*numbers):
    """Mix integers into one 63-bit seed (the finaliser of splitmix64, chained): nearby inputs give unrelated seeds."""
    state = 0
    for number in numbers:
        state = (state + int(number) + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def generator(*numbers, device="cpu"):
    """A torch.Generator seeded by `seed_from(*numbers)`."""
    return torch.Generator(device).manual_seed(seed_from(*numbers))


@functools.lru_cache(maxsize=4)
def permutation(n, seed, epoch):
    return torch.randperm(n, generator=generator(seed, epoch))


def batch_rows(n, size, seed, t):
    """Rows of global batch t when n rows are shuffled anew each epoch.   -> (size,) int64

    The epochs form one endless stream that is cut every `size` rows, so batches never shrink at an epoch's end and every row
    is seen equally often.   raises ValueError for an empty data set
    """
    if n < 1 or size < 1:
        raise ValueError(f"cannot draw batches of {size} from {n} rows: both must be at least 1")
    parts, start, stop = [], t * size, (t + 1) * size
    while start < stop:
        epoch, offset = divmod(start, n)
        parts.append(permutation(n, seed, epoch)[offset : offset + stop - start])
        start += len(parts[-1])
    return torch.cat(parts)


def train_quietly(make, cfg):
    """A rival trained beside a run, without files or a bar, step for step as train.py would.   make(cfg) -> task

    Returns the task as it was at its best evaluation on validation.
    """
    torch.manual_seed(seed_from(cfg.seed))
    task, best, stale, state = make(cfg), float("-inf"), 0, {}
    for step, batch in enumerate(task.batches(cfg.seed, 0, cfg.steps), 1):
        torch.manual_seed(seed_from(cfg.seed, step - 1))
        task.update(batch, step - 1)
        if step % cfg.eval_every == 0 or step == cfg.steps:
            score = task.evaluate("valid")[task.headline] * (1 if task.better == "higher" else -1)
            stale += 1
            if score > best:
                best, stale, state = score, 0, copy.deepcopy(task.model.state_dict())
            if 0 < cfg.patience <= stale:
                break
    task.model.load_state_dict(state)
    return task
