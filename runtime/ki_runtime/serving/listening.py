"""The socket: its address, TLS, and what one connection may cost before it has said anything."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from ki_edge.errors import ArgumentError, BackendError
from ki_edge.files.reading import read_file

from .client import FRAME_SECONDS
from .http import Doorkeeper, connection_class
from .options import ServerOptions

OPENING = 5.0  # seconds for the first request of a connection, or for TLS
CLOSING = 5.0  # for a goodbye, and for a page to be taken
PING, PONG = 10.0, 20.0  # a connection whose other end is gone is noticed
SHORTEST_KEY, LONGEST_KEY = 8, 1024
NEEDS = "ki-serve needs {}: pip install 'ki-edge[serve]'"


class Listener:
    """A socket that clients come in by. `port`: where it listens."""

    def __init__(self, server: Any, opened: set[Any]) -> None:
        self._server, self.opened = server, opened
        self.port = int(server.sockets[0].getsockname()[1])

    def shut(self) -> None:
        """Nobody comes in any more; who is there stays."""
        self._server.server.close()

    async def close(self) -> None:
        """Say goodbye to everybody, and wait until they have gone."""
        self._server.close()
        await self._server.wait_closed()

    def abort(self) -> None:
        """Whoever is still there is there no longer."""
        for connection in tuple(self.opened):
            connection.transport.abort()


async def listen(
    serve: Callable[[Any], Awaitable[None]], options: ServerOptions, door: Doorkeeper, most: int
) -> Listener:
    """Listen for at most `most` connections. ArgumentError for an address or certificate that cannot be used."""
    try:
        from websockets.asyncio import server
    except ModuleNotFoundError as error:
        raise BackendError(NEEDS.format(error.name)) from error
    opened: set[Any] = set()
    encrypted = tls(options)
    more: dict[str, Any] = {} if encrypted is None else {"ssl_handshake_timeout": OPENING}
    try:
        listener = await server.serve(
            serve,
            options.host,
            options.port,
            ssl=encrypted,
            origins=[None],  # no browser: any web page could ask a server on this machine
            compression=None,
            process_request=door.answer,
            server_header=None,
            open_timeout=None,  # the first request has a bound of its own; what is asked may take longer, as a reload
            close_timeout=CLOSING,
            ping_interval=PING,
            ping_timeout=PONG,
            max_size=options.most_frame_mib << 20,
            max_queue=2,
            create_connection=connection_class(opened, most, OPENING, FRAME_SECONDS),
            logger=_logger(),
            **more,
        )
    except (OSError, OverflowError, UnicodeError) as error:
        raise ArgumentError(f"cannot listen on {options.host}:{options.port}: {error}") from None
    return Listener(listener, opened)


def tls(options: ServerOptions) -> ssl.SSLContext | None:
    """What --cert and --key say. ArgumentError for files that do not work."""
    if options.certificate is None or options.private_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for path in (options.certificate, options.private_key):
        read_file(Path(path), 1 << 20, ArgumentError)
    try:
        context.load_cert_chain(options.certificate, options.private_key, password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        raise ArgumentError(
            f"{options.certificate} and {options.private_key} are no PEM certificate with its key, or the key has a "
            f"password ({error})"
        ) from None
    return context


def read_key(path: str | Path) -> str:
    """The key in a file of one line. ArgumentError for anything else."""
    content = read_file(Path(path), LONGEST_KEY, ArgumentError)
    key = content.decode("ascii", "replace").strip()
    if not len(key) >= SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ArgumentError(
            f"{path}: expected one line with a key of at least {SHORTEST_KEY} visible ASCII characters, such as "
            "`openssl rand -hex 32` prints"
        )
    return key


def _logger() -> Any:
    """websockets' own log is silent: a connection that fails is no news, and watchers are told of it."""
    import logging

    logger = logging.getLogger("ki_runtime.serving.websockets")
    logger.propagate = False
    logger.disabled = True
    return logger
