"""Statistics in a fixed amount of memory are numpy's over all rows at once."""

import numpy as np
import pytest

from ki_edge.errors import DatasetError
from ki_edge.train.data.statistics import measure


def blocks(array, size=1000):
    return lambda: (array[at : at + size] for at in range(0, len(array), size))


@pytest.mark.parametrize("rows", [2, 3, 99, 100, 101, 5001, 70_001])
def test_quantiles_are_exact(rows):
    random = np.random.default_rng(rows)
    values = random.standard_normal((rows, 5)) * [1, 1e-4, 60, 1, 0] + [0, 5, -30, 0, 2]
    values = values.astype(np.float32)
    values[:, 3] = np.round(values[:, 3], 1)  # many equal ones, and zeros of both signs
    found = measure(blocks(values), "x")
    wanted = np.quantile(values.astype(np.float64), [0.01, 0.99], axis=0)
    np.testing.assert_array_equal(found.stats.q01, wanted[0])
    np.testing.assert_array_equal(found.stats.q99, wanted[1])
    np.testing.assert_allclose(found.stats.mean, values.astype(np.float64).mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.stats.std, values.astype(np.float64).std(axis=0), rtol=1e-9, atol=1e-12)
    assert (found.low == values.min(axis=0)).all() and (found.high == values.max(axis=0)).all() and found.rows == rows
    assert found.notes == ("x[4] is 2 in every frame: its range is zero, so nothing is learnt about it",)


def test_extreme_floats():
    tiny, large = np.finfo(np.float32).tiny, np.finfo(np.float32).max / 4
    values = np.array([[-large], [-1], [-tiny], [-0.0], [0.0], [tiny], [1], [large]], np.float32)
    found = measure(blocks(values, 3), "x")
    wanted = np.quantile(values.astype(np.float64), [0.01, 0.99], axis=0)
    np.testing.assert_array_equal([found.stats.q01, found.stats.q99], wanted)


def test_a_number_that_seldom_moves_keeps_its_range():
    """A gripper that closes in one frame of 500: between equal quantiles it would be normalised to millions."""
    values = np.zeros((1000, 1), np.float32)
    values[[3, 700]] = 0.8
    found = measure(blocks(values), "action", ("grip",))
    assert (found.stats.q01, found.stats.q99) == (0.0, np.float32(0.8))
    assert found.notes[0].startswith(
        "action[0] (grip) is the same in 98 of 100 frames: its range is taken from 0 to 0.8"
    )


def test_noise_beside_movement_is_told():
    """A gripper that was never used: what a simulator's rounding leaves of it."""
    values = np.random.default_rng(0).uniform(-1, 1, (500, 2)).astype(np.float32) * np.float32([1.0, 2.5e-8])
    (note,) = measure(blocks(values), "action", ("x", "gripper")).notes
    assert note.startswith("action[1] (gripper) moves by 4.9") and "if that is noise" in note
    assert measure(blocks(values[:, 1:]), "action").notes == ()  # all of it is small


def test_outliers_are_told():
    values = np.random.default_rng(0).uniform(-1, 1, (2000, 2)).astype(np.float32)
    values[5, 1] = 1e6
    (note,) = measure(blocks(values), "state").notes
    assert note.startswith("state[1] goes from -") and "to 1e+06" in note and note.endswith("look for outliers")


def test_what_cannot_be_measured():
    with pytest.raises(DatasetError, match=r"state\[1\] is nan: statistics need finite"):
        measure(blocks(np.array([[0, 1], [2, np.nan]], np.float32)), "state")
    with pytest.raises(DatasetError, match="state: no rows"):
        measure(blocks(np.zeros((0, 2), np.float32)), "state")
