"""Limits of a file and of a robot, and all of them together.

A `limits.json` in the robot's units; seconds:

    {"limits": {"shoulder": {"position": [-1.5, 1.5], "velocity": 1.0, "acceleration": 8.0, "step": 0.2, "measured": 0},
                "gripper": {"position": [0, 1], "gripper": true},
                "base.vel": {"position": [-0.3, 0.3], "hold": "zero"}}}

Every key may be left out; null, also for an end of a position, says that there is no limit, whatever statistics say.
A robot's own limits are a mapping of the same form, without the outer key, in its attribute `limits`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ki_edge.errors import ArgumentError, KiEdgeError, RobotError
from ki_edge.files.reading import read_object
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.normalize import NormStats

from .limits import KINDS, LARGEST, RATES, Limits
from .trained_limits import names_of, trained_limits

MOST_BYTES = 1_000_000
MOST_STATES = 1 << 20
MOST_RATE = float(np.finfo(np.float64).max)
HOLDS = {"last": False, "zero": True}  # what stands still: the last command again, or 0
KEYS = (*KINDS, "measured", "gripper", "hold")
Error = type[KiEdgeError]


def limits_for(
    contract: PolicyContract, stats: Mapping[str, NormStats], robot: object = None, path: str | Path | None = None
) -> Limits:
    """The limits of a policy on a robot. Those of the file and of the robot both hold, so a file may only tighten what
    the robot says; the statistics count where neither says anything.

    ArgumentError for a file that is wrong or leaves nothing of the robot's limits, RobotError for those of a robot that
    are wrong.
    """
    names, taken = names_of(contract), getattr(robot, "action_names", None)
    if contract.action_names is None and taken is not None and len(set(taken)) == len(taken) == len(names):
        names = tuple(map(str, taken))
    trained = trained_limits(contract, stats, names)
    given = Limits.none(names)
    if path is not None:
        given = read_limits(path, names, contract.state_dim)
    own = getattr(robot, "limits", None)
    if own is not None:
        name = str(getattr(robot, "name", type(robot).__name__))
        given = given.tightened(described(own, names, contract.state_dim, f"limits of {name}", name, RobotError))
    return given.completed(trained)


def read_limits(path: str | Path, names: tuple[str, ...], states: int = MOST_STATES) -> Limits:
    """The limits of a JSON file for actions of these names, and a state of so many numbers.

    ArgumentError says in one line what is wrong where; a name that no dimension has is wrong, a missing one is not.
    """
    path = Path(path)
    content = read_object(path, ArgumentError, MOST_BYTES)
    if set(content) != {"limits"}:
        found = ", ".join(map(repr, sorted(content)))[:200] or "nothing"
        raise ArgumentError(f'{path}: expected {{"limits": {{name: ...}}}} and no other key, found {found}')
    return described(content["limits"], names, states, f"{path}: limits", path.name, ArgumentError)


def described(given: Any, names: tuple[str, ...], states: int, where: str, origin: str, error: Error) -> Limits:
    """Limits from {name: {key: value}}, with `origin` as their origin; `error`, which says `where`, if it is wrong."""
    if not isinstance(given, Mapping):
        raise error(f"{where}: expected an object by name of the action's dimensions, got {given!r:.60}")
    for name in given:
        if name not in names:
            raise error(
                f"{where}: no dimension of the action is called {name!r:.60}; they are {', '.join(names)[:400]}"
            )
    entries = [_entry(given.get(name, {}), states, f"{where}.{name}", error) for name in names]
    ends = [(None, None) if entry.get("position") is None else entry["position"] for entry in entries]
    values = {kind: np.array([_number(entry.get(kind), math.inf) for entry in entries]) for kind in RATES}
    return Limits.none(
        names,
        low=np.array([_number(low, -math.inf) for low, _ in ends]),
        high=np.array([_number(high, math.inf) for _, high in ends]),
        **values,
        measured=tuple(entry.get("measured") for entry in entries),
        gripper=tuple(entry.get("gripper") for entry in entries),
        motion=tuple(HOLDS.get(entry.get("hold", "")) for entry in entries),
        origin={kind: tuple(origin if kind in entry else "" for entry in entries) for kind in KINDS},
    )


def _entry(entry: Any, states: int, where: str, error: Error) -> Mapping[str, Any]:
    """What is said of one dimension, checked."""
    if not isinstance(entry, Mapping):
        raise error(f"{where}: expected an object with {', '.join(KEYS)}, got {entry!r:.60}")
    said: dict[str, Any] = {key: _plain(value) for key, value in entry.items()}
    for key, value in said.items():
        if key not in KEYS:
            raise error(f"{where}: unknown key {key!r:.60}; there are {', '.join(KEYS)}")
        here = f"{where}.{key}"
        if key == "position" and value is not None:
            _position(value, here, error)
        elif key in RATES and value is not None and not (_is_number(value) and 0 <= value <= MOST_RATE):
            raise error(f"{here}: {value!r:.60}: expected a number of 0 or more, or null for no limit")
        elif key == "measured" and value is not None and not (_is_whole(value) and 0 <= value < states):
            raise error(f"{here}: {value!r:.60}: expected which number of the state, 0 to {states - 1}, or null")
        elif key == "gripper" and not isinstance(value, bool):
            raise error(f"{here}: {value!r:.60}: expected true or false")
        elif key == "hold" and not (isinstance(value, str) and value in HOLDS):
            raise error(f"{here}: {value!r:.60}: expected {' or '.join(map(repr, HOLDS))}")
    return said


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays, as a robot may give them, as Python's."""
    value = list(value) if isinstance(value, tuple) else value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _position(value: Any, where: str, error: Error) -> None:
    pair = value if isinstance(value, list) else []
    if len(pair) != 2 or not all(end is None or (_is_number(end) and abs(end) <= LARGEST) for end in pair):
        raise error(f"{where}: {value!r:.60}: expected [low, high], two numbers of float32, or null for no limit")
    if None not in pair and pair[0] > pair[1]:
        raise error(f"{where}: low {pair[0]:.6g} is above high {pair[1]:.6g}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else float(value)
