"""Where the next command may lie: for each kind of limit and each number of an action, an interval in float32.

With x the command sent last, v the velocity at which it got there, y the measured state (units of the robot, seconds):

    position       low <= a <= high; from outside, the way back in is allowed
    velocity       |a - x| <= velocity dt
    acceleration   |a - x - v dt| <= acceleration dt^2, and the room left to low and high suffices to stop in
    step           |a - y| <= step

The room: with u = (a - x) / (acceleration dt^2) and g = (high - x) / (acceleration dt^2), braking by one
acceleration dt^2 each tick from u takes (u - 1/2)^2 / 2 more of it at most, so u <= sqrt(2 g) - 1/2; below g = 1/2 the
next tick stops anyway, and u <= g. Thus an action that obeys all limits exists at every tick, as long as dt is steady.

Bounds are arrays f64 [2, a] of the highest a and the highest -a, so that one formula serves both ends. What is clamped
to them is rounded inwards to float32, so that it is within the limits as given. NaN is an unknown bound: no limit.
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
KIND_OF = {kind: "acceleration" if kind == "room" else kind for kind in CHECKS}  # of limits, and in verdicts
# Where kinds contradict each other, each clip may undo those before it, never those after it; the last one is `fit`'s.
FIT = ("position", "acceleration", "room", "step", "velocity")


class Envelope:
    """The intervals of one robot. Nothing is allocated at a tick where no limit is touched.

    NumPy's warnings (overflow, invalid, divide) must be off around every call.
    """

    def __init__(self, limits: Limits) -> None:
        self.kinds = [kind for kind in CHECKS if kind == "position" or limits.limited(KIND_OF[kind]).any()]
        size = len(limits.names)
        self._bounds = np.empty((len(self.kinds), 2, size))
        self._row = dict(zip(self.kinds, self._bounds, strict=True))
        self._over = np.empty(self._bounds.shape, np.bool_)
        position = np.stack([np.minimum(limits.high, LARGEST), -np.maximum(limits.low, -LARGEST)])
        with np.errstate(all="ignore"):
            low, high = _rounded(position[None])
        self._row["position"][:] = self._position = np.concatenate([high, -low]).astype(np.float64)
        self._fit = [self.kinds.index(kind) for kind in FIT if kind in self.kinds] + [-1]
        self._velocity, self._acceleration, self._step = (
            np.stack([limit, limit]) for limit in (limits.velocity, limits.acceleration, limits.step)
        )
        self._seconds = np.nan  # that the next three are of
        self._reach, self._unit, self._half = (np.empty((2, size)) for _ in range(3))
        self._last, self._other, self._signed = (np.empty((2, size)) for _ in range(3))
        self._room, self._wide = np.empty((2, size)), np.empty((2, size), np.bool_)

    def place(self, last: F64, speed: F64, measured: F64, dt: float) -> None:
        """Set all intervals for a command that has `dt` seconds; f64 [a] each, `last` values of float32.

        NaN where `last` or `measured` is unknown; `speed`, units per second, is finite.
        """
        rows, x = self._row, self._last
        _both_signs(last, x)
        if dt != self._seconds:
            self._seconds = dt
            np.multiply(self._velocity, dt, out=self._reach)
            np.multiply(self._acceleration, dt * dt, out=self._unit)
            np.divide(self._unit, 2.0, out=self._half)
        if "velocity" in rows:
            np.add(x, self._reach, out=rows["velocity"])
        if "acceleration" in rows:
            np.multiply(speed, dt, out=self._other[0])
            np.negative(self._other[0], out=self._other[1])
            np.add(self._other, x, out=self._other)
            np.add(self._other, self._unit, out=rows["acceleration"])
            self._place_room(x)
        if "step" in rows:
            _both_signs(measured, self._other)
            np.add(self._other, self._step, out=rows["step"])

    def touched(self, action: F32) -> bool:
        """Whether a finite action f32 [a] is outside of any interval, by however little."""
        _both_signs(action, self._signed)
        return bool(np.greater(self._signed, self._bounds, out=self._over).any())

    def violations(self, action: F32) -> dict[str, Bool]:
        """After `touched`: the kinds that an action breaks by more than rounding, each with where, bool [a]."""
        least = ROUNDING * np.fmax(np.abs(self._signed[0]), np.abs(self._last[0]))
        excess = (self._signed - self._bounds).max(axis=1, where=self._over, initial=0.0)
        found: dict[str, Bool] = {}
        for kind, beyond in zip(self.kinds, excess, strict=True):
            if beyond.any():
                where = beyond > (least + SLACK * self._left_by(KIND_OF[kind]) if kind != "position" else least)
                if where.any():
                    found[KIND_OF[kind]] = where | found.get(KIND_OF[kind], False)
        return found

    def fit(self, action: F32) -> F32:
        """A new action f32 [a] near a finite one that obeys every kind, or where they contradict each other as many as
        can be, by their priority: position, velocity, step, acceleration.
        """
        way_back = np.fmax(self._position, self._last)  # from outside, the way back in
        low, high = _rounded(np.concatenate([self._bounds, way_back[None]]))
        out = action.copy()
        for row in self._fit:
            np.fmin(np.fmax(out, low[row], out=out), high[row], out=out)
        return out

    def _left_by(self, kind: str) -> F64:
        """Half the width of what a kind leaves, [a]."""
        row = self._row[kind]
        return np.asarray((row[0] + row[1]) / 2)

    def _place_room(self, x: F64) -> None:
        """How far to go and still be able to stop."""
        room, root = self._room, self._other
        np.fmax(self._position, x, out=room)
        np.subtract(room, x, out=room)
        np.sqrt(np.divide(room, self._half, out=root), out=root)  # sqrt(2 g)
        np.multiply(root, self._unit, out=root)
        np.subtract(root, self._half, out=root)
        np.copyto(room, root, where=np.greater_equal(room, self._half, out=self._wide))
        np.add(room, x, out=self._row["room"])


def _rounded(bounds: F64) -> tuple[F32, F32]:
    """(low, high) f32 [k, a] of bounds [k, 2, a], rounded inwards; where no float32 lies between, both the nearest."""
    inner = bounds.astype(np.float32)
    np.nextafter(inner, np.float32(-np.inf), out=inner, where=inner > bounds)
    low, high = -inner[:, 1], inner[:, 0]
    if (crossed := low > high).any():
        middle = (bounds[:, 0] / 2 - bounds[:, 1] / 2).astype(np.float32)
        low, high = np.where(crossed, middle, low), np.where(crossed, middle, high)
    return low, high


def _both_signs(values: npt.NDArray[np.floating], out: F64) -> None:
    """[a] -> [2, a]: the values, and their negatives."""
    out[0] = values
    np.negative(out[0], out=out[1])
