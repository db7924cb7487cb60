"""The socket: its address, TLS, and what one connection may cost before it has said anything."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from ki_edge.errors import ArgumentError, BackendError
from ki_edge.files.reading import read_file

from .http import Doorkeeper, connection_class
from .options import ServerOptions

OPENING = 5.0  # seconds for the first request of a connection, or for TLS
CLOSING = 0.5  # for a goodbye
PING, PONG = 10.0, 20.0  # a connection whose other end is gone is noticed
SHORTEST_KEY, LONGEST_KEY = 8, 1024
NEEDS = "ki-serve needs {}: pip install 'ki-edge[serve]'"


async def listen(serve: Callable[[Any], Awaitable[None]], options: ServerOptions, door: Doorkeeper, most: int) -> Any:
    """A listening server of websockets. ArgumentError for an address or certificate that cannot be used."""
    try:
        from websockets.asyncio import server
    except ModuleNotFoundError as error:
        raise BackendError(NEEDS.format(error.name)) from error
    listener: Any = None

    def full() -> bool:
        return listener is not None and len(listener.handler_tasks) > most

    try:
        listener = await server.serve(
            serve,
            options.host,
            options.port,
            ssl=tls(options),
            origins=[None],  # no browser: any web page could ask a server on this machine
            compression=None,
            process_request=door.answer,
            server_header=None,
            open_timeout=OPENING,
            close_timeout=CLOSING,
            ping_interval=PING,
            ping_timeout=PONG,
            max_size=options.most_frame_mib << 20,
            max_queue=2,
            create_connection=connection_class(full),
            logger=_logger(),
        )
    except (OSError, OverflowError, UnicodeError) as error:
        raise ArgumentError(f"cannot listen on {options.host}:{options.port}: {error}") from None
    return listener


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
