"""A bundle of ki_edge as a policy of LeRobot.

LeRobot imports this package by its name, which registers the type; it finds the modules by their names too.
"""

from .configuration_ki_edge import KiEdgeConfig

__all__ = ["KiEdgeConfig"]
