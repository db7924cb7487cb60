"""The options of ki-serve."""

from __future__ import annotations

import argparse
from dataclasses import fields

from ki_edge.commands import Parser
from ki_runtime.backends.registry import HELP as BACKENDS_HELP
from ki_runtime.monitoring.flags import add_flags

from .options import ServerOptions
from .ray_options import add_ray

DEFAULTS = {one.name: one.default for one in fields(ServerOptions)}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ki-serve",
        description="Serve a bundle to robots, behind openpi's websocket protocol: openpi-client, ki-run --policy.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle that ki-export wrote")
    add = parser.add_argument_group("where").add_argument
    add("--host", default=DEFAULTS["host"], help="address to listen on; default: %(default)s, this machine alone")
    add("--port", type=int, default=DEFAULTS["port"], help="default: %(default)s; 0: any that is free")
    add("--api-key-file", metavar="FILE", help="clients must send the key in this file")
    add("--cert", metavar="FILE", help="serve over TLS with this certificate (PEM)")
    add("--key", metavar="FILE", help="and its private key")
    add = parser.add_argument_group("the engine").add_argument
    add("--backend", default="auto", metavar="NAME", help=BACKENDS_HELP)
    add("--threads", type=int, metavar="N", help="CPU threads of the engine; default: all cores but one")
    add("--prompt", metavar="TEXT", help="what robots will be told: prompts of its length are prepared")
    add("--trust-engines", action="store_true", help="also load engines for the lean runtime that were not built here")
    add("--sequential", action="store_true", help="keep one graph in memory at a time and load it for every inference")
    add("--verify", action="store_true", help="check the bundle's hashes before serving")
    add_ray(parser)
    add = parser.add_argument_group("bounds").add_argument
    add("--max-clients", type=int, default=DEFAULTS["most_clients"], metavar="N", help="default: %(default)s")
    add("--max-waiting", type=int, default=DEFAULTS["most_waiting"], metavar="N",
        help="requests that wait; beyond, clients are told that it is busy; default: %(default)s")  # fmt: skip
    add("--max-wait", type=float, default=DEFAULTS["longest_wait"], metavar="S",
        help="seconds that a request may wait; default: %(default)g")  # fmt: skip
    add("--max-batch", type=int, default=DEFAULTS["largest_batch"], metavar="N",
        help="requests that run at once, where that is faster; 1: never; default: %(default)s")  # fmt: skip
    add("--max-frame", type=int, default=DEFAULTS["most_frame_mib"], metavar="MIB",
        help="largest frame of a client; default: %(default)s")  # fmt: skip
    add("--debug", action="store_true", help="send errors with their traceback")
    add_flags(parser)
    return parser
