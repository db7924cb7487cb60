"""What of a LeRobot robot is a policy's state, its cameras and its action: a JSON file.

{"robot": {"id": "my_arm", "port": "/dev/ttyACM0", "cameras": {...}},    the fields of LeRobot's own configuration
 "state": ["shoulder_pan.pos", "gripper.pos"],     keys of its observations; left out: all its numbers, in its order
 "actions": ["shoulder_pan.pos", "gripper.pos"],   keys of its actions; left out: all of them, in its order;
                                                   {"name in the policy": "key"} where the policy names them otherwise
 "fixed": {"base.vel": 0},                         keys of its actions that the policy does not command
 "cameras": {"front": "wrist_cam"},                the policy's name: a key of its observations; left out: its own
 "film": "front",                                  optional: the camera of films
 "prompt": "fold the towel", "control_hz": 30, "max_steps": 600}           optional; max_steps: of an episode
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ki_edge.errors import RobotError

from .fields import Fields

KEYS = ("robot", "state", "actions", "fixed", "cameras", "film", "prompt", "control_hz", "max_steps")
WHERE = "robot configuration"


@dataclass(frozen=True)
class Mapped:
    """A mapping that fits a robot. Keys are the robot's; `cameras`: the policy's name -> a key."""

    state: tuple[str, ...]
    actions: tuple[str, ...]
    action_names: tuple[str, ...]
    fixed: Mapping[str, float]
    cameras: Mapping[str, str]
    film: str | None
    prompt: str | None
    control_hz: float | None
    max_steps: int | None


def read_mapping(given: Mapping[str, Any], seen: Mapping[str, Any], taken: Mapping[str, Any], robot: str) -> Mapped:
    """The mapping of a configuration on a robot of LeRobot.

    `seen`, `taken`: its observation_features and action_features: key -> float, or the shape of a picture. RobotError
    for a key that the robot does not have, with those that it has.
    """
    fields = Fields(given, WHERE, KEYS)
    numbers = [key for key, kind in seen.items() if not isinstance(kind, tuple | list)]
    pictures = [key for key, kind in seen.items() if isinstance(kind, tuple | list)]
    state = fields.names("state") if "state" in fields else tuple(numbers)
    _known("state", state, numbers, f"{robot} observes")
    names, actions = _actions(fields, taken)
    _known("actions", actions, list(taken), f"{robot} takes")
    fixed = {key: Fields({key: value}, f"{WHERE}: fixed", (key,)).number(key) for key, value in _fixed(fields).items()}
    _known("fixed", tuple(fixed), list(taken), f"{robot} takes")
    if twice := [key for key in actions if key in fixed]:
        raise RobotError(f"{WHERE}: {', '.join(twice)} is both in actions and in fixed")
    if left := [key for key in taken if key not in actions and key not in fixed]:
        raise RobotError(
            f"{WHERE}: nothing commands {', '.join(left)} of {robot}: name it in actions, or give its value in fixed"
        )
    cameras = {key: key for key in pictures}
    if "cameras" in fields:
        cameras = {name: str(key) for name, key in fields.object("cameras").items()}
        _known("cameras", tuple(cameras.values()), pictures, f"{robot} has the cameras")
    film = fields.text("film") if "film" in fields else next(iter(cameras), None)
    if film is not None:
        _known("film", (film,), list(cameras), "there are the cameras")
    return Mapped(
        state=state,
        actions=actions,
        action_names=names,
        fixed=fixed,
        cameras=cameras,
        film=film,
        prompt=fields.text("prompt") if "prompt" in fields else None,
        control_hz=fields.number("control_hz", 1e-3, 1e4) if "control_hz" in fields else None,
        max_steps=fields.count("max_steps") if "max_steps" in fields else None,
    )


def _actions(fields: Fields, taken: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the policy's names of an action's numbers, the robot's keys)."""
    if "actions" not in fields:
        keys = tuple(key for key in taken if key not in _fixed(fields))
        return keys, keys
    if not isinstance(fields.any("actions"), Mapping):
        keys = fields.names("actions")
        return keys, keys
    named = Fields(dict(fields.object("actions")), f"{WHERE}: actions", fields.object("actions"))
    keys = tuple(named.text(name) for name in fields.object("actions"))
    if twice := [key for at, key in enumerate(keys) if key in keys[:at]]:
        raise RobotError(f"{WHERE}: actions has {twice[0]!r:.60} twice")
    return tuple(fields.object("actions")), keys


def _fixed(fields: Fields) -> Mapping[str, Any]:
    return fields.object("fixed") if "fixed" in fields else {}


def _known(what: str, keys: tuple[str, ...], known: list[str], has: str) -> None:
    if unknown := [key for key in keys if key not in known]:
        raise RobotError(f"{WHERE}: {what}: there is no {', '.join(unknown)}; {has} {', '.join(known) or 'nothing'}")
