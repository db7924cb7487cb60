"""Limits: what a file, a robot and statistics say, which of them wins, what is refused, and how they are shown."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, RobotError
from ki_edge.policy.contract import generic
from ki_edge.policy.normalize import NormStats
from ki_runtime.control.guards import Guards
from ki_runtime.control.limit_sources import limits_for, read_limits
from ki_runtime.control.limits import Limits
from ki_runtime.control.limits_table import limit_lines

NAMES = ("x", "y", "gripper")
WHOLE = {
    "x": {"position": [-1, 1.5], "velocity": 2, "acceleration": 10.5, "step": 0.25, "measured": 4},
    "gripper": {"position": [0, None], "gripper": True, "hold": "last"},
}


def policy(**changes):
    return generic(["cam"], **{"state_dim": 5, "action_dim": 3, "action_horizon": 4, "action_names": NAMES, **changes})


def stats(low=(-2.0, -2.0, 0.0), high=(2.0, 2.0, 1.0)):
    return {"actions": NormStats(q01=np.array(low), q99=np.array(high))}


def written(folder, content):
    path = folder / "limits.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refused(folder, content, names=NAMES):
    with pytest.raises(ArgumentError) as caught:
        read_limits(written(folder, content), names, 5)
    message = str(caught.value)
    assert "\n" not in message and "limits.json" in message and len(message) < 700
    return message


class TestFile:
    def test_every_key(self, tmp_path):
        limits = read_limits(written(tmp_path, {"limits": WHOLE}), NAMES, 5)
        assert limits.low.tolist() == [-1, -math.inf, 0] and limits.high.tolist() == [1.5, math.inf, math.inf]
        assert limits.velocity.tolist() == [2, math.inf, math.inf]
        assert limits.acceleration.tolist() == [10.5, math.inf, math.inf]
        assert limits.step.tolist() == [0.25, math.inf, math.inf]
        assert limits.measured == (4, None, None) and limits.gripper == (None, None, True)
        assert limits.motion == (None, None, False)
        assert limits.origin["position"] == ("limits.json", "", "limits.json")
        assert limits.unlimited() == ["y"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({}, 'expected {"limits": {name: ...}} and no other key, found nothing'),
            ({"limits": {}, "limit": {}}, "found 'limit', 'limits'"),
            ({"x": {}}, "found 'x'"),
            ([], "expected a JSON object, found a list"),
            ({"limits": []}, "expected an object by name of the action's dimensions, got []"),
            ({"limits": {"q": {}}}, "no dimension of the action is called 'q'; they are x, y, gripper"),
            ({"limits": {"x": 3}}, "limits.x: expected an object with position, velocity"),
            ({"limits": {"x": {"speed": 3}}}, "limits.x: unknown key 'speed'; there are position, velocity"),
            ({"limits": {"x": {"position": [2, 1]}}}, "limits.x.position: low 2 is above high 1"),
            ({"limits": {"x": {"position": [1]}}}, "limits.x.position: [1]: expected [low, high]"),
            ({"limits": {"x": {"position": 1}}}, "limits.x.position: 1: expected [low, high]"),
            ({"limits": {"x": {"position": ["1", 2]}}}, "expected [low, high], two numbers"),
            ({"limits": {"x": {"position": [True, 2]}}}, "expected [low, high], two numbers"),
            ({"limits": {"x": {"position": [0, 1e39]}}}, "two numbers of float32"),
            ({"limits": {"x": {"velocity": -1}}}, "limits.x.velocity: -1: expected a number of 0 or more"),
            ({"limits": {"y": {"acceleration": "9"}}}, "limits.y.acceleration: '9': expected a number of 0 or more"),
            ({"limits": {"y": {"step": False}}}, "limits.y.step: False: expected a number"),
            ({"limits": {"x": {"measured": 5}}}, "limits.x.measured: 5: expected which number of the state, 0 to 4"),
            ({"limits": {"x": {"measured": 0.0}}}, "expected which number of the state"),
            ({"limits": {"x": {"measured": -1}}}, "expected which number of the state"),
            ({"limits": {"x": {"gripper": 1}}}, "limits.x.gripper: 1: expected true or false"),
            ({"limits": {"x": {"hold": "zeros"}}}, "limits.x.hold: 'zeros': expected 'last' or 'zero'"),
            ({"limits": {"x": {"hold": ["zero"]}}}, "expected 'last' or 'zero'"),
            ('{"limits": {"x": {"velocity": NaN}}}', "NaN is not a JSON number"),
            ('{"limits": {"x": {"velocity": 1e999}}}', "too large"),
            ('{"limits": {"x": {}, "x": {}}}', "the key 'x' comes twice"),
            ("", "is not valid JSON"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, tmp_path, content, message):
        assert message in refused(tmp_path, content)

    def test_long_names_do_not_fill_the_screen(self, tmp_path):
        refused(tmp_path, {"limits": {"q" * 9000: {}}})
        refused(tmp_path, {"limits": {"q": {}}}, tuple(f"joint number {at}" for at in range(32)))

    @pytest.mark.parametrize("make", ["missing", "folder", "large"])
    def test_what_cannot_be_read(self, tmp_path, make):
        path = tmp_path / "limits.json"
        if make == "folder":
            path.mkdir()
        elif make == "large":
            path.write_bytes(b" " * 1_000_001)
        with pytest.raises(ArgumentError, match=r"limits\.json"):
            read_limits(path, NAMES)


class TestSources:
    def test_statistics_fill_in_where_nobody_says_anything(self, tmp_path):
        limits = limits_for(policy(), stats(), None, written(tmp_path, {"limits": {"x": {"position": [-9, 9]}}}))
        assert limits.low.tolist() == pytest.approx([-9, -2.4, -0.1])
        assert limits.high.tolist() == pytest.approx([9, 2.4, 1.1])
        assert [text[:8] for text in limits.origin["position"]] == ["limits.j", "training", "training"]

    def test_null_says_that_there_is_no_limit(self, tmp_path):
        file = written(tmp_path, {"limits": {"x": {"position": None}, "y": {"position": [None, 1]}}})
        limits = limits_for(policy(), stats(), None, file)
        assert limits.low.tolist() == pytest.approx([-math.inf, -math.inf, -0.1])
        assert limits.high.tolist() == pytest.approx([math.inf, 1, 1.1]) and limits.unlimited() == ["x"]

    def test_of_file_and_robot_the_tighter(self, tmp_path):
        own = {"x": {"position": [-3, 3], "velocity": 1, "step": 1, "measured": 0}, "y": {"velocity": 5}}
        file = {"x": {"position": [-1, 9], "velocity": None}, "y": {"velocity": 2}}
        robot = SimpleNamespace(name="arm 7", limits=own)
        limits = limits_for(policy(), stats(), robot, written(tmp_path, {"limits": file}))
        assert (limits.low[0], limits.high[0]) == (-1, 3) and limits.velocity.tolist() == [1, 2, math.inf]
        assert limits.measured == (0, None, None) and limits.step[0] == 1
        assert limits.origin["position"][0] == "limits.json and arm 7"
        assert limits.origin["velocity"] == ("arm 7", "limits.json", "")

    def test_where_they_exclude_each_other_it_is_one_line(self, tmp_path):
        robot = SimpleNamespace(name="arm", limits={"x": {"position": [0, 1]}})
        file = written(tmp_path, {"limits": {"x": {"position": [2, 3]}}})
        with pytest.raises(
            ArgumentError, match=r"x cannot be within 2 to 3 \(limits.json\) and 0 to 1 \(arm\) at once"
        ):
            limits_for(policy(), {}, robot, file)

    @pytest.mark.parametrize(
        "own",
        [{"q": {}}, {"x": {"position": [2, 1]}}, {"x": {"velocity": math.nan}}, 3, {"x": {"position": [0, math.nan]}}],
    )
    def test_wrong_limits_of_a_robot_name_it(self, own):
        with pytest.raises(RobotError, match="limits of arm"):
            limits_for(policy(), {}, SimpleNamespace(name="arm", limits=own))

    def test_a_robot_may_speak_numpy(self):
        own = {
            "x": {
                "position": np.float32([-1, 1]),
                "velocity": np.float32(2),
                "step": np.int64(1),
                "measured": np.int64(4),
            }
        }
        limits = limits_for(policy(), {}, SimpleNamespace(name="arm", limits=own))
        assert (limits.low[0], limits.high[0], limits.velocity[0]) == (-1, 1, 2) and limits.measured[0] == 4
        assert Guards(limits).admit([3, 0, 0], dt=0.1, measured=np.zeros(5)).action[0] == pytest.approx(0.2)

    def test_a_robot_names_what_the_contract_does_not(self, tmp_path):
        robot = SimpleNamespace(name="arm", action_names=("a", "b", "jaw gripper"))
        limits = limits_for(policy(action_names=None), stats(), robot)
        assert limits.names == ("a", "b", "jaw gripper") and limits.gripper == (False, False, True)
        assert limits_for(policy(action_names=None), stats()).names == ("action 0", "action 1", "action 2")

    def test_a_gripper_has_no_more_than_a_position_from_statistics(self, tmp_path):
        contract = policy(delta_mask=(True, True, False))
        given = {**stats(), "state": NormStats(q01=np.full(5, -1.0), q99=np.full(5, 1.0))}
        assert limits_for(contract, given).step.tolist() == pytest.approx([2.4, 2.4, math.inf])
        file = written(tmp_path, {"limits": {"y": {"gripper": True}}})
        assert limits_for(contract, given, None, file).step.tolist() == pytest.approx([2.4, math.inf, math.inf])


class TestShown:
    def test_the_table(self, tmp_path):
        file = written(tmp_path, {"limits": {**WHOLE, "y": {"position": None}}})
        assert limit_lines(limits_for(policy(), stats(), None, file)) == [
            "limits of the action, in the robot's units",
            "         position   velocity /s  acceleration /s^2  step  measured by  remarks",
            "x        -1 to 1.5  2            10.5               0.25  state 4",
            "y        none       none         none               none  none",
            "gripper  0 to none  none         none               none  none         gripper",
            "",
            "position of x, gripper: limits.json",
            "position of y: none, by limits.json",
            "velocity of x: limits.json",
            "acceleration of x: limits.json",
            "step of x: limits.json",
            "no limits of y; give them in a limits file",
        ]

    def test_where_statistics_say_nothing_it_is_said(self):
        limits = limits_for(policy(), {})
        line = (
            "nothing limits the actions but their shape and that they are finite: the bundle's statistics give no "
            "limits; give them in a limits file"
        )
        assert limits.warning() == line and limit_lines(limits)[-5:] == [
            *(f"{kind}: no limit" for kind in ("position", "velocity", "acceleration", "step")),
            line,
        ]

    def test_with_a_limit_each_there_is_no_warning(self):
        assert limits_for(policy(), stats()).warning() is None

    def test_what_is_held_by_zero_is_said(self):
        lines = limit_lines(limits_for(policy(action_names=("x.vel", "y", "gripper")), stats()))
        assert lines[2].endswith("  held by 0") and "margin" not in lines[2]
        assert "position of x.vel, y, gripper: training actions, q01 to q99, and 10% of it at both ends" in lines


class TestFields:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"low": np.array([0, np.nan])}, "low of b is nan"),
            ({"velocity": np.array([-1, 1])}, "velocity of a is -1"),
            ({"step": np.array([1.0])}, r"step has the shape \(1,\), expected \(2,\)"),
            ({"low": np.array([2.0, 0]), "high": np.array([1.0, 1])}, "a must be between 2 and 1"),
            ({"low": np.array([np.inf, 0])}, "a must be between inf and inf"),
            ({"measured": (0, -1)}, "measured .* from 0 on"),
            ({"measured": (0,)}, "measured: expected 2 entries"),
            ({"origin": {"step": ("file",)}}, "origin: expected 2 entries"),
            ({"names": ("a", "a")}, "each must be there once"),
        ],
    )
    def test_contradictions_are_one_line(self, changes, message):
        with pytest.raises(ArgumentError, match=message):
            Limits.none(**{"names": ("a", "b"), **changes})

    def test_they_cannot_be_changed(self):
        given = np.zeros(1)
        limits = Limits.none(("a",), low=given)
        given[:] = 5
        with pytest.raises(ValueError, match="read-only"):
            limits.low[:] = 1
        assert limits.low == [0]

    def test_other_names_cannot_be_joined(self):
        with pytest.raises(ArgumentError, match="differ"):
            Limits.none(("a",)).completed(Limits.none(("b",)))


def test_the_file_of_the_page_is_right(tmp_path):
    """The example of docs/safety.md, as it stands there."""
    page = (Path(__file__).parents[2] / "docs/safety.md").read_text(encoding="utf-8")
    example = page.split("```json\n")[1].split("```")[0]
    limits = read_limits(written(tmp_path, example), ("shoulder", "gripper", "base.vel"))
    assert limits.warning() is None and not limits.unmeasured() and limits.motion == (None, None, True)
