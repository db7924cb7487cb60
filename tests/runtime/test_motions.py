"""Commands that are motions, which go on until another is sent: what happens where none is to go on."""

import dataclasses
import time

import numpy as np
import pytest

from ki_runtime.control.loop import ControlLoop
from ki_runtime.control.options import LoopOptions

from .fake_robot import HZ, Counting, Line


class Base:
    """A base that is commanded by a velocity. No safe stop of its own."""

    name, control_hz, action_names = "base", HZ, ("x.vel",)
    reset, observe, status, frame = Line.reset, Line.observe, Line.status, Line.frame

    def __init__(self, steps=20):
        self.limit, self.log, self.closed = steps, [], 0

    @property
    def sent(self):
        return [action for _, action in self.log]

    def act(self, action):
        self.log.append((time.monotonic(), float(action[0])))
        self.steps += 1

    def close(self):
        self.closed += 1


class Driving(Counting):
    contract = dataclasses.replace(Counting.contract, action_names=("x.vel",))

    def infer(self, observation, **given):
        time.sleep(self.seconds)
        return {"actions": np.full((8, 1), 0.7)}


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_motion_ends_with_the_run(mode):
    """Whose robot has no safe stop gets what stands still, then it is closed."""
    robot = Base()
    ControlLoop(Driving(), robot, LoopOptions(mode=mode)).run()
    assert robot.sent[-2:] == [pytest.approx(0.7), 0.0] and robot.closed == 1


def test_nothing_is_sent_to_a_robot_that_never_moved():
    robot = Base(steps=0)
    ControlLoop(Driving(), robot, LoopOptions(mode="sync")).run()
    assert not robot.sent and robot.closed == 1


def test_a_motion_does_not_go_on_while_the_robot_waits():
    robot = Base(steps=14)
    ControlLoop(Driving(seconds=0.3), robot, LoopOptions(mode="sync")).run()
    waits = [at for at in range(1, len(robot.log)) if robot.log[at][0] - robot.log[at - 1][0] > 0.2]
    assert waits and all(robot.log[at - 1][1] == 0.0 for at in waits)


def test_a_simulation_whose_time_stands_still_gets_no_commands_of_ours():
    robot = Base(steps=14)
    robot.simulated = True
    ControlLoop(Driving(), robot, LoopOptions(mode="sync", paced=False)).run()
    assert robot.sent == pytest.approx([0.7] * 14)
