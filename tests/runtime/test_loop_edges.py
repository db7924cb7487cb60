"""The loop at its edges: robots that reuse their memory, runs that are cut, priorities of a usual user."""

import gc
import os
import time

import numpy as np
import pytest

from ki_edge.errors import RobotError
from ki_runtime.control import priority
from ki_runtime.control.loop import ControlLoop
from ki_runtime.control.options import LoopOptions
from ki_runtime.control.reporting import Watcher
from ki_runtime.control.watchdog import Watchdog

from .fake_robot import Counting, Line


def test_stale_readings_end_a_run_in_mode_sync_too():
    """A robot that waits for its policy is not held for ever where nothing is asked of the policy."""
    robot = Line(steps=1000)
    robot.timestamps = lambda: {"front": time.monotonic() - (9.0 if robot.steps > 5 else 0.0)}
    with pytest.raises(RobotError, match=r"no fresh action for 10 ticks \(front is 9.00 s old"):
        ControlLoop(Counting(), robot, LoopOptions(mode="sync", delay=0, starve_limit=10)).run()
    assert robot.sent == [*range(8), *[7] * 10] and robot.ended == ["safe_stop", "close"]


def test_the_first_command_moves_from_the_state_that_was_observed():
    """Of a robot without `measure`: it stands still until then. 1 a second at 50 Hz is 0.02 a command."""

    class Far(Counting):
        def infer(self, observation, **given):
            return {"actions": np.full((8, 1), 5.0)}

    robot = Line(steps=3)
    robot.limits = {"action 0": {"velocity": 1.0, "measured": 0}}
    ControlLoop(Far(), robot, LoopOptions(delay=0)).run()
    assert robot.sent == pytest.approx([0.02, 0.04, 0.06], abs=1e-3)


def test_the_rate_of_a_run_that_was_cut_is_that_of_its_commands():
    robot = Line(steps=10_000)
    report = ControlLoop(Counting(), robot, LoopOptions(mode="async", max_seconds=2.0)).run()
    assert report.interrupted and not report.episodes
    assert 0 < report.rate["achieved_hz"] <= 1.2 * robot.control_hz


def test_what_comes_before_the_first_episode_takes_nothing_of_the_seconds_of_a_run(monkeypatch):
    """Garbage of a large process takes half a second to collect."""
    collect = gc.collect
    monkeypatch.setattr(priority.gc, "collect", lambda: (time.sleep(1.0), collect()))
    robot = Line(steps=10_000)
    options = LoopOptions(mode="async", max_seconds=2.5)
    ControlLoop(Counting(), robot, options).run()
    assert len(robot.sent) > 0.5 * robot.control_hz


def test_pictures_of_a_robot_that_draws_over_them():
    canvas = np.zeros((2, 2, 3), np.uint8)

    class Drawing(Line):
        def frame(self):
            canvas[:] = self.steps
            return canvas

    class Films(Watcher):
        def __init__(self):
            self.seen = []

        def films(self, index):
            return True

        def filmed(self, frame):
            self.seen.append(frame)

    films = Films()
    ControlLoop(Counting(), Drawing(steps=10), LoopOptions(mode="async"), [films]).run()
    assert [frame[0, 0, 0] for frame in films.seen] == list(range(11))


def test_a_state_in_memory_that_the_robot_uses_again():
    dog, state = Watchdog(0.5, np.ones(1)), np.zeros(1)
    picture = {"images": {"front": np.zeros((4, 4, 3), np.uint8)}}
    found = []
    for _ in range(4):
        found.append(dog.look(picture, state, {}, 0.0))
        state += 1.0
    assert found[:2] == [None, None] and "same picture" in found[3]


@pytest.mark.skipif(not hasattr(os, "SCHED_RESET_ON_FORK"), reason="Linux")
def test_a_usual_user_is_not_left_with_a_real_time_priority(monkeypatch):
    """The kernel refuses to take back the flag that a priority ends at a fork: sched(7), but for root."""
    now = [os.SCHED_OTHER]

    def set_policy(_, policy, __):
        if now[0] & os.SCHED_RESET_ON_FORK and not policy & os.SCHED_RESET_ON_FORK:
            raise PermissionError(1, "Operation not permitted")
        now[0] = policy

    monkeypatch.setattr(os, "sched_getscheduler", lambda _: now[0])
    monkeypatch.setattr(os, "sched_setscheduler", set_policy)
    with priority.undisturbed():
        assert now[0] & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO
    assert now[0] & ~os.SCHED_RESET_ON_FORK == os.SCHED_OTHER


def test_the_terminal_of_a_loop_that_never_ran(monkeypatch):
    termios = pytest.importorskip("termios")
    leader, follower = os.openpty()
    before = termios.tcgetattr(follower)[3]
    with os.fdopen(follower) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        loop = ControlLoop(Counting(), Line(steps=3), LoopOptions(delay=0, stop_keys=True, close_robot=False))
        assert termios.tcgetattr(follower)[3] == before
        loop.run()
        assert termios.tcgetattr(follower)[3] == before
        line = loop._robot
        line.observe = lambda seen=line.observe: os.write(leader, b"xxq") and seen()  # while the second run goes on
        with pytest.raises(KeyboardInterrupt, match="the key 'q' was pressed"):
            loop.run()
    os.close(leader)
