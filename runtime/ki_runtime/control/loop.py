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
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ki_edge.commands import tell
from ki_edge.errors import ArgumentError, RobotError
from ki_edge.policy.contract import PolicyContract
from ki_runtime.policy.agreement import usual_range
from ki_runtime.policy.guard import Guard
from ki_runtime.robots.base import Robot
from ki_runtime.robots.replay import ReplayRobot

from .clock import Clock, RealClock, SimulatedClock, Ticker
from .cycle import DOUBTED, Counts, Cycle
from .delay import DelayPredictor
from .fit import actions_to_execute, check_actions, control_rate, given_delay, is_paced, most_delay, way_to_join
from .guards import Guards
from .inference import Inference, LockStep, Request, Worker, in_turn
from .interrupts import Interrupts
from .killswitch import KillSwitch
from .limit_sources import limits_for
from .options import LoopOptions
from .parts import Parts, Stops, TimeUp
from .priority import undisturbed
from .reporting import Reporter, Watcher
from .schedule import F32, Schedule, Way
from .seams import SeamLog
from .self_check import SelfCheck
from .telemetry import Episode, LatencyLog, RunReport, percentiles
from .watchdog import Watchdog

STARVED = 2.0  # seconds without a fresh action until the robot is stopped
OLDEST = 1.0  # seconds since its observation after which a chunk is dropped, or twice the chunk's own time


