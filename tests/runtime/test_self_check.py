"""A policy that compares its two heads while it drives."""

import json
import threading

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, BackendError, RobotError
from ki_edge.policy.normalize import NormStats
from ki_runtime.control.cli import main
from ki_runtime.control.inference import Request
from ki_runtime.control.loop import ControlLoop
from ki_runtime.control.options import LoopOptions
from ki_runtime.control.recorder import Recorder
from ki_runtime.control.reporting import Watcher
from ki_runtime.control.self_check import SelfCheck
from ki_runtime.control.self_check_file import LEAST, limit_of, read_limit, save_limit
from ki_runtime.control.terminal import Status
from ki_runtime.policy.agreement import Agreement, usual_range

from .fake_robot import HZ, Counting, Line, Steps


def stats(low, high):
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    return {"actions": NormStats(mean=(low + high) / 2, std=(high - low) / 4, q01=low, q99=high)}


class TwoHeads(Counting):
    """Its heads agree, but for observations of the steps in `apart`. An action usually ranges over 100."""

    stats = stats([0.0], [100.0])

    def __init__(self, apart=(), error=None, **given):
        super().__init__(**given)
        self.apart, self.broken, self.checked = apart, error, []
        self.contract = type("Contract", (), {**vars(self.contract), "fast": object()})()

    def infer_fast(self, observation, *, stop=None):
        step = int(observation["state"][0])
        self.checked.append(step)
        if step in self.apart and self.broken is not None:
            if isinstance(self.broken, str):
                return {"actions": None, "problem": self.broken}
            raise self.broken
        off = 40.0 if step in self.apart else 1.0
        return {"actions": step + np.arange(8.0)[:, None] + off, "problem": None}


class Told(Watcher):
    def __init__(self):
        self.found = []

    def checked(self, found):
        self.found.append(found)


def run(policy, robot=None, *, every=0.0, limit=None, **options):
    robot, told, steps = robot or Line(), Told(), Steps()
    given = {"mode": "async", "delay": 1, **options}
    loop = ControlLoop(policy, robot, LoopOptions(self_check=every, self_check_limit=limit, **given), [told, steps])
    return loop.run(), robot, told.found, steps.steps


def test_what_agrees_is_told_and_changes_nothing():
    report, robot, found, _ = run(TwoHeads(), limit=0.2)
    assert robot.sent == list(range(40))
    assert len(found) >= 8 and [one.disagreement for one in found] == pytest.approx([0.01] * len(found))
    check = report.to_json()["self_check"]
    assert check["count"] == len(found) and not check["given_up"] and not check["beyond"] and not check["held"]
    assert check["disagreement"] == pytest.approx({"p50": 0.01, "p95": 0.01, "p99": 0.01, "max": 0.01})
    assert any("self-check" in line and "0 beyond 0.2" in line for line in report.lines())


def test_every_so_many_seconds_of_the_loops_clock():
    """Chunks are asked for every 4 ticks of 20 ms: a check is due with every second of them."""
    policy = TwoHeads()
    run(policy, Line(steps=40), every=0.15)
    assert policy.checked == [0, 8, 16, 24, 32]
    report, _, found, _ = run(TwoHeads(apart=range(99)), every=1000.0)
    assert len(found) == 1 and not report.self_check["beyond"]  # without a limit a run goes on


