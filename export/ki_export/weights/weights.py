"""The bundle's weights: one safetensors file that all three graphs point into.

Where the checkpoint's own file holds what the graphs need, in the type they need it, it has the same bytes: a reflink,
or a copy where the file system has none, or on request a hard link. Else only the tensors in use are written, streamed
and converted piece by piece. Tensors in use are finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ki_edge.bundle import DecodeVocabulary
from ki_edge.checkpoints import Checkpoint, TensorSource
from ki_edge.checkpoints.layout.keys import EMBEDDING, checkpoint_key
from ki_edge.checkpoints.layout.source import encode
from ki_edge.dtypes import STORED
from ki_edge.errors import ExportError
from ki_edge.files.safetensors_index import SafetensorsIndex
from ki_export.graphs.wrappers import UNEMBEDDING, runs
from ki_export.passes.int8_parts import SCALES, VALUES, read_block_name

from .finite import check_finite, finite_pieces
from .int8 import Int8Weights, layout, split_key
from .low_bits import LowForm, LowWeights, split_low
from .safetensors_writer import Part, write_tensors
from .shared_file import link_file, own_file

WEIGHTS = "weights.safetensors"
FOUR_BITS = ir.DataType.FLOAT4E2M1
LARGEST_F16 = 65504.0
Stored = Literal["float32", "stored"]  # types in the file: all float32, or as the checkpoint stores them


@dataclass(frozen=True)
class StorageFormat:
    """How a tensor is stored: safetensors' name of the type, values divided by 2^exponent."""

    dtype: str = "F32"
    exponent: int = 0


@dataclass(frozen=True)
class TensorSlice:
    """Where an initializer's values come from: a checkpoint tensor, or `count` of its rows from `first` on."""

    key: str
    first: int = 0
    count: int | None = None


@dataclass(frozen=True)
class Weights:
    """The written file. `names`: checkpoint key -> name in the file.

    `how`: reflinked, copied, linked, packed or converted. `sha256` of a file that was written tensor by tensor.
    """

    index: SafetensorsIndex
    names: Mapping[str, str]
    how: str
    sha256: str | None = None


def sources(model: ir.Model, vocabulary: DecodeVocabulary) -> dict[str, TensorSlice]:
    """The origin of every initializer of a traced graph that has no value yet."""
    parts = runs(vocabulary)
    found = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            if name.startswith(UNEMBEDDING):
                first, count = parts[int(name.removeprefix(UNEMBEDDING))]
                found[name] = TensorSlice(EMBEDDING, first, count)
            elif block := read_block_name(name):
                (part, at), count = block, int(str(value.shape[0] if value.shape else 0))
                found[name] = TensorSlice(checkpoint_key(part), at * count, count)
            else:
                found[name] = TensorSlice(checkpoint_key(name))
    return found


def place_weights(
    checkpoint: Checkpoint,
    folder: Path,
    used: Iterable[str],
    *,
    stored: Stored = "float32",
    pack: bool = False,
    link: bool = False,
    forms: Mapping[str, StorageFormat] | None = None,
    low: Mapping[str, LowForm] | None = None,
) -> Weights:
    """Put weights.safetensors into `folder`, holding at least the checkpoint keys `used`. ExportError if it cannot.

    `forms`: keys that are stored in another way than `stored` says; `low`: keys whose parts are stored in eight or four
    bits, each under a key of its own; `link`: share the checkpoint's file, which must
    hold what the graphs need, as they need it.
    """
    keys, path, forms, low = sorted(set(used)), folder / WEIGHTS, forms or {}, low or {}
    names = None if pack or forms or low else _names_in_one_file(checkpoint.source, keys, stored)
    if names is not None:
        check_finite(checkpoint.source, keys)
        file = checkpoint.source.files[0]
        how = link_file(file, path) if link else own_file(file, path)
        return Weights(SafetensorsIndex(path), names, how)
    if link:
        raise ExportError(
            f"{checkpoint.path}: --link needs one safetensors file with every weight in the type that the graphs take "
            "(float32, or any with --stored-types): leave it out"
        )
    parts = _parts(checkpoint.source, keys, stored, forms, low)
    tensors = checkpoint.source.tensors
    same = all(part.name in tensors and part.dtype == tensors[part.name].dtype for part in parts)
    digest = write_tensors(path, parts, {"format": "pt"})
    return Weights(SafetensorsIndex(path), {key: key for key in keys}, "packed" if same else "converted", digest)


