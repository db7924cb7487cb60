"""One connection: its frames come in, and for each of them one frame goes out, in the same order.

A binary frame is an answer, a text frame the line that says why there is none. After an error the connection stays
open: openpi's client raises what the text says and may ask again on the same connection.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from ki_edge.errors import BackendError, KiEdgeError
from ki_runtime.monitoring.events import ClientStatus, Handled
from ki_runtime.remote.packing import unpack

from .question import read_question
from .request import Outcome, Request, failed
from .waiting import WaitingRoom

FRAME_SECONDS = 10.0  # from the first part of a frame to its last
WRITE_SECONDS = 10.0  # for a client to take its answer
UNANSWERED = 8  # frames of one client without an answer; further ones are not read


class Limits(Protocol):
    """Of `ServerOptions`, what concerns one connection."""

    @property
    def most_steps(self) -> int: ...

    @property
    def debug(self) -> bool: ...


class Client:
    """A robot that is connected."""

    def __init__(
        self, connection: Any, room: WaitingRoom, limits: Limits, handled: Callable[[Handled], object]
    ) -> None:
        self._connection, self._room, self._limits, self._handled = connection, room, limits, handled
        self.address = address_of(connection)
        self.since = time.monotonic()
        self._answers: asyncio.Queue[Request | None] = asyncio.Queue()
        self._free, self._open = asyncio.Semaphore(UNANSWERED), 0
        self.answered = self.refused = 0
        self.last_ms: float | None = None
        self._stopped = False

    async def run(self, metadata: bytes) -> str:
        """Serve it until it leaves; why it did."""
        await asyncio.wait_for(self._connection.send(metadata), WRITE_SECONDS)
        writing = asyncio.create_task(self._write())
        try:
            return await self._read()
        finally:
            self._room.drop(self)
            self._stopped = True
            self._answers.put_nowait(None)
            await writing

    def status(self) -> ClientStatus:
        return ClientStatus(self.address, self.since, self.answered, self.refused, self.last_ms)

    async def finish(self) -> None:
        """Once nothing runs any more: wait until all that was answered is sent."""
        while self._open:
            await asyncio.sleep(0.005)

    async def _read(self) -> str:
        from websockets.exceptions import ConnectionClosed

        try:
            while True:
                await self._free.acquire()
                frame = await received(self._connection)
                request = self._request(frame)
                self._open += 1
                self._answers.put_nowait(request)
                if request.asked is not None:
                    self._room.put(self, request)
                del frame, request  # pictures, while the next one comes
        except ConnectionClosed as closed:
            return " ".join(str(closed).split())
        except asyncio.TimeoutError:
            self._connection.transport.abort()
            return f"a frame did not come to its end within {FRAME_SECONDS:g} s"

    def _request(self, frame: bytes | str) -> Request:
        began = time.monotonic()
        request = Request(
            self.address, None, began, len(frame), asyncio.get_running_loop().create_future(), previous_ms=self.last_ms
        )
        try:
            if isinstance(frame, str):
                raise BackendError("a text frame came, expected a binary one of msgpack")
            content = unpack(frame, "the client", most=len(frame))  # the socket has its bound
        except KiEdgeError as error:
            request.settle(failed(error, debug=self._limits.debug, kind="frame"))
            return request
        try:
            request.asked = read_question(content, self._limits.most_steps)
        except Exception as error:  # of nobody's intent too: the connection stays open
            request.settle(failed(error, debug=self._limits.debug))
        request.read_ms = 1e3 * (time.monotonic() - began)
        return request

    async def _write(self) -> None:
        """Every answer, in the order of the questions; once the client is gone they only count."""
        from websockets.exceptions import ConnectionClosed

        while (request := await self._answers.get()) is not None:
            outcome = await request.done
            sent, answer = 0, None
            began = time.monotonic()
            if not self._stopped:
                try:
                    frame, answer = request.frame(outcome)
                    await asyncio.wait_for(self._connection.send(frame), WRITE_SECONDS)
                    sent = len(frame)
                except asyncio.TimeoutError:
                    self._connection.transport.abort()
                except ConnectionClosed:
                    pass
                except Exception as error:  # the policy answered what cannot be sent
                    outcome = failed(error, debug=False, kind="policy")
                    with suppress(Exception):
                        await self._connection.send(f"{outcome.kind}: {outcome.line}")
            self._free.release()
            self._open -= 1
            self._tell(request, outcome, sent, answer, began)
            frame, answer = b"", None  # pictures, until the next one
            del request, outcome

    def _tell(
        self, request: Request, outcome: Outcome, sent: int, answer: Mapping[str, Any] | None, began: float
    ) -> None:
        now = time.monotonic()
        request.written_ms = 1e3 * (now - began)
        if outcome.kind == "answered" and not sent:
            outcome = Outcome("gone", line="its client left before it was answered", batch=outcome.batch)
        if outcome.kind == "answered":
            self.answered += 1
            self.last_ms = 1e3 * (now - request.began)
        else:
            self.refused += 1
        self._handled(request.handled(outcome, sent, answer))


async def received(connection: Any) -> bytes | str:
    """The next frame of a client. TimeoutError for one that began and does not end."""
    parts = connection.recv_streaming()
    first: bytes | str = await anext(parts)

    async def others() -> list[Any]:
        return [part async for part in parts]

    parts_of_it = [first, *await asyncio.wait_for(others(), FRAME_SECONDS)]
    if isinstance(first, str):
        return "".join(map(str, parts_of_it))
    return first if len(parts_of_it) == 1 else b"".join(part for part in parts_of_it if isinstance(part, bytes))


def address_of(connection: Any) -> str:
    """HOST:PORT."""
    found = connection.remote_address
    if not isinstance(found, tuple) or len(found) < 2:
        return "unknown"
    return f"[{found[0]}]:{found[1]}" if ":" in str(found[0]) else f"{found[0]}:{found[1]}"
