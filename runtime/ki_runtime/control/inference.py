"""Inference beside the control thread, in one worker thread, or in lock-step with the ticks.

An answer carries what was asked. What an earlier episode asked is dropped when it arrives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ki_edge.errors import BackendError
from ki_edge.policy.chunking import PreviousChunk

PATIENCE = 5.0  # seconds for an inference that still runs when a robot is left


@dataclass(frozen=True, eq=False)
class Request:
    """What an inference starts from. `tick`: the one for which row 0 of its chunk is; `step`: the same in steps."""

    epoch: int
    number: int
    tick: int
    step: int
    observation: Mapping[str, Any]
    observed: float
    noise: npt.NDArray[np.float32]
    previous: PreviousChunk | None
    delay: int  # predicted
    first: bool  # of an episode: the robot waits for it


@dataclass(frozen=True, eq=False)
class Answer:
    """A result, or the error that came instead of it."""

    request: Request
    result: Mapping[str, Any] | None
    error: BaseException | None = None


Infer = Callable[[Request], Mapping[str, Any]]
Spare = Callable[[Request, Mapping[str, Any], Callable[[], bool]], None]  # the last: whether an inference is wanted


def nothing(request: Request, result: Mapping[str, Any], wanted: Callable[[], bool]) -> None:
    """What is done in spare time, if nothing is."""


class Inference(Protocol):
    """At most one inference at a time."""

    @property
    def busy(self) -> bool:
        """Whether one runs, or has an answer that nobody took."""

    def submit(self, request: Request) -> None:
        """Start one; not while busy."""

    def wait(self, seconds: float) -> bool:
        """Whether an answer comes within so many seconds, or none will come any more."""

    def poll(self, tick: int, epoch: int) -> Answer | None:
        """The answer that is there at this tick. Those of other epochs are dropped."""

    def close(self) -> None:
        """Wait for what runs, for a while."""


class LockStep:
    """Every inference takes exactly `delay` ticks, whatever the machine does; its errors come out of `submit`.

    With a delay of 0 the robot waits for each of them.
    """

    def __init__(self, infer: Infer, delay: int, spare: Spare = nothing) -> None:
        self._infer, self._delay, self._spare = infer, delay, spare
        self._answer: Answer | None = None

    @property
    def busy(self) -> bool:
        return self._answer is not None

    def submit(self, request: Request) -> None:
        try:
            self._answer = Answer(request, result := self._infer(request))
            self._spare(request, result, lambda: False)
        except Exception as error:
            self._answer = Answer(request, None, error)

    def wait(self, seconds: float) -> bool:
        return True

    def poll(self, tick: int, epoch: int) -> Answer | None:
        answer = self._answer
        if answer is not None and answer.request.epoch != epoch:
            answer = self._answer = None
        if answer is None or tick < answer.request.tick + self._delay:
            return None
        self._answer = None
        return answer

    def close(self) -> None:
        """Nothing runs."""


class Worker:
    """One thread. `close` leaves an inference that does not end behind, and the thread with it.

    `spare`: called in it after an answer, while no inference is wanted; an error of it is that of the next inference.
    """

    def __init__(self, infer: Infer, spare: Spare = nothing) -> None:
        self._infer, self._spare = infer, spare
        self._requests: SimpleQueue[Request | None] = SimpleQueue()
        self._answers: SimpleQueue[Answer] = SimpleQueue()
        self._asked: Request | None = None
        self._answer: Answer | None = None  # that `wait` took
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._asked is not None

    def submit(self, request: Request) -> None:
        self._asked = request
        self._requests.put(request)

    def wait(self, seconds: float) -> bool:
        if self._answer is None:
            try:
                self._answer = self._answers.get(timeout=seconds)
            except Empty:
                return not self._thread.is_alive()
        return True

    def poll(self, tick: int, epoch: int) -> Answer | None:
        if self._asked is None:
            return None
        answer, self._answer = self._answer, None
        if answer is not None:
            pass
        elif self._answers.empty():
            if self._thread.is_alive():
                return None
            dead = BackendError("the thread that infers is dead: no chunk will come any more")
            answer = Answer(self._asked, None, dead)
        else:
            answer = self._answers.get()
        self._asked = None
        return answer if answer.request.epoch == epoch else None

    def close(self) -> None:
        self._requests.put(None)
        self._thread.join(PATIENCE)

    def _work(self) -> None:
        failed: BaseException | None = None
        while (request := self._requests.get()) is not None:
            try:
                if failed is not None:
                    raise failed
                result = self._infer(request)
            except BaseException as error:  # of any kind: the control thread decides
                self._answers.put(Answer(request, None, error))
                continue
            self._answers.put(Answer(request, result))
            try:
                self._spare(request, result, lambda: not self._requests.empty())
            except BaseException as error:
                failed = error
