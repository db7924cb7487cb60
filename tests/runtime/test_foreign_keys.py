"""A robot whose observations have LeRobot's keys is looked after by the loop like any other."""

import time

import numpy as np
import pytest

from ki_edge.errors import RobotError
from ki_runtime import ControlLoop, LoopOptions

from .fake_robot import CountingRobot, FormulaPolicy


class Lerobots(CountingRobot):
    """Of seven steps, as `CountingRobot`, under other keys."""

    def observe(self):
        picture = np.zeros((4, 4, 3), np.uint8)
        state = np.full(2, self.steps, np.float32)
        return {"observation.images.cam": picture, "observation.state": state, "task": "its own"}


def test_the_policy_gets_the_contracts_keys_and_the_loops_prompt():
    policy = FormulaPolicy()
    ControlLoop(policy, Lerobots(), LoopOptions(prompt="another")).run()
    asked = [ask.observation for ask in policy.asked]
    assert asked and all(sorted(seen) == ["images", "prompt", "state"] for seen in asked)
    assert {seen["prompt"] for seen in asked} == {"another"}
    policy = FormulaPolicy()
    ControlLoop(policy, Lerobots()).run()
    assert {ask.observation["prompt"] for ask in policy.asked} == {"its own"}


def test_old_readings_are_found_whatever_the_keys():
    robot = Lerobots()
    robot.timestamps = lambda: {"cam": time.monotonic() - 60 * (robot.steps >= 3)}
    with pytest.raises(RobotError, match=r"no fresh action for 2 ticks .*cam is 60"):
        ControlLoop(FormulaPolicy(), robot, LoopOptions(starve_limit=2)).run()
