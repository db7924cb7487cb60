"""Robots that a policy can drive: simulated, or replayed from a file. The simulator at first use.

Imports: of ki_edge: policy, recordings.
"""

from ki_edge.errors import RobotError

from .base import EpisodeStatus, Robot
from .opening import open_robot

__all__ = ["EpisodeStatus", "Robot", "RobotError", "open_robot"]
