"""Between LeRobot's batches of tensors and observations of a policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from lerobot.configs.types import FeatureType, PolicyFeature
from torch import Tensor

from ki_edge.errors import ObservationError
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.keys import PREFIXES

STATE, IMAGES, ACTION, TASK = "observation.state", "observation.images.", "action", "task"


def observations_of(
    batch: Mapping[str, Any], contract: PolicyContract, rename: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """One observation a row of the batch: pictures, state f32 [s], and the task where there is one.

    Of a batch LeRobot's keys are read: `observation.state` [B, s], `observation.images.NAME` or `observation.image`
    [B, 3, h, w], and `task`, a text or one a row. ObservationError if there is no state, or rows differ in number.
    """
    names = rename or {}
    found = {names.get(key, key): value for key, value in batch.items() if isinstance(key, str)}
    state = found.get(STATE)
    if not isinstance(state, Tensor) or state.ndim != 2:
        given = "nothing" if state is None else f"{type(state).__name__} {list(getattr(state, 'shape', ()))}"
        raise ObservationError(f"{STATE}: expected a tensor [B, {contract.state_dim}] in the batch, got {given}")
    rows = len(state)
    pictures = {key: value for key, value in found.items() if _is_picture(key, value)}
    for key, value in pictures.items():
        if value.ndim != 4 or len(value) != rows:
            raise ObservationError(f"{key}: expected a tensor [{rows}, 3, h, w] in the batch, got {list(value.shape)}")
    tasks = _tasks(found.get(TASK), rows)
    return [
        {
            STATE: _numpy(state[row]),
            **{key: _picture(value[row], contract) for key, value in pictures.items()},
            **({} if tasks[row] is None else {TASK: tasks[row]}),
        }
        for row in range(rows)
    ]


def input_features(contract: PolicyContract, rename: Mapping[str, str] | None = None) -> dict[str, PolicyFeature]:
    """What a policy reads: its cameras and the state.

    LeRobot compares the names of the cameras with the robot's, and refuses a robot that lacks some and has others.
    """
    height, width = contract.image_size
    back = {policy: robot for robot, policy in (rename or {}).items()}
    cameras = [_camera_key(camera.key) for camera in contract.cameras if camera.key is not None]
    features = {key: PolicyFeature(FeatureType.VISUAL, (3, height, width)) for key in cameras}
    features[STATE] = PolicyFeature(FeatureType.STATE, (contract.state_dim,))
    return {back.get(key, key): feature for key, feature in features.items()}


def output_features(contract: PolicyContract) -> dict[str, PolicyFeature]:
    """What a policy gives."""
    return {ACTION: PolicyFeature(FeatureType.ACTION, (contract.action_dim,))}


def _camera_key(key: str) -> str:
    """LeRobot's key of a contract's camera."""
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
    return IMAGES + key.removeprefix(prefix)


def _is_picture(key: str, value: Any) -> bool:
    return key.startswith("observation.") and "image" in key and isinstance(value, Tensor)


def _picture(picture: Tensor, contract: PolicyContract) -> np.ndarray:
    """[3, h, w] in the form that the policy's makers resized: LeRobot's floats, or openpi's bytes.

    LeRobot made floats of bytes; where bytes are wanted they are restored by rounding: of float16, cutting decimals
    off, as openpi does with floats, would make every other pixel darker.
    """
    array = _numpy(picture)
    if contract.pictures == "uint8" and np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all():
        return np.clip(np.rint(array.astype(np.float32) * 255), 0, 255).astype(np.uint8)
    return array


def _tasks(task: Any, rows: int) -> list[str | None]:
    """The task of each row; None where none is given."""
    given = [task] * rows if task is None or isinstance(task, str) else list(task)
    if len(given) == 1:
        given = given * rows
    if len(given) != rows:
        raise ObservationError(f"task: expected one text, or one for each of {rows} rows, got {len(given)}")
    return [text or None for text in given]


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
