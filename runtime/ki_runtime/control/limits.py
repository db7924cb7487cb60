"""What may be sent to a robot, for each number of an action: the limits that `Guards` holds, with their origin.

Three sources, in `limits_for` of `limit_sources.py`: the robot's own limits, a `limits.json`, and what the training
statistics suggest. The first two hold both (`tightened`); statistics fill in where neither says anything (`completed`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ki_edge.errors import ArgumentError

Bool = npt.NDArray[np.bool_]
F64 = npt.NDArray[np.float64]
T = TypeVar("T")
KINDS = ("position", "velocity", "acceleration", "step")
RATES = KINDS[1:]
LARGEST = float(np.finfo(np.float32).max)
UNLIMITED = "nothing limits the actions but their shape and that they are finite"


@dataclass(frozen=True, eq=False)
class Limits:
    """Limits of one robot's actions, all in its own units; `names` has one entry for each number of an action.

    A dimension that commands a motion (a velocity, or a displacement per step) stands still at 0; one that commands a
    position stands still where the last command is repeated. A gripper has a limit of its position from statistics,
    and others only where a file or the robot gives them. ArgumentError where the fields contradict each other.
    """

    names: tuple[str, ...]
    low: F64  # [a], what a command is at least; -inf where there is no limit
    high: F64  # [a], at most
    velocity: F64  # [a], change of the command per second; inf where there is no limit, as in the next two
    acceleration: F64  # [a], change of that velocity per second
    step: F64  # [a], distance between the command and the measured state
    measured: tuple[int | None, ...]  # which number of the state measures what this dimension commands; None: unknown
    gripper: tuple[bool | None, ...]  # None: not said, which counts as no
    motion: tuple[bool | None, ...]
    # kind -> where each dimension's limit came from; "" where nothing was said about it
    origin: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = len(self.names)
        _require(size >= 1 and len(set(self.names)) == size, f"limits: names {self.names}: each must be there once")
        for name in ("low", "high", *RATES):
            array = np.array(getattr(self, name), np.float64)
            _require(array.shape == (size,), f"limits: {name} has the shape {array.shape}, expected ({size},)")
            bad = np.flatnonzero(np.isnan(array) if name in ("low", "high") else ~(array >= 0))
            _require(not bad.size, f"limits: {name} of {self.names[_first(bad)]} is {array[_first(bad)]}")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        for name in ("measured", "gripper", "motion"):
            _require(len(getattr(self, name)) == size, f"limits: {name}: expected {size} entries")
        _require(all(at is None or at >= 0 for at in self.measured), f"limits: measured {self.measured}: from 0 on")
        bad = np.flatnonzero((self.low > self.high) | (self.low > LARGEST) | (self.high < -LARGEST))
        at = _first(bad)
        _require(not bad.size, f"limits: {self.names[at]} must be between {self.low[at]:g} and {self.high[at]:g}")
        given = {kind: self.origin.get(kind, ("",) * size) for kind in KINDS}
        _require(all(len(row) == size for row in given.values()), f"limits: origin: expected {size} entries each")
        object.__setattr__(self, "origin", given)

    @classmethod
    def none(cls, names: Sequence[str], **changes: Any) -> Limits:
        """No limits at all, but for `changes`."""
        size = len(names)
        unlimited = {kind: np.full(size, np.inf) for kind in ("high", *RATES)}
        unknown = (None,) * size
        flags = {"measured": unknown, "gripper": unknown, "motion": unknown}
        return cls(**{"names": tuple(names), "low": np.full(size, -np.inf), **unlimited, **flags, **changes})

    def limited(self, kind: str) -> Bool:
        """Which dimensions have a limit of this kind, bool [a]."""
        if kind == "position":
            return (self.low > -np.inf) | (self.high < np.inf)
        values: F64 = getattr(self, kind)
        return values < np.inf

    def tightened(self, other: Limits) -> Limits:
        """Both hold: of each limit the tighter one. ArgumentError where no position satisfies both."""
        changes = self._flags(other)
        changes |= {"low": np.maximum(self.low, other.low), "high": np.minimum(self.high, other.high)}
        for at in np.flatnonzero(changes["low"] > changes["high"])[:1]:
            spans = (f"{part.low[at]:g} to {part.high[at]:g} ({part.origin['position'][at]})" for part in (self, other))
            raise ArgumentError(f"limits: {self.names[at]} cannot be within {' and '.join(spans)} at once")
        changes |= {kind: np.minimum(getattr(self, kind), getattr(other, kind)) for kind in RATES}
        origin = {}
        for kind in KINDS:
            taken = [self._taken(kind, changes), other._taken(kind, changes)]
            rows = zip(*taken, self.origin[kind], other.origin[kind], strict=True)
            origin[kind] = tuple(_both(*row) for row in rows)
        return replace(self, **changes, origin=origin)

    def completed(self, other: Limits) -> Limits:
        """`other` where this says nothing about a kind and a dimension; of a gripper no more than its position."""
        changes = self._flags(other)
        gripper = np.array([bool(flag) for flag in changes["gripper"]])
        origin = {}
        for kind in KINDS:
            silent = np.array([not text for text in self.origin[kind]]) & ~self.limited(kind)
            silent &= (kind == "position") | ~gripper
            for name in ("low", "high") if kind == "position" else (kind,):
                changes[name] = np.where(silent, getattr(other, name), getattr(self, name))
            rows = zip(silent, other.origin[kind], self.origin[kind], strict=True)
            origin[kind] = tuple(theirs if take else mine for take, theirs, mine in rows)
        return replace(self, **changes, origin=origin)

    def unmeasured(self) -> list[str]:
        """Names with a limit of the step whose state nobody knows: it could not be checked."""
        rows = zip(self.names, self.limited("step"), self.measured, strict=True)
        return [name for name, limited, measured in rows if limited and measured is None]

    def unlimited(self) -> list[str]:
        """Names of dimensions without a limit of any kind."""
        some = np.any([self.limited(kind) for kind in KINDS], axis=0)
        return [name for name, limited in zip(self.names, some, strict=True) if not limited]

    def warning(self) -> str | None:
        """One line to print before the robot moves, where some dimension has no limit; else None."""
        names = self.unlimited()
        cure = "give them in a limits file"
        if len(names) == len(self.names):
            return f"{UNLIMITED}: the bundle's statistics give no limits; {cure}"
        return f"no limits of {', '.join(names)}; {cure}" if names else None

    def _taken(self, kind: str, chosen: Mapping[str, F64]) -> Bool:
        """Where the limits that were chosen are these: there are some, as tight as the chosen ones."""
        pairs = ("low", "high") if kind == "position" else (kind,)
        same = np.any([getattr(self, name) == chosen[name] for name in pairs], axis=0)
        return np.asarray(self.limited(kind) & same)

    def _flags(self, other: Limits) -> dict[str, Any]:
        """What is known of each dimension, from this one first."""
        _require(self.names == other.names, f"limits: names {self.names} and {other.names} differ")
        names = ("measured", "gripper", "motion")
        return {name: tuple(map(_known, getattr(self, name), getattr(other, name))) for name in names}


def _both(first: bool, second: bool, mine: str, theirs: str) -> str:
    """Where a limit came from of which these are the parts that count, or none is."""
    if first == second:
        return " and ".join(dict.fromkeys(filter(None, (mine, theirs))))
    return mine if first else theirs


def _known(first: T | None, second: T | None) -> T | None:
    return second if first is None else first


def _first(bad: npt.NDArray[np.intp]) -> int:
    return int(bad[0]) if bad.size else 0


def _require(true: bool, message: str) -> None:
    if not true:
        raise ArgumentError(message)
