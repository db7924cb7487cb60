"""The last look at each single action before a robot gets it, at every tick of the control loop.

Checks in this order: shape, finite, position, velocity, acceleration, step from the measured state, the user's own
check. All are made, none hides another. What breaks a rule is clamped, or the last command is repeated, or the robot
is stopped, by kind of the rule; after so many violations in a row nothing moves any more until `Guards.reset`.

No clock, no robot, no thread: the same calls give the same answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import count
from ki_edge.errors import ArgumentError

from .envelope import F32, Envelope
from .limits import LARGEST, Limits
from .verdict import REACTIONS, Reaction, Verdict, reactions

SHORTEST = 1e-4  # seconds: below, no time has passed, and nothing that is limited may move
LONGEST = 1.0
MOST_VIOLATIONS = 1 << 31
MOST_SHOWN = 200  # characters of what a user's check answers
Check = Callable[[F32, Any], "str | None"]


class Guards:
    """Admits the actions of one robot.

    `on`: reactions by kind, where they are not those of REACTIONS. `trip_after`: violations in a row, clamped grippers
    not counted. `check(action f32 [a], measured)` answers why an action must not be sent, or None; it sees what the
    limits have made of the action. `longest`: seconds; a later tick is allowed no more motion than so many, best the
    control period. ArgumentError for wrong arguments, and for a limit of the step that nothing measures.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        on: Mapping[str, Reaction] | None = None,
        trip_after: int = 5,
        check: Check | None = None,
        longest: float = LONGEST,
    ) -> None:
        if names := limits.unmeasured():
            raise ArgumentError(
                f"limits: the step of {', '.join(names)} is limited, but nothing says which number of the state "
                "measures it: give 'measured'"
            )
        if isinstance(longest, bool) or not isinstance(longest, int | float) or not SHORTEST <= longest < math.inf:
            raise ArgumentError(f"longest {longest!r:.60}: expected seconds, at least {SHORTEST}")
        self.limits, self._check, self._longest = limits, check, float(longest)
        self._on = reactions(on or {})
        self._trip_after = count(trip_after, "trip_after", MOST_VIOLATIONS)
        self._size = len(limits.names)
        self._envelope = Envelope(limits)
        self._accelerates = "acceleration" in self._envelope.kinds
        self._gripper = np.array([bool(flag) for flag in limits.gripper])
        self._grips = bool(self._gripper.any())
        self._motion = np.array([bool(flag) for flag in limits.motion])
        measured = [(at, index) for at, index in enumerate(limits.measured) if index is not None]
        self._measures, self._states = np.array(measured, np.intp).reshape(-1, 2).T
        self._from, self._speed, self._measured = (np.empty(self._size) for _ in range(3))
        self.counts: dict[str, int] = dict.fromkeys(REACTIONS, 0)  # actions that broke a rule of this kind
        self.trips = 0
        self.reset()
        with np.errstate(all="ignore"):
            self._place(0.0)
            self._rest = self._envelope.fit(np.zeros(self._size, np.float32))

    @property
    def tripped(self) -> bool:
        """Whether nothing moves any more until `reset`."""
        return bool(self._why)

    def reset(self, start: npt.ArrayLike | None = None) -> None:
        """A new episode: forgets a trip and the command sent last; the counts go on.

        `start` [a]: what the robot is commanded to now, where that is known; it can be held, and is moved from. Without
        it the first action is compared with the measured state. ArgumentError if it is misshapen or not finite.
        """
        last = None
        if start is not None:
            with np.errstate(all="ignore"):
                last, _, fault = _numbers(start, self.limits.names)
            if last is None:
                raise ArgumentError(f"start: {fault}")
        self._last = last
        self._from[:] = np.nan if last is None else last  # what the next action is compared with
        self._speed[:], self._measured[:] = 0.0, np.nan
        self._row, self._why, self._stopped = 0, "", False

    @property
    def moves(self) -> bool:
        """Whether a number of the actions commands a motion, which goes on until another is sent."""
        return bool(self._motion.any())

    def held(self) -> F32 | None:
        """What stands still, for a starved loop: the last command again f32 [a], 0 where it commands a motion.

        None if nothing was sent since the reset. It counts as sent, and the robot as standing.
        """
        if self._last is None:
            return None
        self._speed.fill(0.0)
        if self._motion.any():
            self._last = np.where(self._motion, self._rest, self._last)
            self._from[:] = self._last
        return self._last.copy()

    def admit(self, action: Any, *, dt: float, measured: Any = None) -> Verdict:
        """What to send: `action` [a] in float32, or what stands in for it. Never raises.

        `dt`: seconds that the robot has to carry it out, the control period; where it is no positive number, nothing
        that is limited may move. `measured`: the robot's state [s], as fresh as it is known; None: not known, then the
        step is not checked.
        """
        if self._why:
            return Verdict(self.held(), (), self._why, tripped=True, stop=self._stopped)
        with np.errstate(all="ignore"):
            wanted, kind, fault = _numbers(action, self.limits.names)
            if wanted is None:
                return self._judge({kind: fault}, None, 0.0)
            trouble = self._measure(measured)
            if self._last is None:
                self._from[:] = self._measured.astype(np.float32)
            seconds = _seconds(dt, self._longest)
            self._place(seconds)
            found = {"measured": trouble} if trouble else {}
            sent = wanted
            if self._envelope.touched(wanted):
                sent = self._envelope.fit(wanted)
                found |= self._told(wanted, sent)
            if self._check is not None and (refusal := _refusal(self._check, sent.copy(), measured)):
                found["user"] = refusal
            if found:
                return self._judge(found, sent, seconds)
            self._row = 0
            return Verdict(self._send(sent, seconds))

    def _judge(self, found: Mapping[str, str], sent: F32 | None, seconds: float) -> Verdict:
        """The verdict on an action that broke rules: kind -> what is said of it. `sent`: what clamping makes of it."""
        kinds, note = tuple(found), "; ".join(found.values())
        for kind in kinds:
            self.counts[kind] += 1
        called_for = {self._on[kind] for kind in kinds}
        self._row = 0 if kinds == ("gripper",) and called_for == {"clamp"} else self._row + 1
        if "stop" in called_for or self._row >= self._trip_after:
            self._stopped = "stop" in called_for
            self._why = f"{'stopped' if self._stopped else f'tripped after {self._row} violations in a row'}: {note}"
            self.trips += 1
            return Verdict(self.held(), kinds, self._why, tripped=True, stop=self._stopped)
        if sent is None or "hold" in called_for:
            return Verdict(self.held(), kinds, note)
        return Verdict(self._send(sent, seconds), kinds, note)

    def _send(self, sent: F32, seconds: float) -> F32:
        if self._accelerates:
            np.subtract(sent, self._from, out=self._speed)
            np.multiply(self._speed, 1.0 / seconds if seconds else 0.0, out=self._speed)
            np.copyto(self._speed, 0.0, where=np.isnan(self._speed))
        self._last = sent
        self._from[:] = sent
        return sent.copy()

    def _place(self, seconds: float) -> None:
        self._envelope.place(self._from, self._speed, self._measured, seconds)

    def _measure(self, measured: Any) -> str:
        """Keep what measures each dimension, NaN where unknown; says what is wrong with it, or ""."""
        self._measured.fill(np.nan)
        if measured is None or not self._measures.size:
            return ""
        try:
            state = np.asarray(measured)
            if state.dtype.kind not in "fiu" or state.ndim != 1:
                return f"measured state: expected numbers [s], got {state.dtype} of shape {state.shape}"
            values = state[self._states].astype(np.float64)
        except Exception as error:  # ragged lists, tensors on a device, too few numbers
            return f"measured state: {_line(error)}"
        if (bad := (~(np.abs(values) <= LARGEST)).nonzero()[0]).size:
            name = self.limits.names[self._measures[bad[0]]]
            return f"measured state: number {self._states[bad[0]]}, which measures {name}, is {values[bad[0]]:.6g}"
        self._measured[self._measures] = values
        return ""

    def _told(self, wanted: F32, sent: F32) -> dict[str, str]:
        """Each kind of limit that `wanted` breaks, grippers last, with a line on its first dimension."""
        broken = self._envelope.violations(wanted)
        arm = {kind: where & ~self._gripper for kind, where in broken.items()} if self._grips else broken
        if self._grips and broken:
            arm["gripper"] = np.logical_or.reduce(list(broken.values())) & self._gripper
        found: dict[str, str] = {}
        for kind, where in arm.items():
            dims = where.nonzero()[0]
            if dims.size:
                at, more = dims[0], f" and {dims.size - 1} more" if dims.size > 1 else ""
                found[kind] = f"{kind}: {self.limits.names[at]} {wanted[at]:.6g} to {sent[at]:.6g}{more}"
        return found


