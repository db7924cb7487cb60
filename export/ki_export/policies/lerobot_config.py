"""What LeRobot's config.json records of a policy: sizes, cameras in their order, dims of state and action."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ki_edge.contract import Camera
from ki_edge.errors import CheckpointError

from .lerobot_processors import ACTION, RENAME, STATE, Processor
from .request import GIVE_CONTRACT

CONFIG = "config.json"
IMAGES = "observation.images."
IMAGE = "observation."
EMPTY = IMAGES + "empty_camera_"
# config.json's name -> what ki_edge's model has built in
BUILT_IN: Mapping[str, object] = {
    "n_obs_steps": 1,
    "min_period": 4e-3,
    "max_period": 4.0,
    "use_visual_memory": False,
    "use_proprioceptive_memory": False,
}
# config.json's name -> the contract's
NUMBERS = {
    "chunk_size": "action_horizon",
    "n_action_steps": "execute",
    "max_action_dim": "model_action_dim",
    "num_inference_steps": "num_steps",
    "tokenizer_max_length": "max_token_len",
}


@dataclass
class Notes:
    """Contract fields as they are read: values, the file of each, and what is missing."""

    values: dict[str, Any]
    known: dict[str, str]
    missing: list[str]

    def add(self, where: str, **values: Any) -> None:
        self.values.update(values)
        self.known.update(dict.fromkeys(values, where))


def read_config(folder: Path, settings: Mapping[str, Any], before: Processor | None, notes: Notes) -> None:
    """Sizes, cameras and dims of config.json; CheckpointError for an option that this model does not have."""
    where = folder / CONFIG
    for name, expected in BUILT_IN.items():
        if settings.get(name, expected) != expected:
            raise CheckpointError(f"{where}: {name} is {settings[name]!r}; only {expected!r} can be exported")
    for name, field in NUMBERS.items():
        value = settings.get(name)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{where}: {name} is {value!r}, expected a positive integer")
        notes.add(CONFIG, **{field: value})
    size = settings.get("image_resolution")
    if size is not None:
        if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
            raise CheckpointError(f"{where}: image_resolution is {size!r}, expected [height, width]")
        notes.add(CONFIG, image_size=tuple(size))
    notes.add("LeRobot", normalization_epsilon="lerobot", time_convention="lerobot")
    notes.add("LeRobot", adapt_to_pi=False)
    inputs, outputs = (_features(where, settings, name) for name in ("input_features", "output_features"))
    for field, features, key in (("state_dim", inputs, STATE), ("action_dim", outputs, ACTION)):
        if key in features:
            notes.add(CONFIG, **{field: _length(where, key, features[key])})
        else:
            notes.missing.append(f"{CONFIG} has no feature '{key}', so {field} is not recorded ({GIVE_CONTRACT})")
    cameras = _cameras(where, inputs, settings.get("empty_cameras", 0), before)
    if cameras:
        notes.add(CONFIG, cameras=cameras)
    else:
        notes.missing.append(f"{CONFIG} has no camera among its input_features ({GIVE_CONTRACT})")


def _cameras(
    where: Path, inputs: Mapping[str, Mapping[str, Any]], empty: object, before: Processor | None
) -> tuple[Camera, ...]:
    """The VISUAL features in their order, then empty slots; keys are what the robot calls them, before renaming."""
    names = [name for name, feature in inputs.items() if feature.get("type") == "VISUAL"]
    if type(empty) is not int or not 0 <= empty <= 100:
        raise CheckpointError(f"{where}: empty_cameras is {empty!r}, expected a small number")
    names += [name for at in range(empty) if (name := f"{EMPTY}{at}") not in names]
    keys = _renamed(before)
    cameras = []
    for name in names:
        is_empty = name.startswith(EMPTY)
        cameras.append(Camera(_short(name), None if is_empty else _short(keys.get(name, name)), not is_empty))
    return tuple(cameras)


def _renamed(before: Processor | None) -> dict[str, str]:
    """The model's name of a feature -> the robot's, as far as they differ."""
    if before is None or RENAME not in before.steps:
        return {}
    names = before.steps[RENAME].config.get("rename_map") or {}
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{before.where}: rename_map must map names to names")
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{before.where}: rename_map gives two features one name: {names}")
    return {new: old for old, new in names.items()}


def _short(name: str) -> str:
    """ "observation.images.front" -> "front"."""
    return name.removeprefix(IMAGES if name.startswith(IMAGES) else IMAGE)


def _features(where: Path, settings: Mapping[str, Any], name: str) -> Mapping[str, Mapping[str, Any]]:
    features = settings.get(name) or {}
    if not isinstance(features, dict) or not all(isinstance(feature, dict) for feature in features.values()):
        raise CheckpointError(f"{where}: {name} must be an object of objects")
    return features


def _length(where: Path, name: str, feature: Mapping[str, Any]) -> int:
    shape = feature.get("shape")
    if not (isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and shape[0] >= 1):
        raise CheckpointError(f"{where}: the feature '{name}' has shape {shape!r}, expected [numbers]")
    return shape[0]
