"""LeRobot's cameras: the VISUAL features of config.json in their order, under the names that the robot gives them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ki_edge.errors import CheckpointError
from ki_edge.policy.contract import Camera

from .lerobot_options import RENAME
from .lerobot_processors import STATE, Processor

IMAGES = "observation.images."
IMAGE = "observation."
EMPTY = IMAGES + "empty_camera_"
MOST_EMPTY = 100


def read_cameras(
    where: Path, inputs: Mapping[str, Mapping[str, Any]], empty: object, before: Processor | None
) -> tuple[Camera, ...]:
    """The VISUAL features in their order, then empty slots; keys are what the robot calls them, before renaming.

    None is required: LeRobot masks a camera that the robot does not send, such as the third one of a base model that
    was trained further with two.
    """
    names = [name for name, feature in inputs.items() if feature["type"] == "VISUAL"]
    if type(empty) is not int or not 0 <= empty <= MOST_EMPTY:
        raise CheckpointError(f"{where}: empty_cameras is {empty!r:.60}, expected a number from 0 to {MOST_EMPTY}")
    names += [name for at in range(empty) if (name := f"{EMPTY}{at}") not in names]
    keys = _renamed(before, (*names, *(name for name in inputs if name not in names)))
    cameras = []
    for name in names:
        key = None if name.startswith(EMPTY) else _short(keys.get(name, name))
        cameras.append(Camera(_short(name), key, required=False))
    for what in ("slot", "key"):
        counts = Counter(value for camera in cameras if (value := getattr(camera, what)) is not None)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise CheckpointError(f"{where}: two cameras of the policy have the short name '{twice[0]}'")
    return tuple(cameras)


def _renamed(before: Processor | None, features: tuple[str, ...]) -> dict[str, str]:
    """The model's name of a feature -> the robot's, as far as they differ.

    CheckpointError for a map that the policy was not trained with: a target that is no feature of it, one target for
    two names, and a feature of the policy that is renamed away.
    """
    if before is None or RENAME not in before.steps:
        return {}
    names = {old: new for old, new in before.steps[RENAME].config.get("rename_map", {}).items() if old != new}
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{before.where}: rename_map gives two features one name: {names!r:.300}")
    for old, new in names.items():
        if new not in (*features, STATE):
            have = ", ".join(features)
            raise CheckpointError(
                f"{before.where}: rename_map gives '{old}' the name '{new}', which no camera or state of the policy "
                f"has; config.json has {have or 'none'}: correct the map, or take the checkpoint that it belongs to"
            )
        if new.startswith(EMPTY):
            raise CheckpointError(
                f"{before.where}: rename_map gives '{old}' the name '{new}', a camera that the policy was "
                "trained to have empty"
            )
        if old in features and old not in names.values():
            raise CheckpointError(
                f"{before.where}: rename_map takes the name '{old}' from a feature of the policy and gives it to none"
            )
    return {new: old for old, new in names.items()}


def _short(name: str) -> str:
    """ "observation.images.front" -> "front"."""
    return name.removeprefix(IMAGES if name.startswith(IMAGES) else IMAGE)
