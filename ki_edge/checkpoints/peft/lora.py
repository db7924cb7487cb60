"""LoRA adapters of the PEFT library, merged into their base tensor by tensor, a few rows at a time.

    W' = W + s B A                        s = alpha / r                LoRA, arXiv 2106.09685
    W' = m (W + s B A) / |W + s B A|      norm of each output's row    DoRA, arXiv 2402.09353

Facts: peft 0.21, tuners/lora/layer.py (`merge`, `get_delta_weight`), variants.py, utils/save_and_load.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ki_edge.checkpoints.layout.keys import EMBEDDING, LM_HEAD, UNUSED, canonical
from ki_edge.checkpoints.layout.source import F32, SafetensorsSource, StoredTensor, TensorSource
from ki_edge.dtypes import FLOATS
from ki_edge.errors import CheckpointError
from ki_edge.files.safetensors_index import SafetensorsIndex

from .adapter import CONFIG, WEIGHTS, AdapterConfig, is_adapter

PREFIX = "base_model.model."
# <module>.lora_A.weight, with the adapter's name inside where other tools than PEFT saved it
PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(\.(?P<kind>weight|bias))?"
)
FULL = re.compile(r"(?P<module>.+?)(\.base_layer|\.modules_to_save(\.default)?)?\.(?P<kind>weight|bias)")


@dataclass
class Module:
    """What an adapter holds of one layer. `name` as in the trained model; `parts`: lora_A, ... -> name in the file."""

    name: str
    parts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LowRank:
    """An update of low rank: scale * left[rows, r] @ right[r, columns]; with `magnitude` [rows], DoRA's."""

    left: F32
    right: F32
    scale: float
    magnitude: F32 | None = None

    def added_to(self, values: F32, start: int, stop: int) -> F32:
        """Rows start..stop of the base's tensor with the update, float32, of the same shape."""
        delta = (self.left[start:stop] @ self.right) * np.float32(self.scale)
        merged: F32 = values.reshape(delta.shape) + delta
        if self.magnitude is not None:
            norm = np.linalg.norm(merged, axis=1, keepdims=True)
            merged = (self.magnitude[start:stop, None] / norm) * merged
        return merged.reshape(values.shape)