def attach(model: ir.Model, origins: Mapping[str, TensorSlice], weights: Weights) -> None:
    """Point every initializer of `origins` to its bytes in the weights file. Nothing is read."""
    for name, rows in origins.items():
        value = model.graph.initializers[name]
        entry = weights.index.entries[weights.names[rows.key]]
        dtype, stored = ir.DataType(STORED[entry.dtype].onnx), entry.shape
        if value.dtype == FOUR_BITS and entry.dtype == "U8":
            dtype, stored = FOUR_BITS, (*stored[:-1], 2 * stored[-1])  # two values a byte
        shape = stored if rows.count is None else (rows.count, *stored[1:])
        if value.shape is None or tuple(value.shape) != shape:
            raise ExportError(f"graph {model.graph.name}: '{name}' is {value.shape}, but its weights are {list(shape)}")
        if value.dtype is not None and value.dtype != dtype:
            raise ExportError(f"graph {model.graph.name}: '{name}' is {value.dtype}, but its weights are {entry.dtype}")
        row = entry.nbytes // (stored[0] if stored else 1)
        value.const_value = ir.ExternalTensor(
            WEIGHTS,
            offset=entry.offset + rows.first * row,
            length=row * (shape[0] if shape else 1),
            dtype=dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=weights.index.path.parent,
        )


def _names_in_one_file(source: TensorSource, keys: Iterable[str], stored: Stored) -> dict[str, str] | None:
    """Each key's name in the checkpoint's only file; None if its bytes cannot be used as they lie there."""
    names = {}
    for key in keys:
        tensor = source.tensors.get(key)
        if tensor is None or tensor.place is None or len(source.files) != 1:
            return None
        if stored == "float32" and tensor.dtype != "F32":
            return None
        names[key] = tensor.place.name
    return names


def _parts(
    source: TensorSource,
    keys: Iterable[str],
    stored: Stored,
    forms: Mapping[str, StorageFormat],
    low: Mapping[str, LowForm],
) -> list[Part]:
    """The tensors of the weights file: as the checkpoint stores them, widened, rounded, or quantised."""
    weights, low_weights, parts = Int8Weights(source), LowWeights(source, low), []
    for key in _in_file_order(source, keys, low):
        base, kind = _split(key, low)
        rows, *columns = source.tensors[base].shape
        if base in low and kind:
            parts.append(Part(key, *low_weights.layout(base, kind), partial(low_weights.pieces, base, kind)))
            continue
        if kind == VALUES:
            parts.append(Part(key, "I8", layout(rows, *columns), partial(weights.values, base)))
        elif kind == SCALES:
            parts.append(Part(key, "F32", (rows,), partial(weights.scales, base)))
        elif key in forms:
            parts.append(Part(key, forms[key].dtype, (rows, *columns), partial(_formed, source, key, forms[key])))
        elif stored == "stored":
            parts.append(Part(key, source.tensors[key].dtype, (rows, *columns), partial(_stored, source, key)))
        else:
            parts.append(Part(key, "F32", (rows, *columns), partial(_checked, key, partial(source.pieces, key))))
    return parts


def _checked(key: str, pieces: Callable[[], Iterable[npt.NDArray[Any]]]) -> Iterator[npt.NDArray[Any]]:
    return finite_pieces(key, pieces())


def _stored(source: TensorSource, key: str) -> Iterator[npt.NDArray[np.uint8]]:
    """A tensor's bytes in its stored type."""
    for values in finite_pieces(key, source.pieces(key)):
        yield encode(values, source.tensors[key].dtype)


def _formed(source: TensorSource, key: str, form: StorageFormat) -> Iterator[npt.NDArray[np.uint8]]:
    """A tensor's bytes in its form. ExportError if a value does not fit the type."""
    factor = np.float32(2.0**-form.exponent)
    for values in finite_pieces(key, source.pieces(key)):
        if form.dtype == "F16" and np.abs(values).max(initial=0.0) * factor > LARGEST_F16:
            raise ExportError(
                f"'{key}' holds {np.abs(values).max():.3g}, and float16 ends at {LARGEST_F16:.0f}: "
                "keep it with --keep-fp32, or use --precision bf16"
            )
        yield encode(values * factor, form.dtype)


def _split(key: str, low: Mapping[str, LowForm]) -> tuple[str, str]:
    """A checkpoint key and which part of what it has become is meant, "" for the tensor itself."""
    base, part = split_low(key)
    return (base, part) if base in low else split_key(key)


def _in_file_order(source: TensorSource, keys: Iterable[str], low: Mapping[str, LowForm]) -> list[str]:
    """So that a file is read from its beginning to its end."""

    order = {key: at for at, key in enumerate(source.tensors)}  # layer after layer where there are no places

    def position(key: str) -> tuple[str, int, str]:
        base, kind = _split(key, low)
        place = source.tensors[base].place
        return ("", order[base], kind) if place is None else (place.index.path.name, place.offset, kind)

    return sorted(keys, key=position)
