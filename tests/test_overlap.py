"""Weights and guidance against the published numbers, and what an overlap must be."""

import numpy as np
import pytest

from ki_edge import flow
from ki_edge.config import TINY, Pi05Config
from ki_edge.errors import ArgumentError
from ki_edge.graphs import specs
from ki_edge.overlap import Overlap, guidance_weights, nothing_before, prefix_weights

# of ten steps, tau = 0 .. 0.9, as the sources of the papers give them, rounded
PUBLISHED = {
    5.0: [5, 5, 4.25, 2.762, 2.167, 2, 2.167, 2.762, 4.25, 5],
    10.0: [10, 9.111, 4.25, 2.762, 2.167, 2, 2.167, 2.762, 4.25, 9.111],
}


@pytest.mark.parametrize(("maximum", "expected"), PUBLISHED.items())
@pytest.mark.parametrize("convention", flow.TIME_CONVENTIONS)
def test_guidance_of_ten_steps(maximum, expected, convention):
    found = guidance_weights(flow.denoise_times(10, convention), maximum)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=6e-4)  # three decimals, and float32 times


def test_guidance_is_its_maximum_where_it_would_be_infinite():
    np.testing.assert_array_equal(guidance_weights([1.0, 0.0, 1e-30], 7.5), np.float32(7.5))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0]),
        ("exponential", [1, 1, 0.571, 0.287, 0.114, 0.026, 0, 0, 0, 0]),
    ],
)
def test_published_weights(schedule, expected):
    np.testing.assert_allclose(prefix_weights(2, 6, 10, schedule), expected, rtol=0, atol=6e-4)


@pytest.mark.parametrize("schedule", ["linear", "exponential"])
@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_weights_of_every_delay_and_end(schedule, horizon):
    """One, then never rising, then zero; the delay counts no further than the end."""
    for end in range(horizon + 1):
        for delay in range(horizon + 1):
            found = prefix_weights(delay, end, horizon, schedule)
            assert found.shape == (horizon,) and found.dtype == np.float32
            assert (found[: min(delay, end)] == 1).all() and (found[end:] == 0).all()
            assert (np.diff(found) <= 0).all()
            between = found[min(delay, end) : end]
            assert ((between > 0) & (between < 1)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 3, 5), "delay -1: expected an integer from 0 to 5"),
        ((6, 3, 5), "delay 6"),
        ((1.0, 3, 5), "delay 1.0"),
        ((1, 6, 5), "end 6: expected an integer from 0 to 5"),
        ((1, 3, 0), "horizon 0"),
        ((1, 3, 5, "cosine"), "schedule 'cosine': expected one of linear, exponential"),
    ],
)
def test_weights_that_cannot_be(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        prefix_weights(*arguments)


@pytest.mark.parametrize("maximum", [0.0, -1.0, np.nan, np.inf, 1e9, True, "5", [5.0]])
def test_maxima_that_cannot_be(maximum):
    with pytest.raises(ArgumentError, match=r"guidance .*: expected a number above 0"):
        guidance_weights([0.5], maximum)


def overlap(**changes):
    fields = {
        "actions": np.zeros((1, 4, 3), np.float32),
        "weights": np.ones((1, 4), np.float32),
        "committed": np.zeros((1, 4), np.bool_),
    }
    return Overlap(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": np.zeros((4, 3), np.float32)}, "actions is float32"),
        ({"actions": np.zeros((1, 4, 3))}, "actions is float64"),
        ({"actions": np.full((1, 4, 3), np.nan, np.float32)}, "NaN or infinity"),
        ({"weights": np.ones((1, 5), np.float32)}, "weights is float32"),
        ({"weights": np.full((1, 4), 1.5, np.float32)}, "from 0 to 1"),
        ({"weights": np.full((1, 4), np.nan, np.float32)}, "from 0 to 1"),
        ({"committed": np.zeros((1, 4), np.int64)}, "committed is int64"),
        ({"committed": None}, "overlap committed"),
        ({"actions": "none"}, "actions is <U4"),
        ({"maximum": 0}, "guidance 0"),
    ],
)
def test_overlaps_that_cannot_be(changes, message):
    with pytest.raises(ArgumentError, match=message):
        overlap(**changes)
    overlap().check(1, 4, 3)
    with pytest.raises(ArgumentError, match=r"its actions are \[1, 4, 3\], expected \[2, 4, 3\]"):
        overlap().check(2, 4, 3)


@pytest.mark.parametrize("rtc", ["none", "guided", "trained"])
def test_graphs_take_what_the_geometry_says(rtc):
    """Bundles of before have no such field, and it is written only where there is something to say."""
    config = Pi05Config.from_dict({**TINY.to_dict(), "rtc": rtc})
    assert config == TINY and ("rtc" in config.to_dict()) == (rtc != "none")
    assert Pi05Config.from_dict(config.to_dict()).rtc == rtc
    plain, found = ([tensor.name for tensor in specs(one)[1].inputs] for one in (TINY, config))
    names = ["previous", "previous_weights", "guidance", "time", "committed", "committed_modulation"]
    assert found == plain + names[: {"none": 0, "guided": 4, "trained": 6}[rtc]]
    zeros = nothing_before(config, 2)
    assert list(zeros) == found[len(plain) :] and not any(array.any() for array in zeros.values())
    assert all(array.dtype == specs(config)[1].tensor(name).dtype for name, array in zeros.items())
