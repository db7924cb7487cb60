"""What LeRobot's config.json records of a policy: sizes, cameras in their order, dims of state and action."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ki_edge.errors import CheckpointError

from .lerobot_cameras import read_cameras
from .lerobot_options import is_features
from .lerobot_processors import ACTION, STATE, Processor
from .request import GIVE_CONTRACT

CONFIG = "config.json"
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
        value = settings.get(name, expected)
        if value != expected or isinstance(value, bool) != isinstance(expected, bool):
            raise CheckpointError(f"{where}: {name} is {value!r:.60}; only {expected!r} can be exported")
    for name, field in NUMBERS.items():
        value = settings.get(name)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{where}: {name} is {value!r:.60}, expected a positive integer")
        notes.add(CONFIG, **{field: value})
    padded = settings.get("max_state_dim", 32)
    if type(padded) is not int or padded < 1:
        raise CheckpointError(f"{where}: max_state_dim is {padded!r:.60}, expected a positive integer")
    size = settings.get("image_resolution")
    if size is not None:
        if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
            raise CheckpointError(f"{where}: image_resolution is {size!r:.60}, expected [height, width]")
        notes.add(CONFIG, image_size=tuple(size))
    notes.add("LeRobot", normalization_epsilon="lerobot", time_convention="lerobot")
    notes.add("LeRobot", adapt_to_pi=False)
    inputs, outputs = (_features(where, settings, name) for name in ("input_features", "output_features"))
    for field, features, key in (("state_dim", inputs, STATE), ("action_dim", outputs, ACTION)):
        if key in features:
            notes.add(CONFIG, **{field: _length(where, key, features[key])})
        else:
            notes.missing.append(f"{CONFIG} has no feature '{key}', so {field} is not recorded ({GIVE_CONTRACT})")
    cameras = read_cameras(where, inputs, settings.get("empty_cameras", 0), before)
    if cameras:
        notes.add(CONFIG, cameras=cameras)
    else:
        notes.missing.append(f"{CONFIG} has no camera among its input_features ({GIVE_CONTRACT})")


def _features(where: Path, settings: Mapping[str, Any], name: str) -> Mapping[str, Mapping[str, Any]]:
    features = settings.get(name)
    if features is None:
        return {}
    if not is_features(features):
        raise CheckpointError(
            f"{where}: {name} must be an object of features with type and shape, not {features!r:.100}"
        )
    return dict(features)


def _length(where: Path, name: str, feature: Mapping[str, Any]) -> int:
    shape = feature["shape"]
    if len(shape) != 1:
        raise CheckpointError(f"{where}: the feature '{name}' has shape {shape!r:.60}, expected [numbers]")
    return int(shape[0])
