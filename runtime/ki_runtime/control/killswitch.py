"""What stops a run from outside: a file that appears, a key on the terminal."""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from ki_edge.errors import ArgumentError

KEYS = "q "  # the space bar is the largest


class KillSwitch:
    """Asked at every tick. `file`: stops when it exists; `keys`: also q or the space bar, if stdin is a terminal.

    ArgumentError if the file is there already.
    """

    def __init__(self, file: str | Path | None = None, *, keys: bool = False) -> None:
        self._file = None if file is None else os.fspath(file)
        if self._file is not None and os.path.lexists(self._file):
            raise ArgumentError(f"{self._file}, which stops the run, exists already: remove it first")
        self._keys = keys
        self._terminal: Any = None

    def open(self) -> None:
        """Take the keys of the terminal, from here to `close`: whoever fails in between leaves it as it was."""
        if self._keys and self._terminal is None and sys.stdin is not None and sys.stdin.isatty():
            self._read_single_keys()

    def pulled(self) -> str | None:
        """What asks for a stop; None if nothing does. Never waits."""
        if self._file is not None and os.path.lexists(self._file):
            return f"the file {self._file} appeared"
        if self._terminal is not None and select.select([sys.stdin], [], [], 0)[0]:
            pressed = os.read(sys.stdin.fileno(), 1024).decode("ascii", "ignore")  # all: others may wait before it
            key = next((key for key in pressed if key in KEYS), None)
            if key is not None:
                return f"the key {key!r} was pressed"
        return None

    def close(self) -> None:
        """Give the terminal back as it was."""
        if self._terminal is not None:
            import termios

            with suppress(termios.error, OSError, ValueError):
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._terminal)
            self._terminal = None

    def _read_single_keys(self) -> None:
        with suppress(ImportError, OSError):  # Windows; a terminal that cannot
            import termios
            import tty

            self._terminal = termios.tcgetattr(sys.stdin.fileno())
            tty.setcbreak(sys.stdin.fileno())
