"""A recorded episode as a robot: `replay:FILE` shows its observations and keeps the actions predicted for them.

The file is an .npz: "images/<camera>" u8 [T, h, w, 3] for each camera, "state" f32 [T, s], "actions" f32 [T, a] and
"prompt", a string. Nothing in it is unpickled.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_edge.errors import RobotError
from ki_edge.npz import Header, read_npz
from ki_runtime.robots.base import EpisodeStatus, checked_action

MAX_BYTES = 4 << 30  # all arrays of a file together, uncompressed
MAX_PROMPT = 4096  # characters
_CURE = "record it again with ki_runtime.robots.replay.record_episode"


class ReplayRobot:
    """Open loop: `act` stores the predicted action and moves on to the next recorded step.

    Attributes: `recorded` f32 [T, a], the actions in the file; `predicted` f32 [T, a], NaN where none was given yet.
    """

    def __init__(self, path: str | os.PathLike[str], *, prompt: str | None = None, control_hz: float = 25.0) -> None:
        self.name = f"replay:{os.fspath(path)}"
        self.control_hz = control_hz
        arrays = _load(Path(path))
        self._images = {name.partition("/")[2]: array for name, array in arrays.items() if name.startswith("images/")}
        self._state = arrays["state"].astype(np.float32)
        self._prompt = str(arrays["prompt"]) if prompt is None else prompt
        self.recorded = arrays["actions"].astype(np.float32)
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Back to the first step; forgets the predictions. The seed changes nothing."""
        self._step = 0
        self.predicted = np.full_like(self.recorded, np.nan)

    def observe(self) -> dict[str, Any]:
        """The recorded observation of the present step; after the end, that of the last one."""
        t = min(self._step, len(self.recorded) - 1)
        images = {camera: pictures[t].copy() for camera, pictures in self._images.items()}
        return {"images": images, "state": self._state[t].copy(), "prompt": self._prompt}

    def act(self, action: NDArray[np.float32]) -> None:
        """Store the action f32 [a] as the prediction of the present step."""
        values = checked_action(action, self.recorded.shape[1], self.name)
        if self._step >= len(self.recorded):
            raise RobotError(f"{self.name}: the recording has {len(self.recorded)} steps and is over; call reset()")
        self.predicted[self._step] = values
        self._step += 1

    def status(self) -> EpisodeStatus:
        """Done at the recording's end; whether it succeeded is not known."""
        return EpisodeStatus(self._step >= len(self.recorded), None, self._step)

    def frame(self) -> NDArray[np.uint8] | None:
        """The recorded pictures side by side where all are equally high, else the first one."""
        images: dict[str, NDArray[np.uint8]] = self.observe()["images"]
        pictures = [images[camera] for camera in sorted(images)]
        same = len({picture.shape[0] for picture in pictures}) == 1
        return np.concatenate(pictures, axis=1) if same else pictures[0]

    def close(self) -> None:
        """Nothing to release."""


def record_episode(
    path: str | os.PathLike[str],
    *,
    images: Mapping[str, NDArray[np.uint8]],
    state: NDArray[np.float32],
    actions: NDArray[np.float32],
    prompt: str,
) -> None:
    """Write an episode of T steps: images {camera: u8 [T, h, w, 3]}, state f32 [T, s], actions f32 [T, a].

    The file appears complete or not at all.
    """
    arrays: dict[str, NDArray[Any]] = {f"images/{camera}": np.asarray(value) for camera, value in images.items()}
    arrays |= {"state": np.asarray(state), "actions": np.asarray(actions), "prompt": np.array(prompt)}
    target = Path(path)
    fault = _fault({name: (array.shape, array.dtype) for name, array in arrays.items()}) or _value_fault(arrays)
    if fault:
        raise RobotError(f"cannot record {target}: {fault}")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    temporary.replace(target)


def _load(path: Path) -> dict[str, NDArray[Any]]:
    """The file's arrays; their headers are checked before any of their data is read."""
    try:
        arrays = read_npz(path, MAX_BYTES, RobotError, _fault)
    except RobotError as error:
        raise RobotError(f"{error}; {_CURE}") from None
    fault = _value_fault(arrays)
    if fault:
        raise RobotError(f"{path}: {fault}; {_CURE}")
    return arrays


def _fault(headers: Mapping[str, Header]) -> str:
    """What is wrong with the names, shapes and dtypes of an episode; "" if nothing."""
    missing = [name for name in ("state", "actions", "prompt") if name not in headers]
    cameras = [name for name in headers if name.startswith("images/") and len(name) > 7]
    if missing or not cameras:
        return f"{', '.join(missing or ['images/<camera>'])} is missing, found {sorted(headers)}"
    shape, dtype = headers["prompt"]
    if shape != () or dtype.kind != "U" or dtype.itemsize > 4 * MAX_PROMPT:
        return f"prompt is {dtype} {list(shape)}, expected one string of up to {MAX_PROMPT} characters"
    steps = headers["actions"][0][0] if headers["actions"][0] else 0
    for name in ("actions", "state"):
        shape, dtype = headers[name]
        if len(shape) != 2 or dtype.kind != "f" or shape[0] != steps or 0 in shape:
            return f"{name} is {dtype} {list(shape)}, expected float32 [T, n] with T = {steps} (of actions) and not 0"
    for name in cameras:
        shape, dtype = headers[name]
        if len(shape) != 4 or dtype != np.uint8 or shape[0] != steps or shape[3] != 3 or 0 in shape:
            return f"{name} is {dtype} {list(shape)}, expected uint8 [{steps}, h, w, 3]"
    return ""


def _value_fault(arrays: Mapping[str, NDArray[Any]]) -> str:
    """The first array of numbers with a value that is not finite; "" if none."""
    for name in ("state", "actions"):
        if not np.isfinite(arrays[name]).all():
            return f"{name} holds values that are not finite"
    return ""
