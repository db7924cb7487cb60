"""The guards by example: each check, each reaction, the trip, what is held, and whatever may be handed in."""

import math

import numpy as np
import pytest

from ki_edge.errors import ArgumentError
from ki_runtime.control.guards import SHORTEST, Guards
from ki_runtime.control.limits import KINDS, Limits
from ki_runtime.control.verdict import REACTIONS

from .guard_rules import one

DT = 0.04
ARM = ("x", "y", "gripper")


def arm(**changes):
    """Limits of an arm with two joints and a gripper, measured by the state's numbers 0 and 1."""
    given = {
        "low": np.array([-1.0, -1.0, 0.0]),
        "high": np.array([1.0, 1.0, 1.0]),
        "velocity": np.array([2.0, 2.0, math.inf]),
        "measured": (0, 1, None),
        "gripper": (False, False, True),
    }
    return Limits.none(ARM, **{**given, **changes})


def moved(limits, *actions, start=None, dt=DT, measured=None, **options):
    """The verdicts on these actions, one after the other."""
    guards = Guards(limits, **options)
    guards.reset(start)
    return [guards.admit(action, dt=dt, measured=measured) for action in actions]


class Hostile:
    """Raises whatever it is asked."""

    def __array__(self, *_, **__):
        raise RuntimeError("on a device")

    def __float__(self):
        raise OverflowError("no number")


WRONG_SHAPES = {
    "none": None,
    "too few": [0.0, 0.0],
    "a chunk": np.zeros((1, 3)),
    "text": "abc",
    "truth values": [True, False, True],
    "objects": np.array([0.0, None, 1.0], object),
    "complex": np.zeros(3, complex),
    "ragged": [[0.0], [0.0, 1.0], 2.0],
    "a device's": Hostile(),
    "a mapping": {"actions": [0, 0, 0]},
    "dates": np.zeros(3, "datetime64[s]"),
}


class TestChecks:
    @pytest.mark.parametrize("action", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
    def test_what_is_no_action_is_held(self, action):
        first, second = moved(arm(), [0.02, 0.0, 0.5], action, start=[0.0, 0.0, 0.5])
        assert second.kinds == ("shape",) and second.action.tolist() == first.action.tolist()
        assert "\n" not in second.note

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, 3.5e38])
    def test_what_is_not_finite_in_float32_is_held(self, value):
        first, second = moved(arm(), [0.02, 0.0, 0.5], [0.0, value, 0.5], start=[0.0, 0.0, 0.5])
        assert second.kinds == ("finite",) and second.action.tolist() == first.action.tolist()
        assert second.note.startswith("finite: y is ")

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, np.int8, np.uint64, ">f4"])
    def test_every_type_of_number_is_sent_as_float32(self, dtype):
        (verdict,) = moved(arm(), np.array([0, 0, 1], dtype), start=[0, 0, 1])
        assert verdict.action.dtype == np.float32 and verdict.action.tolist() == [0, 0, 1] and not verdict.kinds

    def test_position(self):
        (verdict,) = moved(arm(), [3.0, -3.0, 0.5])
        assert verdict.kinds == ("position",) and verdict.action.tolist() == [1, -1, 0.5]
        assert verdict.note == "position: x 3 to 1 and 1 more"

    def test_a_position_between_two_floats_is_the_nearest_one(self):
        first, second = moved(one(low=0.1, high=0.1), [0.1], [3.0])
        assert first.action == second.action == np.float32(0.1) and not first.kinds

    def test_velocity_takes_the_time_into_account(self):
        (slow,), (fast,) = (moved(arm(), [1.0, 0, 0], start=[0, 0, 0], dt=dt) for dt in (0.01, 0.1))
        assert slow.action[0] == pytest.approx(0.02) and fast.action[0] == pytest.approx(0.2)
        assert slow.kinds == fast.kinds == ("velocity",)

    def test_velocity_is_that_of_what_was_sent(self):
        """A policy that jumps ahead at once is followed at the limit, never faster in between."""
        verdicts = moved(arm(), *[[1.0, 0, 0]] * 4, start=[0, 0, 0])
        assert [v.action[0] for v in verdicts] == pytest.approx([0.08, 0.16, 0.24, 0.32])

    def test_acceleration_starts_from_rest_and_follows_the_last_two(self):
        limits = one(acceleration=10.0)
        verdicts = moved(limits, [1.0], [1.0], [1.0], start=[0.0], dt=0.1)
        assert [v.action[0] for v in verdicts] == pytest.approx([0.1, 0.3, 0.6])
        assert all(v.kinds == ("acceleration",) for v in verdicts)

    def test_a_stop_ahead_of_a_limit_begins_early_enough(self):
        """At full speed towards the end of the range only the velocity is obeyed; the guards brake in time."""
        limits = one(low=-1.0, high=1.0, velocity=1.0, acceleration=2.0)
        sent = np.array([0.0, *(v.action[0] for v in moved(limits, *[[9.0]] * 60, start=[0.0], trip_after=99))])
        speeds = np.diff(sent) / DT
        changes = np.diff([0.0, *speeds]) / DT
        assert sent[-1] == pytest.approx(1.0, abs=1e-6) and sent.max() <= 1.0
        assert speeds.max() == pytest.approx(1.0, rel=1e-4) and np.abs(changes).max() <= 2.0 + 1e-3

    def test_step_is_from_the_measured_state(self):
        limits = one(step=0.1)
        (far,) = moved(limits, [1.0], start=[0.9], measured=[0.5])
        assert far.kinds == ("step",) and far.action[0] == pytest.approx(0.6)
        assert not moved(limits, [1.0], start=[0.9], measured=None)[0].kinds

    @pytest.mark.parametrize("measured", [[math.nan, 0], [math.inf, 0], [1e300, 0], [0.0], [], "state", Hostile(), 3.0])
    def test_a_state_that_cannot_be_used_is_held(self, measured):
        first, second = moved(
            arm(step=np.array([1, 1, math.inf])), *[[0, 0, 0]] * 2, start=[0, 0, 1], measured=measured
        )
        assert first.kinds == second.kinds == ("measured",)
        assert first.action.tolist() == second.action.tolist() == [0, 0, 1]

    def test_the_note_says_which_number_of_the_state(self):
        (verdict,) = moved(one(step=0.1, measured=(3,)), [0.0], measured=[0, 0, 0, math.nan])
        assert verdict.note == "measured state: number 3, which measures x, is nan" and verdict.action is None

    def test_the_first_action_is_compared_with_the_measured_state(self):
        limits = one(velocity=1.0, step=0.5, high=10.0)
        (verdict,) = moved(limits, [5.0], measured=[2.0])
        assert verdict.action[0] == pytest.approx(2.04) and verdict.kinds == ("velocity", "step")
        (verdict,) = moved(limits, [5.0], measured=None)
        assert verdict.action[0] == 5.0 and not verdict.kinds

    def test_no_check_hides_another(self):
        limits = one(low=-1.0, high=1.0, velocity=1.0, acceleration=5.0, step=0.1)
        (verdict,) = moved(limits, [9.0], start=[0.0], measured=[0.0], check=lambda *_: "not now")
        assert verdict.kinds == ("position", "velocity", "acceleration", "step", "user")

    def test_rounding_is_no_violation(self):
        """What moves exactly as fast as allowed is one ulp too far in float32 now and then: clamped, not counted."""
        guards = Guards(one(velocity=1.0))
        guards.reset([0.1])
        wanted = np.arange(1, 200, dtype=np.float64) * DT + 0.1
        verdicts = [guards.admit([value], dt=DT) for value in wanted]
        assert not any(v.kinds for v in verdicts) and not guards.tripped
        sent = np.array([0.1, *(v.action[0] for v in verdicts)], np.float32).astype(np.float64)
        assert np.diff(sent).max() <= DT and (sent[1:] != wanted.astype(np.float32)).any()


