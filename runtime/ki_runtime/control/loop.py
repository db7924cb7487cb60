"""The control loop: infer a chunk, execute the first actions of it, repeat; over episodes with reproducible noise.

Seeds: episode i resets the robot with seed + i, and its n-th inference starts from `episode_noise(seed + i, n, ...)`.
Whoever evaluates the same policy elsewhere (PyTorch, another backend) with the same loop or the same two rules gives it
the same scenes and the same noise.

However a run ends (by itself, by an error, by SIGINT, SIGTERM or SIGHUP), the robot is closed first and once, then
every watcher.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ki_edge import flow
from ki_edge.arguments import MAX_SEED, count
from ki_edge.commands import tell
from ki_edge.errors import ArgumentError, RobotError
from ki_edge.policy.contract import PolicyContract
from ki_runtime.policy.guard import F32, Guard
from ki_runtime.robots.base import EpisodeStatus, Robot
from ki_runtime.robots.replay import ReplayRobot

from .interrupts import Interrupts
from .telemetry import Episode, LatencyLog, RunReport

SLOWEST = 1e-3  # actions a second
MOST = 1 << 31  # episodes, or steps of one


class Actor(Protocol):
    """What the loop needs of a policy: `Policy`, or any other model behind the same call."""

    @property
    def contract(self) -> PolicyContract: ...

    def infer(
        self, observation: Mapping[str, Any], *, noise: npt.ArrayLike | None = None, num_steps: int | None = None
    ) -> Mapping[str, Any]:
        """{"actions": [H, a] in robot units, "timing": milliseconds by stage, if they are known}."""


class Watcher:
    """Is told what happens in a loop; every method may be overridden."""

    def episode_started(self, index: int, seed: int, robot: Robot) -> None:
        """The robot was reset."""

    def inferred(self, step: int, observation: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """A chunk of actions was computed before this step."""

    def stepped(self, step: int, action: F32, robot: Robot) -> None:
        """An action was applied."""

    def episode_ended(self, index: int, episode: Episode) -> None:
        """The episode is over."""

    def close(self) -> None:
        """The run is over, by itself, by an error or by a signal; the robot is closed already."""


@dataclass(frozen=True)
class LoopOptions:
    """How to run. `execute`: actions of a chunk before the next inference; None: the contract's."""

    episodes: int = 1
    seed: int = 0
    execute: int | None = None
    num_steps: int | None = None  # of denoising; None: the bundle's
    prompt: str | None = None  # instead of the robot's own
    max_steps: int | None = None  # of an episode; None: until the robot says that it is over
    max_hz: float | None = None  # actions a second at most; None: as fast as the robot takes them
    close_robot: bool = True  # at the end of `run`; False: the caller goes on with the robot, and closes it

    def __post_init__(self) -> None:
        for name in ("episodes", "execute", "max_steps"):
            value = getattr(self, name)
            if value is not None or name == "episodes":
                count(value, name, MOST)
        if self.num_steps is not None:
            flow.check_steps(self.num_steps)
        count(self.seed, "seed", MAX_SEED - MOST, least=0)
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise ArgumentError(f"prompt: expected text, got {type(self.prompt).__name__}")
        hz = self.max_hz
        if hz is not None and (not isinstance(hz, int | float) or isinstance(hz, bool) or not hz >= SLOWEST):
            raise ArgumentError(f"max_hz {hz!r:.60}: expected a number of at least {SLOWEST}")


def episode_noise(seed: int, index: int, shape: Sequence[int]) -> F32:
    """Noise of the `index`-th inference of the episode with this seed, f32 [*shape], usually [H, A]."""
    return np.random.default_rng([seed, index]).standard_normal(tuple(shape), np.float32)


