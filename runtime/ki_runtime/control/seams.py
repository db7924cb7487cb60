"""How the commands jump where one chunk ends and another begins, against the steps inside chunks.

Of the commands a_k of consecutive ticks, in robot units, over the dimensions that command positions (largest absolute
value): position |a_k - a_k-1|, velocity |a_k - 2 a_k-1 + a_k-2| and acceleration, the third difference. A step from one
chunk to another, and one into or out of a hold, is a seam; a difference that contains a seam counts as its own. The
steps of 0 within a hold are none of a chunk, and are left out.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .telemetry import percentiles

F32 = npt.NDArray[np.float32]
ORDERS = ("position", "velocity", "acceleration")


class SeamLog:
    """Keeps the jumps of all commands. `positions`: which dimensions are looked at, bool [a]."""

    def __init__(self, positions: Sequence[bool]) -> None:
        self._positions = np.asarray(positions, np.bool_)
        self._seams = {order: array("d") for order in ORDERS}  # 8 bytes each: they are of every tick, for hours
        self._inside = {order: array("d") for order in ORDERS}
        self.count = 0
        self.reset()

    def reset(self) -> None:
        """A new episode."""
        self._chunk: int | None = None
        self._differences: list[npt.NDArray[np.float64] | None] = [None, None, None]  # of order 0, 1, 2, the last ones
        self._recent = (False, False)  # whether the last two steps were seams

    def add(self, action: F32, chunk: int | None) -> bool:
        """A command f32 [a] of a chunk, None while the robot holds. Gives whether it was a seam."""
        started = self._differences[0] is not None
        seam = started and (chunk is None or chunk != self._chunk)
        self._chunk = chunk
        value = action[self._positions].astype(np.float64)
        near = (seam, seam or self._recent[0], seam or any(self._recent))
        for order, name in enumerate(ORDERS):
            before = self._differences[order]
            self._differences[order] = value
            if before is None:
                break
            value = value - before
            kept = self._seams if near[order] else self._inside
            if chunk is not None or order:
                kept[name].append(float(np.abs(value).max(initial=0.0)))
        self.count += seam and chunk is not None
        self._recent = (seam, self._recent[0])
        return seam

    def summary(self) -> dict[str, Any]:
        """{"count", order: {"p50", "p95", "max"} or None, "inside": the same}."""
        return {"count": self.count, **_percentiles(self._seams), "inside": _percentiles(self._inside)}


def _percentiles(jumps: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float] | None]:
    return {order: percentiles(values, 50, 95, 100) for order, values in jumps.items()}
