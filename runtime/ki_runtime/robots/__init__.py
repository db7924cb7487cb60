"""Robots that a policy can drive: simulated, replayed from a file, of LeRobot, of openpi, or anybody's own class.

What drives one is imported when it is opened. Imports: of ki_edge: files, policy, recordings.
"""

from ki_edge.errors import RobotError

from .base import EpisodeStatus, Robot
from .opening import open_robot

__all__ = ["EpisodeStatus", "Robot", "RobotError", "open_robot"]
