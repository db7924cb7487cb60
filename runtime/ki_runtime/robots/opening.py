"""A robot opened by its name. Each kind is imported when one of its robots is asked for."""

from __future__ import annotations

from typing import Any

from ki_edge.errors import RobotError

from .base import Robot


def open_robot(spec: str, **options: Any) -> Robot:
    """Open the robot named by `spec`, "gym:FetchReach-v4" or "replay:FILE"; `options` go to its constructor.

    The simulator is imported only for the robot that needs it.
    """
    kind, _, rest = spec.partition(":")
    if spec == "gym:FetchReach-v4":
        from .fetch import GymRobot

        return GymRobot(**options)
    if kind == "replay" and rest:
        from .replay import ReplayRobot

        return ReplayRobot(rest, **options)
    raise RobotError(f"unknown robot {spec!r}: expected gym:FetchReach-v4 or replay:FILE")
