"""A line for what happens: of every request as JSON, or of clients and errors for people."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from ki_edge.commands import OutputClosed, printable, show_json_line
from ki_edge.policy.contract import PolicyContract

from .background import Background
from .events import Handled

WAITING = 2000  # lines
PATIENCE = 1.0  # seconds at the end for lines that are still to be written
PER_SECOND = 20  # lines for people: an error that repeats must not hide the others, nor fill the disk
LONGEST = 500  # characters of an error


def utc(seconds: float) -> str:
    """Seconds since 1970 as "2026-11-26T10:31:47.125Z"."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonLog:
    """A JSON object a line, {"time", "event", ...}, see docs/monitoring.md. `write` puts it on a line of stdout.

    Written by a thread. Lines beyond what waits for a slow reader are dropped and counted; who reads no more (a closed
    pipe, a full disk) costs the lines, and the server goes on.
    """

    def __init__(
        self, write: Callable[[Mapping[str, Any]], None] = show_json_line, clock: Callable[[], float] = time.time
    ) -> None:
        self._write_line, self._clock = write, clock
        self._lost = 0
        self._lines: Background[Mapping[str, Any]] = Background("log", self._write, most=WAITING)

    @property
    def dropped(self) -> int:
        return self._lines.dropped + self._lost

    def loaded(self, contract: PolicyContract, policy: Mapping[str, Any]) -> None:
        self._put("loaded", {"policy": {name: policy.get(name) for name in ("name", "backend")}})

    def connected(self, client: str) -> None:
        self._put("connected", {"client": client})

    def left(self, client: str, why: str) -> None:
        self._put("left", {"client": client, "why": why[:LONGEST]})

    def handled(self, request: Handled) -> None:
        facts: dict[str, Any] = {"id": request.id, "client": request.client, "outcome": request.outcome}
        facts |= {"total_ms": request.total, "stages": request.stages, "batch": request.batch}
        facts |= {"received": request.received, "sent": request.sent}
        if request.error is not None:
            facts["error"] = request.error[:LONGEST]
        if request.reported:
            facts["reported"] = request.reported
        self._put("request", facts)

    def close(self) -> None:
        self._lines.close(PATIENCE)

    def _put(self, event: str, facts: Mapping[str, Any]) -> None:
        self._lines.put({"time": self._clock(), "event": event, **facts})

    def _write(self, facts: Mapping[str, Any]) -> None:
        line = {**facts, "time": utc(facts["time"])}
        for name in ("stages", "reported"):
            if name in line:
                line[name] = {str(key): _number(value) for key, value in line[name].items()}
        if "total_ms" in line:
            line["total_ms"] = _number(line["total_ms"])
        try:
            self._write_line(line)
        except (OSError, OutputClosed, ValueError):  # nobody reads, or a disk is full
            self._lost += 1


@dataclass(frozen=True)
class _Told:
    words: str


class PlainLog:
    """A line for people by `say`, of clients that come and leave, of errors, of a policy that was loaded.

    At most PER_SECOND a second; how many were left out is said then.
    """

    def __init__(self, say: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._second, self._count, self._left_out = -1, 0, 0
        self._lines: Background[_Told] = Background("log", lambda told: self._write(told.words), most=WAITING)

    @property
    def dropped(self) -> int:
        return self._lines.dropped

    def loaded(self, contract: PolicyContract, policy: Mapping[str, Any]) -> None:
        """Said by who loads it."""

    def connected(self, client: str) -> None:
        self._put(f"{client}: connected")

    def left(self, client: str, why: str) -> None:
        self._put(f"{client}: left" + (f", {why[:LONGEST]}" if why else ""))

    def handled(self, request: Handled) -> None:
        if request.error is not None:
            self._put(f"{request.client}: {request.error[:LONGEST]} (request {request.id})")

    def close(self) -> None:
        if self._left_out:
            self._lines.put(_Told(self._more()), needed=True)
        self._lines.close(PATIENCE)

    def _put(self, words: str) -> None:
        second = int(self._clock())
        if second != self._second:
            self._second, self._count = second, 0
            if self._left_out:
                self._lines.put(_Told(self._more()))
                self._left_out = 0
        self._count += 1
        if self._count > PER_SECOND:
            self._left_out += 1
        else:
            self._lines.put(_Told(words))

    def _more(self) -> str:
        return f"{self._left_out} lines more were left out"

    def _write(self, words: str) -> None:
        self._say(printable(words))


def _number(value: Any) -> Any:
    """To a microsecond; JSON has no NaN."""
    try:
        number = round(float(value), 3)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None
