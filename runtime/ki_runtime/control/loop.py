"""The control loop: a policy drives a robot at a rate, over episodes with reproducible noise.

Seeds: episode i resets the robot with seed + i, and its n-th inference starts from `episode_noise(seed + i, n, ...)`.
Whoever evaluates the same policy elsewhere (PyTorch, another backend) with the same loop or the same two rules gives it
the same scenes and the same noise.

However a run ends (by itself, by an error, by SIGINT, SIGTERM or SIGHUP, by the kill switch), the robot is stopped and
closed first and once, then every watcher.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ki_edge.commands import tell
from ki_edge.errors import ArgumentError, RobotError
from ki_edge.policy.contract import PolicyContract
from ki_runtime.policy.guard import Guard
from ki_runtime.robots.base import Robot
from ki_runtime.robots.replay import ReplayRobot

from .clock import Clock, RealClock, SimulatedClock, Ticker
from .cycle import Counts, Cycle
from .delay import DelayPredictor
from .guards import Guards
from .inference import Inference, LockStep, Request, Worker
from .interrupts import Interrupts
from .killswitch import KillSwitch
from .limits import Limits
from .options import LoopOptions, control_rate
from .parts import Parts, Stops, TimeUp, state_scale
from .reporting import Reporter, Watcher
from .schedule import F32, Schedule
from .seams import SeamLog
from .telemetry import Episode, LatencyLog, RunReport, percentiles
from .watchdog import Watchdog

STARVED = 2.0  # seconds without a fresh action until the robot is stopped
OLDEST = 1.0  # seconds since its observation after which a chunk is not begun, or twice the chunk's own time
SWITCH = 5e-4  # seconds until Python lets another thread on: the control thread must not wait for the others


class Actor(Protocol):
    """What the loop needs of a policy: `Policy`, or any other model behind the same call.

    One for mode rtc has `rtc` ("guided" or "trained"), `max_delay`, and takes `previous`.
    """

    @property
    def contract(self) -> PolicyContract: ...

    def infer(
        self, observation: Mapping[str, Any], *, noise: npt.ArrayLike | None = None, num_steps: int | None = None
    ) -> Mapping[str, Any]:
        """{"actions": [H, a] in robot units, "timing": milliseconds by stage, if they are known}."""


def episode_noise(seed: int, index: int, shape: Sequence[int]) -> F32:
    """Noise of the `index`-th inference of the episode with this seed, f32 [*shape], usually [H, A]."""
    return np.random.default_rng([seed, index]).standard_normal(tuple(shape), np.float32)


class ControlLoop:
    """Runs a policy on a robot.

    `interrupts`: those of the program, if it has some; `latency_ms`: of an inference, as it was measured before the
    robot moves; `say` is told of errors while closing that come after another. ArgumentError for options that the
    policy cannot follow, RobotError if the robot does not fit the policy.
    """

    def __init__(
        self,
        policy: Actor,
        robot: Robot,
        options: LoopOptions | None = None,
        watchers: Sequence[Watcher] = (),
        *,
        interrupts: Interrupts | None = None,
        latency_ms: float = 0.0,
        say: Callable[[str], object] = tell,
    ) -> None:
        self._policy, self._robot, self._watchers = policy, robot, list(watchers)
        self._options = options or LoopOptions()
        self._interrupts, self._say = interrupts or Interrupts(), say
        contract = policy.contract
        _check_actions(robot, contract)
        if hasattr(robot, "fit"):
            robot.fit(contract)
        self._rate = control_rate(self._options, contract, robot)
        self._paced = _paced(self._options, robot)
        self._execute = _execute(self._options, contract)
        self._guess = _delay(self._options, contract, latency_ms, self._rate)
        self._way = _way(self._options, policy, self._guess)
        self.limits = _limits(self._options, policy, robot)
        self._guards = Guards(self.limits, trip_after=self._options.trip_after, check=getattr(robot, "check", None))
        self._switch = KillSwitch(self._options.stop_file, keys=self._options.stop_keys)
        self._latencies, self._episodes = LatencyLog(), list[Episode]()
        self._parts: Parts | None = None
        self._epoch = 0
        self._closed = self._cut = False

    def watch(self, *watchers: Watcher) -> None:
        """Tell these too what happens, from the next run on."""
        self._watchers.extend(watchers)

    def run(self) -> RunReport:
        """All episodes, then the robot is stopped and closed, and the watchers are.

        Errors of the policy, the robot, the guards or a watcher end the run, as do signals and the kill switch
        (`Interrupted`, a KeyboardInterrupt); `report` keeps the episodes before them. RobotError for a second run after
        the robot was closed.
        """
        if self._closed:
            raise RobotError("this loop has run and closed its robot: open the robot again, and make a new loop")
        with self._interrupts, self._interrupts.held():
            error: BaseException | None = None
            try:
                self._parts = self._assemble()
                with _undisturbed(self._parts.beside):
                    for index in range(self._options.episodes):
                        self._run_episode(self._parts, index, self._options.seed + index)
            except TimeUp:
                self._cut = True
            except BaseException as stopped:
                error = stopped
                raise
            finally:
                with self._interrupts.finishing():
                    self._close(error)
        return self.report()

    def report(self, *, interrupted: bool = False) -> RunReport:
        """What was measured so far."""
        parts, options = self._parts, self._options
        ticks = 0 if parts is None else parts.ticker.ticks
        seconds = sum(episode.seconds for episode in self._episodes)
        steps = sum(episode.steps for episode in self._episodes)
        late = [] if parts is None else parts.ticker.late
        jitter = percentiles([1e3 * value for value in late], 50, 99, 100)
        rate = {
            "asked_hz": self._rate if self._paced else None,
            "achieved_hz": steps / seconds if seconds > 0 else 0.0,
            "ticks": ticks,
            "missed": 0 if parts is None else parts.ticker.missed,
            "starved": 0 if parts is None else parts.starved,
            "late_chunks": 0 if parts is None else parts.late,
            "jitter_ms": None if options.delay is not None else jitter,
        }
        delays = DelayPredictor(0) if parts is None else parts.delays
        refused = {} if parts is None else parts.watchdog.refused
        backend = getattr(getattr(self._policy, "sampler", None), "backend", None)
        return RunReport(
            tuple(self._episodes),
            self._latencies.summary(),
            mode=options.mode if options.mode != "rtc" else f"rtc {self._way}",
            rate=rate,
            seams=(SeamLog(()) if parts is None else parts.seams).summary(),
            delay={name: percentiles(getattr(delays, name), 50, 95) for name in ("predicted", "real")},
            guards={**self._guards.counts, **refused, "tripped": self._guards.tripped},
            dropped=0 if parts is None else parts.reporter.dropped,
            backend=getattr(backend, "name", None),
            interrupted=interrupted or self._cut,
        )

    def _assemble(self) -> Parts:
        """A fresh clock, schedule and inference for a run."""
        options, contract, robot = self._options, self._policy.contract, self._robot
        shape = (contract.action_horizon, contract.model_action_dim)
        beside = options.mode != "sync" and options.delay is None
        clock: Clock = RealClock() if options.delay is None else SimulatedClock()
        inference: Inference = Worker(self._infer) if beside else LockStep(self._infer, options.delay or 0)
        limit = self._execute if options.mode == "sync" else contract.action_horizon
        starved = options.starve_limit or max(1, math.ceil(STARVED * self._rate))
        scale = state_scale(getattr(self._policy, "stats", None), contract.state_dim)
        gripper = self.limits.gripper
        return Parts(
            robot=robot,
            contract=contract,
            options=options,
            clock=clock,
            ticker=Ticker(clock, 1.0 / self._rate, paced=self._paced or options.delay is not None),
            schedule=Schedule(limit, options.crossfade),
            delays=DelayPredictor(self._guess),
            inference=inference,
            guard=Guard(contract, limit),
            guards=self._guards,
            watchdog=Watchdog(options.stale_after, scale),
            seams=SeamLog([not apart for apart in gripper]),
            latencies=self._latencies,
            reporter=Reporter(self._watchers, threaded=beside),
            interrupts=self._interrupts,
            stops=Stops(self._switch, options.max_seconds),
            say=self._say,
            way=self._way,
            noise=lambda seed, index: episode_noise(seed, index, shape),
            execute=self._execute,
            beside=beside,
            starve_limit=starved,
            oldest=max(OLDEST, 2.0 * contract.action_horizon / self._rate),
        )

    def _infer(self, request: Request) -> Mapping[str, Any]:
        previous: dict[str, Any] = {} if request.previous is None else {"previous": request.previous}
        steps = self._options.num_steps
        return self._policy.infer(request.observation, noise=request.noise, num_steps=steps, **previous)

    def _run_episode(self, parts: Parts, index: int, seed: int) -> None:
        self._interrupts.check()
        robot = self._robot
        robot.reset(seed)
        parts.reporter.tell(lambda watcher: watcher.episode_started(index, seed, robot), must=True)
        parts.filmers = tuple(watcher for watcher in self._watchers if watcher.films(index))
        parts.film()
        start, self._epoch = parts.clock.now(), self._epoch + 1
        counts = Cycle(parts, self._epoch, seed).run()
        episode = _episode(seed, robot, counts, parts.clock.now() - start)
        self._episodes.append(episode)
        parts.reporter.tell(lambda watcher: watcher.episode_ended(index, episode), must=True)

    def _close(self, error: BaseException | None) -> None:
        """The robot, then the watchers, each once. The first error comes out, those after it are told."""
        closing: list[Callable[[], None]] = []
        if hasattr(self._robot, "safe_stop"):
            closing.append(self._robot.safe_stop)
        if self._options.close_robot:
            self._closed = True
            closing.append(self._robot.close)
        closing.append(self._switch.close)
        if self._parts is not None:
            closing += [self._parts.inference.close, self._parts.reporter.close]
        closing += [watcher.close for watcher in self._watchers]
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


def _episode(seed: int, robot: Robot, counts: Counts, seconds: float) -> Episode:
    known = None not in counts.successes
    return Episode(
        seed=seed,
        steps=robot.status().steps,
        inferences=counts.inferences,
        seconds=seconds,
        success=counts.successes[-1],
        success_any=any(counts.successes) if known else None,
        replay_error=_replay_error(robot),
    )


def _replay_error(robot: Robot) -> float | None:
    if not isinstance(robot, ReplayRobot):
        return None
    return float(np.nanmean(np.abs(robot.predicted - robot.recorded)))


def _check_actions(robot: Robot, contract: PolicyContract) -> None:
    taken, given = getattr(robot, "action_names", None), contract.action_names
    if taken is not None and given is not None and tuple(taken) != tuple(given):
        raise RobotError(
            f"{robot.name} is commanded by ({', '.join(taken)}), but the policy gives ({', '.join(given)}): "
            "use a policy trained for this robot"
        )


def _paced(options: LoopOptions, robot: Robot) -> bool:
    """Whether the loop keeps to a rate. A robot whose time does not pass by itself needs none."""
    real = getattr(robot, "real_time", True)
    if not real and options.mode != "sync" and options.delay is None:
        raise ArgumentError(f"mode {options.mode}: no time passes for {robot.name} by itself: give a delay (--delay N)")
    return options.paced and real


def _execute(options: LoopOptions, contract: PolicyContract) -> int:
    execute = options.execute or contract.execute
    if execute > contract.action_horizon:
        raise ArgumentError(
            f"execute must be at most {contract.action_horizon}, the actions that the policy gives at once; "
            f"got {execute}"
        )
    return execute


def _delay(options: LoopOptions, contract: PolicyContract, latency_ms: float, rate: float) -> int:
    """Actions that an inference takes, as far as is known before the first one."""
    horizon = contract.action_horizon
    if options.delay is not None:
        if options.mode != "sync" and 2 * options.delay > horizon:
            raise ArgumentError(
                f"delay {options.delay}: the policy gives {horizon} actions at once, of which {options.delay} pass "
                f"during an inference and {options.delay} more during the next; at most {horizon // 2} can be "
                f"bridged: use mode sync, or a policy with a longer horizon"
            )
        return options.delay
    guess = math.ceil(1e-3 * latency_ms * rate)
    if options.mode != "sync" and guess >= horizon:
        raise ArgumentError(
            f"an inference takes {latency_ms:.0f} ms, {guess} actions at {rate:g} a second, but the policy gives only "
            f"{horizon} at once: use mode sync, fewer denoising steps, a lower rate or a faster backend"
        )
    return guess


def _way(options: LoopOptions, policy: Actor, delay: int) -> Any:
    if options.mode != "rtc":
        return "plain"
    way, most = getattr(policy, "rtc", None), getattr(policy, "max_delay", None)
    if way is None:
        raise ArgumentError(
            "this bundle was exported without real-time chunking: export it again with --rtc, or use mode async"
        )
    if most is not None and options.delay is not None and delay > most:
        raise ArgumentError(
            f"delay {delay}: this policy was trained for delays of at most {most} actions: use mode async"
        )
    return way


def _limits(options: LoopOptions, policy: Actor, robot: Robot) -> Limits:
    names = policy.contract.action_names or [f"action {i}" for i in range(policy.contract.action_dim)]
    return Limits.none(names)


@contextmanager
def _undisturbed(beside: bool) -> Iterator[None]:
    """Real time: garbage is collected before, not in between, and threads give way to each other sooner."""
    if not beside:
        yield
        return
    interval, collecting = sys.getswitchinterval(), gc.isenabled()
    gc.collect()
    gc.disable()
    sys.setswitchinterval(SWITCH)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        if collecting:
            gc.enable()
