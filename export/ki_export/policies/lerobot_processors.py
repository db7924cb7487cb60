"""LeRobot's processors on disk: policy_preprocessor.json, policy_postprocessor.json and the state files they name.

{"name": ..., "steps": [{"registry_name": ..., "config": {...}, "state_file"?: ..., "artifacts"?: {...}}]}; a state
file is safetensors with "<feature>.<statistic>" (lerobot/processor/pipeline.py, normalize_processor.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ki_edge.errors import CheckpointError
from ki_edge.files.reading import read_file, read_object
from ki_edge.files.safetensors_index import SafetensorsIndex
from ki_edge.policy.normalize import NormStats, checked_stats

from .lerobot_options import (
    ABSOLUTE,
    KEYS,
    NORMALIZER,
    PI0_PROMPTS,
    PI05_PROMPT,
    RELATIVE,
    RENAME,
    TOKENIZER,
    UNNORMALIZER,
    check_options,
)
from .paths import is_inside

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
MAX_STATE = 64_000_000  # bytes of a state file
MAX_STEPS = 100
HARMLESS = ("to_batch_processor", "device_processor", "identity_processor")
INPUT_STEPS = frozenset({RENAME, RELATIVE, NORMALIZER, PI05_PROMPT, *PI0_PROMPTS, TOKENIZER, *HARMLESS})
OUTPUT_STEPS = frozenset({UNNORMALIZER, ABSOLUTE, *HARMLESS})
STATE, ACTION = "observation.state", "action"
# LeRobot's mode -> (kind, the statistics that stand in for q01 and q99, or mean and std)
MODES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "IDENTITY": ("none", ()),
    "MEAN_STD": ("zscore", ("mean", "std")),
    "QUANTILES": ("quantile", ("q01", "q99")),
    "QUANTILE10": ("quantile", ("q10", "q90")),
    "MIN_MAX": ("quantile", ("min", "max")),
}
LENGTHS = ("mean", "std", "min", "max", "q01", "q99")  # statistics with a number for each of the feature's
FIELDS = {"zscore": ("mean", "std"), "quantile": ("q01", "q99")}


@dataclass(frozen=True)
class Step:
    """One step of a processor. `at` is its place in the order."""

    name: str
    at: int
    config: Mapping[str, Any]
    state_file: str | None


@dataclass(frozen=True)
class Processor:
    """A processor's steps by name. `where`: its file, for messages."""

    folder: Path
    file: str
    steps: Mapping[str, Step]

    @property
    def where(self) -> str:
        return str(self.folder / self.file)

    @classmethod
    def open(cls, folder: Path, file: str, known: frozenset[str]) -> Processor | None:
        """Read a processor; None if there is none.

        CheckpointError for a step that is not `known` or comes twice, and for an option that is not known.
        """
        if not (folder / file).is_file():
            return None
        content = read_object(folder / file, CheckpointError)
        steps = content.get("steps")
        if not isinstance(steps, list) or len(steps) > MAX_STEPS:
            raise CheckpointError(f"{folder / file}: expected a list 'steps' of at most {MAX_STEPS}")
        foreign = sorted(content.keys() - {"name", "steps"})
        if foreign:
            raise CheckpointError(f"{folder / file}: the key {foreign[0]!r:.60} is not known, expected name and steps")
        found: dict[str, Step] = {}
        for at, item in enumerate(steps):
            step = _step(folder / file, at, item)
            if step.name not in known:
                raise CheckpointError(
                    f"{folder / file}: step {at} {step.name!r:.100} is not known, so what it does to the policy would "
                    "be lost; export the model alone with --model-only, or remove the step if it does nothing"
                )
            if step.name in found:
                raise CheckpointError(f"{folder / file}: the step '{step.name}' comes twice")
            check_options(str(folder / file), step.name, step.config)
            found[step.name] = step
        return cls(folder, file, found)

    def in_order(self, *names: str) -> None:
        """CheckpointError unless the steps that are there come in this order."""
        given = [step.name for step in sorted(self.steps.values(), key=lambda step: step.at) if step.name in names]
        expected = [name for name in names if name in given]
        if given != expected:
            raise CheckpointError(
                f"{self.where}: steps in the order {', '.join(given)}; expected {', '.join(expected)}"
            )


