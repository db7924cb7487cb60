"""What of a Gymnasium environment is a policy's state, its cameras and its action: a JSON file.

    {"prompt": "push the block",                     optional
     "control_hz": 25, "max_steps": 50, "seed": 7,   optional: the environment's own; `seed`: of every episode
     "make": {...},                                  optional: arguments of gymnasium.make
     "state": [{"key": "observation", "indices": [0, 1, 2]}, {"key": "joints"}],
     "cameras": {"front": {"key": "pixels/front"},   a picture in the observation
                 "side": {"render": true},           what the environment renders
                 "top": {"mujoco": {"camera": "NAME"}, "size": [96, 96]},    a camera of a MuJoCo model, or a free one:
                 "free": {"mujoco": {"azimuth": 145, "elevation": -22, "distance": 1, "look_at": [0, 0, 0]}, ...}},
     "film": {...},                                  optional: as a camera, for films
     "actions": {"names": ["x", "y"], "scale": [10, 10], "offset": [0, 0], "relative_to": {"key": "observation"}},
     "success": {"info": "is_success"}}              optional; or {"terminated": true}, {"reward": 0.0}: at least that

A key of an observation is a path through its dicts; "" where it is none. The environment gets, for each number a of an
action, scale * (a - reference) + offset, within the bounds of its action space; references are numbers of the
observation, for the first numbers of an action.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from ki_edge.errors import RobotError
from ki_edge.files.reading import parse_json

from .fields import Fields
from .rendering import Camera

KEYS = ("prompt", "control_hz", "max_steps", "seed", "make", "state", "cameras", "film", "actions", "success")
SOURCES = ("key", "render", "mujoco")
MOST_PIXELS = 8192  # of a side of a picture


@dataclass(frozen=True)
class Numbers:
    """Some numbers of an observation. `indices`: which of the array's; None: all."""

    key: str
    indices: tuple[int, ...] | None


@dataclass(frozen=True)
class View:
    """Where a picture comes from: a key of the observation, what the environment renders, or a camera of MuJoCo."""

    key: str | None = None
    camera: Camera | str | None = None
    size: tuple[int, int] = (0, 0)  # height, width of a MuJoCo picture

    @property
    def rendered(self) -> bool:
        """Whether the environment renders it."""
        return self.key is None and self.camera is None


@dataclass(frozen=True)
class Success:
    """How an environment tells that it reached its aim."""

    info: str | None = None
    terminated: bool = False
    reward: float | None = None


