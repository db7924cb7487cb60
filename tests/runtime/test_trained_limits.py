"""What statistics and the kind of robot say about limits, for each kind of action."""

import math

import numpy as np
import pytest

from ki_edge.policy.contract import aloha, droid, droid_joint_position, generic, libero, make_mask, pi0_libero
from ki_edge.policy.normalize import NormStats, compute_stats, read_norm_stats
from ki_edge.policy.transforms import aloha_actions_to_robot
from ki_runtime.control.guards import Guards
from ki_runtime.control.trained_limits import names_of, trained_limits


def spread(size, low=-1.0, high=1.0):
    return NormStats(q01=np.full(size, low), q99=np.full(size, high))


def plain(**changes):
    return generic(["cam"], **{"state_dim": 3, "action_dim": 2, "action_horizon": 4, **changes})


class TestRanges:
    def test_absolute_actions_have_their_own_range(self):
        limits = trained_limits(plain(), {"actions": spread(2), "state": spread(3, -50, 50)})
        assert limits.low.tolist() == pytest.approx([-1.2] * 2) and limits.high.tolist() == pytest.approx([1.2] * 2)
        assert limits.measured == (None, None) and not limits.limited("step").any()
        assert limits.origin["position"] == ("training actions, q01 to q99, and 10% of it at both ends",) * 2

    def test_relative_actions_have_the_states_range_and_their_own_as_a_step(self):
        given = {"actions": spread(2, -0.5, 0.25), "state": spread(3, 1, 3)}
        limits = trained_limits(plain(delta_mask=(True,)), given)
        assert limits.low.tolist() == pytest.approx([0.8, -0.575])
        assert limits.high.tolist() == pytest.approx([3.2, 0.325])
        assert limits.step.tolist() == pytest.approx([0.575, math.inf]) and limits.measured == (0, None)
        assert limits.origin["position"][0].startswith("training states")
        assert limits.origin["step"][0].startswith("training actions") and limits.origin["step"][1] == ""

    def test_relative_actions_without_statistics_of_the_state_have_a_step_alone(self):
        limits = trained_limits(plain(delta_mask=(True, True)), {"actions": spread(2)})
        assert not limits.limited("position").any() and limits.limited("step").all()

    def test_mean_and_deviation_where_there_are_no_quantiles(self):
        limits = trained_limits(plain(), {"actions": NormStats(mean=np.zeros(2), std=np.ones(2))})
        assert limits.high.tolist() == pytest.approx([3.6, 3.6]) and "mean -+ 3 std" in limits.origin["position"][0]

    def test_quantiles_of_lerobot_may_be_those_of_ten_percent(self):
        entry = NormStats(mean=np.zeros(2), std=np.ones(2), q01=np.full(2, -1.28), q99=np.full(2, 1.28))
        narrow, wide = (
            trained_limits(plain(normalization_epsilon=style), {"actions": entry}).high[0]
            for style in ("openpi", "lerobot")
        )
        assert narrow == pytest.approx(1.28 * 1.2) and wide == pytest.approx(2.4)

    def test_crossed_quantiles_are_put_right(self):
        assert trained_limits(plain(), {"actions": spread(2, 1, -1)}).low.tolist() == pytest.approx([-1.2] * 2)

    def test_what_never_moved_has_room_to_round(self):
        limits = trained_limits(plain(), {"actions": spread(2, 1000.0, 1000.0)})
        assert limits.low[0] == pytest.approx(999.0) and limits.high[0] == pytest.approx(1001.0)

    @pytest.mark.parametrize("stats", [{}, {"actions": NormStats()}, {"state": spread(3)}])
    def test_without_statistics_there_is_nothing(self, stats):
        limits = trained_limits(plain(normalization="none"), stats)
        assert limits.unlimited() == list(limits.names) and not any(any(row) for row in limits.origin.values())

    def test_statistics_of_other_lengths(self):
        assert trained_limits(plain(), {"actions": spread(32)}).limited("position").all()
        assert trained_limits(plain(), {"actions": spread(1)}).unlimited() == ["action 1"]


