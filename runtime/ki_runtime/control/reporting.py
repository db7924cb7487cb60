"""Tells watchers what happens in a loop: at once, or from a thread of its own, so that none of them slows a tick."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.policy.contract import PolicyContract
from ki_runtime.robots.base import Robot

from .schedule import F32
from .self_check import Checked
from .telemetry import Episode

MOST = 500  # events that wait for slow watchers; those after them are dropped and counted
MOST_BYTES = 256 << 20  # of pictures that wait with them
PATIENCE = 60.0  # seconds for what waits when a run is over


@dataclass(frozen=True, eq=False)
class Step:
    """A command that was sent: `action` f32 [a], robot units, in tick `tick` of the episode.

    `planned`: what the policy wanted, None while the robot holds; `chunk`, `index`: where that comes from; `age`:
    seconds since its observation; `seam`: the first command of another chunk, or of a hold; `guards`: what the guards
    found; `time`: seconds of the loop's clock since the episode began; `measured`: the state [s] when it was sent, of a
    robot that measures it.
    """

    tick: int
    action: F32
    planned: F32 | None = None
    chunk: int | None = None
    index: int | None = None
    age: float | None = None
    seam: bool = False
    guards: tuple[str, ...] = ()
    time: float = 0.0
    measured: npt.NDArray[np.float64] | None = None


class Watcher:
    """Is told what happens in a loop; every method may be overridden.

    In a paced loop with inference beside it all calls but `films` and `observes` come from a thread of the loop's own,
    in order and some ticks later: nothing that moves may be asked of the robot there.
    """

    def run_started(self, contract: PolicyContract, rate: float) -> None:
        """A run begins, for a policy with this contract, at so many commands a second."""

    def films(self, index: int) -> bool:
        """Whether this watcher wants pictures of the episode, which may cost the robot time."""
        return False

    def observes(self, index: int) -> bool:
        """Whether this watcher wants an observation at every tick of the episode, which costs the robot time."""
        return False

    def episode_started(self, index: int, seed: int, robot: Robot) -> None:
        """The robot was reset."""

    def filmed(self, frame: npt.NDArray[np.uint8]) -> None:
        """A picture RGB u8 [h, w, 3]: after the reset, and after every step."""

    def observed(self, tick: int, observation: Mapping[str, Any]) -> None:
        """The robot was observed before the command of this tick."""

    def inferred(self, step: int, observation: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """A chunk of actions was computed from the observation before this tick."""

    def stepped(self, step: Step) -> None:
        """A command was sent."""

    def checked(self, found: Checked) -> None:
        """The policy's two heads were compared."""

    def episode_ended(self, index: int, episode: Episode) -> None:
        """The episode is over."""

    def close(self) -> None:
        """The run is over, by itself, by an error or by a signal; the robot is closed already."""


class Reporter:
    """Tells all watchers, in order. `threaded`: from a thread; what comes too fast for it is dropped and counted."""

    def __init__(
        self, watchers: Sequence[Watcher], *, threaded: bool, say: Callable[[str], object] = lambda line: None
    ) -> None:
        self._watchers, self._say = watchers, say
        self.dropped = 0
        self._error: BaseException | None = None
        self._events: deque[tuple[Callable[[], object], int]] = deque()
        self._bytes = 0  # of pictures that wait
        self._some = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._work, name="watchers", daemon=True) if threaded else None
        if self._thread is not None:
            self._thread.start()

    def tell(self, event: Callable[[Watcher], None], *, must: bool = False, size: int = 0) -> None:
        """Tell them soon. What one of them raises is raised here, or by the next call.

        `must`: never dropped; `size`: bytes of the pictures that the event keeps.
        """
        self._do(lambda: self._tell_all(event), must, size)

    def say(self, line: str) -> None:
        """A line for the user, whose terminal may not take it at once."""
        self._do(lambda: self._say(line), False, 0)

    def _tell_all(self, event: Callable[[Watcher], None]) -> None:
        for watcher in self._watchers:
            event(watcher)

    def _do(self, event: Callable[[], object], must: bool, size: int) -> None:
        if self._thread is None:
            event()
            return
        self.check()
        with self._some:
            if (len(self._events) >= MOST or (self._bytes + size > MOST_BYTES and self._bytes)) and not must:
                self.dropped += 1
                return
            self._events.append((event, size))
            self._bytes += size
            self._some.notify()

    def check(self) -> None:
        """Raise what a watcher raised."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Tell what still waits."""
        if self._thread is not None:
            with self._some:
                self._over = True
                self._some.notify()
            self._thread.join(PATIENCE)
            self.check()

    def _work(self) -> None:
        while True:
            with self._some:
                while not self._events:
                    if self._over:
                        return
                    self._some.wait()
                event, size = self._events.popleft()
            try:
                event()
            except BaseException as error:
                self._error = self._error or error
            event = None  # type: ignore[assignment]  # what it keeps is free before it is no longer counted
            with self._some:
                self._bytes -= size