@dataclass(frozen=True)
class GymMapping:
    """A mapping file, read; see the module. `scale`, `offset` [a]; `reference`: of the first numbers of an action."""

    state: tuple[Numbers, ...]
    cameras: Mapping[str, View]
    action_names: tuple[str, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    reference: Numbers | None
    success: Success | None
    make: Mapping[str, Any]
    film: View | None
    prompt: str | None
    control_hz: float | None
    max_steps: int | None
    seed: int | None

    @classmethod
    def read(cls, given: Any, where: str) -> GymMapping:
        """The mapping of a parsed JSON object. RobotError, which begins with `where`, says what is wrong with it."""
        fields = Fields(given, where, KEYS)
        views = fields.object("cameras")
        actions = Fields(fields.any("actions"), f"{where}: actions", ("names", "scale", "offset", "relative_to"))
        names = actions.names("names")
        size = len(names)
        reference = _numbers(actions.any("relative_to"), f"{where}: relative_to") if "relative_to" in actions else None
        if reference is not None and len(reference.indices or ()) > size:
            raise RobotError(f"{where}: relative_to has more indices than the action has names, {size}")
        return cls(
            state=_state(fields.any("state"), f"{where}: state"),
            cameras={name: _view(view, f"{where}: cameras: {name}") for name, view in views.items()},
            action_names=names,
            scale=actions.numbers("scale", size) if "scale" in actions else (1.0,) * size,
            offset=actions.numbers("offset", size) if "offset" in actions else (0.0,) * size,
            reference=reference,
            success=_success(fields.any("success"), f"{where}: success") if "success" in fields else None,
            make=fields.object("make") if "make" in fields else {},
            film=_view(fields.any("film"), f"{where}: film") if "film" in fields else None,
            prompt=fields.text("prompt") if "prompt" in fields else None,
            control_hz=fields.number("control_hz", 1e-3, 1e4) if "control_hz" in fields else None,
            max_steps=fields.count("max_steps") if "max_steps" in fields else None,
            seed=fields.count("seed", 0) if "seed" in fields else None,
        )


def shipped_mappings() -> dict[str, Any]:
    """The files that come with this package, by the environment's id."""
    return {
        place.name.removesuffix(".json"): place
        for place in files("ki_runtime.robots").joinpath("mappings").iterdir()
        if place.name.endswith(".json")
    }


def shipped(name: str) -> GymMapping:
    """The mapping that comes with this package. RobotError for an environment that has none."""
    known = shipped_mappings()
    if name not in known:
        have = ", ".join(["FetchReach-v4", *sorted(known)])
        if near := get_close_matches(name, ["FetchReach-v4", *known], 1, 0.85):
            raise RobotError(f"robot 'gym:{name[:80]}': no such environment is known; did you mean gym:{near[0]}?")
        raise RobotError(
            f"robot 'gym:{name[:80]}' needs --robot-config FILE, which says what of the environment is state, camera "
            f"and action (docs/robots.md); without one there is {have}"
        )
    return GymMapping.read(parse_json(known[name].read_bytes(), str(known[name]), RobotError), known[name].name)


def _state(given: Any, where: str) -> tuple[Numbers, ...]:
    if not isinstance(given, list | tuple) or not given:
        raise RobotError(f'{where}: expected a list such as [{{"key": "observation"}}], got {given!r:.60}')
    return tuple(_numbers(part, f"{where}[{at}]") for at, part in enumerate(given))


def _numbers(given: Any, where: str) -> Numbers:
    fields = Fields(given, where, ("key", "indices"))
    return Numbers(fields.text("key"), fields.counts("indices") if "indices" in fields else None)


def _view(given: Any, where: str) -> View:
    fields = Fields(given, where, (*SOURCES, "size"))
    sources = [name for name in SOURCES if name in fields]
    if len(sources) != 1 or (sources == ["render"] and not fields.flag("render")):
        raise RobotError(f"{where}: expected one of {', '.join(SOURCES)}, got {given!r:.80}")
    if sources != ["mujoco"] and "size" in fields:
        raise RobotError(f"{where}: size is for mujoco alone; the policy resizes every picture by itself")
    if "key" in fields:
        return View(key=fields.text("key"))
    if "render" in fields:
        return View()
    height, width = fields.counts("size") if len(fields.counts("size")) == 2 else (0, 0)
    if not (1 <= height <= MOST_PIXELS and 1 <= width <= MOST_PIXELS):
        raise RobotError(f"{where}: size is {fields.any('size')!r:.60}, expected [height, width] in pixels")
    return View(camera=_camera(fields.any("mujoco"), f"{where}: mujoco"), size=(height, width))


def _camera(given: Any, where: str) -> Camera | str:
    if isinstance(given, Mapping) and "camera" in given:
        return Fields(given, where, ("camera",)).text("camera")
    fields = Fields(given, where, ("azimuth", "elevation", "distance", "look_at"))
    x, y, z = fields.numbers("look_at", 3)
    return Camera(where, fields.number("azimuth"), fields.number("elevation"), fields.number("distance"), (x, y, z))


def _success(given: Any, where: str) -> Success:
    fields = Fields(given, where, ("info", "terminated", "reward"))
    if sum(name in fields for name in ("info", "terminated", "reward")) != 1:
        raise RobotError(f"{where}: expected one of info, terminated, reward, got {given!r:.80}")
    return Success(
        fields.text("info") if "info" in fields else None,
        fields.flag("terminated") if "terminated" in fields else False,
        fields.number("reward") if "reward" in fields else None,
    )
