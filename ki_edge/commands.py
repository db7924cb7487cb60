"""What all commands share: errors as one line on stderr, and their exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from .errors import KiEdgeError, ParityError

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument as one line on stderr, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def run_command(name: str, command: Callable[[], int], interrupted: str = "nothing was published") -> int:
    """Run a command; its exit status is 0, 1 for a ParityError, 2 for any other error, 130 if it was interrupted."""
    try:
        return command()
    except KeyboardInterrupt:
        tell(f"{name}: interrupted; {interrupted}")
        return INTERRUPTED
    except (KiEdgeError, OSError) as error:
        tell(f"{name}: error: {' '.join(str(error).split())}")
        return 1 if isinstance(error, ParityError) else 2


def tell(line: str) -> None:
    """A line on stderr, at once."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
