"""A recorded episode on disk: an .npz of T steps.

    images/<camera>   u8 [T, h, w, 3] RGB (or [T, 3, h, w]) of each camera
    state             float [T, s], robot units
    actions           float [T, a], robot units
    prompt            a string

Cameras and state may also stand under the robot's own keys, as its observations have them (`observation/image`,
`observation/joint_position` and `observation/gripper_position`), or under LeRobot's (`observation.images.front`,
`observation.state`, `action`, `task`). Other arrays are not read. Nothing is unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ki_edge.errors import DatasetError
from ki_edge.files.npz import Header, Headers, read_headers, read_npz

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

MAX_BYTES = 4 << 30  # of all arrays that are read, uncompressed
MAX_PROMPT = 4096  # characters
ACTIONS, PROMPTS = ("actions", "action"), ("prompt", "task")
STATES = ("state", "observation/state", "observation.state")
PARTS = ("observation/joint_position", "observation/gripper_position")  # of a state
PREFIXES = ("images/", "observation.images.")
CURE = "; record it again with ki_runtime.robots.replay.record_episode"


class Pictures(Protocol):
    """A camera's pictures by step, each u8 [h, w, 3] or [3, h, w]: an array, or a film that is decoded step by step."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, step: int) -> npt.NDArray[np.uint8]: ...


@dataclass(frozen=True, eq=False)
class RecordedEpisode:
    """The arrays of an episode. `cameras`: pictures by camera, without the prefix of its name in the file."""

    where: str  # its file, for messages
    cameras: Mapping[str, Pictures]  # [T, h, w, 3] or [T, 3, h, w]
    state: Float32  # [T, s]
    actions: Float32  # [T, a]
    prompt: str | None
    contents: str  # every array of the file with its shape, for messages

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RecordedEpisode:
        """Read an episode; headers are checked before any data is read. DatasetError names what does not fit."""
        path = Path(path)
        headers = read_headers(path, DatasetError, CURE)
        arrays = read_npz(path, MAX_BYTES, DatasetError, header_fault, _wanted, CURE)
        if fault := value_fault(arrays):
            raise DatasetError(f"{path}: {fault}{CURE}")
        parts = [arrays[name].reshape(len(arrays[name]), -1) for name in _state_names(headers)]
        prompt = _first(PROMPTS, headers)
        return cls(
            str(path),
            {_camera(name): array for name, array in arrays.items() if _is_camera(name, headers[name])},
            np.concatenate(parts, axis=1).astype(np.float32),
            arrays[_first(ACTIONS, headers) or ""].astype(np.float32),
            None if prompt is None else str(arrays[prompt]),
            _contents(headers),
        )

    def __len__(self) -> int:
        return len(self.actions)


def value_fault(arrays: Mapping[str, Array]) -> str:
    """The first number that is not finite in float32; "" if none."""
    for name, array in arrays.items():
        if array.dtype.kind == "f":
            with np.errstate(over="ignore", invalid="ignore"):
                bad = np.argwhere(~np.isfinite(array.astype(np.float32)))
            if len(bad):
                place = "".join(f"[{i}]" for i in bad[0])
                return f"{name}{place} is {array[tuple(bad[0])]:.6g}, which is not finite in float32"
    return ""


def _wanted(headers: Headers) -> list[str]:
    """The arrays that are read."""
    single = (_first(ACTIONS, headers), _first(PROMPTS, headers), *_state_names(headers))
    return [*(name for name in single if name), *(name for name in headers if _is_camera(name, headers[name]))]


def _state_names(headers: Headers) -> tuple[str, ...]:
    """One array, or the parts that make it up."""
    whole = _first(STATES, headers)
    return (whole,) if whole is not None else tuple(name for name in PARTS if name in headers)


def _first(names: tuple[str, ...], headers: Headers) -> str | None:
    return next((name for name in names if name in headers), None)


def _is_camera(name: str, header: Header) -> bool:
    """Whether an array holds pictures: by its prefix, or of a robot's own key by what it is."""
    shape, dtype = header
    return _camera(name) != name or (len(shape) == 4 and dtype == np.uint8)


def _camera(name: str) -> str:
    return next((name[len(prefix) :] for prefix in PREFIXES if name.startswith(prefix) and name != prefix), name)


def header_fault(headers: Headers) -> str:
    """What is wrong with the names, shapes and dtypes of an episode; "" if nothing."""
    actions, prompt, states = _first(ACTIONS, headers), _first(PROMPTS, headers), _state_names(headers)
    cameras = [name for name in headers if _is_camera(name, headers[name])]
    there = {"state": states, "actions": actions, "images/<camera>": cameras}
    if missing := [name for name, found in there.items() if not found]:
        return f"{', '.join(missing)} is missing, found {_contents(headers)}"
    size = sum(int(np.prod(headers[name][0], dtype=object)) * headers[name][1].itemsize for name in _wanted(headers))
    if size > MAX_BYTES:
        return f"{size} bytes of arrays, at most {MAX_BYTES} are read"
    if prompt is not None:
        shape, dtype = headers[prompt]
        if shape != () or dtype.kind != "U" or dtype.itemsize > 4 * MAX_PROMPT:
            return f"{prompt} is {dtype} {list(shape)}, expected one string of up to {MAX_PROMPT} characters"
    assert actions is not None
    steps = headers[actions][0][0] if headers[actions][0] else 0
    for name in (actions, *states):
        shape, dtype = headers[name]
        flat = name in PARTS and len(shape) == 1  # a gripper's number
        if (len(shape) != 2 and not flat) or dtype.kind != "f" or shape[0] != steps or 0 in shape:
            return f"{name} is {dtype} {list(shape)}, expected float32 [T, n] with T = {steps} (of actions) and not 0"
    for name in cameras:
        shape, dtype = headers[name]
        if len(shape) != 4 or dtype != np.uint8 or shape[0] != steps or 3 not in (shape[1], shape[3]) or 0 in shape:
            return f"{name} is {dtype} {list(shape)}, expected uint8 [{steps}, h, w, 3]"
    return ""


def _contents(headers: Headers) -> str:
    found = [f"{name} {dtype}{list(shape)}" for name, (shape, dtype) in sorted(headers.items())[:12]]
    more = [f"and {len(headers) - 12} more"] if len(headers) > 12 else []
    return ", ".join([*found, *more]) or "nothing"
