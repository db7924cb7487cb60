"""The last two minutes by the second, and all since the start: what the page draws."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .events import Handled
from .words import DROPPED, MISSES, OTHER, OUTCOMES, guards, known, told

SECONDS = 120
MOST = 500  # latencies of one second that are kept; what comes on top is counted only
NOW = 10  # seconds: what "now" means in rates


@dataclass
class _Second:
    at: int
    answered: int = 0
    batches: int = 0  # sum of the batch sizes of the answered
    totals: list[float] = field(default_factory=list)  # ms
    waits: list[float] = field(default_factory=list)  # ms
    drawn: tuple[float | None, float | None] = (None, None)  # (p50, max) of `totals`, once it is over

    def close(self) -> None:
        found = sorted(self.totals)
        middle = (found[(len(found) - 1) // 2] + found[len(found) // 2]) / 2
        self.drawn = (round(middle, 2), round(found[-1], 2))


class Recent:
    """Told from the server's thread, asked from others. `clock`: seconds that only grow."""

    def __init__(self, clock: Any = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seconds: deque[_Second] = deque(maxlen=SECONDS)
        self._counts: Counter[str] = Counter()  # "requests.OUTCOME", "dropped.REASON", "guards.RULE", ...
        self._error: tuple[float, str] | None = None

    def handled(self, request: Handled) -> None:
        with self._lock:
            outcome = OUTCOMES.get(request.outcome, OTHER)
            self._counts[f"requests.{outcome}"] += 1
            if outcome == "dropped":
                self._counts[f"dropped.{known(request.outcome, DROPPED)}"] += 1
            for name, value in told(request.reported):
                if name == MISSES:
                    self._counts[MISSES] += round(value)
            for rule, value in guards(request.reported).items():
                self._counts[f"guards.{rule}"] += round(value)
            if request.error is not None:
                self._error = (self._clock(), request.error[:300])
            if request.outcome == "answered":
                self._answered(request)

    def _answered(self, request: Handled) -> None:
        at = int(self._clock())
        if not self._seconds or self._seconds[-1].at != at:
            if self._seconds:
                self._seconds[-1].close()
            self._seconds.append(_Second(at))
        second = self._seconds[-1]
        second.answered += 1
        second.batches += request.batch
        if len(second.totals) < MOST:
            second.totals.append(request.total)
            second.waits.append(request.stages.get("wait", 0.0))

    def to_json(self) -> dict[str, Any]:
        """{"latency", "wait", "batch", "per_second", "history", "counts", "last_error"}; milliseconds, None: no data.

        "history": of each of the last two minutes' seconds, the oldest first.
        """
        with self._lock:
            now = int(self._clock())
            if self._seconds and self._seconds[-1].at < now:
                self._seconds[-1].close()
            seconds = {second.at: (second.answered, *second.drawn) for second in self._seconds}
            near = [replace(s, totals=s.totals[:], waits=s.waits[:]) for s in self._seconds if now - NOW <= s.at <= now]
            counts, error = dict(self._counts), self._error
        span = [seconds.get(at, (0, None, None)) for at in range(now - SECONDS, now)]  # the present second is not over
        answered = sum(s.answered for s in near)
        return {
            "latency": _percentiles([value for s in near for value in s.totals]),
            "wait": _percentiles([value for s in near for value in s.waits]),
            "batch": round(sum(s.batches for s in near) / answered, 2) if answered else None,
            "per_second": round(sum(s.answered for s in near if s.at < now) / NOW, 1),
            "history": {
                "p50": [middle for _, middle, _ in span],
                "max": [most for _, _, most in span],
                "answered": [count for count, _, _ in span],
            },
            "counts": counts,
            "last_error": None if error is None else {"ago": round(self._clock() - error[0], 1), "line": error[1]},
        }


def _percentiles(values: list[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p99": None, "max": None}
    p50, p99, most = np.percentile(values, (50, 99, 100))
    return {"p50": round(float(p50), 2), "p99": round(float(p99), 2), "max": round(float(most), 2)}
