"""SIGINT, SIGTERM and SIGHUP as one exception, raised where a robot can be left: not inside one of its own calls.

A loop holds interrupts while it talks to the robot and lets them through where it computes or waits. The first signal
that comes while they are held is raised at the next such place; a second one at once, for a robot that hangs. While a
run is being finished (robot closed, films written) signals are kept back: the third of those is raised, so that nobody
needs SIGKILL.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
PATIENCE = 3  # signals during the finish until one is obeyed


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop. `signum`: which; the exit status of a command is 128 + signum."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class Stopped(Interrupted):
    """Somebody at the robot asked the run to stop. `reason`: how."""

    def __init__(self, reason: str) -> None:
        super().__init__(signal.SIGINT)
        self.reason = reason
        self.args = (reason,)


class Interrupts:
    """Handlers for the time of a `with` block, which may be entered again inside itself.

    Signals that are ignored (SIGHUP under nohup, SIGINT of background programs) stay ignored, and handlers that the
    program installed itself stay. In a thread other than the main one nothing is installed.
    """

    def __init__(self) -> None:
        self._entered = 0
        self._before: dict[int, Any] = {}
        self._held = self._finishing = False
        self._waiting: int | None = None  # the signal that comes through at the next release
        self._late = 0  # signals during the finish

    def __enter__(self) -> Interrupts:
        self._entered += 1
        if self._entered == 1 and threading.current_thread() is threading.main_thread():
            for signum in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[signum] = signal.signal(signum, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        self._entered -= 1
        if not self._entered:
            while self._before:
                signum, handler = self._before.popitem()
                signal.signal(signum, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the first signal back until `released` or the end of this block, the outermost one if it is nested."""
        held = self._held
        try:
            self._held = True
            yield
        finally:
            self._held = held
        if not held:
            self.check()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Inside `held`: let signals through, those that waited at once."""
        held = self._held
        try:
            self._held = False
            self.check()
            yield
        finally:
            self._held = held

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Keep signals back while a run is being finished."""
        self._finishing, self._waiting, self._late = True, None, 0
        try:
            yield
        finally:
            self._finishing = False

    def check(self) -> None:
        """Interrupted if a signal waits."""
        if self._waiting is not None:
            signum, self._waiting = self._waiting, None
            raise Interrupted(signum)

    def _received(self, signum: int, _: FrameType | None) -> None:
        if self._finishing:
            self._late += 1
            if self._late < PATIENCE:
                _tell(f"{signal.Signals(signum).name}: the robot is being closed and the recording finished first")
                return
        elif self._held and self._waiting is None:
            self._waiting = signum
            return
        raise Interrupted(signum)


def _tell(line: str) -> None:
    """A line on stderr from a signal handler, which may have interrupted a write to sys.stderr."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())