def _numbers(action: Any, names: tuple[str, ...]) -> tuple[F32 | None, str, str]:
    """(an action of its own f32 [a], "", ""), or (None, the kind that is broken, what is wrong)."""
    try:
        given = np.asarray(action)
    except Exception as error:  # __array__ of foreign types raises whatever it likes
        return None, "shape", f"shape: not an array of numbers ({_line(error)})"
    if given.shape != (len(names),) or given.dtype.kind not in "fiu":
        return None, "shape", f"shape: {given.dtype} of shape {given.shape}, expected {len(names)} numbers"
    values = given.astype(np.float32)
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        return None, "finite", f"finite: {names[at]} is {given[at]:.6g}"
    return values, "", ""


def _refusal(check: Check, action: F32, measured: Any) -> str:
    """Why a user's check refuses an action, in one line; "" if it does not."""
    try:
        answer = check(action, measured)
        return "" if answer is None or answer == "" else f"user: {_line(answer)}"
    except Exception as error:  # a check that fails has not agreed
        return f"user: the check raised {type(error).__name__}: {_line(error)}"


def _line(value: object) -> str:
    try:
        return " ".join(str(value).split())[:MOST_SHOWN]
    except Exception:
        return type(value).__name__


def _seconds(dt: Any, longest: float) -> float:
    try:
        seconds = float(dt)
    except Exception:
        return 0.0
    return min(seconds, longest) if SHORTEST <= seconds < math.inf else 0.0