class TestContradictions:
    def test_outside_the_range_the_way_back_is_as_slow_as_anything_else(self):
        limits = one(low=0.0, high=1.0, velocity=1.0)
        verdicts = moved(limits, [0.5], [3.0], [2.0], start=[2.0])
        assert [v.action[0] for v in verdicts] == pytest.approx([1.96, 1.92, 1.88])

    def test_never_further_out(self):
        (verdict,) = moved(one(low=0.0, high=1.0), [3.0], start=[2.0])
        assert verdict.action[0] == 1.0

    def test_the_step_yields_to_the_velocity(self):
        """A blocked arm: the command comes back to where the arm is, at the speed allowed."""
        (verdict,) = moved(one(velocity=1.0, step=0.1), [1.0], start=[1.0], measured=[0.0])
        assert verdict.action[0] == pytest.approx(0.96)

    def test_the_step_yields_to_the_position(self):
        (verdict,) = moved(one(low=0.0, high=1.0, step=0.1), [0.5], start=[0.5], measured=[7.0])
        assert verdict.action[0] == 1.0

    def test_the_acceleration_yields_to_the_step(self):
        guards = Guards(one(acceleration=1.0, step=0.1))
        guards.reset([0.0])
        guards.admit([0.05], dt=1.0, measured=[0.0])
        assert guards.admit([3.0], dt=1.0, measured=[5.0]).action[0] == pytest.approx(4.9)


