"""What a step takes follows from seed and step alone; a dataset is gone through once an epoch; weights are kept."""

import numpy as np
import pytest

from ki_edge.train.data.mixture import BLOCK, Mixture, shuffled

SIZES, WEIGHTS, BATCH = [100, 37, 10], [5.0, 3.0, 0.5], 8


def plans(first, last, seed=3):
    mixture = Mixture(SIZES, WEIGHTS, BATCH, seed)
    return [mixture.plan(step) for step in range(first, last)]


def test_each_sample_comes_once_an_epoch():
    seen = [[] for _ in SIZES]
    for plan in plans(0, BLOCK + 300):
        for source, sample, epoch in zip(plan.source, plan.sample, plan.epoch, strict=True):
            seen[source].append((int(epoch), int(sample)))
    for size, each in zip(SIZES, seen, strict=True):
        last = max(epoch for epoch, _ in each)
        assert last >= 5
        orders = [[sample for at, sample in each if at == epoch] for epoch in range(last)]
        assert all(sorted(order) == list(range(size)) for order in orders)
        assert orders[0] != orders[1]


def test_a_step_needs_none_of_those_before():
    whole = plans(0, BLOCK + 20)
    for step in (0, 1, 500, BLOCK - 1, BLOCK, BLOCK + 19):
        alone = Mixture(SIZES, WEIGHTS, BATCH, 3).plan(step)
        for name in ("source", "sample", "epoch"):
            np.testing.assert_array_equal(getattr(alone, name), getattr(whole[step], name))
    assert any((a.sample != b.sample).any() for a, b in zip(plans(0, 5), plans(0, 5, seed=4), strict=True))


def test_shares_are_the_weights_in_each_step_and_over_all():
    counts = np.array([np.bincount(plan.source, minlength=3) for plan in plans(0, 1200)])
    assert (counts.sum(axis=1) == BATCH).all()
    wanted = BATCH * np.array(WEIGHTS) / sum(WEIGHTS)
    assert (np.abs(counts - wanted) < 1.0 + 1e-9).all()
    np.testing.assert_allclose(counts.mean(axis=0), wanted, atol=0.05)
    first = [plan.source[0] for plan in plans(0, 500)]
    assert set(first) == {0, 1, 2}  # a process that has the first rows sees all datasets


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_an_order_holds_each_place_once(size):
    found = shuffled(np.arange(size), size, (0, 1))
    assert sorted(found) == list(range(size))
    np.testing.assert_array_equal(shuffled(np.arange(size)[::-1], size, (0, 1)), found[::-1])
    if size > 60:
        assert np.abs(np.corrcoef(np.arange(size), found)[0, 1]) < 0.3
        assert (shuffled(np.arange(size), size, (0, 2)) != found).mean() > 0.9


def test_orders_look_random():
    """How often each of the 24 orders of four places comes over many keys: chi squared of 23 degrees of freedom."""
    orders = [tuple(shuffled(np.arange(4), 4, (7, key))) for key in range(2400)]
    counts = np.array([orders.count(one) for one in set(orders)])
    assert len(counts) == 24 and ((counts - 100) ** 2 / 100).sum() < 60
