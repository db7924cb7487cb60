"""`replay:` drives a policy in the policy's own form, from a recording made under any names."""

from dataclasses import replace

import numpy as np
import pytest

from ki_edge.errors import RobotError
from ki_edge.policy.contract import droid
from ki_runtime.control.loop import ControlLoop
from ki_runtime.robots import open_robot

from .fake_robot import FormulaPolicy


class Droid:
    """Gives the recorded joints as actions, and keeps the observations."""

    contract = droid(execute=4, control_hz=15.0)

    def __init__(self):
        self.seen = []

    def infer(self, observation, *, noise=None, num_steps=None):
        self.seen.append(observation)
        row = np.concatenate([observation["observation/joint_position"], observation["observation/gripper_position"]])
        return {"actions": np.repeat(row[None], 15, axis=0)}


def test_a_case_from_the_field(data):
    robot, policy = open_robot(f"replay:{data / 'droid_replay' / 'ep.npz'}"), Droid()
    assert sorted(robot.observe()) == ["images", "prompt", "state"]  # generic until a policy drives it
    report = ControlLoop(policy, robot).run()
    assert (report.episodes[0].steps, len(policy.seen)) == (12, 3)
    assert sorted(policy.seen[0]) == [
        "observation/exterior_image_1_left", "observation/gripper_position", "observation/joint_position",
        "observation/wrist_image_left", "prompt",
    ]  # fmt: skip
    assert report.episodes[0].replay_error is not None
    assert robot.control_hz == 15.0 and robot.frame().shape == (48, 128, 3)


def test_what_does_not_fit_is_told_before_anything_runs(data):
    robot = open_robot(f"replay:{data / 'droid_replay' / 'ep.npz'}")
    with pytest.raises(
        RobotError, match=r"no pictures of camera cam\. The file has .*this generic policy needs the cam"
    ):
        ControlLoop(FormulaPolicy(), robot)
    wide = Droid()
    wide.contract = replace(droid(), action_dim=7, execute=4)
    with pytest.raises(RobotError, match="8 numbers in actions, expected 7"):
        ControlLoop(wide, robot)


def test_a_rate_that_is_given_stays(data):
    robot = open_robot(f"replay:{data / 'droid_replay' / 'ep.npz'}", control_hz=5.0)
    ControlLoop(Droid(), robot)
    assert robot.control_hz == 5.0
