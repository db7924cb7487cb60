"""Memory of a device that is short: what earlier calls left there makes room for the present one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from ki_edge.errors import BackendError, DeviceMemoryError

Result = TypeVar("Result")


class Stage(Protocol):
    """A graph with the plans that it keeps: memory, bindings and recordings, each for one shape of input."""

    def drop_oldest(self) -> bool:
        """Let go of the plan that was not used for longest, never of the last one used; False if there is no other."""

    def forget(self) -> None:
        """Let go of all memory."""


@contextmanager
def clean(stage: Stage) -> Iterator[None]:
    """After a failure within, the stage forgets all: NaN that is left would reach later runs through 0 * NaN."""
    try:
        yield
    except DeviceMemoryError:
        raise  # the caller may make room and try again
    except (BackendError, MemoryError):
        stage.forget()
        raise


def within_memory(stages: Callable[[], Sequence[Stage]], run: Callable[[], Result]) -> Result:
    """`run()`, tried again with fewer and fewer plans of earlier calls while the device's memory does not suffice.

    Before the last try everything is let go of, also what lies around in pieces that are too small. DeviceMemoryError
    if that does not help either; nothing is kept then.
    """
    more = True
    while True:
        try:
            return run()
        except DeviceMemoryError:
            if not more:
                for stage in stages():
                    stage.forget()
                raise
            more = any(stage.drop_oldest() for stage in stages())
            for stage in () if more else stages():
                stage.forget()
