"""Where the next command may lie: for each kind of limit and each number of an action, an interval in float32.

With x the command sent last, v the velocity at which it got there, y the measured state (units of the robot, seconds):

    position       low <= a <= high; from outside, the way back in is allowed
    velocity       |a - x| <= velocity dt
    acceleration   |a - x - v dt| <= acceleration dt^2, and the room left to low and high suffices to stop in
    step           |a - y| <= step

The room: with u = (a - x) / (acceleration dt^2) and g = (high - x) / (acceleration dt^2), braking by one
acceleration dt^2 each tick from u takes (u - 1/2)^2 / 2 more of it at most, so u <= sqrt(2 g) - 1/2; below g = 1/2 the
next tick stops anyway, and u <= g. Thus an action that obeys all limits exists at every tick, as long as dt is steady.

Bounds are kept as arrays [2, a] of the highest a and the highest -a, so that one formula serves both ends. They are
rounded inwards to float32: what is sent is within the limits as given. NaN is an unknown bound and limits nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .limits import LARGEST, Limits

Bool = npt.NDArray[np.bool_]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
# A clamp by less than this is no violation: whatever moves exactly as fast as it may is rounded at every tick.
ROUNDING = 4 * float(np.finfo(np.float32).eps)  # of a value
SLACK = 1e-3  # of what a velocity, an acceleration or a step leaves
CHECKS = ("position", "velocity", "acceleration", "room", "step")
# Where kinds contradict each other, each clip may undo those before it, never those after it.
FIT = ("position", "acceleration", "room", "step", "velocity", "way back")


class Envelope:
    """The intervals of one robot. Nothing is allocated at a tick where no limit is touched.

    NumPy's warnings (overflow, invalid, divide) must be off around every call.
    """

    def __init__(self, limits: Limits) -> None:
        kinds = {"position", *(kind for kind in ("velocity", "acceleration", "step") if limits.limited(kind).any())}
        kinds |= {"room"} if "acceleration" in kinds else set()
        self.kinds = [kind for kind in CHECKS if kind in kinds]
        rows = [*self.kinds, "way back"]
        size = len(limits.names)
        self._exact, self._bounds = np.empty((len(rows), 2, size)), np.empty((len(rows), 2, size), np.float32)
        self._outside, self._crossed = np.empty(self._exact.shape, np.bool_), np.empty((len(rows), size), np.bool_)
        self._negative = np.empty((len(rows), size), np.float32)
        self._at = {kind: row for row, kind in enumerate(rows)}
        self._rows = {kind: self._exact[row] for kind, row in self._at.items()}
        self._fit = [
            (self._bounds[row, 0], self._negative[row]) for kind in FIT if (row := self._at.get(kind)) is not None
        ]
        self._velocity, self._acceleration, self._step = limits.velocity, limits.acceleration, limits.step
        self._last, self._other, self._room = np.empty((2, size)), np.empty((2, size)), np.empty((2, size))
        self._reach, self._wide = np.empty(size), np.empty((2, size), np.bool_)
        self._signed, self._over = np.empty((2, size), np.float32), np.empty((len(rows) - 1, 2, size), np.bool_)
        self._position = self._within_float32(limits)

    def place(self, last: F64, speed: F64, measured: F64, dt: float) -> None:
        """Set all intervals for a command that has `dt` seconds; f64 [a] each, `last` values of float32.

        NaN where `last` or `measured` is unknown; `speed`, units per second, is finite.
        """
        rows, reach, x = self._rows, self._reach, self._last
        _both_signs(last, x)
        np.copyto(rows["position"], self._position)
        np.fmax(self._position, x, out=rows["way back"])
        if "velocity" in rows:
            np.add(x, np.multiply(self._velocity, dt, out=reach), out=rows["velocity"])
        if "acceleration" in rows:
            np.multiply(self._acceleration, dt * dt, out=reach)
            np.multiply(speed, dt, out=self._other[0])
            _both_signs(np.add(self._other[0], last, out=self._other[0]), self._other)
            np.add(self._other, reach, out=rows["acceleration"])
            self._place_room(x, reach)
        if "step" in rows:
            _both_signs(measured, self._other)
            np.add(self._other, self._step, out=rows["step"])
        self._round()

    def touched(self, action: F32) -> bool:
        """Whether a finite action f32 [a] is outside of any interval, by however little."""
        _both_signs(action, self._signed)
        return bool(np.greater(self._signed, self._bounds[:-1], out=self._over).any())

    def violations(self, action: F32) -> dict[str, Bool]:
        """After `touched`: the kinds that an action breaks by more than rounding, each with where, bool [a]."""
        least = ROUNDING * np.fmax(np.abs(action.astype(np.float64)), np.abs(self._last[0]))
        slack = [self._reach_of(kind) * SLACK for kind in self.kinds]
        excess = self._signed - self._bounds[:-1].astype(np.float64)
        broken = self._over.any(axis=1) & (np.fmax(excess[:, 0], excess[:, 1]) > least + slack)
        found: dict[str, Bool] = {}
        for kind, row in zip(self.kinds, broken, strict=True):
            if row.any():
                kind = "acceleration" if kind == "room" else kind
                found[kind] = found[kind] | row if kind in found else row
        return found

    def fit(self, action: F32) -> F32:
        """A new action f32 [a] near a finite one that obeys every kind, or where they contradict each other as many as
        can be, by their priority: position, velocity, step, acceleration.
        """
        out = action.copy()
        for high, low in self._fit:
            np.fmax(out, low, out=out)
            np.fmin(out, high, out=out)
        return out

    def _reach_of(self, kind: str) -> F64 | float:
        """Half the width of what a kind leaves, but for positions; [a]."""
        row = self._rows["acceleration" if kind == "room" else kind]
        return 0.0 if kind == "position" else (row[0] + row[1]) / 2

    def _place_room(self, x: F64, unit: F64) -> None:
        """How far to go and still be able to stop; `unit` is acceleration dt^2."""
        room, root = self._room, self._other
        np.subtract(self._rows["way back"], x, out=room)
        np.divide(room, unit, out=room)
        np.sqrt(np.multiply(room, 2.0, out=root), out=root)
        np.subtract(root, 0.5, out=root)
        np.copyto(room, root, where=np.greater_equal(room, 0.5, out=self._wide))
        np.multiply(room, unit, out=room)
        np.add(room, x, out=self._rows["room"])

    def _round(self) -> None:
        """Exact bounds to float32, inwards; where no float32 lies between, both ends to the nearest one."""
        bounds, exact = self._bounds, self._exact
        np.copyto(bounds, exact, casting="unsafe")
        np.greater(bounds, exact, out=self._outside)
        np.nextafter(bounds, np.float32(-np.inf), out=bounds, where=self._outside)
        np.negative(bounds[:, 1], out=self._negative)
        if np.greater(self._negative, bounds[:, 0], out=self._crossed).any():
            middle = (exact[:, 0] / 2 - exact[:, 1] / 2).astype(np.float32)
            np.copyto(bounds[:, 0], middle, where=self._crossed)
            np.copyto(self._negative, middle, where=self._crossed)
            np.negative(self._negative, out=bounds[:, 1])

    def _within_float32(self, limits: Limits) -> F64:
        """The bounds of the position [2, a], rounded once for all."""
        self._exact[:] = np.inf
        self._exact[0, 0], self._exact[0, 1] = np.minimum(limits.high, LARGEST), -np.maximum(limits.low, -LARGEST)
        self._round()
        return self._bounds[0].astype(np.float64)


def _both_signs(values: npt.NDArray[np.floating], out: npt.NDArray[np.floating]) -> None:
    """[a] -> [2, a]: the values, and their negatives."""
    if values is not out[0]:
        out[0] = values
    np.negative(values, out=out[1])
