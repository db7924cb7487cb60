"""Worker processes that make batches ahead of the training, through torch's DataLoader.

They are started from a fork server, which has no threads: a fork of the training's own process would copy locks that
its threads hold. A worker ends when the process that started it is gone, even if that was killed, and leaves signals
that reach the whole job (Ctrl-C, SIGTERM) to it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ki_edge.errors import DatasetError, KiEdgeError
from ki_edge.train.step.batch import Batch

from .assembly import Assembler

MOST_WORKERS = 16  # that are started unasked
AHEAD = 2  # batches that each worker makes in advance
Item = tuple[Any, ...]  # ("step", step, first row, last row) or ("held", ((source, number), ...))


@dataclass(frozen=True)
class Failure:
    """An error on purpose, on its way from a worker to the user."""

    error: type[KiEdgeError]
    message: str


class Pace:
    """How fast batches are made: rows for each second that a worker was busy with them, over the last batches."""

    def __init__(self, workers: int) -> None:
        self._workers, self._made = max(1, workers), deque[tuple[int, float]](maxlen=50)

    def add(self, rows: int, seconds: float) -> None:
        """A batch was made."""
        self._made.append((rows, seconds))

    @property
    def samples_per_s(self) -> float | None:
        """Of all workers together, when none of them waits; None before the first batch."""
        busy = sum(seconds for _, seconds in self._made)
        return self._workers * sum(rows for rows, _ in self._made) / busy if busy else None


class Batches(Dataset[Any]):
    """Batches by what is asked for, each with the seconds that it took."""

    def __init__(self, assembler: Assembler) -> None:
        self._assembler = assembler

    def __getitem__(self, item: Item) -> tuple[Batch, float] | Failure:
        began = time.perf_counter()
        try:
            if item[0] == "held":
                batch = self._assembler.held_out(item[1])
            else:
                batch = self._assembler.batch(*item[1:])
            return batch, time.perf_counter() - began
        except KiEdgeError as error:
            return Failure(type(error), str(error))
        except OSError as error:
            return Failure(DatasetError, f"the data cannot be read: {error}")


class Asked(Sampler[Any]):
    """Items as they are asked for; the DataLoader takes them one by one, so there may be endlessly many."""

    def __init__(self, items: Sequence[Item] | StepItems) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)


@dataclass(frozen=True)
class StepItems:
    """The items of a process from a step on: of each step `accumulate`, each of `size` rows from `offset` on."""

    first: int
    last: int
    offset: int
    size: int
    accumulate: int

    def __iter__(self) -> Iterator[Item]:
        for step in range(self.first, self.last):
            for part in range(self.accumulate):
                begin = self.offset + part * self.size
                yield ("step", step, begin, begin + self.size)


def default_workers() -> int:
    """One for each core that this process may use but one; processes of a run on this machine share the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = os.environ.get("LOCAL_WORLD_SIZE", "1")
    processes = int(told) if told.isdigit() and int(told) else 1
    return max(1, min(MOST_WORKERS, cores // processes - 1))


def load(assembler: Assembler, items: Sequence[Item] | StepItems, workers: int, pace: Pace) -> Iterator[Batch]:
    """The batches of these items, in order. `workers` 0: made here, when they are asked for.

    DatasetError, or whatever else a worker met on purpose, with its own message; DatasetError if a worker was killed.
    Closing the iterator ends the workers.
    """
    if workers == 0:
        batches = Batches(assembler)
        yield from (_checked(batches[item], pace) for item in items)
        return
    loader: DataLoader[Any] = DataLoader(
        Batches(assembler),
        batch_size=None,
        sampler=Asked(items),
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=AHEAD,
        worker_init_fn=_begin,
        multiprocessing_context=_context(),
    )
    running = iter(loader)
    try:
        while True:
            try:
                batch = next(running)
            except StopIteration:
                return
            except (RuntimeError, EOFError, OSError) as error:  # the latter: it was killed while it handed one over
                raise _told(error) from None
            yield _checked(batch, pace)
    finally:
        _end(running)


def _context() -> Any:
    """A fork server that has imported what workers need, or new interpreters where there is none."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.preload"])
    return context


def _begin(number: int) -> None:
    """In a worker, before its first batch."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    sys.excepthook = _quiet
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _quiet(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """In a worker: that nobody takes what it hands over any more is no news."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _end(running: Any) -> None:
    """End the workers of an iterator now, not when it is collected."""
    if (shut := getattr(running, "_shutdown_workers", None)) is not None:
        shut()
    for worker in getattr(running, "_workers", ()):
        with suppress(ValueError):  # closed already
            if worker.is_alive():  # in the midst of something long
                worker.kill()
                worker.join()


def _as_it_is(batch: Any) -> Any:
    return batch


def _checked(made: tuple[Batch, float] | Failure, pace: Pace) -> Batch:
    if isinstance(made, Failure):
        raise made.error(made.message)
    batch, seconds = made
    pace.add(len(batch), seconds)
    return batch


def _told(error: Exception) -> Exception:
    """What became of a worker, in one line; other errors as they are."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, RuntimeError) and ("DataLoader worker" not in text or "Caught" in text):
        return error
    if "Bus error" in text or "shared memory" in text:
        return DatasetError(
            "a worker that prepares batches had no shared memory left (/dev/shm): give the container more, "
            "or --workers 0"
        )
    return DatasetError(
        f"a worker that prepares batches was killed ({text[:160]}): was memory short? Fewer --workers need less"
    )
