"""A robot opened by its name. Each kind is imported when one of its robots is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ki_edge.errors import RobotError
from ki_edge.files.reading import read_object

from .base import Robot
from .classes import NoModule, construct, load_class, load_offered, offered, package_of
from .protocol import check_robot

Config = Mapping[str, Any]
Opener = Callable[[str, Config, Config], Any]  # what follows the kind's name, the configuration, options


def open_robot(spec: str, *, config: Config | str | os.PathLike[str] | None = None, **options: Any) -> Robot:
    """Open the robot named by `spec`:

    gym:ID                a Gymnasium environment, described by `config` (those of Fetch need none)
    replay:FILE           a recorded episode
    lerobot:TYPE          a robot of LeRobot, described by `config`
    openpi:MODULE:CLASS   an openpi environment, made with the keys of `config`
    NAME, NAME:ARG        one that an installed package offers (entry points `ki_edge.robots`), made with ARG
    MODULE:CLASS[:ARG]    any class, also of a module in the current folder

    `config`: a mapping, or a JSON file with an object; of the last two kinds its keys are arguments of the class.
    `options` go to the constructor too. RobotError says what there is, where `spec` names nothing; what fails; and what
    the object lacks of a robot.
    """
    if not isinstance(spec, str):
        raise RobotError(f"a robot is named by text, such as gym:FetchReach-v4, got {type(spec).__name__}")
    given = config if isinstance(config, Mapping) else {} if config is None else _read(config)
    kind, _, rest = spec.partition(":")
    if kind in BUILT_IN:
        if not rest:
            raise RobotError(f"robot {spec!r:.80}: expected {kind}:{BUILT_IN[kind][0]}")
        robot = BUILT_IN[kind][1](rest, given, options)
    else:
        robot = _open_class(spec, kind, rest, {**given, **options})
    try:
        check_robot(robot, spec)
    except RobotError:
        _leave(robot)
        raise
    return robot  # type: ignore[no-any-return]


def check_known(spec: str, config: object = None) -> None:
    """RobotError for a name that `open_robot` cannot know, before anything else is opened. Modules are imported."""
    kind, _, rest = spec.partition(":")
    if kind == "gym" and rest and config is None and rest != "FetchReach-v4":
        from .gym_mapping import shipped

        shipped(rest)
    if kind not in BUILT_IN:
        _find_class(spec, kind, rest)


def known_robots() -> str:
    """What `open_robot` takes here, in one line."""
    kinds = [f"{kind}:{rest}" for kind, (rest, _) in BUILT_IN.items()]
    names = [f"{name} (of {package_of(points[0])})" for name, points in offered().items()]
    others = f"; installed packages offer {', '.join(names)}" if names else "; no installed package offers another"
    return f"{', '.join(kinds)} or MODULE:CLASS, such as my_robot:MyArm{others}"


def _open_class(spec: str, name: str, rest: str, options: Config) -> Any:
    found, argument = _find_class(spec, name, rest)
    return construct(found, (argument,) if argument else (), options, f"robot {spec!r:.80}")


def _find_class(spec: str, name: str, rest: str) -> tuple[Any, str]:
    """A robot's class and the argument that follows its name."""
    points = offered().get(name)
    if points is not None:
        return load_offered(name, points), rest
    attribute, _, argument = rest.partition(":")
    if not name or not attribute:
        raise RobotError(f"unknown robot {spec!r:.80}: expected {known_robots()}")
    try:
        return load_class(name, attribute, f"robot {spec!r:.80}"), argument
    except NoModule as error:
        raise RobotError(f"{error}; there is {known_robots()}") from None


def _open_gym(rest: str, config: Config, options: Config) -> Any:
    if rest == "FetchReach-v4" and not config:
        from .fetch import GymRobot

        return construct(GymRobot, (), options, "robot 'gym:FetchReach-v4'")
    from .environment import EnvironmentRobot
    from .gym_mapping import GymMapping, shipped

    mapping = GymMapping.read(config, "robot configuration") if config else shipped(rest)
    return construct(EnvironmentRobot, (rest, mapping), options, f"robot 'gym:{rest[:80]}'")


def _open_replay(rest: str, config: Config, options: Config) -> Any:
    from .replay import ReplayRobot

    return construct(ReplayRobot, (rest,), {**config, **options}, f"robot 'replay:{rest}'")


def _open_lerobot(rest: str, config: Config, options: Config) -> Any:
    from .lerobot_robot import LerobotRobot

    return construct(LerobotRobot.open, (rest, config), options, f"robot 'lerobot:{rest[:80]}'")


def _open_openpi(rest: str, config: Config, options: Config) -> Any:
    from .openpi_robot import OpenpiRobot

    return OpenpiRobot.open(rest, {**config, **options})


BUILT_IN: Mapping[str, tuple[str, Opener]] = {
    "gym": ("ID", _open_gym),
    "replay": ("FILE", _open_replay),
    "lerobot": ("TYPE", _open_lerobot),
    "openpi": ("MODULE:CLASS", _open_openpi),
}


def _read(path: str | os.PathLike[str]) -> Config:
    return read_object(Path(path), RobotError)


def _leave(robot: Any) -> None:
    """Close what was opened and cannot be driven, as far as it can be closed."""
    close = getattr(robot, "close", None)
    if callable(close) and not isinstance(robot, type):
        try:
            close()
        except Exception:
            return
