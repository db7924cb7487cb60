"""A checkpoint in any format, opened: its tensors under openpi's keys, its geometry, and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ki_edge.checkpoints.layout.formats import SHARDS, WEIGHTS, Format, Found, described_by, read_json, recognise
from ki_edge.checkpoints.layout.geometry import read_geometry, read_horizon
from ki_edge.checkpoints.layout.keys import (
    EMBEDDING,
    LM_HEAD,
    TIME_LAYERS,
    UNUSED,
    canonical,
    checkpoint_key,
    is_pi05,
    parameter_shapes,
)
from ki_edge.checkpoints.layout.source import F32, FileState, SafetensorsSource, StoredTensor, TensorSource, file_state
from ki_edge.config import Embeddings, Pi05Config, Pictures, RealTime
from ki_edge.dtypes import FLOATS
from ki_edge.errors import CheckpointError
from ki_edge.files.safetensors_index import SafetensorsIndex

MAX_SHARDS = 1000
MAX_NAME = 200  # characters of a file's name


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened checkpoint. `source` holds every tensor that the model needs, `config` its geometry.

    `settings` is config.json; `origin` says where it was fetched from, empty for a local folder.
    """

    path: Path
    format: Format
    source: TensorSource
    settings: Mapping[str, Any]
    config: Pi05Config
    origin: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[Path, FileState] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        horizon: int | None = None,
        default_horizon: int | None = None,
        adapter: str | Path | None = None,
        origin: Mapping[str, str] | None = None,
    ) -> Checkpoint:
        """Read headers and geometry of a checkpoint of any format. No tensor is loaded.

        `horizon`: actions of a chunk, which must be what config.json records if it does; `default_horizon`: where
        neither tells. `adapter`: a PEFT folder to merge into it, whose own config.json and processors, if it has any,
        describe the policy instead of the base's.
        CheckpointError names what is missing, truncated, foreign, or of a wrong shape.
        """
        found = recognise(Path(path))
        source = open_source(found)
        if adapter is not None:
            from ki_edge.checkpoints.peft.lora import open_adapter

            source = open_adapter(Path(adapter), source)
            found = described_by(Path(adapter), found)
        try:
            config = read_geometry(source, found.settings, _horizon(found, horizon, default_horizon))
            check_tensors(source.tensors, config)
        except CheckpointError as error:
            raise CheckpointError(f"{found.folder}: {error}") from None
        opened = cls(found.folder, found.format, source, found.settings, config, origin or {}, source.states())
        # what the format's makers do; a policy's contract may say otherwise
        return opened.with_pictures("float32" if found.format == "lerobot" else "uint8")

    @property
    def time_convention(self) -> str:
        """How the reference that wrote this format computes denoising times: "openpi" or "lerobot"."""
        return "lerobot" if self.format == "lerobot" else "openpi"

    def with_pictures(self, pictures: Pictures) -> Checkpoint:
        """The same checkpoint of a policy whose pictures go in as `pictures`."""
        return replace(self, config=replace(self.config, pictures=pictures))

    def with_rtc(self, rtc: RealTime) -> Checkpoint:
        """The same checkpoint of a policy whose chunks continue the one before in this way."""
        return replace(self, config=replace(self.config, rtc=rtc))

    def with_embeddings(self, embeddings: Embeddings) -> Checkpoint:
        """The same checkpoint for graphs that gather embeddings there."""
        return replace(self, config=replace(self.config, embeddings=embeddings))

    def read(self, name: str) -> F32:
        """A tensor by the model's parameter name, float32."""
        return self.source.array(checkpoint_key(name))

    def check_unchanged(self) -> None:
        """CheckpointError if a file was written, replaced or removed since the checkpoint was opened."""
        for path, state in self.states.items():
            if file_state(path) != state:
                raise CheckpointError(f"{path} changed while it was read: wait until it is complete and start again")


def open_source(found: Found) -> TensorSource:
    """The tensors of a recognised checkpoint under openpi's keys."""
    if found.params is not None:
        from ki_edge.checkpoints.jax.orbax import OrbaxSource

        return OrbaxSource.open(found.params)
    paths = _shards(found.folder)
    indexes = [SafetensorsIndex(path) for path in paths]
    names: dict[str, tuple[int, str]] = {}
    for at, index in enumerate(indexes):
        for name in index.entries:
            key = canonical(name)
            if key in names:
                other = names[key]
                raise CheckpointError(
                    f"{index.path}: '{name}' and '{other[1]}' are the same tensor '{key}': two checkpoints in one?"
                )
            names[key] = (at, name)
    if EMBEDDING not in names and LM_HEAD in names:
        names[EMBEDDING] = names[LM_HEAD]
    return SafetensorsSource(indexes, _rename_time(names))


def check_tensors(tensors: Mapping[str, StoredTensor], config: Pi05Config) -> None:
    """CheckpointError unless exactly the model's tensors are there, with their shapes, in a type that can be read."""
    expected = parameter_shapes(config)
    missing = sorted(set(expected) - set(tensors))
    unknown = sorted(key for key in set(tensors) - set(expected) if not UNUSED.fullmatch(key))
    if missing or unknown:
        what = f"key '{missing[0]}' is missing" if missing else f"unexpected key '{unknown[0]}'"
        raise CheckpointError(f"{what} ({len(missing)} missing, {len(unknown)} unexpected of {len(expected)})")
    for key, shape in expected.items():
        tensor = tensors[key]
        if tensor.shape != shape:
            raise CheckpointError(f"'{key}' has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"'{key}' has dtype {tensor.dtype}, expected {', '.join(FLOATS)}")


def _horizon(found: Found, given: int | None, default: int | None) -> int:
    recorded = read_horizon(found.settings)
    if recorded is not None and given is not None and recorded != given:
        raise CheckpointError(f"config.json records an action horizon of {recorded}, but {given} was asked for")
    if given is not None and given < 1:
        raise CheckpointError(f"action horizon {given}: expected at least one action a chunk")
    horizon = recorded or given or default
    if horizon is None:
        raise CheckpointError(
            "the action horizon is not recorded (config.json has neither 'action_horizon' nor 'chunk_size'): "
            "give --contract, or --horizon with the actions of a chunk"
        )
    return horizon


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; of several, those that the index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    places = read_json(folder / SHARDS).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{folder / SHARDS} has no 'weight_map'")
    names = sorted({str(name) for name in places.values()})
    if len(names) > MAX_SHARDS or any(Path(name).name != name or len(name) > MAX_NAME for name in names):
        raise CheckpointError(f"{folder / SHARDS} names {len(names)} files, one of them outside its folder or too many")
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: file '{name}' of its {len(names)} is missing: copy the checkpoint again")
    return [folder / name for name in names]


def _rename_time(names: dict[str, tuple[int, str]]) -> dict[str, tuple[int, str]]:
    """LeRobot's early π0.5 files kept π0's names for the time layers, and left its unused tensors in."""
    if not is_pi05(names):
        return names
    for layer in TIME_LAYERS:
        for part in ("weight", "bias"):
            old = names.pop(f"action_{layer}.{part}", None)
            if old is not None:
                names.setdefault(f"{layer}.{part}", old)
    return {key: place for key, place in names.items() if not _of_pi0(key)}


def _of_pi0(key: str) -> bool:
    plain_norm = key.startswith("paligemma_with_expert.gemma_expert.") and key.endswith("norm.weight")
    return plain_norm or key.startswith("state_proj.")