class LoraSource(TensorSource):
    """A base with an adapter merged into it, as PEFT's merge_and_unload() does it in float32.

    A merged tensor is F32 and has no place, whatever the base is stored in: rounded to bfloat16 an update smaller than
    half a step of the base's value would vanish, so rounding is left to whoever chooses the type of the export. Layers
    that were trained in full are the adapter's own tensors; everything else is the base's, with its place. Where the
    head of the language model shares the bytes of an embedding that changed, it is left out.
    """

    def __init__(self, base: TensorSource, adapter: SafetensorsSource, config: AdapterConfig) -> None:
        self.base, self.adapter, self.config = base, adapter, config
        self.geometry = base.geometry
        self.files = (*base.files, *adapter.files, config.path)
        self.modules, self.full = _sort(adapter)
        self._drop_unused()
        _check_names(self)
        updated = {f"{layer}.{kind}" for layer, module in self.modules.items() for kind in _updated(module)}
        tensors = {**base.tensors, **{key: adapter.tensors[name] for key, name in self.full.items()}}
        tensors.update({key: replace(tensors[key], dtype="F32", place=None) for key in updated})
        if EMBEDDING in updated | set(self.full) and _shared(base.tensors):
            del tensors[LM_HEAD]
        self.tensors: Mapping[str, StoredTensor] = tensors
        self._latest: tuple[str, LowRank] | None = None

    def rows(self, key: str, start: int, stop: int) -> F32:
        if key in self.full:
            values = self.adapter.rows(self.full[key], start, stop)
        else:
            values = self.base.rows(key, start, stop)
        layer, _, kind = key.rpartition(".")
        module = self.modules.get(layer)
        if module is None or kind not in _updated(module):
            return values
        if kind == "weight":
            merged = self._low_rank(layer, module).added_to(values, start, stop)
        else:
            bias = self.adapter.rows(module.parts["lora_B.bias"], start, stop)
            merged = values + bias * np.float32(self.config.scale(module.name))
        if not np.isfinite(merged).all():
            raise CheckpointError(f"{self.adapter.files[0]}: '{key}' merged has values that are not finite")
        return merged

    def _low_rank(self, layer: str, module: Module) -> LowRank:
        """The factors of a layer; kept, as its rows are asked for one piece after the other."""
        if self._latest is None or self._latest[0] != layer:
            read, parts = self.adapter.array, module.parts
            if "lora_A" in parts:
                left, right = read(parts["lora_B"]), read(parts["lora_A"])
            else:
                left, right = read(parts["lora_embedding_A"]).T, read(parts["lora_embedding_B"]).T
            rank = self.config.rank(module.name)
            magnitude = read(parts["lora_magnitude_vector"]).reshape(-1) if self.config.dora else None
            scale = self.config.scale(module.name)
            low_rank = LowRank(left.reshape(-1, rank), right.reshape(rank, -1), scale, magnitude)
            self._latest = (layer, low_rank)
        return self._latest[1]

    def _drop_unused(self) -> None:
        """Forget what the model never reads; the tied head only if the adapter leaves it as it is."""
        head = LM_HEAD.removesuffix(".weight")
        if (head in self.modules and self._head_is_updated(self.modules[head])) or self._head_is_replaced():
            raise CheckpointError(
                f"{self.adapter.files[0]}: the adapter changes '{head}', which this model ties to the embedding: the "
                "two would differ after a merge; train an adapter without lm_head"
            )
        self.modules = {name: m for name, m in self.modules.items() if not UNUSED.fullmatch(f"{name}.weight")}
        self.full = {key: name for key, name in self.full.items() if not UNUSED.fullmatch(key)}

    def _head_is_updated(self, head: Module) -> bool:
        last = head.parts.get("lora_B") or head.parts.get("lora_embedding_B")
        return self.config.dora or last is None or bool(self.adapter.array(last).any())

    def _head_is_replaced(self) -> bool:
        if LM_HEAD not in self.full:
            return False
        name, base = self.full[LM_HEAD], LM_HEAD if LM_HEAD in self.base.tensors else EMBEDDING
        if base not in self.base.tensors or self.adapter.tensors[name].shape != self.base.tensors[base].shape:
            return True
        pairs = zip(self.adapter.pieces(name), self.base.pieces(base), strict=False)
        return any(not np.array_equal(ours, theirs) for ours, theirs in pairs)


def open_adapter(folder: str | Path, base: TensorSource) -> LoraSource:
    """`base` with the adapter of a PEFT folder (adapter_config.json, adapter_model.safetensors) merged into it.

    CheckpointError for a folder that is none, another method than LoRA, settings that cannot be merged exactly, and
    tensors that do not fit the base. Headers and, for a head that nobody uses, one factor are read; no weight is.
    """
    folder = Path(folder)
    if not is_adapter(folder):
        raise CheckpointError(f"{folder} holds no adapter: expected {CONFIG} and {WEIGHTS}")
    config = AdapterConfig.read(folder)
    if not (folder / WEIGHTS).is_file():
        pickle = (folder / "adapter_model.bin").is_file()
        hint = "adapter_model.bin is a pickle, which is never opened: save it again" if pickle else "copy it again"
        raise CheckpointError(f"{folder} has {CONFIG} but no {WEIGHTS}: {hint}")
    index = SafetensorsIndex(folder / WEIGHTS)
    adapter = SafetensorsSource([index], {name: (0, name) for name in index.entries})
    return LoraSource(base, adapter, config)


