"""Observations that no action should be computed from: a camera that stands still, readings that are too old."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

SAME = 3  # observations with one picture
MOVED = 0.05  # of the state's range, so far may a robot move while a picture stays the same to the last bit


class Watchdog:
    """Looks at every observation before it is used.

    `stale_after`: seconds that a reading may be old; `scale`: the usual range of each number of the state [s], None
    where it is not known: then no camera is found frozen. `refused`: how many observations were, by kind.
    """

    def __init__(self, stale_after: float, scale: npt.NDArray[np.float64] | None) -> None:
        self._stale_after, self._scale = stale_after, scale
        self.refused: dict[str, int] = {}
        self.reset()

    def reset(self) -> None:
        """A new episode."""
        self._pictures: dict[str, npt.NDArray[Any]] = {}
        self._changed: dict[str, npt.NDArray[np.float64]] = {}  # the state when a camera's picture last changed
        self._same: dict[str, int] = {}

    def look(
        self, observation: Mapping[str, Any], state: npt.NDArray[np.float64], times: Mapping[str, float], now: float
    ) -> str | None:
        """Why this observation must not be used, in one line; None if it may.

        `state` [s]; `times`: when its parts were read, seconds of `time.monotonic`, as far as the robot tells; `now`:
        the same clock.
        """
        frozen = [name for name, picture in pictures_of(observation).items() if self._stands(name, picture, state)]
        for name, read in times.items():
            if now - read < -self._stale_after:  # of another clock: it would never become old
                return self._refuse("stale", f"{name} was read {read - now:.2f} s from now: give time.monotonic()")
            if not now - read <= self._stale_after:
                return self._refuse("stale", f"{name} is {now - read:.2f} s old, at most {self._stale_after:g} s")
        if frozen:
            return self._refuse("camera_frozen", f"camera {frozen[0]} shows the same picture while the robot moves")
        return None

    def _stands(self, name: str, picture: npt.NDArray[Any], state: npt.NDArray[np.float64]) -> bool:
        before = self._pictures.get(name)
        if before is None or before.shape != picture.shape or not np.array_equal(before, picture):
            # copies: a robot may use its memory again
            self._pictures[name], self._changed[name], self._same[name] = picture.copy(), state.copy(), 1
            return False
        self._same[name] += 1
        if self._scale is None or self._same[name] < SAME:
            return False
        return bool((np.abs(state - self._changed[name]) > MOVED * self._scale).any())

    def _refuse(self, kind: str, reason: str) -> str:
        self.refused[kind] = self.refused.get(kind, 0) + 1
        return reason


def pictures_of(observation: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """The pictures of an observation by the name of their camera, whatever its form."""
    found: dict[str, npt.NDArray[Any]] = {}
    for name, value in observation.items():
        for part, given in value.items() if isinstance(value, Mapping) else [(name, value)]:
            if isinstance(given, np.ndarray) and given.ndim >= 2:
                found[str(part)] = given
    return found
