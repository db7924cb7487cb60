"""Write float32 tensors of a safetensors file into a new one, a piece at a time, whatever their stored type.

Never holds more than a piece of one tensor; the result opens with any safetensors reader.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ki_edge.errors import ExportError
from ki_edge.safetensors_index import SafetensorsIndex

PIECE = 1 << 22  # elements
ALIGNMENT = 64  # of the first tensor, in bytes


def write_float32(source: SafetensorsIndex, names: Sequence[str], path: Path) -> None:
    """Copy the tensors called `names` to `path`, widening float16 and bfloat16 exactly.

    ExportError if the disk is too small or writing fails.
    """
    shapes = {name: source.entries[name].shape for name in names}
    check_space(path, 4 * sum(math.prod(shape) for shape in shapes.values()))
    metadata = {**source.metadata, "format": "pt"}
    try:
        with path.open("xb") as file:
            file.write(_header(shapes, metadata))
            for name in names:
                raw, dtype = source.raw(name), source.entries[name].dtype
                width = 4 if dtype == "F32" else 2
                for start in range(0, raw.size, PIECE * width):
                    file.write(widen(raw[start : start + PIECE * width], dtype).data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error}") from error


def widen(raw: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float32]:
    """Bytes of an F32, F16 or BF16 tensor as float32, [elements]."""
    raw = raw.copy()  # aligned
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return raw.view("<f2").astype(np.float32)
    return raw.view("<f4")


def check_space(path: Path, wanted: int) -> None:
    """ExportError unless the disk has room for `wanted` bytes more."""
    free = shutil.disk_usage(path.parent).free
    if free < wanted:
        raise ExportError(
            f"{path.parent}: the weights need {wanted / 1e9:.1f} GB and only {free / 1e9:.1f} GB are free; "
            "make room, or export a float32 checkpoint on the same disk, whose file is linked"
        )


def _header(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