class TestReactions:
    @pytest.mark.parametrize(
        "kind", [kind for kind in REACTIONS if kind not in ("shape", "finite", "measured", "user")]
    )
    def test_a_kind_that_holds_sends_the_last_again(self, kind):
        limits = one(low=-1.0, high=1.0, gripper=(True,)) if kind == "gripper" else one(low=-1.0, high=1.0)
        limits = one(velocity=1.0, acceleration=1e9, step=9.0) if kind == "velocity" else limits
        limits = one(acceleration=1.0) if kind == "acceleration" else one(step=0.1) if kind == "step" else limits
        first, second = moved(limits, [0.001], [5.0], start=[0.0], measured=[0.0], on={kind: "hold"})
        assert second.kinds == (kind,) and second.action == first.action and not second.stop

    @pytest.mark.parametrize("kind", ["shape", "finite", "position", "user"])
    def test_a_kind_that_stops_stops_for_good(self, kind):
        action = {"shape": [1, 2], "finite": [math.nan], "position": [5.0], "user": [0.5]}[kind]
        guards = Guards(one(high=1.0), on={kind: "stop"}, check=lambda a, _: "no" if a[0] == 0.5 else None)
        guards.reset([0.0])
        verdicts = [guards.admit(action, dt=DT), guards.admit([0.0], dt=DT), guards.admit([0.1], dt=DT)]
        assert all(v.stop and v.tripped and v.action == [0.0] for v in verdicts)
        assert guards.trips == 1 and guards.counts[kind] == 1
        guards.reset([0.0])
        assert guards.admit([0.1], dt=DT).action == np.float32(0.1)

    def test_of_several_the_strictest(self):
        limits, on = one(high=1.0, velocity=1.0), {"position": "hold", "velocity": "stop"}
        assert moved(limits, [1.01], start=[1.0], on=on)[0].kinds == ("position",)
        assert moved(limits, [5.0], start=[0.0], on=on)[0].stop

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"on": {"effort": "hold"}}, "no check is called 'effort'; they are shape, finite"),
            ({"on": {"shape": "clamp"}}, "reaction to shape: 'clamp': expected one of hold, stop"),
            ({"on": {"position": "zero"}}, "expected one of clamp, hold, stop"),
            ({"on": {"position": ["hold"]}}, "expected one of clamp, hold, stop"),
            ({"trip_after": 0}, "trip_after 0: expected an integer from 1"),
            ({"trip_after": True}, "trip_after True"),
            ({"longest": math.nan}, "longest nan: expected seconds"),
            ({"longest": 0}, "longest 0: expected seconds"),
        ],
    )
    def test_wrong_options_are_one_line(self, options, message):
        with pytest.raises(ArgumentError, match=message):
            Guards(arm(), **options)

    def test_a_step_that_nothing_measures_is_refused(self):
        with pytest.raises(ArgumentError, match="the step of x is limited, but nothing says which number of the state"):
            Guards(one(step=0.1, measured=(None,)))


class TestUsersCheck:
    def test_it_sees_what_would_be_sent_and_cannot_change_it(self):
        seen = []

        def check(action, measured):
            seen.append((action.copy(), measured))
            action[:] = 77.0

        (verdict,) = moved(arm(), [3.0, 0, 0], start=[1, 0, 0], measured=[1.0, 0.0], check=check)
        assert seen[0][0].tolist() == [1, 0, 0] and seen[0][1] == [1.0, 0.0]
        assert verdict.action.tolist() == [1, 0, 0]

    @pytest.mark.parametrize("answer", ["too close to the table", True, False, 1, np.zeros(2)])
    def test_any_answer_refuses(self, answer):
        (verdict,) = moved(arm(), [0, 0, 0], start=[0, 0, 1], check=lambda *_: answer)
        assert verdict.kinds == ("user",) and verdict.action.tolist() == [0, 0, 1]

    @pytest.mark.parametrize("answer", [None, ""])
    def test_none_agrees(self, answer):
        assert not moved(arm(), [0, 0, 0], start=[0, 0, 0], check=lambda *_: answer)[0].kinds

    def test_a_check_that_raises_refuses(self):
        (verdict,) = moved(arm(), [0, 0, 0], start=[0, 0, 1], check=lambda *_: {}["no\nsuch"])
        assert verdict.kinds == ("user",) and "the check raised KeyError" in verdict.note and "\n" not in verdict.note

    def test_nothing_held_is_asked_again(self):
        asked = []
        moved(arm(), "nonsense", start=[0, 0, 0], check=lambda *_: asked.append(1))
        assert not asked


class TestTime:
    @pytest.mark.parametrize("dt", [0.0, -1.0, math.nan, math.inf, None, "soon", Hostile(), SHORTEST / 2])
    def test_without_time_nothing_that_is_limited_moves(self, dt):
        limits = Limits.none(ARM, velocity=np.array([1.0, math.inf, math.inf]), acceleration=np.array([9, 9, math.inf]))
        (verdict,) = moved(limits, [1.0, 1.0, 1.0], start=[0, 0, 0], dt=dt)
        assert verdict.action.tolist() == [0, 0, 1]

    def test_what_had_no_time_has_no_speed(self):
        guards = Guards(one(acceleration=10.0, step=0.1))
        guards.reset([0.0])
        assert guards.admit([0.0], dt=0.0, measured=[5.0]).action[0] == pytest.approx(4.9)
        assert guards.admit([9.0], dt=0.1).action[0] == pytest.approx(5.0)

    def test_a_late_tick_is_allowed_no_leap(self):
        (verdict,) = moved(one(velocity=1.0), [100.0], start=[0.0], dt=3600.0, longest=0.04)
        assert verdict.action[0] == pytest.approx(0.04)


def test_kinds_of_limits_are_kinds_of_violations():
    assert set(KINDS) < set(REACTIONS)
