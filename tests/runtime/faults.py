"""What a robot is told, tick by tick, when something fails: the faults, and the table that docs/reliability.md shows.

    python -m tests.runtime.faults

A robot of 40 commands at 50 Hz; chunks have 8 actions, of which 4 are played before the next chunk is asked for; mode
async in lock-step, an inference takes 2 ticks. From the fault on nothing is beyond the limits, stale, or sent twice.
"""

import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ki_edge.errors import BackendError, ObservationError, RobotError
from ki_edge.policy.normalize import NormStats
from ki_runtime.control.loop import ControlLoop
from ki_runtime.control.options import LoopOptions
from ki_runtime.control.recorder import Recorder
from ki_runtime.robots import EpisodeStatus

from .fake_robot import Counting, Line, Steps

AT = 13  # the command before which robots fail
LIMIT = 10  # ticks without a fresh action


class FaultyArm(Line):
    """Two episodes of 40 commands. Fails in the second, before its AT-th command, by `fault(robot)`."""

    def __init__(self, **faults):
        super().__init__()
        self.faults, self.episode = faults, -1
        self.limits = {"action 0": {"position": [0.0, 60.0]}}

    def reset(self, seed=None):
        super().reset(seed)
        self.episode += 1

    def _now(self, method):
        return self.faults.get(method) if self.episode == 1 and self.steps >= AT else None

    def observe(self):
        fault = self._now("observe")
        return super().observe() if fault is None else fault(super().observe())

    def act(self, action):
        if (fault := self._now("act")) is not None:
            fault(action)
        super().act(action)

    def measure(self):
        return np.full(1, self.steps, np.float64)

    def timestamps(self):
        return {"state": time.monotonic() - (2.0 if self._now("stale") else 0.0)}

    def status(self):
        return EpisodeStatus(self.steps >= self.limit, None, self.steps)


class FaultyPolicy(Counting):
    """Its inference number `number` of a run is `fault(policy)` instead of a chunk."""

    def __init__(self, number=0, fault=None):
        super().__init__()
        self.number, self.fault = number, fault
        self.stats = {"state": NormStats(q01=np.zeros(1), q99=np.ones(1))}

    def infer(self, observation, **given):
        result = super().infer(observation, **given)
        if self.fault is not None and len(self.asked) >= self.number:
            return self.fault(self, observation, result)
        return result


@dataclass
class Fault:
    """A fault: what it is in words, and how it is brought about."""

    words: str
    robot: dict = field(default_factory=dict)
    policy: Callable | None = None
    number: int = 14  # the fourth inference of the second episode
    delay: int | None = 2
    ends: type[Exception] | None = None
    recorder: Callable | None = None


def raising(error):
    def fail(*_):
        raise error

    return fail


def slow(policy, observation, result):
    """From now on ten times as slow: 20 ticks."""
    policy.loop._parts.inference._delay = 20
    return result


def jump(policy, observation, result):
    """The loop's clock jumps forward by a thousand seconds during one inference."""
    if len(policy.asked) == policy.number:
        clock = policy.loop._parts.clock
        clock.wait_until(clock.now() + 1000.0)
    return result


def beyond(policy, observation, result):
    return {"actions": np.full_like(result["actions"], 1e6)}


def not_a_number(policy, observation, result):
    result["actions"][3] = math.nan
    return result


def without_camera(observation):
    return {**observation, "images": {}}


def needs_its_camera(policy, observation, result):
    if not observation["images"]:
        raise ObservationError("camera cam is missing")
    return result


def same_picture(observation):
    return {**observation, "images": {"cam": np.zeros((2, 2, 3), np.uint8)}}


class FullDisk(Recorder):
    """The disk is full in the second episode."""

    def stepped(self, step):
        if self._index == 1 and step.tick >= AT:
            raise OSError(28, "No space left on device")
        super().stepped(step)


FAULTS = {
    "slow": Fault("policy ten times slower", policy=slow, ends=RobotError),
    "raises": Fault("policy raises", policy=raising(BackendError("the engine failed")), ends=BackendError),
    "nan": Fault("policy gives NaN", policy=not_a_number, ends=BackendError),
    "beyond": Fault("policy gives 1e6, the limit is 60", policy=beyond, ends=RobotError),
    "dead": Fault("the thread that infers dies", policy=raising(SystemExit(1)), delay=None, ends=SystemExit),
    "frozen": Fault("camera frozen", robot={"observe": same_picture}, ends=RobotError),
    "gone": Fault(
        "camera gone", robot={"observe": without_camera}, policy=needs_its_camera, number=1, ends=ObservationError
    ),
    "stale": Fault("state 2 s old", robot={"stale": True}, ends=RobotError),
    "observe": Fault("robot raises in observe", robot={"observe": raising(RobotError("bus lost"))}, ends=RobotError),
    "act": Fault("robot raises in act", robot={"act": raising(RobotError("motor lost"))}, ends=RobotError),
    "clock": Fault("clock jumps by 1000 s", policy=jump),
    "disk": Fault("disk full while recording", recorder=FullDisk, ends=OSError),
}


@dataclass
class Outcome:
    """What came of a fault. `steps` of the second episode; `error` that came out."""

    robot: FaultyArm
    steps: list
    error: BaseException | None
    report: object


def run(fault: Fault, folder: Path) -> Outcome:
    """Two episodes, the second with the fault."""
    robot, steps = FaultyArm(**fault.robot), Steps()
    policy = FaultyPolicy(fault.number, fault.policy)
    options = LoopOptions(episodes=2, mode="async", delay=fault.delay, starve_limit=LIMIT, trip_after=5)
    recorder = (fault.recorder or Recorder)(folder, films=0)
    loop = policy.loop = ControlLoop(policy, robot, options, [steps, recorder], say=lambda _: None)
    error = None
    try:
        loop.run()
    except (Exception, SystemExit) as caught:
        error = caught
    starts = [at for at, step in enumerate(steps.steps) if step.index == 0 and step.chunk == 0]
    return Outcome(robot, steps.steps[starts[1] :], error, loop.report())


def trace(outcome: Outcome) -> str:
    """The second episode in words: rows of chunks, holds, the end."""
    parts = []
    for chunk, group in itertools.groupby(outcome.steps, key=lambda step: (step.chunk, bool(step.guards))):
        rows = list(group)
        if chunk[0] is None:
            parts.append(f"{len(rows)} held")
            continue
        some = f"{rows[0].index}-{rows[-1].index}" if len(rows) > 1 else f"{rows[0].index}"
        parts.append(f"{'**clamped** ' if chunk[1] else ''}c{chunk[0]}[{some}]")
    return ", ".join([*parts, *outcome.robot.ended])


def table(folder: Path) -> str:
    """Markdown: a row a fault."""
    lines = ["| fault, from command 13 or inference 4 on | commands of that episode | ends with |", "|---|---|---|"]
    for name, fault in FAULTS.items():
        outcome = run(fault, folder / name)
        error = outcome.error
        says = "the episode's end" if error is None else f"{type(error).__name__}: {error}"
        lines.append(f"| {fault.words} | {trace(outcome)} | {says} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        sys.stdout.write(table(Path(place)) + "\n")
