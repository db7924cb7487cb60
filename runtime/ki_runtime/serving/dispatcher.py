"""Takes what waits to the engine, batch after batch, and lets another engine take over between two of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np

from ki_edge.errors import BackendError, DeviceError
from ki_runtime.policy.guard import finite_actions

from .engine import Answer, Engine
from .request import ENDING, Outcome, Request, failed
from .waiting import WaitingRoom


class Dispatcher:
    """`lost`: told once if the engine's device is lost, for good."""

    def __init__(
        self, engine: Engine, room: WaitingRoom, *, debug: bool, lost: Callable[[BackendError], object]
    ) -> None:
        self.engine = engine
        self._room, self._debug, self._lost = room, debug, lost
        self.running = self._busy = 0  # requests, tasks
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """One task for each batch that the engine computes at once."""
        for _ in range(getattr(self.engine, "at_once", 1)):
            task = asyncio.create_task(self._work())
            task.add_done_callback(self._over)
            self._tasks.append(task)

    def _over(self, task: asyncio.Task[None]) -> None:
        """Nobody would be answered any more after an error of our own."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._lost(BackendError(f"the server's queue failed: {type(error).__name__}: {error}"))

    async def finish(self) -> None:
        """The room is closed: wait for what runs."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _work(self) -> None:
        while requests := await self._room.take(self._share):
            self.running += len(requests)
            self._busy += 1
            try:
                await self._run(requests)
            finally:
                self.running -= len(requests)
                self._busy -= 1
                del requests  # their pictures, while there is nothing to do

    def _share(self, waiting: int) -> int:
        """The largest batch of one task: what waits is for all of those that have none."""
        free = len(self._tasks) - self._busy
        return min(self.engine.largest_batch, -(-waiting // free))

    async def _run(self, requests: list[Request]) -> None:
        engine, started = self.engine, time.monotonic()
        for request in requests:
            request.started = started
        try:
            answers = list(await engine.answer([request.asked.question for request in requests if request.asked]))
            if len(answers) != len(requests):
                raise RuntimeError(f"the engine gave {len(answers)} answers to {len(requests)} questions")
            outcomes = [self._outcome(answer, len(requests)) for answer in answers]
        except asyncio.CancelledError:
            for request in requests:
                request.settle(ENDING)
            raise
        except Exception as error:
            outcomes = [self._outcome(error, len(requests))] * len(requests)
        took = 1e3 * (time.monotonic() - started)
        for request, outcome in zip(requests, outcomes, strict=True):
            request.stages["run"] = took
            request.settle(outcome)

    def _outcome(self, answer: Answer | Exception, batch: int) -> Outcome:
        if not isinstance(answer, Exception):
            try:
                actions = answer.get("actions")
                if isinstance(actions, np.ndarray) and actions.dtype.kind == "f":
                    finite_actions(np.atleast_2d(actions), self.engine.contract.action_names)
                return Outcome("answered", answer, batch=int(answer.get("timing", {}).get("batch", batch)))
            except BackendError as error:
                answer = error
            except Exception as error:  # it is no map, or its timing is none
                answer = RuntimeError(f"the engine gave no answer but a {type(answer).__name__} ({error})")
        if isinstance(answer, DeviceError):
            self._lost(answer)
        return failed(answer, debug=self._debug, batch=batch)
