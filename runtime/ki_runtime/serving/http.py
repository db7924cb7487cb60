"""Plain HTTP on the server's port: whether it is well, the pages of who watches it, and who may come in.

websockets before 17 reads GET alone, without a word about a body. `POST /reload` is therefore turned into GET while its
head comes in, and only that one: GET /reload, which a browser may send by itself, is refused.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from ki_runtime.monitoring.access import given as key_in
from ki_runtime.monitoring.access import same
from ki_runtime.monitoring.events import HEADERS, Page

POST, GET = b"POST /reload ", b"GET /reload "
NO_BODY = re.compile(rb"(?im)^content-length:[ \t]*0[ \t]*\r\n")  # which may be said of a POST
MOST_HEAD = 1 << 14  # bytes of its head
PLAIN = "text/plain; charset=utf-8"
MOST_FIELDS = 32
PIECE = 1 << 13  # bytes that one connection may give the event loop to read before another has its turn
SHORTEST_PART = 512  # bytes of a part of a frame that is no nuisance, but for the last one
MOST_LIGHT = 500  # such parts, pings and the like in a second; more end the connection


class Doorkeeper:
    """Answers every request for something else than a websocket, and lets clients with the right key in.

    `key`: what they must send, None: nothing; `pages`: functions of the fields of a query and of headers, by path;
    `accepting`: whether there is a policy that answers; `full`: whether there are as many clients as may be;
    `reload`: loads the bundle again, None where that is not possible; gives a line, raises KiEdgeError.
    """

    def __init__(
        self,
        key: str | None,
        pages: Mapping[str, Page],
        *,
        accepting: Callable[[], bool],
        full: Callable[[], bool],
        reload: Callable[[], Awaitable[tuple[bool, str]]] | None,
    ) -> None:
        self._key, self._pages = key, pages
        self._accepting, self._full, self._reload = accepting, full, reload

    async def answer(self, connection: Any, request: Any) -> Any:
        """An HTTP response, or None: go on with the websocket."""
        try:
            target = urlsplit(request.path)
        except ValueError:
            return _text(400, "this is no address")
        upgrades = request.headers.get_all("Upgrade")
        if len(upgrades) > 1:
            return _text(400, "more than one Upgrade header")
        if upgrades and "websocket" in upgrades[0].lower():
            return self._let_in(request)
        if target.path == "/healthz":
            well = self._accepting()
            return _response(200 if well else 503, PLAIN, b"OK\n" if well else b"not serving\n")
        if target.path == "/reload":
            return await self._reloaded(request, bool(getattr(connection, "posted", False)))
        page = self._pages.get(target.path)
        if page is None:
            return _text(404, "nothing is here: a policy server answers on its websocket, and /healthz")
        try:
            fields = dict(parse_qsl(target.query, keep_blank_values=True, max_num_fields=MOST_FIELDS))
        except ValueError:
            return _text(400, f"more than {MOST_FIELDS} fields")
        headers = {name.lower(): value for name, value in request.headers.raw_items()}
        status, kind, body = await asyncio.to_thread(page, fields, headers)
        return _response(status, kind, body)

    def knows(self, request: Any) -> bool:
        """Whether a request has the key. The time that this takes tells nothing of it."""
        if self._key is None:
            return True
        given = request.headers.get_all("Authorization")
        sent = key_in({"authorization": given[0]}) if len(given) == 1 else ""
        return bool(sent) and same(sent, self._key)

    def _let_in(self, request: Any) -> Any:
        if not self.knows(request):
            return _text(401, "this server wants its key: Authorization: Api-Key KEY", {"WWW-Authenticate": "Api-Key"})
        if not self._accepting():
            return _text(503, "the server ends, or has no policy yet")
        if self._full():
            return _text(503, "as many clients are connected as may be (--max-clients)")
        return None

    async def _reloaded(self, request: Any, posted: bool) -> Any:
        if not posted:
            return _text(405, "POST it", {"Allow": "POST"})
        if self._reload is None:
            return _text(404, "this server cannot load its policy again")
        if self._key is None:
            return _text(403, "only a server with a key (--api-key-file) takes this over the network; or send SIGHUP")
        if not self.knows(request):
            return _text(401, "this server wants its key: Authorization: Api-Key KEY", {"WWW-Authenticate": "Api-Key"})
        loaded, line = await self._reload()
        return _text(200 if loaded else 409, line)


def connection_class(opened: set[Any], most: int, patience: float, whole: float) -> type:
    """What websockets makes of a TCP connection. `opened`: all that are open now, at most `most`, further ones end at
    once; `patience`: seconds for the first request to be there; `whole`: seconds for a frame that began.
    """
    from websockets.asyncio.server import ServerConnection
    from websockets.frames import DATA_OPCODES, Opcode

    class Door(ServerConnection):
        posted = False
        _begun: bytes | None = b""
        _frames = 0  # that came in, of any kind
        _light, _second = 0, 0.0  # frames that ask nothing, since then
        _half: asyncio.TimerHandle | None = None  # runs while a frame has begun

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            opened.add(self)
            self._rest = bytearray()  # came in, for the next turns of the loop
            self.recv_messages.resume = self._read_on
            self._late = self.loop.call_later(patience, self._end_if_silent)
            if len(opened) > most:
                self.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            opened.discard(self)
            self._late.cancel()
            self._rest.clear()
            self._time_frame(False)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._begun is not None:
                data = self._begun + data
                if POST.startswith(data[: len(POST)]) and b"\r\n\r\n" not in data and len(data) < MOST_HEAD:
                    self._begun = data
                    return
                self._begun = None
                if data.startswith(POST):
                    self.posted, data = True, GET + NO_BODY.sub(b"", data[len(POST) :], count=1)
            waits = bool(self._rest)
            self._rest += data
            if not waits:
                self._take_piece()

        def eof_received(self) -> None:
            while self._rest:
                self._take(self._rest[:])
            super().eof_received()

        def process_event(self, event: Any) -> None:
            self._frames += 1
            opcode = getattr(event, "opcode", None)
            if opcode is not None and (
                opcode not in DATA_OPCODES or (opcode is Opcode.CONT and len(event.data) < SHORTEST_PART)
            ):
                self._count_light()
            super().process_event(event)

        def _take_piece(self) -> None:
            """A few thousand small frames fit what one read gives: others have their turn between two pieces."""
            if self._rest:
                self._take(self._rest[:PIECE])
            if self._rest:
                self.transport.pause_reading()
                self.loop.call_soon(self._take_piece)
            elif not self.recv_messages.paused:
                self.transport.resume_reading()

        def _take(self, piece: bytearray) -> None:
            del self._rest[: len(piece)]
            before = self._frames
            super().data_received(bytes(piece))
            if self._frames > before:
                self._time_frame(False)
            if self.request is not None and (self._frames == before or self.protocol.reader.buffer):
                self._time_frame(True)

        def _read_on(self) -> None:
            """There is room for frames again; what was not read meanwhile is not late."""
            if self._half is not None:
                self._time_frame(False)
                self._time_frame(True)
            if not self._rest:
                self.transport.resume_reading()

        def _time_frame(self, begun: bool) -> None:
            if begun and self._half is None:
                self._half = self.loop.call_later(whole, self._end_if_half)
            elif not begun and self._half is not None:
                self._half.cancel()
                self._half = None

        def _count_light(self) -> None:
            now = self.loop.time()
            if now - self._second >= 1.0:
                self._light, self._second = 0, now
            self._light += 1
            if self._light > MOST_LIGHT:
                self._rest.clear()
                self.transport.abort()

        def _end_if_half(self) -> None:
            if self.recv_messages.paused:  # it is not read
                self._half = self.loop.call_later(whole, self._end_if_half)
            else:
                self.transport.abort()

        def _end_if_silent(self) -> None:
            if self.request is None:
                self.transport.abort()

    return Door


def _text(status: int, line: str, more: Mapping[str, str] | None = None) -> Any:
    return _response(status, PLAIN, f"{line}\n".encode(), more)


def _response(status: int, kind: str, body: bytes, more: Mapping[str, str] | None = None) -> Any:
    from websockets.datastructures import Headers
    from websockets.http11 import Response

    headers = Headers()
    for name, value in {
        "Date": formatdate(usegmt=True),
        "Connection": "close",
        "Content-Length": str(len(body)),
        "Content-Type": kind,
        **HEADERS,
        **(more or {}),
    }.items():
        headers[name] = value
    return Response(status, HTTPStatus(status).phrase, headers, body)
