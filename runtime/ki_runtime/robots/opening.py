"""A robot opened by its name. Each kind is imported when one of its robots is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ki_edge.errors import RobotError

from .base import Robot


def open_robot(spec: str, **options: Any) -> Robot:
    """Open the robot named by `spec`, "gym:FetchReach-v4" or "replay:FILE"; `options` go to its constructor.

    The simulator is imported only for the robot that needs it.
    """
    kind, _, rest = spec.partition(":")
    opener = _OPENERS.get(kind)
    if opener is None or not rest:
        raise _unknown(spec)
    return opener(rest, options)


def _open_gym(env: str, options: dict[str, Any]) -> Robot:
    if env != "FetchReach-v4":
        raise _unknown(f"gym:{env}")
    from .fetch import GymRobot

    return GymRobot(**options)


def _open_replay(path: str, options: dict[str, Any]) -> Robot:
    from .replay import ReplayRobot

    return ReplayRobot(path, **options)


def _unknown(spec: str) -> RobotError:
    return RobotError(f"unknown robot {spec!r}: expected gym:FetchReach-v4 or replay:FILE")


_OPENERS: dict[str, Callable[[str, dict[str, Any]], Robot]] = {"gym": _open_gym, "replay": _open_replay}
