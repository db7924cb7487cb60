"""ki-serve: a policy for robots that have no computer of their own for it."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from typing import Any

from ki_edge.commands import run_command, tell
from ki_edge.errors import ArgumentError

from .engine import LocalEngine
from .flags import build_parser
from .listening import read_key
from .options import ServerOptions
from .ray_options import ray_options
from .server import Server


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 after SIGTERM; 2 for an error, which is one line on stderr; 130 for Ctrl-C."""
    options = build_parser().parse_args(arguments)
    return run_command("ki-serve", lambda: _serve(options), "nothing was served")


def _serve(options: argparse.Namespace) -> int:
    server_options = _options(options)
    replicas = ray_options(options, server_options.largest_batch)
    if replicas is None:
        server = Server(_load(options, server_options), server_options, load=lambda: _load(options, server_options))
    else:
        from .ray_engine import RayEngine

        engine = RayEngine(options.bundle, replicas)
        server = Server(engine, server_options, load=engine.reloaded)
    return asyncio.run(_run(server))


async def _run(server: Server) -> int:
    loop, stopped_by = asyncio.get_running_loop(), []

    def stop(signum: int) -> None:
        stopped_by.append(signum)
        server.stop()

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
    tell(f"ki-serve: {server.engine.metadata['name']} answers at {server.uri}")
    await server.ended()
    if server.failure is not None:
        raise server.failure
    return 128 + signal.SIGINT if signal.SIGINT in stopped_by else 0


def _options(options: argparse.Namespace) -> ServerOptions:
    """All that can be refused before a large model is loaded."""
    if (options.cert is None) != (options.key is None):
        raise ArgumentError("TLS needs --cert FILE and --key FILE, both")
    return ServerOptions(
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


def _load(options: argparse.Namespace, server_options: ServerOptions) -> LocalEngine:
    """The bundle, proven and warmed up."""
    from ki_runtime.policy.policy import Policy

    policy = Policy.load(
        options.bundle,
        options.backend,
        threads=options.threads,
        verify=options.verify,
        build=True,
        trust_engines=options.trust_engines,
        say=tell,
    )
    prepared = policy.warm_up(prompt=options.prompt)
    tell(
        f"ki-serve: warmed up in {prepared.milliseconds / 1e3:.1f} s; an inference takes {prepared.inference_ms:.0f} ms"
    )
    return LocalEngine(policy, largest_batch=server_options.largest_batch)


if __name__ == "__main__":
    sys.exit(main())
