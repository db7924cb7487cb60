"""Takes what waits to the engine, batch after batch, and lets another engine take over between two of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ki_edge.errors import DeviceError

from .engine import Answer, Engine
from .request import ENDING, Outcome, Request, failed
from .waiting import WaitingRoom


class Dispatcher:
    """`lost`: told once if the engine's device is lost, for good."""

    def __init__(
        self, engine: Engine, room: WaitingRoom, *, debug: bool, lost: Callable[[DeviceError], object]
    ) -> None:
        self.engine = engine
        self._room, self._debug, self._lost = room, debug, lost
        self.running = self._busy = 0  # requests, tasks
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """One task for each batch that the engine computes at once."""
        for _ in range(getattr(self.engine, "at_once", 1)):
            self._tasks.append(asyncio.create_task(self._work()))

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
        except asyncio.CancelledError:
            for request in requests:
                request.settle(ENDING)
            raise
        except Exception as error:
            answers = [error] * len(requests)
        took = 1e3 * (time.monotonic() - started)
        for request, answer in zip(requests, answers, strict=True):
            request.stages["run"] = took
            request.settle(self._outcome(answer, len(requests)))

    def _outcome(self, answer: Answer | Exception, batch: int) -> Outcome:
        if not isinstance(answer, Exception):
            return Outcome("answered", answer, batch=int(answer.get("timing", {}).get("batch", batch)))
        if isinstance(answer, DeviceError):
            self._lost(answer)
        return failed(answer, debug=self._debug, batch=batch)