class ControlLoop:
    """Runs a policy on a robot, blocking: the robot waits during inference.

    `interrupts`: those of the program, if it has some; `say` is told of errors while closing that come after another.
    ArgumentError if `execute` exceeds the policy's horizon, RobotError if the robot does not fit the policy.
    """

    def __init__(
        self,
        policy: Actor,
        robot: Robot,
        options: LoopOptions | None = None,
        watchers: Sequence[Watcher] = (),
        *,
        interrupts: Interrupts | None = None,
        say: Callable[[str], object] = tell,
    ) -> None:
        self._policy, self._robot, self._watchers = policy, robot, list(watchers)
        self._options = options or LoopOptions()
        self._interrupts, self._say = interrupts or Interrupts(), say
        contract = policy.contract
        self._execute = self._options.execute or contract.execute
        if self._execute > contract.action_horizon:
            raise ArgumentError(
                f"execute must be at most {contract.action_horizon}, the actions that the policy gives at once; "
                f"got {self._execute}"
            )
        taken, given = getattr(robot, "action_names", None), contract.action_names
        if taken is not None and given is not None and tuple(taken) != tuple(given):
            raise RobotError(
                f"{robot.name} is commanded by ({', '.join(taken)}), but the policy gives ({', '.join(given)}): "
                "use a policy trained for this robot"
            )
        if hasattr(robot, "fit"):
            robot.fit(contract)
        self._guard = Guard(contract, self._execute)
        self._noise_shape = (contract.action_horizon, contract.model_action_dim)
        self._latencies = LatencyLog()
        self._episodes: list[Episode] = []
        self._due = 0.0  # when the next action may be applied, by time.perf_counter
        self._closed = False

    def watch(self, *watchers: Watcher) -> None:
        """Tell these too what happens, from the next episode on."""
        self._watchers.extend(watchers)

    def run(self) -> RunReport:
        """All episodes, then the robot and the watchers are closed.

        Errors of the policy, the robot or a watcher end the run, as do signals (`Interrupted`, a KeyboardInterrupt);
        `report` keeps the episodes before them. RobotError for a second run after the robot was closed.
        """
        if self._closed:
            raise RobotError("this loop has run and closed its robot: open the robot again, and make a new loop")
        with self._interrupts, self._interrupts.held():
            error: BaseException | None = None
            try:
                for index in range(self._options.episodes):
                    self._run_episode(index, self._options.seed + index)
            except BaseException as stopped:
                error = stopped
                raise
            finally:
                with self._interrupts.finishing():
                    self._close(error)
        return self.report()

    def report(self, *, interrupted: bool = False) -> RunReport:
        """What was measured so far."""
        steps, seconds = (sum(getattr(e, name) for e in self._episodes) for name in ("steps", "seconds"))
        rate = steps / seconds if seconds > 0 else 0.0
        return RunReport(tuple(self._episodes), self._latencies.summary(), rate, interrupted)

    def _close(self, error: BaseException | None) -> None:
        """The robot, then the watchers, each once. The first error comes out, those after it are told."""
        closing: list[Callable[[], None]] = [watcher.close for watcher in self._watchers]
        if self._options.close_robot:
            self._closed = True
            closing.insert(0, self._robot.close)
        first = None
        for close in closing:
            try:
                close()
            except BaseException as failure:
                if error is None and first is None:
                    first = failure
                else:
                    self._say(f"and while closing: {type(failure).__name__}: {' '.join(str(failure).split())}")
        if first is not None:
            raise first

    def _run_episode(self, index: int, seed: int) -> None:
        self._interrupts.check()
        robot = self._robot
        robot.reset(seed)
        for watcher in self._watchers:
            watcher.episode_started(index, seed, robot)
        start = time.perf_counter()
        status = robot.status()
        successes, inferences = [status.success], 0
        while not self._over(status):
            for step, action in enumerate(self._infer(seed, inferences, status.steps), start=status.steps):
                self._act(step, action)
                status = robot.status()
                successes.append(status.success)
                if self._over(status):
                    break
            inferences += 1
        episode = Episode(
            seed=seed,
            steps=status.steps,
            inferences=inferences,
            seconds=time.perf_counter() - start,
            success=status.success,
            success_any=None if status.success is None else any(successes),
            replay_error=_replay_error(robot),
        )
        self._episodes.append(episode)
        for watcher in self._watchers:
            watcher.episode_ended(index, episode)

    def _over(self, status: EpisodeStatus) -> bool:
        limit = self._options.max_steps
        return status.done or (limit is not None and status.steps >= limit)

    def _infer(self, seed: int, index: int, step: int) -> F32:
        """The actions to execute now, f32 [execute, a]; the whole chunk was checked."""
        start = time.perf_counter_ns()
        observation = self._robot.observe()
        if self._options.prompt is not None:
            observation = {**observation, "prompt": self._options.prompt}
        observed = time.perf_counter_ns()
        noise = episode_noise(seed, index, self._noise_shape)
        with self._interrupts.released():
            result = self._policy.infer(observation, noise=noise, num_steps=self._options.num_steps)
        actions = self._guard.admit(result)
        timing = {"observe_ms": (observed - start) / 1e6, **(result.get("timing") or {})}
        self._latencies.add(timing)
        for watcher in self._watchers:
            watcher.inferred(step, observation, {**result, "timing": timing})
        return actions[: self._execute]

    def _act(self, step: int, action: F32) -> None:
        start = time.perf_counter()
        with self._interrupts.released():
            if self._options.max_hz is not None:
                time.sleep(max(0.0, self._due - start))
                start = time.perf_counter()
                self._due = start + 1.0 / self._options.max_hz
        self._robot.act(action)
        self._latencies.add({"act_ms": 1e3 * (time.perf_counter() - start)})
        for watcher in self._watchers:
            watcher.stepped(step, action, self._robot)


def _replay_error(robot: Robot) -> float | None:
    if not isinstance(robot, ReplayRobot):
        return None
    return float(np.nanmean(np.abs(robot.predicted - robot.recorded)))
