"""The bundle's weights: one safetensors file that all three graphs point into.

It is a hard link to the checkpoint's own file if that holds what the graphs need in float32 and lies on the same
filesystem; else a copy. Stored in another type, or with `pack`, only the tensors in use are written, as float32.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ki_edge.bundle import DecodeVocabulary
from ki_edge.errors import ExportError
from ki_edge.model import Checkpoint
from ki_edge.model.checkpoint import EMBEDDING, checkpoint_key
from ki_edge.safetensors_index import SafetensorsIndex

from .safetensors_writer import check_space, write_float32
from .wrappers import UNEMBEDDING, runs

WEIGHTS = "weights.safetensors"
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


@dataclass(frozen=True)
class Rows:
    """Where an initializer's values come from: a checkpoint tensor, or `count` of its rows from `first` on."""

    key: str
    first: int = 0
    count: int | None = None


@dataclass(frozen=True)
class Weights:
    """The written file. `names`: checkpoint key -> name in the file; `how`: linked, copied, packed or converted."""

    index: SafetensorsIndex
    names: Mapping[str, str]
    how: str


def sources(model: ir.Model, vocabulary: DecodeVocabulary) -> dict[str, Rows]:
    """The origin of every initializer of a traced graph that has no value yet."""
    parts = runs(vocabulary)
    found = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            if name.startswith(UNEMBEDDING):
                first, count = parts[int(name.removeprefix(UNEMBEDDING))]
                found[name] = Rows(EMBEDDING, first, count)
            else:
                found[name] = Rows(checkpoint_key(name))
    return found


def place_weights(
    checkpoint: Checkpoint,
    folder: Path,
    used: Iterable[str],
    *,
    pack: bool,
) -> Weights:
    """Put weights.safetensors into `folder`, holding at least the checkpoint keys `used`. ExportError if it cannot."""
    names = {key: checkpoint.keys[key] for key in sorted(set(used))}
    path = folder / WEIGHTS
    stored = list(dict.fromkeys(names.values()))
    convert = any(checkpoint.index.entries[name].dtype != "F32" for name in stored)
    if convert or pack:
        order = sorted(stored, key=lambda name: checkpoint.index.entries[name].offset)
        write_float32(checkpoint.index, order, path)
        how = "converted" if convert else "packed"
    else:
        how = _link_or_copy(checkpoint.index.path, path)
    return Weights(SafetensorsIndex(path), names, how)


def _link_or_copy(source: Path, path: Path) -> str:
    source = source.resolve()
    try:
        os.link(source, path)
        return "linked"
    except OSError as error:
        if error.errno not in NO_LINK:
            raise ExportError(f"cannot link {source} to {path}: {error}") from error
    check_space(path, source.stat().st_size)
    try:
        shutil.copyfile(source, path)
    except OSError as error:
        raise ExportError(f"cannot copy {source} to {path}: {error}") from error
    return "copied"


def attach(model: ir.Model, origins: Mapping[str, Rows], weights: Weights) -> None:
    """Point every initializer of `origins` to its bytes in the weights file. Nothing is read."""
    for name, rows in origins.items():
        value = model.graph.initializers[name]
        entry = weights.index.entries[weights.names[rows.key]]
        shape = entry.shape if rows.count is None else (rows.count, *entry.shape[1:])
        if value.shape is None or tuple(value.shape) != shape:
            raise ExportError(f"graph {model.graph.name}: '{name}' is {value.shape}, but its weights are {list(shape)}")
        row = entry.nbytes // entry.shape[0]
        value.const_value = ir.ExternalTensor(
            WEIGHTS,
            offset=entry.offset + rows.first * row,
            length=shape[0] * row,
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(shape),
            name=name,
            base_dir=weights.index.path.parent,
        )
