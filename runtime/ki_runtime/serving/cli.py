"""ki-serve: a policy for robots that have no computer of their own for it."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ki_edge.commands import run_command, tell
from ki_edge.errors import ArgumentError
from ki_runtime.monitoring.flags import open_monitor

from .engine import POLICY_THREAD, Engine
from .flags import build_parser
from .listening import read_key, tls
from .loading import ServedBundle
from .options import LOOPBACK, ServerOptions
from .ray_options import RayOptions, ray_options
from .reloading import RELOAD_THREAD
from .server import Server

SWITCH = 1e-3  # seconds until the policy's thread lets the event loop go on, where it computes in Python


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 after SIGTERM; 2 for an error, which is one line on stderr; 130 for Ctrl-C."""
    options = build_parser().parse_args(arguments)
    ended: list[Server] = []
    status = run_command("ki-serve", lambda: _serve(options, ended), "nothing was served")
    if ended and _left_behind():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    return status


def _left_behind() -> bool:
    """Whether a thread computes that nobody waits for: one that is in an engine when Python ends aborts the process."""
    return any(thread.name in (POLICY_THREAD, RELOAD_THREAD) for thread in threading.enumerate())


def _serve(options: argparse.Namespace, ended: list[Server]) -> int:
    sys.setswitchinterval(SWITCH)
    server_options = _options(options)
    replicas = ray_options(options, server_options.largest_batch)
    loopback = server_options.host in LOOPBACK
    monitor = open_monitor(options, key=server_options.api_key, loopback=loopback, say=_say)
    engine, load = _here(options, server_options) if replicas is None else _on_ray(options, replicas)
    server = Server(engine, server_options, watchers=[monitor], load=load)
    server.pages.update(monitor.pages(server.status))
    return asyncio.run(_run(server, ended))


def _here(options: argparse.Namespace, server_options: ServerOptions) -> tuple[Engine, Callable[[], Engine]]:
    """The policy in a thread of this process, and what a reload calls."""
    bundle = ServedBundle(
        options.bundle,
        options.backend,
        threads=options.threads,
        verify=options.verify,
        trust_engines=options.trust_engines,
        sequential=options.sequential,
        prompt=options.prompt,
        largest_batch=server_options.largest_batch,
        say=_say,
    )
    return bundle.open(), bundle.again


def _on_ray(options: argparse.Namespace, replicas: RayOptions) -> tuple[Engine, Callable[[], Engine]]:
    """The policy in replicas of a Ray cluster, and what a reload calls."""
    if options.sequential:
        raise ArgumentError("--sequential is for a policy in this process: replicas of a cluster keep their graphs")
    from .ray_engine import RayEngine

    engine = RayEngine(options.bundle, replicas, _say)
    return engine, engine.reloaded


def _say(line: str) -> None:
    tell(f"ki-serve: {line}")


async def _run(server: Server, ended: list[Server]) -> int:
    loop, stopped_by = asyncio.get_running_loop(), []

    def stop(signum: int) -> None:
        stopped_by.append(signum)
        (server.stop if len(stopped_by) == 1 else server.abort)()  # the second time without waiting for what runs

    reloads: set[Any] = set()

    def reload() -> None:
        task = loop.create_task(server.reload())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    await server.open()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop, signum)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        loop.add_signal_handler(signal.SIGHUP, reload)
    if server.options.exposed:
        lacks = [] if server.options.api_key is not None else ["key (--api-key-file): anybody can ask it"]
        lacks += [] if server.options.certificate is not None else ["TLS (--cert, --key): key and pictures can be read"]
        tell(
            f"ki-serve: warning: other machines reach {server.options.host}, and there is no {', and no '.join(lacks)}"
        )
    tell(f"ki-serve: {server.engine.metadata['name']} answers at {server.uri}")
    await server.ended()
    ended.append(server)
    if server.failure is not None:
        raise server.failure
    return 128 + signal.SIGINT if signal.SIGINT in stopped_by else 0


def _options(options: argparse.Namespace) -> ServerOptions:
    """All that can be refused before a large model is loaded."""
    if (options.cert is None) != (options.key is None):
        raise ArgumentError("TLS needs --cert FILE and --key FILE, both")
    found = ServerOptions(
        host=options.host,
        port=options.port,
        api_key=None if options.api_key_file is None else read_key(options.api_key_file),
        certificate=options.cert,
        private_key=options.key,
        most_clients=options.max_clients,
        most_waiting=options.max_waiting,
        longest_wait=options.max_wait,
        largest_batch=options.max_batch,
        most_frame_mib=options.max_frame,
        debug=options.debug,
    )
    tls(found)
    return found


if __name__ == "__main__":
    sys.exit(main())
