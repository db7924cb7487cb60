"""What the ticks of a run work with, put together once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.policy.contract import PolicyContract
from ki_runtime.policy.guard import Guard
from ki_runtime.robots.base import Robot

from .clock import Clock, Ticker
from .delay import DelayPredictor
from .guards import Guards
from .inference import Inference, Request
from .interrupts import Interrupts, Stopped
from .killswitch import KillSwitch
from .options import LoopOptions
from .reporting import Reporter, Watcher
from .schedule import F32, Schedule, Way
from .seams import SeamLog
from .self_check import SelfCheck
from .telemetry import LatencyLog
from .watchdog import Watchdog


class TimeUp(Exception):
    """The seconds of a run are over."""


@dataclass
class Stops:
    """What ends a run from outside at a tick, but for signals."""

    switch: KillSwitch
    seconds: float | None
    begun: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """The seconds count from here on."""
        self.begun = time.monotonic()

    def check(self) -> None:
        """Stopped if the kill switch was pulled, TimeUp after the seconds that a run may take."""
        reason = self.switch.pulled()
        if reason is not None:
            raise Stopped(reason)
        if self.seconds is not None and time.monotonic() - self.begun > self.seconds:
            raise TimeUp


@dataclass(eq=False)
class Parts:
    """Everything of a run. Counters that the ticks write stand at the end."""

    robot: Robot
    contract: PolicyContract
    options: LoopOptions
    clock: Clock
    ticker: Ticker
    schedule: Schedule
    delays: DelayPredictor
    inference: Inference
    guard: Guard  # of whole chunks
    guards: Guards  # of single commands
    watchdog: Watchdog
    seams: SeamLog
    latencies: LatencyLog
    reporter: Reporter
    interrupts: Interrupts
    stops: Stops
    way: Callable[[Request], Way]  # how a chunk is joined to the one before it, in mode rtc
    noise: Callable[[int, int], F32]  # (seed of the episode, number of the inference)
    execute: int
    beside: bool  # inference runs in a thread of its own
    goes_on: bool  # a command is a motion that goes on until another is sent
    reads_on: bool  # an observation is read by another thread while the robot moves
    starve_limit: int
    self_check: SelfCheck | None
    oldest: float  # seconds since its observation, after which nothing of a chunk is sent
    filmers: tuple[Watcher, ...] = ()  # watchers that want pictures of the present episode
    observers: bool = False  # whether one wants an observation at every tick of it
    commands: int = 0  # that were sent, and the seconds of the loop's clock that episodes took, also the last one
    seconds: float = 0.0
    starved: int = 0  # ticks without an action
    late: int = 0  # chunks that came too late to be used
    ways: set[Way] = field(default_factory=set)  # in which chunks were joined

    def __post_init__(self) -> None:
        optional = {name: getattr(self.robot, name, None) for name in ("hold", "measure", "timestamps")}
        self.hold: Callable[[], None] | None = optional["hold"]
        self.measure: Callable[[], npt.ArrayLike] | None = optional["measure"]
        self.timestamps: Callable[[], Mapping[str, float]] | None = optional["timestamps"]

    @property
    def waits(self) -> bool:
        """Whether the robot waits for every inference."""
        return self.options.mode == "sync"

    def is_old(self, observed: float | None) -> bool:
        """Whether nothing that was computed from an observation of this time may be sent any more.

        A robot that waits stands still meanwhile: there it is the answer alone that may be too old, not its later rows.
        """
        return observed is not None and not self.waits and self.clock.now() - observed > self.oldest

    def before_next(self, delay: int) -> int:
        """Rows of a chunk that are played before the next is asked for, so that it comes before the last row."""
        return max(0, min(self.execute, self.contract.action_horizon - delay))

    def film(self) -> None:
        """A picture for those who want one."""
        frame: npt.NDArray[np.uint8] | None = self.robot.frame() if self.filmers else None
        if frame is not None:
            picture, filmers = frame.copy() if self.beside else frame, self.filmers  # the robot may draw over it
            size = picture.nbytes
            self.reporter.tell(lambda watcher: watcher.filmed(picture) if watcher in filmers else None, size=size)

    def tell_observed(self, tick: int, observation: Mapping[str, Any]) -> None:
        """An observation for the watchers."""
        self.reporter.tell(lambda watcher: watcher.observed(tick, observation), size=_bytes(observation))


def _bytes(observation: Mapping[str, Any]) -> int:
    """Of the arrays of an observation."""
    parts = observation.values() if isinstance(observation, Mapping) else ()
    return sum(_bytes(part) if isinstance(part, Mapping) else getattr(part, "nbytes", 0) for part in parts)
