"""Time of the loop: clocks, and the ticks of a control rate on one of them."""

from __future__ import annotations

import time
from array import array
from typing import Protocol


class Clock(Protocol):
    """Seconds that only go forwards; no setting of the machine's time moves them."""

    def now(self) -> float:
        """Seconds since some moment."""

    def wait_until(self, when: float) -> None:
        """Return at `when`, at once if it has passed."""


class RealClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()

    def wait_until(self, when: float) -> None:
        pause = when - time.monotonic()
        if pause > 0:
            time.sleep(pause)


class SimulatedClock:
    """Moves only when somebody waits: the same run gives the same times on any machine."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def wait_until(self, when: float) -> None:
        self._now = max(self._now, when)


class Ticker:
    """Ticks of a fixed period. A tick that comes over a period late was missed: it is counted, and not made up for.

    `late`: seconds by which each tick came after its time; `missed`: ticks that never came; `paced` False: ticks come
    as fast as they are asked for.
    """

    def __init__(self, clock: Clock, period: float, *, paced: bool = True) -> None:
        self.clock, self.period, self.paced = clock, period, paced
        self.late = array("f")
        self.missed = self.ticks = 0
        self._due = clock.now()

    def restart(self) -> None:
        """After a wait that nobody paced: the next tick is now, if its time has passed, and none was missed."""
        self._due = max(self._due, self.clock.now())

    def wait(self) -> None:
        """Return at the next tick."""
        self.ticks += 1
        if not self.paced:
            return
        self.clock.wait_until(self._due)
        late = self.clock.now() - self._due
        skipped = int(late / self.period)
        self.missed += skipped
        self.late.append(late - skipped * self.period)
        self._due += (1 + skipped) * self.period
