"""Ticks, predicted delays, seams, observations that are refused, switches: the parts of the loop, each alone."""

import gc
import os
import pty
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from ki_edge.errors import ArgumentError
from ki_runtime.control.clock import RealClock, SimulatedClock, Ticker
from ki_runtime.control.delay import WINDOW, DelayPredictor
from ki_runtime.control.killswitch import KillSwitch
from ki_runtime.control.priority import undisturbed
from ki_runtime.control.reporting import MOST, Reporter, Watcher
from ki_runtime.control.seams import SeamLog
from ki_runtime.control.watchdog import Watchdog

# ---------------------------------------------------------------- ticks


class Jumping(SimulatedClock):
    """A clock that somebody may move."""

    def jump(self, seconds):
        self._now += seconds


def test_ticks_come_at_their_times_and_late_ones_are_counted():
    clock = Jumping()
    ticker, times = Ticker(clock, 0.1), []
    for pause in (0.0, 0.03, 0.0, 0.25, 0.0, 0.0):  # seconds of work after each tick
        ticker.wait()
        times.append(round(clock.now(), 6))
        clock.jump(pause)
    assert times == [0.0, 0.1, 0.2, 0.3, 0.55, 0.6]
    assert (ticker.ticks, ticker.missed) == (6, 1)  # that of 0.4 never came; 0.5 came late
    assert max(ticker.late) == pytest.approx(0.05)


def test_a_machine_that_slept_makes_up_for_nothing():
    clock = Jumping()
    ticker = Ticker(clock, 0.1)
    ticker.wait()
    clock.jump(1000.0)
    ticker.wait()
    before = clock.now()
    ticker.wait()
    assert 0 < clock.now() - before <= 0.1 + 1e-9 and ticker.missed == 9999


def test_a_wait_that_nobody_paced_is_no_missed_tick():
    clock = Jumping()
    ticker = Ticker(clock, 0.1)
    ticker.wait()
    clock.jump(0.5)
    ticker.restart()
    ticker.wait()
    assert (clock.now(), ticker.missed) == (0.5, 0)
    clock.jump(0.02)
    ticker.restart()  # and never are two commands nearer to each other than a period
    ticker.wait()
    assert clock.now() == pytest.approx(0.6)


def test_the_real_clock_waits():
    clock = RealClock()
    start = clock.now()
    clock.wait_until(start + 0.01)
    assert clock.now() >= start + 0.01
    clock.wait_until(start)


# ---------------------------------------------------------------- delays


def test_one_slow_inference_is_forgotten():
    """The 95th percentile of a window; a maximum would never recover (kinetix and LeRobot reports)."""
    delays = DelayPredictor(4)
    assert delays.predict() == 4
    for _ in range(WINDOW):
        delays.add(4, 2, 2)
    delays.add(2, 7, 40)
    assert delays.predict() == 2
    for _ in range(10):
        delays.add(2, 3, 3)
    assert delays.predict() == 3
    assert len(delays.real) == WINDOW + 11 and delays.real[WINDOW] == 7


# ---------------------------------------------------------------- seams


def test_jumps_at_seams_and_inside_chunks():
    log = SeamLog([True, True, False])
    values = [0.0, 1.0, 2.0, 12.0, 13.0, 14.0, 15.0]
    seams = [log.add(np.array([v, -v, 100 * v], np.float32), int(i >= 3)) for i, v in enumerate(values)]
    assert seams == [False, False, False, True, False, False, False]
    found = log.summary()
    assert found["count"] == 1
    assert found["position"] == {"p50": 10, "p95": 10, "max": 10}  # the gripper's 1000 does not count
    assert found["inside"]["position"]["max"] == 1
    assert found["velocity"]["max"] == 9 and found["inside"]["velocity"]["max"] == 0
    assert found["acceleration"]["max"] == 18 and found["inside"]["acceleration"]["max"] == 0


def test_a_hold_begins_and_ends_with_a_seam_and_an_episode_with_none():
    log = SeamLog([True])
    given = [(0.0, 0), (1.0, 0), (1.0, None), (1.0, None), (3.0, 1)]
    assert [log.add(np.array([v], np.float32), c) for v, c in given] == [False, False, True, True, True]
    log.reset()
    assert not log.add(np.array([50.0], np.float32), 0)
    assert log.summary()["position"]["max"] == 2


# ---------------------------------------------------------------- observations


def observation(picture, state):
    return {"images": {"front": np.full((4, 4, 3), picture, np.uint8)}, "state": np.array(state, np.float32)}


def look(dog, picture, state, times=None, now=0.0):
    return dog.look(observation(picture, state), np.array(state, np.float64), times or {}, now)


