"""However a run ends, the robot is closed once, before the watchers, and every watcher is closed."""

import os
import signal

import numpy as np
import pytest

from ki_edge.errors import BackendError, RobotError
from ki_runtime.control.interrupts import Interrupted
from ki_runtime.control.loop import ControlLoop
from ki_runtime.control.options import LoopOptions
from ki_runtime.control.reporting import Watcher

from .fake_robot import CountingRobot, Failing, FormulaPolicy


class Order(Watcher):
    """Notes in the robot's log that it was closed; fails then if it is told to."""

    def __init__(self, robot, error=None):
        self.robot, self.error = robot, error

    def close(self):
        self.robot.log.append(("watcher closed", self.robot.closed))
        if self.error is not None:
            raise self.error


class Breaking(CountingRobot):
    """Raises `errors[method]` at its fifth step, or when it is closed."""

    def __init__(self, **errors):
        super().__init__()
        self.errors = errors

    def _maybe(self, method):
        if method in self.errors and self.steps >= 4:
            raise self.errors[method]

    def observe(self):
        self._maybe("observe")
        return super().observe()

    def act(self, action):
        self._maybe("act")
        super().act(action)

    def status(self):
        self._maybe("status")
        return super().status()

    def close(self):
        super().close()
        if "close" in self.errors:
            raise self.errors["close"]


class Stopping(FormulaPolicy):
    """Raises `error` at its second inference."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def infer(self, observation, **options):
        if self.asked:
            raise self.error
        return super().infer(observation, **options)


def run(robot, policy=None, watchers=None, **options):
    told = []
    loop = ControlLoop(
        policy or FormulaPolicy(), robot, LoopOptions(**options), watchers or [Order(robot)], say=told.append
    )
    try:
        loop.run()
    finally:
        robot.told = told
    return loop


def closings(robot):
    return [value for event, value in robot.log if event == "watcher closed"]


def test_after_a_run():
    robot = CountingRobot()
    loop = run(robot, episodes=2)
    assert robot.closed == 1 and closings(robot) == [1]
    with pytest.raises(RobotError, match="this loop has run and closed its robot"):
        loop.run()
    assert robot.closed == 1


def test_a_robot_that_its_owner_keeps():
    robot = CountingRobot()
    loop = run(robot, close_robot=False)
    loop.run()
    assert robot.closed == 0 and len(loop.report().episodes) == 2


@pytest.mark.parametrize("method", ["observe", "act", "status"])
@pytest.mark.parametrize("error", [RobotError("jammed"), ValueError("driver"), KeyboardInterrupt(), SystemExit(3)])
def test_after_an_error_of_the_robot(method, error):
    robot = Breaking(**{method: error})
    with pytest.raises(type(error)) as caught:
        run(robot)
    assert caught.value is error
    assert robot.closed == 1 and closings(robot) == [1]


@pytest.mark.parametrize("error", [BackendError("broken"), MemoryError(), KeyboardInterrupt(), Interrupted(15)])
def test_after_an_error_of_the_policy(error):
    robot = CountingRobot()
    with pytest.raises(type(error)):
        run(robot, Stopping(error))
    assert robot.closed == 1 and closings(robot) == [1]


def test_an_error_while_closing_does_not_hide_the_first():
    robot = Breaking(act=RobotError("jammed"), close=OSError("bus gone"))
    with pytest.raises(RobotError, match="jammed"):
        run(robot, watchers=[Order(robot, RobotError("disk full")), Order(robot)])
    assert robot.closed == 1 and closings(robot) == [1, 1]
    assert robot.told == ["and while closing: OSError: bus gone", "and while closing: RobotError: disk full"]


@pytest.mark.parametrize("error", [RobotError("disk full"), KeyboardInterrupt()])
def test_a_watcher_that_fails_at_the_end_stops_nobody(error):
    robot = CountingRobot()
    with pytest.raises(type(error)):
        run(robot, watchers=[Order(robot, error), Order(robot)])
    assert robot.closed == 1 and closings(robot) == [1, 1]


def test_a_close_that_fails_after_a_good_run_is_an_error():
    robot = Breaking(close=RobotError("still moving"))
    with pytest.raises(RobotError, match="still moving"):
        run(robot)
    assert robot.closed == 1 and closings(robot) == [1]


@pytest.mark.parametrize("event", ["episode_started", "inferred", "stepped", "episode_ended"])
def test_after_an_error_of_a_watcher(event):
    robot = CountingRobot()
    watcher = Order(robot)

    def full(*_):
        raise OSError(28, "No space left on device")

    setattr(watcher, event, full)
    with pytest.raises(OSError, match="No space left"):
        run(robot, watchers=[watcher, Order(robot)])
    assert robot.closed == 1 and closings(robot) == [1, 1]


def test_the_robot_is_told_whose_policy_drives_it():
    robot = CountingRobot()
    robot.fit = lambda contract: robot.log.append(("fit", contract.action_dim))
    ControlLoop(Failing(), robot)
    assert robot.log == [("fit", 2)] and np.isfinite(robot.log[0][1])


class Terminating(Watcher):
    """Asks the process to end once an episode is over."""

    def episode_ended(self, index, episode):
        os.kill(os.getpid(), signal.SIGTERM)


def test_after_a_signal_the_robot_is_not_reset_once_more():
    robot, before = CountingRobot(), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(Interrupted):
            ControlLoop(FormulaPolicy(), robot, LoopOptions(episodes=2), [Terminating()]).run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [event for event, _ in robot.log if event == "reset"] == ["reset"] and robot.closed
