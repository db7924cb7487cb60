"""The numbers of weights in eight and four bits, computed from a checkpoint a piece at a time, as a file stores them.

| kind | `.values` [out, in] | `.scales` | `.second` |
|---|---|---|---|
| int8 | I8 | base type [out] | |
| fp8 | F8_E4M3 | base type [out] | |
| nvfp4 | U8 [out, in / 2]: two values a byte, the first in the low half | F8_E4M3 [out, in / 16] | F32 [] |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ki_edge.checkpoints import TensorSource
from ki_edge.checkpoints.layout.source import encode

from .finite import finite_pieces
from .rounding import BLOCK, Kind, round_blocks, round_e4m3, round_values, scale_of, second_scale

VALUES, SCALES, SECOND = ".values", ".scales", ".second"  # what stands behind a weight's key in the weights file
VALUE_TYPES = {"int8": "I8", "fp8": "F8_E4M3", "nvfp4": "U8"}
CODES = torch.tensor([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7], dtype=torch.uint8)  # of e2m1, by twice its magnitude
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class LowForm:
    """How a weight is stored: divided by 2^exponent, columns multiplied by `balance` f32 [in], then rounded to `kind`.

    `base`: safetensors' name of the type of 8-bit weights' scales.
    """

    kind: Kind
    base: str = "F16"
    exponent: int = 0
    balance: npt.NDArray[np.float32] | None = None


def split_low(key: str) -> tuple[str, str]:
    """A checkpoint key and what of it is meant: VALUES, SCALES, SECOND or "" for the tensor itself."""
    for part in (VALUES, SCALES, SECOND):
        if key.endswith(part):
            return key.removesuffix(part), part
    return key, ""


class LowWeights:
    """Weights of a source in their low forms, by checkpoint key."""

    def __init__(self, source: TensorSource, forms: Mapping[str, LowForm]) -> None:
        self._source, self._forms = source, forms
        self._seconds: dict[str, Tensor] = {}

    def layout(self, key: str, part: str) -> tuple[str, tuple[int, ...]]:
        """Safetensors' type and the shape of a part."""
        rows, columns = self._source.tensors[key].shape
        form = self._forms[key]
        four = form.kind == "nvfp4"
        if part == VALUES:
            return VALUE_TYPES[form.kind], (rows, columns // 2 if four else columns)
        if part == SCALES:
            return ("F8_E4M3", (rows, columns // BLOCK)) if four else (form.base, (rows,))
        return "F32", ()

    def pieces(self, key: str, part: str) -> Iterator[Bytes]:
        """The bytes of a part, in order. ExportError by name for a weight that is not finite."""
        if part == SECOND:
            yield np.frombuffer(np.float32(self.second(key)).tobytes(), np.uint8)
            return
        for values in finite_pieces(key, self._source.pieces(key)):
            yield self._bytes(key, part, self._prepared(key, values))

    def part(self, key: str, part: str, start: int, stop: int) -> Bytes:
        """The bytes of rows start..stop of a part, which is not SECOND."""
        return self._bytes(key, part, self._prepared(key, self._source.rows(key, start, stop)))

    def second(self, key: str) -> Tensor:
        """nvfp4's scale of all scales, f32 []; read from the whole weight once."""
        if key not in self._seconds:
            largest = torch.zeros(())
            for values in finite_pieces(key, self._source.pieces(key)):
                largest = torch.maximum(largest, self._prepared(key, values).abs().max())
            self._seconds[key] = second_scale(largest)
        return self._seconds[key]

    def _prepared(self, key: str, values: npt.NDArray[Any]) -> Tensor:
        """Rows as they are rounded: divided and balanced, f32 [rows, in]."""
        form = self._forms[key]
        factor = np.float32(2.0**-form.exponent)
        return torch.from_numpy(values * (factor if form.balance is None else form.balance * factor))

    def _bytes(self, key: str, part: str, rows: Tensor) -> Bytes:
        form = self._forms[key]
        if form.kind == "nvfp4":
            values, scales = round_blocks(rows, self.second(key))
            return _packed(values) if part == VALUES else _e4m3(scales)
        scales = scale_of(rows.abs().amax(1), form.kind)
        if part == SCALES:
            return encode(scales.numpy(), form.base)
        rounded = round_values(rows / scales[:, None], form.kind)
        return rounded.to(torch.int8).numpy().view(np.uint8) if form.kind == "int8" else _e4m3(rounded)


def _e4m3(values: Tensor) -> Bytes:
    return np.asarray(round_e4m3(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy())


def _packed(values: Tensor) -> Bytes:
    """e2m1 numbers [rows, in] as codes, two a byte."""
    codes = CODES[(values.abs() * 2).to(torch.int64)] | (torch.signbit(values).to(torch.uint8) << 3)
    return np.asarray((codes[:, 0::2] | (codes[:, 1::2] << 4)).numpy())
