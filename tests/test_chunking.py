"""The chunk before, from robot units into the model's space of the moment."""

import json
from dataclasses import replace

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, ContractError
from ki_edge.overlap import prefix_weights
from ki_edge.policy import contract as contracts
from ki_edge.policy.chunking import Guiding, PreviousChunk, overlap_of
from ki_edge.policy.normalize import NormStats, normalize
from ki_edge.policy.transforms import OutputPipeline

HORIZON = 6
STATS = NormStats(mean=[0.5, -1.0], std=[2.0, 0.25], q01=[-1.0, -2.0], q99=[3.0, 1.0])
PLAIN = contracts.generic(["top"], state_dim=3, action_dim=2, action_horizon=HORIZON, model_action_dim=5)
STATE = np.array([0.3, -0.7, 2.0])


def chunk(rows, width=2, seed=0):
    return np.random.default_rng(seed).uniform(-1.0, 1.0, (rows, width))


@pytest.mark.parametrize("kind", ["quantile", "zscore", "none"])
@pytest.mark.parametrize("epsilon", ["openpi", "lerobot"])
@pytest.mark.parametrize("delta", [None, (True, False), (False, True), (True,)])
def test_the_runtime_would_send_it_again(kind, epsilon, delta):
    """What goes in comes out of the pipeline that makes robot actions of the model's, for another state than its own;
    what is past its end is its last action, what is past the robot's numbers is 0."""
    contract = replace(PLAIN, normalization=kind, normalization_epsilon=epsilon, delta_mask=delta)
    previous = PreviousChunk(chunk(4), delay=2)
    found = overlap_of(previous, contract, STATS, STATE, way="guided")
    assert found.actions.shape == (1, HORIZON, 5) and found.actions.dtype == np.float32
    assert not found.actions[..., 2:].any()
    sent = OutputPipeline(contract, {"actions": STATS})(found.actions[0], STATE)
    np.testing.assert_allclose(sent, previous.actions[[0, 1, 2, 3, 3, 3]], rtol=0, atol=2e-6)


def test_relative_actions_are_of_the_present_state():
    """The number itself: an absolute 0.9 is 0.6 from 0.3; kept relative to where it was made it would be elsewhere."""
    contract = replace(PLAIN, normalization="zscore", delta_mask=(True, False))
    previous = PreviousChunk([[0.9, 0.5]], delay=1)
    here, there = (overlap_of(previous, contract, STATS, at, way="guided").actions[0, 0] for at in (STATE, -STATE))
    np.testing.assert_allclose(here[:2], [(0.9 - 0.3 - 0.5) / 2, (0.5 + 1.0) / 0.25], rtol=1e-5)
    np.testing.assert_allclose(there[:2], [(0.9 + 0.3 - 0.5) / 2, (0.5 + 1.0) / 0.25], rtol=1e-5)


def test_aloha(data):
    """Signs, grippers and relative joints at once, with openpi's golden statistics."""
    contract = contracts.aloha(action_horizon=HORIZON)
    recorded = json.loads((data / "transforms" / "norm_stats.json").read_text())["aloha"]
    stats = NormStats(**recorded["actions"])
    state, previous = chunk(1, 14, 1)[0], PreviousChunk(chunk(5, 14), delay=3)
    found = overlap_of(previous, contract, stats, state, way="guided")
    sent = OutputPipeline(contract, {"actions": stats})(found.actions[0], state)
    np.testing.assert_allclose(sent[:5], previous.actions, rtol=0, atol=1e-5)


def test_normalised_as_in_training():
    contract = replace(PLAIN, normalization="quantile")
    found = overlap_of(PreviousChunk(chunk(HORIZON), delay=0), contract, STATS, STATE, way="guided")
    np.testing.assert_array_equal(found.actions[0, :, :2], normalize(chunk(HORIZON), STATS, "quantile").astype("f4"))