def test_a_camera_is_frozen_when_the_robot_moved_and_its_picture_did_not():
    dog = Watchdog(0.5, np.array([1.0, 10.0]))
    assert [look(dog, 7, [x, 0]) for x in (0.0, 0.02, 0.04)] == [None] * 3  # less than a pixel shows
    assert "camera front shows the same picture while the robot moves" in look(dog, 7, [0.06, 0])
    assert look(dog, 7, [0.06, 0]) is not None  # and stays so while the robot holds
    assert look(dog, 8, [0.06, 0]) is None
    assert dog.refused == {"camera_frozen": 2}


def test_a_robot_that_stands_still_may_see_the_same():
    dog = Watchdog(0.5, np.array([1.0]))
    assert all(look(dog, 7, [0.5]) is None for _ in range(50))


def test_without_statistics_no_camera_is_found_frozen():
    dog = Watchdog(0.5, None)
    assert all(look(dog, 7, [x]) is None for x in range(20))


def test_readings_that_are_too_old():
    dog = Watchdog(0.5, None)
    assert look(dog, 1, [0], {"front": 9.6, "state": 9.9}, 10.0) is None
    assert look(dog, 2, [0], {"front": 9.9, "state": 9.4}, 10.0) == "state is 0.60 s old, at most 0.5 s"
    assert "nan s old" in look(dog, 3, [0], {"front": float("nan")}, 10.0)
    assert dog.refused == {"stale": 2}


# ---------------------------------------------------------------- switches


def test_a_file_stops_the_run(tmp_path):
    switch = KillSwitch(tmp_path / "stop")
    assert switch.pulled() is None
    (tmp_path / "stop").write_text("")
    assert "stop appeared" in switch.pulled()
    with pytest.raises(ArgumentError, match="exists already: remove it first"):
        KillSwitch(tmp_path / "stop")


def test_keys_stop_the_run_and_the_terminal_is_given_back(monkeypatch):
    termios = pytest.importorskip("termios")
    leader, follower = pty.openpty()
    before = termios.tcgetattr(follower)
    with os.fdopen(follower) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        switch = KillSwitch(keys=True)
        assert termios.tcgetattr(follower)[3] == before[3]  # nothing is taken before the run
        switch.open()
        os.write(leader, b"x")
        time.sleep(0.05)
        assert switch.pulled() is None  # another key
        os.write(leader, b"abc ")  # the key behind others
        until = time.monotonic() + 20
        while (pulled := switch.pulled()) is None:
            assert time.monotonic() < until
        assert pulled == "the key ' ' was pressed"
        switch.close()
        assert termios.tcgetattr(follower)[3] == before[3]
    os.close(leader)


def test_keys_without_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert KillSwitch(keys=True).pulled() is None


# ---------------------------------------------------------------- watchers


class Slow(Watcher):
    def __init__(self):
        self.free, self.busy, self.seen = threading.Event(), threading.Event(), []

    def stepped(self, step):
        self.busy.set()
        self.free.wait()
        self.seen.append(step)

    def episode_ended(self, index, episode):
        self.seen.append("end")


def test_a_slow_watcher_slows_nobody():
    slow = Slow()
    reporter = Reporter([slow], threaded=True)
    for step in range(MOST + 50):
        reporter.tell(lambda watcher, step=step: watcher.stepped(step))
        assert step or slow.busy.wait(60)  # it has the first one: what is dropped from here on is the end
    reporter.tell(lambda watcher: watcher.episode_ended(0, None), must=True)
    assert reporter.dropped >= 49
    slow.free.set()
    reporter.close()
    assert slow.seen == [*range(MOST + 50 - reporter.dropped), "end"]


def test_an_error_of_a_watcher_reaches_the_loop():
    class Full(Watcher):
        def stepped(self, step):
            raise OSError(28, "No space left on device")

    reporter = Reporter([Full()], threaded=True)
    reporter.tell(lambda watcher: watcher.stepped(1))
    with pytest.raises(OSError, match="No space left"):
        while True:
            reporter.check()
            time.sleep(0.001)
    reporter.close()


# ---------------------------------------------------------------- priority


def test_all_is_as_before_after_an_undisturbed_time():
    """Whatever the system allows: root gets a real-time priority, others what they have."""
    before = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), gc.isenabled(), sys.getswitchinterval()
    with undisturbed() as words:
        assert not gc.isenabled() and sys.getswitchinterval() < before[3]
        real_time = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO
        assert real_time == ("real-time" in words)
        child = subprocess.run(
            [sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(child.stdout) == os.SCHED_OTHER  # none of it for the programs that it starts
    after = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), gc.isenabled(), sys.getswitchinterval()
    assert after == before


def test_a_system_that_allows_nothing(monkeypatch):
    def denied(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", denied)
    monkeypatch.setattr(os, "setpriority", denied)
    with undisturbed() as words:
        assert words == "usual priority: the system allows no other"