def _sort(adapter: SafetensorsSource) -> tuple[dict[str, Module], dict[str, str]]:
    """An adapter's tensors: low-rank parts by layer, and openpi's key -> name of those that were trained in full."""
    modules: dict[str, Module] = {}
    full: dict[str, str] = {}
    for stored, tensor in adapter.tensors.items():
        if tensor.dtype not in FLOATS or 0 in tensor.shape or not tensor.shape:
            where = f"{adapter.files[0]}: '{stored}' is {tensor.dtype}{list(tensor.shape)}"
            raise CheckpointError(f"{where}, expected weights in {', '.join(FLOATS)}")
        name = stored.removeprefix(PREFIX)
        if match := PART.fullmatch(name):
            part = match["part"] + (".bias" if match["kind"] == "bias" else "")
            layer = canonical(match["module"] + ".weight").removesuffix(".weight")
            parts = modules.setdefault(layer, Module(match["module"])).parts
            known = parts.setdefault(part, stored)
        else:
            match = FULL.fullmatch(name)
            key = canonical(f"{match['module']}.{match['kind']}" if match else name)
            known = full.setdefault(key, stored)
        if known != stored:
            raise CheckpointError(f"{adapter.files[0]}: '{known}' and '{stored}' are the same tensor")
    return modules, full


def _check_names(source: LoraSource) -> None:
    """Every tensor of the adapter has its place in the base, and fits there."""
    path, base = source.adapter.files[0], source.base.tensors
    if not source.modules and not source.full:
        raise CheckpointError(f"{path}: the adapter holds no tensor that the model uses")
    for key, name in source.full.items():
        _check_key(path, name, key, base)
        shape = source.adapter.tensors[name].shape
        if shape != base[key].shape:
            raise CheckpointError(f"{path}: '{name}' has shape {list(shape)}, the base {list(base[key].shape)}")
    for layer, module in source.modules.items():
        _check_module(source, layer, module)
    biased = source.config.bias == "all" or any(f"{layer}.bias" in base for layer in source.modules)
    if source.config.bias != "none" and biased and not any(key.endswith(".bias") for key in source.full):
        raise CheckpointError(
            f"{source.config.path}: biases were trained (bias: {source.config.bias!r}), but {path.name} holds none: "
            "save the adapter again or merge it with PEFT where it was trained"
        )


def _check_module(source: LoraSource, layer: str, module: Module) -> None:
    path, base, parts = source.adapter.files[0], source.base.tensors, module.parts
    _check_key(path, module.name, f"{layer}.weight", base)
    weight = base[f"{layer}.weight"].shape
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    rank, (rows, *rest) = source.config.rank(module.name), weight
    shapes = {first: (rank, *rest), second: (rows, rank) + (1,) * (len(rest) - 1)}
    if embedding:
        shapes = {first: (rank, rows), second: (*rest, rank)}
    if source.config.dora:
        if embedding or len(weight) != 2:
            raise CheckpointError(f"{path}: DoRA of '{module.name}' cannot be merged here, only DoRA of linear layers")
        shapes["lora_magnitude_vector"] = (rows,)
    if "lora_B.bias" in parts:
        _check_key(path, parts["lora_B.bias"], f"{layer}.bias", base)
        shapes["lora_B.bias"] = (rows,)
    if set(shapes) != set(parts):
        lacking, extra = sorted(set(shapes) - set(parts)), sorted(set(parts) - set(shapes))
        what = f"has no {lacking[0]}" if lacking else f"has {extra[0]}, which {CONFIG} does not tell of"
        raise CheckpointError(f"{path}: the adapter of '{module.name}' {what}")
    for part, shape in shapes.items():
        found = source.adapter.tensors[parts[part]].shape
        if found != shape:
            raise CheckpointError(
                f"{path}: '{parts[part]}' has shape {list(found)}, expected {list(shape)} for rank {rank} and the "
                f"base's {list(weight)}"
            )


def _check_key(path: Path, name: str, key: str, base: Mapping[str, StoredTensor]) -> None:
    if key not in base:
        raise CheckpointError(
            f"{path}: '{name}' has no tensor in the base ('{key}' is not there): was it trained on another model?"
        )


def _updated(module: Module) -> tuple[str, ...]:
    """Which of a layer's tensors its low-rank parts change."""
    return ("weight", "bias") if "lora_B.bias" in module.parts else ("weight",)


def _shared(tensors: Mapping[str, StoredTensor]) -> bool:
    """The head of the language model is the embedding: the same bytes of a file."""
    head, embedding = tensors.get(LM_HEAD), tensors[EMBEDDING]
    return head is not None and head.place is not None and head.place == embedding.place
