"""A state far outside the training range is told once, by name; ordinary ones never are."""

import numpy as np
import pytest

from ki_edge.policy.contract import generic
from ki_edge.policy.normalize import NormStats
from ki_runtime.policy.training_range import TrainingRange

RADIANS = np.array([-1.5, -0.5, 0.2, 0.7])
STATS = NormStats(mean=np.zeros(4), std=[0.6, 0.3, 0.1, 0.0], q01=[-1.6, -0.9, 0.1, 0.7], q99=[1.6, 0.9, 0.4, 0.7])


def told(states, kind="quantile", stats=STATS):
    said = []
    contract = generic(["cam"], state_dim=4, action_dim=2, action_horizon=5, normalization=kind)
    watch = TrainingRange(contract, {"state": stats} if stats else {}, said.append)
    for state in states:
        watch.look(np.asarray(state, np.float64))
    return said


@pytest.mark.parametrize("kind", ["quantile", "zscore"])
def test_degrees_for_radians(kind):
    (line,) = told([RADIANS, np.degrees(RADIANS), np.degrees(RADIANS)], kind)
    assert line.startswith("the state is far outside the training range: state[0] is -85.94 (trained on -1.6 to 1.6)")
    assert line.endswith("; check its units and its order")


@pytest.mark.parametrize("kind", ["quantile", "zscore", "none"])
def test_states_near_the_training_are_ordinary(kind):
    """Also one that is out by the whole range, and a number that never moved in training."""
    assert told([RADIANS, [3.2, 1.8, 0.7, 0.9], [-3.2, -1.8, -0.2, -5.0]], kind) == []


def test_without_statistics_nothing_is_said():
    assert told([[1e6] * 4], stats=None) == []
    assert told([[1e6] * 4], "none") == []


def test_many_numbers_are_counted():
    wide = NormStats(q01=np.zeros(9), q99=np.ones(9))
    said = []
    contract = generic(["cam"], state_dim=9, action_dim=2, action_horizon=5)
    TrainingRange(contract, {"state": wide}, said.append).look(np.full(9, 90.0))
    assert "state[3] is 90 (trained on 0 to 1) and 5 more" in said[0] and "state[4]" not in said[0]
