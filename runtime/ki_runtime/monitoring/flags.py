"""The options of ki-serve that concern who watches it, and the monitor that they ask for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ki_edge.errors import ArgumentError

from .monitor import Monitor
from .request_log import JsonLog, PlainLog
from .request_recorder import LIMIT, RequestRecorder
from .room import GB


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--log-json, --record and their like."""
    add = parser.add_argument_group("watching it").add_argument
    add("--log-json", action="store_true",
        help="a JSON line on stdout for every request; without, clients and errors are told on stderr")  # fmt: skip
    add("--record", metavar="DIR", help="keep requests and answers as a LeRobotDataset in a new folder below DIR")
    add("--record-limit", type=float, metavar="GB", default=LIMIT / GB,
        help="stop recording when DIR holds so much; default: %(default)g")  # fmt: skip
    add("--show-clients", action="store_true",
        help="show clients and their pictures to all; default: with the key, or on this machine alone")  # fmt: skip
    add("--no-page", action="store_true", help="no page at /")
    add("--no-metrics", action="store_true", help="no /metrics")


def open_monitor(
    options: argparse.Namespace, *, key: str | None, loopback: bool, say: Callable[[str], object]
) -> Monitor:
    """What the options ask for. ArgumentError, RobotError for a folder that cannot be recorded into."""
    limit = options.record_limit
    if not 0 < limit <= 1e6 or math.isnan(limit):
        raise ArgumentError(f"--record-limit {limit:g}: expected GB, above 0 and at most 1e6")
    recorder = None
    if options.record is not None:
        recorder = RequestRecorder(Path(options.record), limit=int(limit * GB), say=say)
    log: Any = JsonLog() if options.log_json else PlainLog(say)
    return Monitor(
        key=key,
        loopback=loopback,
        open_to_all=options.show_clients,
        metrics=not options.no_metrics,
        page=not options.no_page,
        log=log,
        recorder=recorder,
    )