class TestRobots:
    def test_aloha_in_its_own_convention(self):
        """The range of every action that the pipeline makes of a model's, signs and grippers included."""
        random = np.random.default_rng(0)
        state, actions = (random.uniform(-1, 0.5, (5000, 14)) for _ in range(2))
        contract = aloha(delta_mask=None, adapt_to_pi=True)
        limits = trained_limits(contract, {"state": compute_stats(state), "actions": compute_stats(actions)})
        robot = aloha_actions_to_robot(actions)
        assert (limits.low < np.quantile(robot, 0.01, axis=0)).all() and (limits.low > robot.min(axis=0) - 0.2).all()
        assert (limits.high > np.quantile(robot, 0.99, axis=0)).all() and (limits.high < robot.max(axis=0) + 0.2).all()
        assert limits.gripper == tuple(at in (6, 13) for at in range(14)) and not any(limits.motion)

    def test_aloha_relative_to_the_state(self):
        limits = trained_limits(aloha(), {"state": spread(14, -0.5, 1.0), "actions": spread(14)})
        assert limits.measured == tuple(None if at in (6, 13) else at for at in range(14))
        assert (limits.low[1], limits.high[1]) == pytest.approx((-1.15, 0.65))  # its sign is turned
        assert math.isinf(limits.step[6]) and limits.step[0] == pytest.approx(1.2)

    def test_droid_commands_velocities_unless_relative_to_the_state(self):
        given = {"state": spread(8), "actions": spread(8)}
        assert trained_limits(droid(), given).motion == (True,) * 7 + (False,)
        assert trained_limits(droid_joint_position(), given).motion == (False,) * 8
        assert trained_limits(droid(), given).gripper == (False,) * 7 + (True,)

    def test_libero_commands_displacements(self):
        given = {"state": spread(8), "actions": spread(7)}
        limits = trained_limits(libero(), given)
        assert limits.motion == (True,) * 6 + (False,) and limits.gripper[6] and limits.limited("position").all()

    def test_displacements_made_relative_once_more_have_no_range(self):
        limits = trained_limits(pi0_libero(), {"state": spread(8), "actions": spread(7)})
        assert limits.unlimited() == [f"action {at}" for at in range(6)] and limits.measured == (None,) * 7

    def test_names_tell_of_other_robots(self):
        names = ("x.vel", "theta_velocity", "delta x", "travel", "left_Gripper", "main gripper.vel", "level", "deltoid")
        contract = plain(action_dim=8, action_names=names, model_action_dim=8)
        limits = trained_limits(contract, {})
        assert limits.motion == (True, True, True, False, False, False, False, False)
        assert [name for name, flag in zip(names, limits.gripper, strict=True) if flag] == [
            "left_Gripper",
            "main gripper.vel",
        ]

    def test_names_that_are_not_unique_are_not_used(self):
        assert names_of(plain(action_names=("joint", "joint"))) == ("action 0", "action 1")

    @pytest.mark.parametrize(
        "contract",
        [droid(), droid_joint_position(), libero(), pi0_libero(), aloha(), plain(delta_mask=make_mask(1, -1))],
    )
    def test_every_preset_can_be_guarded(self, contract):
        limits = trained_limits(contract, {"state": spread(contract.state_dim), "actions": spread(contract.action_dim)})
        verdict = Guards(limits).admit(np.zeros(contract.action_dim), dt=0.05, measured=np.zeros(contract.state_dim))
        assert verdict.action.tolist() == [0.0] * contract.action_dim and not verdict.kinds


def test_the_demonstrations_fit_the_demos_limits(fetch_contract_and_stats):
    """The shipped policy's own statistics: the expert's set-points lie within, a point beside the table does not."""
    contract, stats = fetch_contract_and_stats
    limits = trained_limits(contract, stats)
    assert limits.warning() is None and limits.gripper == (False, False, False, True)
    mean = stats["actions"].mean
    guards = Guards(limits)
    guards.reset(mean)
    assert not guards.admit(mean + 0.14 * np.array([1, -1, 1, 0]), dt=0.04).kinds
    assert guards.admit(mean + np.array([0.3, 0, 0, 0]), dt=0.04).kinds == ("position",)


@pytest.fixture
def fetch_contract_and_stats():
    from pathlib import Path

    from ki_edge.policy.contract import PolicyContract

    folder = Path(__file__).parents[2] / "examples/fetch/checkpoint"
    (contract,) = folder.rglob("*contract*.json")
    return PolicyContract.load(contract), read_norm_stats(folder / "assets")
