"""First actions that are given in training: how many, and where they lie."""

import numpy as np
import pytest

from ki_edge.errors import ArgumentError
from ki_edge.planning.settings import TrainSettings
from ki_edge.train.step.delays import FADE, shifted

ACTIONS = np.arange(2 * 10 * 4, dtype=np.float32).reshape(2, 10, 4)


def test_given_actions_are_shifted_by_one_offset_which_fades_out():
    delay = np.array([3, 0, 1, 9, 3, 0])  # of three draws of two samples
    moved = shifted(np.random.default_rng(0), ACTIONS, delay, 0.5, dims=3)
    assert moved.shape == (6, 10, 4) and moved.dtype == np.float32
    offsets = moved - np.tile(ACTIONS, (3, 1, 1))
    assert not offsets[..., 3].any() and not offsets[1].any() and not offsets[5].any()
    for row, d in enumerate(delay):
        first = offsets[row, :1, :3]
        assert np.allclose(offsets[row, :d, :3], first, atol=1e-5)
        lengths = np.abs(offsets[row, :, :3]).max(axis=1)
        assert (np.diff(lengths) <= 1e-5).all() and not lengths[2 * d + FADE :].any()
    led_back = offsets[0, 3:8, 0] / offsets[0, 0, 0]
    assert led_back == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], abs=1e-4)


def test_the_spread_is_a_standard_deviation():
    delay = np.full(20_000, 1)
    offsets = shifted(np.random.default_rng(1), ACTIONS, delay, 0.25, dims=4) - np.tile(ACTIONS, (10_000, 1, 1))
    assert offsets[:, 0].std(axis=0) == pytest.approx(np.full(4, 0.25), rel=0.03)
    assert np.abs(offsets[:, 0].mean(axis=0)).max() < 0.01


@pytest.mark.parametrize("given", [{"rtc_offset": -0.1}, {"rtc_offset": float("nan")}, {"rtc_offset": 0.1}])
def test_offsets_that_make_no_sense(given):
    with pytest.raises(ArgumentError, match="expected 0 or more, above 0 only with rtc_max_delay"):
        TrainSettings(**{"rtc_max_delay": 2 if given["rtc_offset"] != 0.1 else 0, **given})
