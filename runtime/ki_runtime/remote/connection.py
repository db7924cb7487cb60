"""One question after the other to a policy server of openpi's kind: a binary frame out, a binary frame in."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from ki_edge.errors import ArgumentError, BackendError

from .abilities import OWN
from .packing import MOST_BYTES, NEEDS, unpack

OPENING = 10.0  # seconds for a connection and for the server's first frame
CLOSING = 1.0
PASSING = ("busy: ", "ending: ", "late: ")  # what ki-serve says that may be otherwise a moment later


class Lost(BackendError):
    """The connection broke: the same question may be asked of a new one."""


class Connection:
    """A connection to `uri`, and the metadata that the server sent first, both within `patience` seconds. `key`: as
    `Authorization: Api-Key KEY`.

    ArgumentError for an address that is none; Lost where nobody answers; BackendError for a server of another kind.
    """

    def __init__(self, uri: str, key: str | None = None, patience: float = OPENING) -> None:
        self._uri, self._websockets = uri, _websockets()
        self.metadata: Mapping[str, Any] = {}
        until = time.monotonic() + patience
        self._socket: Any = self._open(key, patience)
        try:
            metadata = unpack(self._receive(max(0.0, until - time.monotonic())), uri)
        except BaseException:
            self.close()
            raise
        if not isinstance(metadata, Mapping):
            self.close()
            raise BackendError(f"{uri} sent {type(metadata).__name__} first, expected a map: is it a policy server?")
        self.metadata = metadata

    def ask(self, question: bytes, patience: float) -> Mapping[str, Any]:
        """The answer to one question.

        Lost where the connection broke. BackendError for an answer that nobody asked for, one that does not come
        within `patience` seconds, a text frame, which is the server's error, and one of another form. After an error
        the connection is closed: what still comes on it must not be taken for the answer to another question.
        """
        try:
            self._expect_nothing()
            try:
                self._socket.send(question)
            except self._websockets.exceptions.ConnectionClosed as error:
                self._raise_what_was_said(error)
            answer = unpack(self._receive(patience), self._uri)
            if not isinstance(answer, Mapping):
                raise BackendError(f"{self._uri} answered {type(answer).__name__}, expected a map with actions")
        except BaseException:
            self.close()
            raise
        return answer

    def close(self) -> None:
        """Say goodbye, or be gone; a second time does nothing. From any thread: it ends a question that waits."""
        with contextlib.suppress(Exception):
            self._socket.close()

    def _open(self, key: str | None, patience: float) -> Any:
        headers = None if key is None else {"Authorization": f"Api-Key {key}"}
        errors = self._websockets.exceptions
        try:
            connected = self._websockets.sync.client.connect(
                self._uri,
                compression=None,
                max_size=MOST_BYTES,
                additional_headers=headers,
                open_timeout=patience,
                close_timeout=CLOSING,
                ping_interval=None,  # openpi's server answers none while it infers
                proxy=None,
            )
            return connected.__enter__()  # `close` is its __exit__
        except (errors.InvalidURI, ValueError):  # a port that is none is a ValueError
            raise ArgumentError(
                f"{self._uri!r:.200} is no address of a policy server: expected ws://HOST:PORT"
            ) from None
        except errors.InvalidStatus as error:
            status = error.response.status_code
            cure = ": set KI_API_KEY to the server's key" if status in (401, 403) else ""
            kind = Lost if status >= 500 else BackendError  # a gateway whose server starts again
            raise kind(f"{self._uri} refuses the connection (HTTP {status}){cure}") from None
        except (errors.WebSocketException, EOFError) as error:  # or one that is just ending
            raise Lost(f"{self._uri} is no policy server: {_line(error)}") from None
        except (OSError, TimeoutError) as error:
            raise Lost(f"no policy server answers at {self._uri} ({_line(error)}): is it running?") from None

    def _expect_nothing(self) -> None:
        """BackendError if a frame is there that belongs to no question."""
        try:
            frame = self._socket.recv(timeout=0)
        except TimeoutError:
            return
        except self._websockets.exceptions.ConnectionClosed as error:
            raise Lost(f"{self._uri} closed the connection ({_line(error)})") from None
        self._refuse_text(frame)
        raise BackendError(
            f"{self._uri} answered a question twice: which answer belongs to which is not known any more, so no "
            "further one is used"
        )

    def _receive(self, patience: float) -> bytes:
        try:
            frame = self._socket.recv(timeout=patience)
        except TimeoutError:
            raise BackendError(f"{self._uri} did not answer within {patience:g} s") from None
        except self._websockets.exceptions.ConnectionClosed as error:
            if error.sent is not None and error.sent.code == 1009:
                raise BackendError(f"{self._uri} sent a frame of more than {MOST_BYTES} bytes") from None
            raise Lost(f"{self._uri} closed the connection ({_line(error)})") from None
        self._refuse_text(frame)
        found: bytes = frame
        return found

    def _raise_what_was_said(self, error: Exception) -> None:
        """A server that fails says why, and closes: its text may lie there although nothing can be sent any more."""
        with contextlib.suppress(TimeoutError, self._websockets.exceptions.ConnectionClosed):
            self._refuse_text(self._socket.recv(timeout=0))
        raise Lost(f"{self._uri} closed the connection ({_line(error)})") from None

    def _refuse_text(self, frame: object) -> None:
        if isinstance(frame, str):
            lines = [line.strip() for line in frame.splitlines() if line.strip()] or ["no reason given"]
            if OWN in self.metadata and lines[-1].startswith(PASSING):
                raise Lost(f"{self._uri} cannot answer now ({lines[-1][:300]})")
            raise BackendError(f"{self._uri} failed: {lines[-1][:300]}")  # the last line of a traceback is the error


def _websockets() -> Any:
    try:
        import websockets
        import websockets.exceptions
        import websockets.sync.client
    except ModuleNotFoundError as error:
        raise BackendError(NEEDS.format(error.name)) from error
    return websockets


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
