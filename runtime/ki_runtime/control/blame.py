"""Whose error an exception is: of a robot, whose maker wants to know which of its methods failed where."""

from __future__ import annotations

import traceback

from ki_edge.errors import KiEdgeError, RobotError
from ki_runtime.robots.base import Robot


def blamed(error: Exception, robot: Robot) -> Exception:
    """A RobotError with the method and the place, for what a method of `robot` raised; any other error as it is."""
    if isinstance(error, KiEdgeError | OSError | MemoryError):
        return error
    frames = list(traceback.walk_tb(error.__traceback__))
    method = next((frame.f_code.co_name for frame, _ in frames if frame.f_locals.get("self") is robot), None)
    if method is None:
        return error
    last, line = frames[-1]
    words = " ".join(str(error).split())
    return RobotError(
        f"{robot.name}: {method}() raised {type(error).__name__}{f': {words}' if words else ''} "
        f"({last.f_code.co_filename}:{line})"
    )