@pytest.mark.parametrize("error", [None, "no chunk in these tokens", BackendError("logits are not finite")])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_robot_holds_while_the_heads_disagree(mode, error):
    """From observation 8 on they do for a while: what was planned is dropped, and the next chunks are not sent."""
    policy, robot = TwoHeads(error=error), Line(steps=24)
    doubted = []

    class Sees(Watcher):
        def checked(self, found):
            doubted.append(found.beyond)
            policy.apart = () if sum(doubted) > 3 else range(8, 99)

    policy.apart = range(8, 99)
    options = LoopOptions(mode=mode, delay=0 if mode == "sync" else 1, self_check=0.0, self_check_limit=0.2)
    steps = Steps()
    report = ControlLoop(policy, robot, options, [Sees(), steps]).run()
    held = [step for step in steps.steps if step.chunk is None]
    assert len(held) > 1 and report.self_check["held"] >= len(held) - 1  # the last good chunk may be on its way
    assert sum(doubted) >= 3 and report.self_check["beyond"] == sum(doubted)
    sent = [step.action[0] for step in steps.steps]
    first = next(at for at, step in enumerate(steps.steps) if step.chunk is None)
    assert {step.action[0] for step in held} == {sent[first - 1]}  # it stands still
    after = [step for step in steps.steps[first:] if step.chunk is not None]
    assert after and all(0 <= step.tick - step.planned[0] <= 2 for step in after)  # held ticks count no action


def test_nothing_moves_before_the_first_chunk_was_found_good():
    policy, robot = TwoHeads(apart=range(99)), Line()
    with pytest.raises(RobotError, match=r"the first chunk of actions did not come within 60 s .the two heads"):
        run(policy, robot, limit=0.2)
    assert not robot.sent and robot.ended == ["safe_stop", "close"]


def test_a_doubt_that_does_not_end_stops_the_robot():
    robot = Line(steps=1000)
    with pytest.raises(RobotError, match=r"no fresh action for 10 ticks .the two heads of the policy want different"):
        run(TwoHeads(apart=range(12, 2000)), robot, limit=0.2, starve_limit=10)
    assert robot.ended == ["safe_stop", "close"]


def test_a_check_is_given_up_when_the_next_chunk_is_wanted():
    """In the thread that infers: decoding that takes for ever makes no chunk late."""

    class Slow(TwoHeads):
        def infer_fast(self, observation, *, stop=None):
            self.checked.append(int(observation["state"][0]))
            waits = threading.Event()
            while not stop():
                waits.wait(0.002)
            return {"actions": None, "problem": "stopped"}

    policy, robot = Slow(), Line(steps=30)
    report, _, found, _ = run(policy, robot, delay=None, starve_limit=1000)
    assert policy.checked and not found
    assert report.self_check["given_up"] >= 3 and report.self_check["count"] == 0
    assert report.rate["starved"] <= 3 and report.delay["predicted"]["p95"] <= 2


def test_what_an_episode_finds_is_no_doubt_of_the_next():
    """A check that ends when another episode has begun."""
    policy = TwoHeads(apart=range(99))
    check = SelfCheck(policy, 0.0, 0.2)
    check.reset(1)
    request = Request(1, 0, 0, 0, {"state": np.zeros(1)}, 0.0, np.zeros((8, 2), np.float32), None, 1, first=False)
    policy.infer_fast = lambda *_, **__: check.reset(2) or {"actions": np.full((8, 1), 40.0), "problem": None}
    check.when_idle(request, {"actions": np.zeros((8, 1))}, lambda: False)
    assert not check.doubtful and not check.take() and check.summary(1.0)["given_up"] == 1


def test_a_check_sees_what_its_chunk_saw():
    """Also of a robot that uses its memory again, and moves while the check goes on."""

    class Reusing(Line):
        memory = np.zeros(1, np.float32)

        def observe(self):
            self.memory[0] = self.steps
            return {**super().observe(), "state": self.memory}

        def act(self, action):
            super().act(action)
            self.memory[0] = self.steps

    class Slow(TwoHeads):
        def infer_fast(self, observation, *, stop=None):
            threading.Event().wait(0.05)
            return super().infer_fast(observation)

    _, _, found, _ = run(Slow(), Reusing(), mode="sync", delay=None)
    assert found and all(one.disagreement == pytest.approx(0.01) for one in found)


