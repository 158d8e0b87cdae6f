"""Batches are pure functions of (seed, t)."""
import pytest
import torch

from data.batches import batch_rows, generator, seed_from


def test_every_row_is_seen_once_an_epoch():
    stream = torch.cat([batch_rows(10, 4, seed=3, t=t) for t in range(5)])     # two epochs, cut anywhere
    assert sorted(stream[:10].tolist()) == sorted(stream[10:].tolist()) == list(range(10))
    assert stream[:10].tolist() != stream[10:].tolist()


def test_a_batch_does_not_depend_on_the_batches_before():
    alone = batch_rows(100, 7, seed=1, t=40)
    for t in range(60):
        batch_rows(100, 7, seed=1, t=t)
    assert torch.equal(alone, batch_rows(100, 7, seed=1, t=40))
    assert not torch.equal(alone, batch_rows(100, 7, seed=2, t=40))


def test_a_batch_may_be_larger_than_the_data():
    assert torch.bincount(batch_rows(3, 12, seed=0, t=5)).tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match="cannot draw batches of 4 from 0 rows"):
        batch_rows(0, 4, 0, 0)


def test_seeds_do_not_collide():
    seeds = {seed_from(a, b) for a in range(100) for b in range(100)}
    assert len(seeds) == 10_000 and max(seeds) < 2**63
    assert torch.rand(1, generator=generator(1, 2)) != torch.rand(1, generator=generator(2, 1))
