"""The loop and what it measures, with a robot that counts and a policy that is a formula."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, BackendError, DeviceError, RobotError
from ki_edge.policy.contract import generic
from ki_runtime.control.loop import ControlLoop, episode_noise
from ki_runtime.control.options import LoopOptions
from ki_runtime.control.reporting import Watcher
from ki_runtime.control.seams import SeamLog
from ki_runtime.control.telemetry import Episode, LatencyLog, RunReport

from .fake_robot import HORIZON, CountingRobot, Failing, FormulaPolicy


def test_chunks_are_executed_and_inferred_again():
    robot, policy = CountingRobot(), FormulaPolicy()
    report = ControlLoop(policy, robot).run()
    acts = [value for event, value in robot.log if event == "act"]
    assert acts == [[0, 0], [0, 1], [0, 2], [3, 0], [3, 1], [3, 2], [6, 0]]
    assert [value for event, value in robot.log if event == "observe"] == [0, 3, 6]
    (episode,) = report.episodes
    assert (episode.steps, episode.inferences, episode.success, episode.success_any) == (7, 3, True, True)


@pytest.mark.parametrize(("execute", "inferences"), [(1, 7), (2, 4), (5, 2)])
def test_execute(execute, inferences):
    policy = FormulaPolicy()
    ControlLoop(policy, CountingRobot(), LoopOptions(execute=execute)).run()
    assert len(policy.asked) == inferences


def test_seeds_and_noise_can_be_repeated_elsewhere():
    robot, policy = CountingRobot(), FormulaPolicy()
    report = ControlLoop(policy, robot, LoopOptions(episodes=3, seed=40, num_steps=4)).run()
    assert [value for event, value in robot.log if event == "reset"] == [40, 41, 42]
    assert [episode.seed for episode in report.episodes] == [40, 41, 42]
    for i, asked in enumerate(policy.asked):
        np.testing.assert_array_equal(asked.noise, episode_noise(40 + i // 3, i % 3, (HORIZON, 4)))
        assert asked.num_steps == 4
    expected = np.random.default_rng([41, 2]).standard_normal((HORIZON, 4), np.float32)
    np.testing.assert_array_equal(episode_noise(41, 2, (HORIZON, 4)), expected)
    assert len({asked.noise.tobytes() for asked in policy.asked}) == 9


def test_success_at_the_end_and_at_any_step():
    report = ControlLoop(FormulaPolicy(), CountingRobot(), LoopOptions(episodes=4, seed=1)).run()
    assert [episode.success for episode in report.episodes] == [False, True, False, True]
    assert (report.success_rate, report.success_rate_any) == (0.5, 1.0)


def test_limit_and_prompt():
    robot, policy = CountingRobot(), FormulaPolicy()
    report = ControlLoop(policy, robot, LoopOptions(max_steps=4, prompt="mine")).run()
    assert report.episodes[0].steps == 4 and not report.episodes[0].success
    assert {asked.observation["prompt"] for asked in policy.asked} == {"mine"}


def test_pace():
    robot = CountingRobot()
    robot.real_time = True
    report = ControlLoop(FormulaPolicy(), robot, LoopOptions(rate=100)).run()
    assert report.episodes[0].seconds >= 0.06 and report.rate["achieved_hz"] <= 117  # 7 actions, 6 pauses of 10 ms
    assert (report.rate["asked_hz"], report.rate["ticks"]) == (100, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "episodes 0"),
        ({"seed": -1}, "seed -1"),
        ({"execute": 0}, "execute 0"),
        ({"execute": 6}, "execute must be at most 5, the actions that the policy gives at once; got 6"),
        ({"max_steps": 0}, "max_steps 0"),
        ({"rate": 0.0}, "rate 0.0"),
        ({"num_steps": 0}, "num_steps 0"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ArgumentError, match=message):
        ControlLoop(FormulaPolicy(), CountingRobot(), LoopOptions(**options))


@pytest.mark.parametrize("error", [BackendError("broken"), DeviceError("broken: lost")])
def test_an_error_closes_the_watchers_and_keeps_the_report(monkeypatch, error):
    """The robot is told nothing more, so it holds where it is."""
    monkeypatch.setattr(Failing, "error", error)
    closed, robot = [], CountingRobot()
    watcher = type("Closing", (Watcher,), {"close": lambda self: closed.append(1)})()
    loop = ControlLoop(Failing(), robot, LoopOptions(episodes=2), [watcher])
    with pytest.raises(type(error), match="broken"):
        loop.run()
    assert robot.log[-1] == ("observe", 0)
    assert closed == [1] and len(loop.report(interrupted=True).episodes) == 1


def test_a_robot_with_other_actions_is_refused():
    """Same number of actions, another meaning: the arm must not move."""
    contract = generic(["front"], state_dim=2, action_dim=2, action_horizon=4, action_names=("dx", "dy"))
    arm = CountingRobot()
    arm.name, arm.action_names = "arm", ("x", "y")
    with pytest.raises(RobotError, match=r"arm is commanded by \(x, y\), but the policy gives \(dx, dy\)"):
        ControlLoop(SimpleNamespace(contract=contract), arm)
    arm.action_names = ("dx", "dy")
    ControlLoop(SimpleNamespace(contract=contract), arm)


# ---------------------------------------------------------------- telemetry


def test_percentiles():
    log = LatencyLog()
    for value in range(1, 101):
        log.add({"denoise_ms": value, "extra_ms": 1.0, "prefix_ms": 2.0 * value})
    summary = log.summary()
    assert list(summary) == ["prefix_ms", "denoise_ms", "extra_ms"]
    x = summary["denoise_ms"]
    assert (x.count, x.p50, x.max, x.mean) == (100, 50.5, 100, 50.5) and x.p99 == pytest.approx(99.01)


def run_report(episodes, latency):
    nothing = SeamLog([True]).summary()
    rate = {"asked_hz": 20.0, "achieved_hz": 19.9, "ticks": 40, "missed": 1, "starved": 0, "jitter_ms": None}
    delay, guards = {"predicted": None, "real": None}, {"position": 3, "tripped": False}
    return RunReport(episodes, latency, "sync", rate, nothing, delay, guards)


def test_report():
    episodes = tuple(Episode(seed, 10, 2, 0.5, success=seed > 0, success_any=True) for seed in range(4))
    log = LatencyLog()
    log.add({"total_ms": 3.0})
    report = run_report(episodes, log.summary())
    text = "\n".join(report.lines())
    assert "75.0 % at the end" in text and "100.0 % at any step" in text and "19.9 Hz of 20 asked" in text
    assert "40, 1 missed, 0 without an action" in text and "position 3" in text
    data = json.loads(json.dumps(report.to_json()))
    assert data["success_rate"] == 0.75 and data["latency_ms"]["total_ms"]["p99"] == 3.0
    assert data["torch_loaded"] is ("torch" in sys.modules)
    unknown = run_report(tuple(replace(e, success=None, success_any=None) for e in episodes), {})
    assert unknown.success_rate is None and "success" not in "\n".join(unknown.lines())
