"""What the guards hold, when they trip, and what is special about grippers and motions."""

import math

import numpy as np
import pytest

from ki_edge.errors import ArgumentError
from ki_runtime.control.guards import Guards
from ki_runtime.control.limits import Limits

from .guard_rules import one
from .test_guards import DT, arm, moved


class TestHolding:
    def test_nothing_is_held_before_anything_was_sent(self):
        guards = Guards(arm())
        verdict = guards.admit([math.nan, 0, 0], dt=DT)
        assert verdict.action is None and guards.held() is None and verdict.kinds == ("finite",)
        assert guards.admit([0, 0, 0], dt=DT).action is not None

    def test_the_start_is_held(self):
        guards = Guards(arm())
        guards.reset([0.1, 0.2, 0.3])
        assert guards.held().tolist() == np.float32([0.1, 0.2, 0.3]).tolist()
        assert guards.admit(None, dt=DT).action.tolist() == np.float32([0.1, 0.2, 0.3]).tolist()

    @pytest.mark.parametrize("start", [[0, 0], [0, 0, math.nan], "start", [0, 0, 1e300]])
    def test_a_wrong_start_is_one_line(self, start):
        with pytest.raises(ArgumentError, match="start: "):
            Guards(arm()).reset(start)

    def test_what_is_held_stands(self):
        """After a hold the acceleration begins at rest; the velocity is that from what was held."""
        guards = Guards(one(acceleration=10.0))
        guards.reset([0.0])
        for _ in range(3):
            guards.admit([9.0], dt=0.1)
        held = guards.held()
        assert held[0] == pytest.approx(0.6)
        assert guards.admit([9.0], dt=0.1).action[0] == pytest.approx(0.7)

    def test_what_was_handed_out_belongs_to_its_owner(self):
        """Writing into an action, or into what the guards gave back, changes nothing of what is held."""
        guards = Guards(arm())
        given = np.array([0.5, 0.5, 0.5], np.float32)
        verdict = guards.admit(given, dt=DT)
        given[:] = verdict.action[:] = guards.held()[:] = 0.0
        assert guards.held().tolist() == [0.5, 0.5, 0.5]

    def test_motions_stand_still_at_zero(self):
        limits = Limits.none(("base.vel", "lift"), motion=(True, False))
        guards = Guards(limits)
        guards.admit([0.3, 0.7], dt=DT)
        assert guards.held().tolist() == [0.0, np.float32(0.7)]
        guards.admit([0.3, 0.7], dt=DT)
        assert guards.admit([math.nan, 0.9], dt=DT).action.tolist() == [0.0, np.float32(0.7)]

    def test_a_motion_whose_range_has_no_zero_is_held_at_its_nearest_end(self):
        guards = Guards(one(low=0.1, high=0.4, motion=(True,)))
        guards.admit([0.3], dt=DT)
        held = guards.held()[0]
        assert float(held) >= 0.1 and held == pytest.approx(0.1)


class TestTrip:
    def test_violations_in_a_row(self):
        guards = Guards(one(high=1.0), trip_after=3)
        guards.reset([1.0])
        for value in (2.0, 2.0, 0.5, 2.0, 2.0):
            assert not guards.admit([value], dt=DT).tripped
        verdict = guards.admit([2.0], dt=DT)
        assert verdict.tripped and guards.tripped and not verdict.stop and guards.trips == 1
        assert verdict.note == "tripped after 3 violations in a row: position: x 2 to 1"

    def test_it_is_for_good_until_a_reset(self):
        guards = Guards(one(high=1.0), trip_after=1)
        guards.reset([0.25])
        guards.admit([2.0], dt=DT)
        for value in [0.25, 0.3, math.nan, None] * 50:
            verdict = guards.admit([value], dt=DT)
            assert verdict.tripped and verdict.action == [0.25]
        assert guards.held() == [0.25] and guards.counts["position"] == 1
        guards.reset([0.25])
        assert not guards.tripped and guards.admit([0.3], dt=DT).action == np.float32(0.3)

    def test_a_reset_begins_the_row_anew_and_keeps_the_counts(self):
        guards = Guards(one(high=1.0), trip_after=2)
        for _ in range(5):
            guards.reset()
            assert not guards.admit([2.0], dt=DT).tripped
        assert guards.counts["position"] == 5 and guards.trips == 0

    def test_a_starved_tick_is_neither_good_nor_bad(self):
        guards = Guards(one(high=1.0), trip_after=2)
        guards.reset([0.0])
        guards.admit([2.0], dt=DT)
        guards.held()
        assert guards.admit([2.0], dt=DT).tripped

    def test_a_trip_before_anything_was_sent_sends_nothing(self):
        verdicts = moved(arm(), *[[math.nan] * 3] * 7)
        assert all(v.action is None for v in verdicts) and [v.tripped for v in verdicts] == [False] * 4 + [True] * 3


class TestGripper:
    def test_it_is_counted_apart_and_does_not_trip(self):
        guards = Guards(arm(), trip_after=2)
        guards.reset([0, 0, 0])
        verdicts = [guards.admit([0, 0, 5.0], dt=DT) for _ in range(9)]
        assert all(v.kinds == ("gripper",) and v.action.tolist() == [0, 0, 1] for v in verdicts)
        assert guards.counts["gripper"] == 9 and guards.counts["position"] == 0 and not guards.tripped

    def test_with_the_arm_it_counts(self):
        guards = Guards(arm(), trip_after=2)
        guards.reset([1, 0, 0])
        verdicts = [guards.admit([5.0, 0, 5.0], dt=DT) for _ in range(2)]
        assert verdicts[0].kinds == ("position", "velocity", "gripper") and verdicts[1].tripped

    def test_its_clamp_interrupts_the_row_of_the_arm(self):
        guards = Guards(one(high=1.0, gripper=(True,)), trip_after=2)
        for value in ([2.0], [math.nan], [2.0], [math.nan]):
            assert not guards.admit(value, dt=DT).tripped

    def test_it_may_jump_where_no_file_limits_it(self):
        (verdict,) = moved(arm(), [0, 0, 1.0], start=[0, 0, 0])
        assert verdict.action.tolist() == [0, 0, 1] and not verdict.kinds

    def test_a_limit_that_was_given_holds_for_it_too(self):
        (verdict,) = moved(one(velocity=1.0, gripper=(True,)), [1.0], start=[0.0])
        assert verdict.action[0] == pytest.approx(0.04) and verdict.kinds == ("gripper",)

    def test_it_can_be_asked_to_hold_and_then_counts(self):
        verdicts = moved(arm(), *[[0, 0, 5.0]] * 2, start=[0, 0, 0.5], on={"gripper": "hold"}, trip_after=2)
        assert verdicts[0].action.tolist() == [0, 0, 0.5] and verdicts[1].tripped
