"""Weights that are numbers. A checkpoint of a run that diverged holds NaN, and so would every action."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.checkpoints import TensorSource
from ki_edge.dtypes import FLOATS
from ki_edge.errors import ExportError

PIECE = 1 << 24  # bytes


def check_finite(source: TensorSource, keys: Iterable[str]) -> None:
    """ExportError by name for a tensor that holds NaN or infinity. Stored bytes are read, a piece at a time."""
    for key in keys:
        tensor = source.tensors[key]
        if tensor.place is None:
            _exhaust(finite_pieces(key, source.pieces(key)))
            continue
        for start in range(0, tensor.nbytes, PIECE):
            raw = tensor.place.index.read(tensor.place.name, start, min(start + PIECE, tensor.nbytes))
            raw = raw[: raw.size - raw.size % FLOATS[tensor.dtype].nbytes]
            if tensor.dtype == "F32":
                good = _finite(raw.view("<f4"))
            else:
                bits = FLOATS[tensor.dtype].exponent
                good = not bool(((raw.view("<u2") & bits) == bits).any())
            if not good:
                _refuse(key)


def finite_pieces(key: str, pieces: Iterable[npt.NDArray[Any]]) -> Iterator[npt.NDArray[Any]]:
    """The pieces of a tensor, each checked on its way."""
    for piece in pieces:
        if piece.dtype == np.float32 and not _finite(piece):
            _refuse(key)
        yield piece


def _finite(values: npt.NDArray[Any]) -> bool:
    """A sum is not finite if a term is not; the terms are looked at one by one only if it overflowed."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(values.sum(dtype=np.float32)) or np.isfinite(values).all())


def _refuse(key: str) -> None:
    raise ExportError(f"'{key}' holds values that are not finite: the training diverged, or the file is damaged")


def _exhaust(pieces: Iterable[object]) -> None:
    for _ in pieces:
        pass
