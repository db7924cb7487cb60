"""Where a long verification is: a bar on a terminal, a line for each slow stage everywhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

SLOW = 20.0  # seconds; a shorter stage gets no line
Say = Callable[[str], object]


class Progress:
    """`say` gets the lines; the bar goes to stderr, if that is a terminal."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self._bar: tqdm[None] | None = None

    @contextmanager
    def stage(self, what: str, steps: int | None = None) -> Iterator[None]:
        """A stage of `steps` steps, None if nobody counts them."""
        start = time.perf_counter()
        self._bar = tqdm(total=steps, desc=what, leave=False, disable=None, unit="layer")
        try:
            yield
        finally:
            self._bar.close()
            self._bar = None
        seconds = time.perf_counter() - start
        if seconds >= SLOW:
            self.say(f"{what} ({seconds:.1f} s)")

    def step(self, where: str) -> None:
        """One step done; `where` is shown beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(where, refresh=False)
            self._bar.update()