@pytest.mark.parametrize(
    ("guiding", "end"),
    [(Guiding(), 4), (Guiding(schedule="linear"), 4), (Guiding(end=3), 3), (Guiding(end=9), 4), (Guiding(end=0), 2)],
)
def test_weights_end_with_the_chunk(guiding, end):
    """Those of actions that will have been executed stay 1, whatever end was asked for."""
    found = overlap_of(PreviousChunk(chunk(4), delay=2), PLAIN, STATS, STATE, way="guided", guiding=guiding)
    np.testing.assert_array_equal(found.weights[0], prefix_weights(2, end, HORIZON, guiding.schedule))
    assert not found.committed.any() and found.maximum is None


def test_the_trained_way_commits_what_will_have_been_executed():
    contract = replace(PLAIN, rtc_max_delay=3, rtc_distribution="uniform")
    for delay in range(4):
        found = overlap_of(PreviousChunk(chunk(4), delay=delay), contract, STATS, STATE, way="trained")
        assert found.committed[0].tolist() == [True] * delay + [False] * (HORIZON - delay)
        assert not found.weights.any()
    with pytest.raises(ArgumentError, match="delay 4: this policy was trained for delays up to 3"):
        overlap_of(PreviousChunk(chunk(4), delay=4), contract, STATS, STATE, way="trained")


@pytest.mark.parametrize(
    ("actions", "delay", "message"),
    [
        (np.zeros((0, 2)), 0, r"expected \[n, a\] with at least one row, got \[0, 2\]"),
        (np.zeros(3), 0, r"got \[3\]"),
        (np.zeros((2, 0)), 0, r"got \[2, 0\]"),
        ([[0.0, np.nan]], 0, "row 0 holds NaN or infinity"),
        ([[0.0], [np.inf]], 0, "row 1 holds NaN or infinity"),
        ([["a"]], 0, "previous actions: expected numbers"),
        (np.zeros((3, 2)), 4, "delay 4: expected an integer from 0 to 3"),
        (np.zeros((3, 2)), -1, "delay -1"),
        (np.zeros((3, 2)), 1.5, "delay 1.5"),
        (np.zeros((3, 2)), True, "delay True"),
    ],
)
def test_chunks_that_cannot_be(actions, delay, message):
    with pytest.raises(ArgumentError, match=message):
        PreviousChunk(actions, delay)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (chunk(3, 4), "previous actions: 4 numbers each, the policy's have 2"),
        (chunk(7), "previous actions: 7 rows, but a chunk has 6"),
        (np.full((2, 2), 1e300), "too large for float32"),
    ],
)
def test_chunks_of_another_policy(actions, message):
    with pytest.raises(ArgumentError, match=message):
        overlap_of(PreviousChunk(actions, delay=1), PLAIN, STATS, STATE, way="guided")


@pytest.mark.parametrize("wrong", [{"maximum": 0}, {"maximum": "5"}, {"schedule": "cosine"}, {"end": -1}, {"end": 1.5}])
def test_guiding_that_cannot_be(wrong):
    with pytest.raises(ArgumentError):
        Guiding(**wrong)


def test_the_contract_records_what_it_was_trained_for():
    """Only where there is something to record, so that older versions read all other contracts."""
    assert not {"rtc_max_delay", "rtc_distribution"} & set(PLAIN.to_json())
    made = replace(PLAIN, rtc_max_delay=5, rtc_distribution="uniform")
    assert type(made).from_json(made.to_json()) == made
    for wrong, message in (
        ({"rtc_max_delay": 6}, "rtc_max_delay must be 1 to 5, got 6"),
        ({"rtc_max_delay": 0}, "rtc_max_delay must be 1 to 5, got 0"),
        ({"rtc_max_delay": None}, "give both or neither"),
        ({"rtc_distribution": None}, "give both or neither"),
        ({"rtc_distribution": "exponential"}, "expected one of uniform"),
        ({"rtc_max_delay": 2.0}, "rtc_max_delay: expected int"),
    ):
        with pytest.raises(ContractError, match=message):
            type(made).from_json({**made.to_json(), **wrong})
