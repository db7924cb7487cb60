"""What all commands share: errors as one line on stderr, and their exit status."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from .errors import KiEdgeError, ParityError


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument as one line on stderr, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def run_command(name: str, command: Callable[[], int], interrupted: str = "nothing was published") -> int:
    """Run a command; its exit status is 0, 1 for a ParityError, 2 for any other error, 128 + n if signal n stopped it.

    Standard output that nobody reads any more ends it quietly, as SIGPIPE would.
    """
    try:
        status = command()
        _flush()
        return status
    except KeyboardInterrupt as stop:
        tell(f"{name}: interrupted; {interrupted}")
        return 128 + int(getattr(stop, "signum", signal.SIGINT))
    except (KiEdgeError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _output_is_gone():
            return 128 + signal.SIGPIPE
        tell(f"{name}: error: {' '.join(str(error).split())}")
        return 1 if isinstance(error, ParityError) else 2


def tell(line: str) -> None:
    """A line on stderr, at once; none if stderr is gone."""
    if sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _output_is_gone() -> bool:
    """Whether nobody reads standard output any more; the interpreter then flushes what is left to nowhere."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # no output at all, or one of a test
        return False
    watch = select.poll()
    watch.register(descriptor, select.POLLOUT)
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in watch.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
    return True
