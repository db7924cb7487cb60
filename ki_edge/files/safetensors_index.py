"""Where each tensor lies in a safetensors file: read the header, map the bytes, copy nothing.

Format: 8 bytes little-endian header length, JSON header, tensor bytes
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.dtypes import STORED
from ki_edge.errors import CheckpointError

from .reading import parse_json

MAX_HEADER = 32_000_000  # bytes; a π0.5 with an adapter takes about 200,000
MAX_AXES = 8
MAX_NAME = 1000  # characters
TYPE = re.compile(r"[A-Z][A-Z0-9_]{0,15}")  # how safetensors writes a type, known here or not


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor. `offset` counts bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsIndex:
    """The tensors of one file, by name.

    Raises CheckpointError for a file that is missing, truncated, or not safetensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.entries, self.metadata = _read_header(self.path)
        self._bytes: npt.NDArray[np.uint8] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, u8 [nbytes], a read-only view into the mapped file."""
        entry = self._entry(name)
        if self._bytes is None:
            self._bytes = np.memmap(self.path, np.uint8, mode="r")
        return self._bytes[entry.offset : entry.offset + entry.nbytes]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """Bytes start..stop of the tensor, u8, copied from the file: unlike `raw` it maps nothing into the process."""
        entry = self._entry(name)
        stop = entry.nbytes if stop is None else stop
        return np.fromfile(self.path, np.uint8, stop - start, offset=entry.offset + start)

    def array(self, name: str) -> npt.NDArray[Any]:
        """The tensor with its shape: a read-only view, except bfloat16, which is widened to a float32 copy."""
        entry, raw = self._entry(name), self.raw(name)
        if entry.dtype == "BF16":
            wide = raw.copy().view("<u2").astype(np.uint32) << 16
            return wide.view(np.float32).reshape(entry.shape)
        dtype = STORED[entry.dtype]
        if entry.offset % dtype.nbytes:
            raw = raw.copy()  # numpy handles unaligned views, but slowly and not everywhere
        return raw.view(dtype.numpy).reshape(entry.shape)

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise CheckpointError(f"{self.path}: no tensor '{name}' among its {len(self.entries)}")
        return self.entries[name]


def _read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}: expected a safetensors file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= MAX_HEADER:
            raise CheckpointError(f"{path} is not a safetensors file: its first 8 bytes give no header length")
        if 8 + length > size:
            raise CheckpointError(
                f"{path} is truncated: {size} bytes, but the header alone needs {8 + length}; copy it again"
            )
        blob = file.read(length)
    header = parse_json(blob, f"{path}: its header", CheckpointError)
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ must be an object of strings")
    entries = {name: _parse_entry(path, name, item, 8 + length, size) for name, item in header.items()}
    _check_overlap(path, entries)
    return entries, {str(k): str(v) for k, v in metadata.items()}


def _parse_entry(path: Path, name: str, item: Any, base: int, size: int) -> TensorEntry:
    if len(name) > MAX_NAME or not name.isprintable():
        raise CheckpointError(f"{path}: {name[:80]!r} cannot be the name of a tensor: the file is damaged")
    try:
        dtype, shape, (begin, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        numbers = (*shape, begin, end)
        sound = len(shape) <= MAX_AXES and all(type(n) is int and n >= 0 for n in numbers)
        sound = sound and isinstance(dtype, str) and TYPE.fullmatch(dtype) is not None
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: the header entry of tensor '{name}' is malformed")
    if dtype not in STORED:
        raise CheckpointError(
            f"{path}: tensor '{name}' has the type {dtype}, which is not supported: save the model in BF16, F16 or F32"
        )
    if end - begin != math.prod(shape) * STORED[dtype].nbytes:
        raise CheckpointError(f"{path}: tensor '{name}' {dtype}{list(shape)} does not fit its {end - begin} bytes")
    if base + end > size:
        raise CheckpointError(
            f"{path} is truncated: tensor '{name}' ends at byte {base + end} of {size}; copy it again"
        )
    return TensorEntry(dtype, shape, base + begin, end - begin)


def _check_overlap(path: Path, entries: dict[str, TensorEntry]) -> None:
    end, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset < end:
            raise CheckpointError(f"{path}: tensors '{before}' and '{name}' overlap: the file is damaged")
        end, before = entry.offset + entry.nbytes, name
