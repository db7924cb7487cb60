"""Requests that wait for the model: one of each client, its newest; the client that waits longest is the next."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from .request import Outcome, Request

TICK, LOOK = 0.001, 0.25  # seconds after the end of a wait, and between two looks at most: a newer one may end sooner


class WaitingRoom:
    """At most `most` requests, and none of them for longer than `longest` seconds. Of the event loop alone."""

    def __init__(self, most: int, longest: float) -> None:
        self._most, self._longest = most, longest
        self._requests: dict[object, Request] = {}  # by client, in the order in which they are served
        self._changed = asyncio.Event()
        self._closed: Outcome | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._requests)

    def put(self, client: object, request: Request) -> None:
        """Let it wait. A newer one takes the place of its client's older one; where there is no room it is refused."""
        if self._closed is not None:
            request.settle(self._closed)
        elif client in self._requests:
            older, self._requests[client] = self._requests[client], request
            older.settle(Outcome("replaced", line="a newer observation of this client took its place"))
        elif len(self._requests) >= self._most:
            line = f"{len(self._requests)} requests wait already, and no more may (--max-waiting): ask again later"
            request.settle(Outcome("busy", line=line))
        else:
            self._requests[client] = request
            self._changed.set()
        self._watch_time()

    def drop(self, client: object) -> None:
        """Its client left."""
        request = self._requests.pop(client, None)
        if request is not None:
            request.settle(Outcome("gone", line="its client left"))

    async def take(self, share: Callable[[int], int]) -> list[Request]:
        """The next ones, at least one, that may run in one batch; none once it is closed.

        `share`: how many at most, of so many that wait; asked when there are some, which may be after a reload.
        """
        while True:
            self._refuse_late()
            if self._requests:
                return self._next(share(len(self._requests)))
            if self._closed is not None:
                return []
            self._changed.clear()
            await self._changed.wait()

    def close(self, outcome: Outcome) -> None:
        """Whoever waits, and whoever comes, gets this."""
        self._closed = outcome
        for request in self._requests.values():
            request.settle(outcome)
        self._requests.clear()
        self._changed.set()

    def _next(self, largest: int) -> list[Request]:
        first = next(iter(self._requests))
        group = _group(self._requests[first])
        chosen = [first]
        if group is not None:
            others = (client for client, request in self._requests.items() if _group(request) == group)
            chosen = [client for client, _ in zip(others, range(largest), strict=False)]
        return [self._requests.pop(client) for client in chosen]

    def _watch_time(self) -> None:
        """While the model runs nobody takes: who waits too long is told nevertheless."""
        if self._timer is None and self._requests:
            soonest = min(_end(request, self._longest) for request in self._requests.values())
            self._timer = asyncio.get_running_loop().call_later(
                min(max(0.0, soonest - time.monotonic()) + TICK, LOOK), self._refuse_in_time
            )

    def _refuse_in_time(self) -> None:
        self._timer = None
        self._refuse_late()
        self._watch_time()

    def _refuse_late(self) -> None:
        now = time.monotonic()
        for client in list(_late(self._requests.items(), now, self._longest)):
            waited = now - self._requests[client].began
            line = f"it waited {waited:.1f} s, and its answer would be of no use any more"
            self._requests.pop(client).settle(Outcome("late", line=line))


def _group(request: Request) -> object:
    return None if request.asked is None else request.asked.question.group


def _late(requests: Iterable[tuple[object, Request]], now: float, longest: float) -> Iterable[object]:
    for client, request in requests:
        if now > _end(request, longest):
            yield client


def _end(request: Request, longest: float) -> float:
    """Until when it may wait."""
    patience = None if request.asked is None else request.asked.patience
    return request.began + (longest if patience is None else min(longest, patience))
