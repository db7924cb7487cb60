"""The loop in each mode: in lock-step, tick by tick; and on the real clock with inference in its thread."""

import threading
import time
from itertools import pairwise

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, BackendError, RobotError
from ki_edge.policy.normalize import NormStats
from ki_runtime.control import cycle
from ki_runtime.control.interrupts import Stopped
from ki_runtime.control.loop import ControlLoop
from ki_runtime.control.options import LoopOptions

from .fake_robot import HZ, Counting, Line, Steps
from .fake_robot import ROWS as HORIZON


def run(policy=None, robot=None, **options):
    robot, watcher = robot or Line(), Steps()
    loop = ControlLoop(policy or Counting(), robot, LoopOptions(**options), [watcher])
    try:
        report = loop.run()
    except BaseException:
        assert robot.ended == ["safe_stop", "close"] and watcher.closed == 1
        raise
    assert robot.ended == ["safe_stop", "close"] and watcher.closed == 1
    return report, robot, watcher.steps


@pytest.mark.parametrize("mode", ["async", "rtc"])
@pytest.mark.parametrize("delay", range(HORIZON // 2 + 1))
@pytest.mark.parametrize("execute", [1, 3, 8])
def test_every_command_is_the_one_for_its_tick(mode, delay, execute):
    report, robot, steps = run(mode=mode, delay=delay, execute=execute)
    assert robot.sent == list(range(40))
    assert report.rate["starved"] == report.rate["late_chunks"] == 0
    assert all(step.age >= 0 and step.chunk is not None for step in steps)
    assert report.delay["real"] == {"p50": delay, "p95": delay}
    assert all(later.index == step.index + 1 or later.seam for step, later in pairwise(steps))


def test_waiting_holds_and_shows_it():
    """A delay in mode sync is a stop at every seam: the robot gets its last command again."""
    report, robot, steps = run(mode="sync", delay=3)
    assert robot.sent[:12] == [0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 7, 7]  # three holds do count as commands
    assert [step.chunk for step in steps[:8]] == [0, 0, 0, 0, None, None, None, 1]
    assert report.rate["starved"] == 0 and report.seams["count"] > 0


def test_lock_step_does_the_same_each_time():
    """Whatever the machine does meanwhile."""
    first, second = (run(Counting(seconds), mode="async", delay=2)[1].sent for seconds in (0.0, 0.003))
    assert first == second


def test_what_is_told_of_the_chunk_before():
    policy = Counting()
    run(policy, mode="rtc", delay=3, execute=4)
    first, *others = policy.asked
    assert first is None and len(others) >= 5
    for previous in others[:-1]:
        assert previous.delay == 3 and len(previous.actions) == 4  # rows 4 to 7 of the chunk that is played
        np.testing.assert_array_equal(np.diff(previous.actions[:, 0]), 1)
    assert not any(run_previous is not None for run_previous in asked_in("async"))


def asked_in(mode):
    policy = Counting()
    run(policy, mode=mode, delay=3)
    return policy.asked


def test_a_policy_that_fails_plays_its_last_good_chunk_to_the_end():
    robot = Line()
    with pytest.raises(BackendError, match="broken"):
        run(Counting(fail_at=3, error=BackendError("broken")), robot, mode="async", delay=2)
    assert robot.sent == list(range(12))  # asked at 0, 4 and 8 and no more: 4 + 8 rows


def test_nan_is_never_sent():
    robot = Line()
    with pytest.raises(BackendError, match="cannot be sent"):
        run(Counting(fail_at=2, error=np.nan), robot, mode="async", delay=1)
    assert robot.sent == list(range(8))


def test_starved_for_too_long():
    """Real time: the policy hangs, the robot gets the good actions, then holds, then is stopped."""
    robot = Line(steps=10_000)
    with pytest.raises(RobotError, match="no fresh action for 5 ticks: line is stopped"):
        run(Hanging(), robot, mode="async", starve_limit=5)
    assert robot.sent == [*range(8), *[7] * 5]


class Hanging(Counting):
    """Its second inference takes as long as a test may."""

    def infer(self, observation, **given):
        if len(self.asked) == 1:
            time.sleep(3.0)
        return super().infer(observation, **given)


class Stuck(Counting):
    """Its second inference ends when the test does."""

    def __init__(self):
        super().__init__()
        self.free = threading.Event()

    def infer(self, observation, **given):
        if len(self.asked) == 1:
            self.free.wait(60.0)
        return super().infer(observation, **given)


def test_a_robot_that_waits_for_a_policy_that_hangs_can_be_stopped(tmp_path):
    """Mode sync: by the seconds of the run and by the file, not by a signal alone."""
    policy, robot = Stuck(), Line(steps=10_000)
    report, _, _ = run(policy, robot, mode="sync", max_seconds=0.7)
    assert report.interrupted and robot.sent == list(range(4)) and robot.ended == ["safe_stop", "close"]
    policy.free.set()
    policy, robot, stop = Stuck(), Line(steps=10_000), tmp_path / "stop"
    robot.act = lambda action: (Line.act(robot, action), stop.touch() if robot.steps == 4 else None)
    with pytest.raises(Stopped, match="stop"):
        run(policy, robot, mode="sync", stop_file=stop)
    assert robot.sent == list(range(4)) and robot.ended == ["safe_stop", "close"]
    policy.free.set()


def test_a_robot_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(cycle, "LONGEST", 0.2)
    policy, robot = Stuck(), Line(steps=10_000)
    with pytest.raises(RobotError, match=r"an inference has not answered within 0.2 s: line is stopped"):
        run(policy, robot, mode="sync")
    assert robot.ended == ["safe_stop", "close"]
    policy.free.set()


def test_inference_runs_in_a_thread_of_its_own():
    policy, robot = Counting(seconds=0.03), Line(steps=60)
    report, robot, steps = run(policy, robot, mode="async", starve_limit=1000)
    assert threading.main_thread() not in policy.threads and len(policy.threads) == 1
    assert report.rate["asked_hz"] == HZ and report.delay["real"]["p95"] >= 1
    played = [step for step in steps if step.chunk is not None]
    assert [step.action[0] for step in played] == pytest.approx([step.planned[0] for step in played])
    assert {thread.name for thread in threading.enumerate()} & {"inference", "watchers"} == set()


def test_a_slow_policy_starves_the_robot_and_recovers():
    """Every inference takes longer than half a chunk: it holds in between, and no row is lost."""
    report, _, steps = run(Counting(seconds=0.25), Line(steps=30), mode="async", starve_limit=1000)
    assert report.rate["starved"] > 5
    held = [step for step in steps if step.chunk is None]
    assert len(held) == report.rate["starved"]
    numbers = [step.index for step in steps if step.chunk is not None]
    assert numbers[:12] == [*range(8), 4, 5, 6, 7]


def test_a_new_episode_drops_what_the_last_one_asked():
    class Late(Counting):
        def infer(self, observation, **given):
            result = super().infer(observation, **given)
            return result if observation["state"][0] < 30 else {"actions": np.full((HORIZON, 1), 1000.0)}

    robot = Line()
    run(Late(), robot, mode="async", delay=4, episodes=2)
    assert robot.sent[40:60] == list(range(20))


def test_a_frozen_camera_holds_the_robot():
    class Frozen(Line):
        def observe(self):
            return {**super().observe(), "images": {"cam": np.zeros((2, 2, 3), np.uint8)}}

    policy, robot = Counting(), Frozen(steps=1000)
    policy.stats = {"state": NormStats(q01=np.zeros(1), q99=np.ones(1))}
    with pytest.raises(RobotError, match="camera cam shows the same picture while the robot moves"):
        run(policy, robot, mode="async", delay=1, starve_limit=10)
    assert robot.sent[-10:] == [robot.sent[-11]] * 10


def test_stale_readings_hold_the_robot():
    robot = Line(steps=1000)
    robot.timestamps = lambda: {"front": time.monotonic() - (9.0 if robot.steps > 10 else 0.0)}
    with pytest.raises(RobotError, match=r"front is 9.00 s old, at most 0.5 s"):
        run(Counting(), robot, mode="async", delay=1, starve_limit=10)


def test_max_seconds_and_the_stop_file(tmp_path):
    report, _, _ = run(Counting(), Line(steps=10_000), mode="async", max_seconds=2.0)
    assert report.interrupted and report.rate["ticks"] >= 5
    robot = Line(steps=10_000)
    timer = threading.Timer(0.1, (tmp_path / "stop").touch)
    timer.start()
    with pytest.raises(Stopped, match="stop appeared"):
        run(Counting(), robot, mode="async", stop_file=tmp_path / "stop")
    timer.join()


def test_own_hold_of_a_robot():
    robot = Line()
    robot.held = 0
    robot.hold = lambda: setattr(robot, "held", robot.held + 1) or setattr(robot, "steps", robot.steps + 1)
    run(Counting(), robot, mode="sync", delay=2)
    assert robot.held > 0 and all(b > a for a, b in pairwise(robot.sent))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "mode 'fast': expected one of sync, async, rtc"),
        ({"mode": "async", "delay": 5}, "delay 5: the policy gives 8 actions at once.*at most 4 can be bridged"),
        ({"mode": "sync", "crossfade": 2}, "crossfade 2 blends chunks of mode async; the mode is sync"),
        ({"mode": "async", "paced": False}, "unpaced: mode async computes beside a robot"),
        ({"mode": "sync", "paced": False}, "unpaced: line does not say that it is simulated"),
        ({"delay": -1}, "delay -1"),
        ({"rate": float("nan")}, "rate nan"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ArgumentError, match=message):
        ControlLoop(Counting(), Line(), LoopOptions(**options))


def test_rates():
    robot = Line()
    robot.control_hz = 30.0
    with pytest.raises(RobotError, match="trained at 50 actions a second, and line runs at 30: give the rate"):
        ControlLoop(Counting(), robot)
    robot.control_hz = 50.4
    ControlLoop(Counting(), robot)
    ControlLoop(Counting(), robot, LoopOptions(rate=10.0))
    del Line.control_hz
    try:
        assert ControlLoop(Counting(), Line())._rate == 50
    finally:
        Line.control_hz = HZ


def test_an_inference_too_slow_for_its_chunk():
    said = []
    loop = ControlLoop(Counting(), Line(), LoopOptions(mode="async"), say=said.append)
    loop.expect(80.0)
    assert not said
    loop.expect(100.0)
    assert said[0].startswith(
        "an inference takes 100 ms, 5 actions at 50 a second, and the policy gives only 8 at once"
    )
    assert "line will hold now and then" in said[0]
    with pytest.raises(ArgumentError, match=r"takes 400 ms, 20 actions at 50 a second, and the policy gives only 8 at"):
        loop.expect(400.0)


def test_modes_that_a_policy_cannot_do():
    policy = Counting()
    policy.rtc = None
    with pytest.raises(ArgumentError, match="exported without real-time chunking: export it again with --rtc"):
        ControlLoop(policy, Line(), LoopOptions(mode="rtc"))
    policy.rtc, policy.max_delay = "trained", 2
    with pytest.raises(ArgumentError, match="delay 3: this policy was trained for delays of at most 2"):
        ControlLoop(policy, Line(), LoopOptions(mode="rtc", delay=3))


def test_a_policy_that_failed_when_the_episode_was_over_anyway():
    """Its last good chunk was enough; the next episode does not begin."""
    robot = Line(steps=11)
    with pytest.raises(BackendError, match="broken"):
        run(Counting(fail_at=3, error=BackendError("broken")), robot, mode="async", delay=2, episodes=2)
    assert robot.sent == list(range(11))


def test_max_steps_counts_commands_and_not_the_wait_for_the_first():
    assert run(robot=Line(), mode="async", delay=4, max_steps=6)[1].sent == list(range(6))


def test_a_policy_that_answers_nothing():
    policy = Counting()
    policy.infer = lambda *_, **__: None
    with pytest.raises(BackendError, match="the policy answered NoneType, expected a mapping with 'actions'"):
        run(policy)


def test_a_rate_of_a_robot_that_is_none():
    robot = Line()
    robot.control_hz = float("nan")
    with pytest.raises(RobotError, match="line says that it takes nan actions a second"):
        ControlLoop(Counting(), robot)


def test_a_reading_of_another_clock_is_refused():
    robot = Line(steps=1000)
    robot.timestamps = lambda: {"front": time.time()}
    with pytest.raises(RobotError, match=r"front was read .* from now: give time.monotonic\(\)"):
        run(Counting(), robot, mode="sync", starve_limit=3, max_steps=30, delay=0)