class Actor(Protocol):
    """What the loop needs of a policy: `Policy`, or any other model behind the same call.

    One for mode rtc has `rtc` ("guided" or "trained"), `max_delay`, and takes `previous`. One may have `reset()`,
    called where an episode begins, `when_idle` (`inference.Spare`), called in the thread that infers, and `report`,
    told before each inference what was counted so far: {"deadline_misses": ticks without an action, "guards.RULE": n}.
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

    `interrupts`: those of the program, if it has some; `say` is told of errors while closing that come after another.
    ArgumentError for options that the policy cannot follow, RobotError if the robot does not fit the policy.
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
        check_actions(robot, contract)
        if hasattr(robot, "fit"):
            robot.fit(contract)
        self._rate = control_rate(self._options, contract, robot)
        self._paced = is_paced(self._options, robot)
        self._execute = actions_to_execute(self._options, contract)
        self._guess = given_delay(self._options, contract)
        self._way = way_to_join(self._options, policy)
        self.limits = limits_for(contract, getattr(policy, "stats", None) or {}, robot, self._options.limits)
        trip = self._options.trip_after or max(1, round(self._rate))
        self._guards = Guards(self.limits, trip_after=trip, check=getattr(robot, "check", None))
        self._switch = KillSwitch(self._options.stop_file, keys=self._options.stop_keys)
        every = self._options.self_check
        self.self_check = None if every is None else SelfCheck(policy, every, self._options.self_check_limit)
        self._latencies, self._episodes = LatencyLog(), list[Episode]()
        self._parts: Parts | None = None
        self._epoch = 0
        self._closed = self._cut = False
        self._priority: str | None = None  # of the control thread

    @property
    def robot(self) -> Robot:
        """The robot that is driven."""
        return self._robot

    @property
    def commands(self) -> int:
        """How many were sent so far."""
        return 0 if self._parts is None else self._parts.commands

    def expect(self, latency_ms: float) -> None:
        """How long an inference takes, as was measured when it was warmed up: what delays are predicted from at first.

        ArgumentError if a chunk is too short for it; a word to the user if it is too short to bridge every inference.
        """
        if self._options.mode == "sync" or self._options.delay is not None:
            return
        guess, contract = math.ceil(1e-3 * latency_ms * self._rate), self._policy.contract
        took = (
            f"an inference takes {latency_ms:.0f} ms, {guess} actions at {self._rate:g} a second, and the policy gives "
            f"only {contract.action_horizon} at once"
        )
        remedy = "use mode sync, fewer denoising steps, a lower rate or a faster backend"
        if guess >= contract.action_horizon:
            raise ArgumentError(f"{took}: {remedy}")
        if guess > most_delay(contract):
            self._say(f"{took}: {self._robot.name} will hold now and then; {remedy}")
        self._guess = guess

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
                self._switch.open()
                self._parts = self._assemble()
                contract, rate = self._policy.contract, self._rate
                self._parts.reporter.tell(lambda watcher: watcher.run_started(contract, rate), must=True)
                with undisturbed() if self._parts.beside else nullcontext() as self._priority:
                    self._parts.stops.begin()
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
        commands, seconds = (0, 0.0) if parts is None else (parts.commands, parts.seconds)
        late = [] if parts is None else parts.ticker.late
        jitter = percentiles([1e3 * value for value in late], 50, 99, 100)
        rate = {
            "asked_hz": self._rate if self._paced else None,
            "achieved_hz": commands / seconds if seconds > 0 else 0.0,
            "ticks": ticks,
            "missed": 0 if parts is None else parts.ticker.missed,
            "starved": 0 if parts is None else parts.starved,
            "late_chunks": 0 if parts is None else parts.late,
            "priority": self._priority,
            "jitter_ms": None if options.delay is not None else jitter,
        }
        delays = DelayPredictor(0) if parts is None else parts.delays
        refused = {} if parts is None else parts.watchdog.refused
        backend = getattr(getattr(self._policy, "sampler", None), "backend", None)
        return RunReport(
            tuple(self._episodes),
            self._latencies.summary(),
            mode=self._mode(),
            rate=rate,
            seams=(SeamLog(()) if parts is None else parts.seams).summary(),
            delay={name: percentiles(getattr(delays, name), 50, 95) for name in ("predicted", "real")},
            guards={**self._guards.counts, **refused, "tripped": self._guards.tripped},
            dropped=0 if parts is None else parts.reporter.dropped,
            backend=getattr(backend, "name", None),
            self_check=None if self.self_check is None else self.self_check.summary(seconds),
            interrupted=interrupted or self._cut,
        )

    def _mode(self) -> str:
        """The mode that was really active, with the ways in which chunks were joined."""
        used = () if self._parts is None else sorted(self._parts.ways - {"plain"})
        return " ".join([self._options.mode, *(used if self._options.mode == "rtc" else ())])

    def _assemble(self) -> Parts:
        """A fresh clock, schedule and inference for a run."""
        options, contract, robot = self._options, self._policy.contract, self._robot
        shape = (contract.action_horizon, contract.model_action_dim)
        beside = options.mode != "sync" and options.delay is None
        clock: Clock = RealClock() if options.delay is None else SimulatedClock()
        found = (getattr(part, "when_idle", None) for part in (self.self_check, self._policy))
        idle = [one for one in found if one is not None]
        spare = in_turn(idle)
        inference: Inference = (
            Worker(self._infer, spare) if options.delay is None else LockStep(self._infer, options.delay, spare)
        )
        limit = self._execute if options.mode == "sync" else contract.action_horizon
        starved = options.starve_limit or max(1, math.ceil(STARVED * self._rate))
        scale = usual_range(getattr(self._policy, "stats", None) or {}, "state", contract.state_dim)
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
            reporter=Reporter(self._watchers, threaded=beside, say=self._say),
            interrupts=self._interrupts,
            stops=Stops(self._switch, options.max_seconds),
            way=self._way_of,
            noise=lambda seed, index: episode_noise(seed, index, shape),
            execute=self._execute,
            beside=beside,
            reads_on=beside or bool(idle),
            goes_on=self._goes_on(),
            starve_limit=starved,
            self_check=self.self_check,
            oldest=max(OLDEST, 2.0 * contract.action_horizon / self._rate),
        )

    def _infer(self, request: Request) -> Mapping[str, Any]:
        more: dict[str, Any] = {}
        if (report := getattr(self._policy, "report", None)) is not None and self._parts is not None:
            counts = {f"guards.{rule}": count for rule, count in self._guards.counts.items()}
            report({"deadline_misses": self._parts.starved, **counts})
        if request.previous is not None:
            more = {"previous": request.previous, "way": self._way_of(request)}
        result = self._policy.infer(request.observation, noise=request.noise, num_steps=self._options.num_steps, **more)
        if self.self_check is not None and self.self_check.before_answering(request, result):
            return {**result, DOUBTED: True}
        return result

    def _way_of(self, request: Request) -> Way:
        """A policy is not trained for any delay: beyond, its chunks are guided."""
        most = getattr(self._policy, "max_delay", None)
        return "guided" if most is not None and request.delay > most else self._way

    def _run_episode(self, parts: Parts, index: int, seed: int) -> None:
        self._interrupts.check()
        parts.stops.check()
        if parts.beside:
            gc.collect()  # nobody does it within an episode
        robot = self._robot
        robot.reset(seed)
        if (reset := getattr(self._policy, "reset", None)) is not None:
            reset()
        parts.reporter.tell(lambda watcher: watcher.episode_started(index, seed, robot), must=True)
        parts.filmers = tuple(watcher for watcher in self._watchers if watcher.films(index))
        parts.observers = any(watcher.observes(index) for watcher in self._watchers)
        parts.film()
        start, self._epoch = parts.clock.now(), self._epoch + 1
        try:
            counts = Cycle(parts, self._epoch, seed).run()
        finally:
            parts.seconds += parts.clock.now() - start
        episode = _episode(seed, robot, counts, parts.clock.now() - start)
        self._episodes.append(episode)
        parts.reporter.tell(lambda watcher: watcher.episode_ended(index, episode), must=True)
        if counts.failure is not None:  # the episode was over before the last good chunk was
            raise counts.failure

    def _rest(self) -> None:
        """For a robot without a safe stop of its own: no motion that was commanded goes on, positions stay."""
        if self._goes_on() and (still := self._guards.held()) is not None:
            self._robot.act(still)

    def _goes_on(self) -> bool:
        """Whether a command is a motion that goes on by itself: of no robot whose time only passes with commands."""
        robot = self._robot
        waits = getattr(robot, "simulated", False) or not getattr(robot, "real_time", True)
        return self._guards.moves and not waits

    def _close(self, error: BaseException | None) -> None:
        """The robot, then the watchers, each once. The first error comes out, those after it are told."""
        closing: list[Callable[[], None]] = []
        closing.append(getattr(self._robot, "safe_stop", self._rest))
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
        reached=next((tick for tick, success in enumerate(counts.successes) if success), None),
        replay_error=_replay_error(robot),
    )


def _replay_error(robot: Robot) -> float | None:
    if not isinstance(robot, ReplayRobot):
        return None
    return float(np.nanmean(np.abs(robot.predicted - robot.recorded)))