@dataclass(frozen=True)
class Normalizer:
    """A (un)normaliser step: the mode of a feature, and its statistics."""

    processor: Processor
    step: Step

    def mode(self, feature: str) -> str:
        """LeRobot's mode of "observation.state" or "action". CheckpointError for one that is missing or not known.

        What is missing is never taken as "not normalised", though LeRobot does so: it is a fault of the file.
        """
        keys, features = self.step.config.get("normalize_observation_keys"), self.step.config["features"]
        if feature not in features:
            raise CheckpointError(
                f"{self.processor.where}: the features of the step '{self.step.name}' have no '{feature}', so how it "
                "is normalised is not recorded"
            )
        if feature != ACTION and keys is not None and feature not in keys:
            return "IDENTITY"
        kind = "ACTION" if feature == ACTION else features[feature]["type"]
        mode = self._mode_of(kind)
        if mode is None:
            raise CheckpointError(
                f"{self.processor.where}: the norm_map of the step '{self.step.name}' has no {kind}, so how "
                f"'{feature}' is normalised is not recorded"
            )
        return mode

    def check_images(self) -> None:
        """CheckpointError if pictures are normalised by statistics."""
        if self._mode_of("VISUAL") not in (None, "IDENTITY"):
            raise CheckpointError(
                f"{self.processor.where}: pictures are normalised by {self._mode_of('VISUAL')}, expected IDENTITY: "
                "π0.5 takes them as they are"
            )

    def stats(self, feature: str) -> NormStats | None:
        """Statistics of a feature in the places that its kind reads; None where the file has none (or is none)."""
        kind, names = MODES[self.mode(feature)]
        if not names or self.step.state_file is None:
            return None
        path = self._path(self.step.state_file)
        index = SafetensorsIndex(path)
        found = {}
        for field, name in zip(FIELDS[kind], names, strict=True):
            if f"{feature}.{name}" not in index:
                return None
            found[field] = index.array(f"{feature}.{name}").astype(np.float64)
        names_of = dict(zip(FIELDS[kind], names, strict=True))
        return checked_stats(found, f"{path}: {feature}", names_of, CheckpointError)

    def length(self, feature: str) -> int | None:
        """Numbers of a feature, by its statistics, whether its mode reads them or not; None if there are none."""
        if self.step.state_file is None:
            return None
        index = SafetensorsIndex(self._path(self.step.state_file))
        shapes = {index.entries[f"{feature}.{name}"].shape for name in LENGTHS if f"{feature}.{name}" in index}
        return next(iter(shapes))[0] if len(shapes) == 1 and len(next(iter(shapes))) == 1 else None

    @property
    def sha256(self) -> str:
        """Of the state file."""
        assert self.step.state_file is not None
        path = self.processor.folder / self.step.state_file
        return hashlib.sha256(read_file(path, MAX_STATE, CheckpointError)).hexdigest()

    def _mode_of(self, kind: str) -> str | None:
        mode = self.step.config["norm_map"].get(kind)
        if mode is not None and mode not in MODES:
            raise CheckpointError(
                f"{self.processor.where}: {kind} is normalised by {mode}, expected one of {', '.join(MODES)}"
            )
        return None if mode is None else str(mode)

    def _path(self, name: str) -> Path:
        path = inside(self.processor.folder, name, self.processor.where)
        if not path.is_file():
            raise CheckpointError(f"{self.processor.where} names {name}, which is missing: copy the whole checkpoint")
        if path.stat().st_size > MAX_STATE:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes are too many for statistics (at most {MAX_STATE})"
            )
        return path


def inside(folder: Path, name: str, where: str) -> Path:
    """The file `name` of a folder. CheckpointError for a name that leads out of it."""
    if not is_inside(name):
        raise CheckpointError(f"{where}: the file {name!r:.100} lies outside its folder, or is not a file name")
    return folder / name


def _step(path: Path, at: int, item: object) -> Step:
    name = item.get("registry_name", item.get("class")) if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(name, str):
        raise CheckpointError(f"{path}: step {at} has no 'registry_name'")
    config, state, artifacts = item.get("config"), item.get("state_file"), item.get("artifacts")
    config, artifacts = {} if config is None else config, {} if artifacts is None else artifacts
    if not isinstance(config, dict) or not (state is None or isinstance(state, str)) or not isinstance(artifacts, dict):
        raise CheckpointError(
            f"{path}: step {at} {name!r:.100} is malformed: config and artifacts are objects, state_file is a name"
        )
    unknown = sorted(item.keys() - KEYS)
    if unknown:
        raise CheckpointError(f"{path}: step {at} {name!r:.100} has the key {unknown[0]!r:.60}, which is not known")
    return Step(name, at, config, state)