def test_what_it_found_is_recorded_and_shown(tmp_path):
    """A line of steps.jsonl each, a chart of run.html, a row on the terminal."""
    status, recorder = Status(1), Recorder(tmp_path / "run", dataset=False)
    policy = TwoHeads(apart=range(20, 28), error="no chunk in these tokens")
    options = LoopOptions(mode="async", delay=1, self_check=0.0, self_check_limit=0.2, starve_limit=5)
    with pytest.raises(RobotError, match="two heads"):
        ControlLoop(policy, Line(), options, [status, recorder]).run()
    events = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    checks = [event for event in events if event["event"] == "check"]
    assert [check["disagreement"] for check in checks[:3]] == pytest.approx([0.01] * 3)
    assert checks[-1]["disagreement"] is None and checks[-1]["beyond"]
    assert checks[-1]["problem"] == "no chunk in these tokens"
    page = (tmp_path / "run" / "run.html").read_text()
    assert "disagreement of the two heads" in page and "no actions in FAST" in page
    row = dict(status.rows())["self-check"]
    assert row.startswith("no chunk in these tokens, ") and row.endswith("beyond the limit")


def test_a_policy_with_one_head_is_refused():
    with pytest.raises(ArgumentError, match=r"this one has no FAST head: export its checkpoint with one .--fast-head."):
        ControlLoop(Counting(), Line(), LoopOptions(self_check=1.0))
    policy = TwoHeads()
    policy.stats = {}
    with pytest.raises(ArgumentError, match="statistics do not say how far its actions range"):
        ControlLoop(policy, Line(), LoopOptions(self_check=1.0))
    with pytest.raises(ArgumentError, match="self_check_limit is of a self-check"):
        LoopOptions(self_check_limit=0.1)


def test_disagreement_is_in_shares_of_what_moves():
    agreement = Agreement(stats([0, -1, 5], [2, 1, 5]), 3)
    flow, off = np.array([[0.0, 0.0, 5.0], [1.0, 0.0, 5.0]]), np.array([0.2, 0.4, 100.0])
    assert agreement.disagreement(flow, flow + off) == pytest.approx(np.sqrt((0.1**2 + 0.2**2) / 2))
    assert agreement.disagreement(flow, flow) == 0.0
    assert agreement.disagreement(flow, flow * np.nan) == float("inf")
    spread = {"actions": NormStats(mean=np.zeros(2), std=np.array([0.5, 0.0]))}
    assert usual_range(spread, "actions", 2).tolist() == [2.0, np.inf]
    assert usual_range({}, "actions", 2) is None and usual_range(spread, "actions", 3) is None


def test_the_limit_of_normal_runs(tmp_path):
    found = [*np.linspace(0.0, 1.0, 101)]
    assert limit_of(found)["limit"] == pytest.approx(1.25 * 0.99)
    assert save_limit(tmp_path / "limit.json", found) == read_limit(str(tmp_path / "limit.json"))
    assert read_limit("0.25") == 0.25
    with pytest.raises(ArgumentError, match=f"at least {LEAST} checks, this run has room for 3"):
        limit_of([0.1] * 3)
    with pytest.raises(ArgumentError, match="20 of 100 checks of this run found no actions"):
        limit_of([0.1] * 80 + [float("inf")] * 20)
    for wrong in ("nothing", "-1", "nan", "0"):
        with pytest.raises(ArgumentError, match="self-check limit"):
            read_limit(wrong)
    (tmp_path / "other.json").write_text('{"limit": "much"}')
    with pytest.raises(ArgumentError, match="expected a number above 0"):
        read_limit(str(tmp_path / "other.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--self-check-limit", "0.1"], "self_check_limit is of a self-check: say every how many seconds"),
        (["--self-check", "1", "--self-check-limit", "much"], "expected a number, or a file that --self-check-save"),
        (["--self-check-save", "x.json"], "--self-check-save is of a self-check"),
        (["--self-check", "1", "--self-check-save", "x.json", "--max-seconds", "49"], "this run has room for 49"),
        (["--self-check", "-1"], "self_check -1.0: expected a number from 0"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_opened(arguments, message, capsys):
    assert main(["nowhere", "--robot", "gym:FetchReach-v4", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


assert HZ == 50.0  # the times above
