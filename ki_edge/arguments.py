"""What callers hand to the library: arrays, numbers and counts, or one error of the callee's kind that names them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ArgumentError, KiEdgeError

Error = type[KiEdgeError]
MAX_NUMBERS = 1 << 31  # of one array: 16 GB
MAX_SEED = (1 << 63) - 1


def array_of(value: npt.ArrayLike, name: str, error: Error = ArgumentError) -> npt.NDArray[Any]:
    """`value` as an array of its own type and shape; `error` for what is none, such as lists of unequal lengths."""
    try:
        array = np.asarray(value)
    except Exception as problem:  # __array__ of foreign types raises whatever it likes
        raise error(f"{name}: expected an array, got {type(value).__name__} ({str(problem)[:120]})") from None
    if array.dtype.kind in "OV":
        raise error(f"{name}: expected an array of numbers, got {type(value).__name__} with {array.dtype} inside")
    return array


def numbers(value: npt.ArrayLike, name: str, error: Error = ArgumentError) -> npt.NDArray[np.float64]:
    """`value` as float64 of any shape; `error` for anything but real numbers. What float64 cannot hold is infinite."""
    array = array_of(value, name, error)
    if array.dtype.kind not in "fiu":
        raise error(f"{name}: expected numbers, got {array.dtype} {list(array.shape)}")
    if array.size > MAX_NUMBERS:
        raise error(f"{name}: {list(array.shape)} has more than {MAX_NUMBERS} numbers")
    with np.errstate(over="ignore"):
        return array.astype(np.float64, copy=False)


def integers(value: Any, name: str, most: int, error: Error = ArgumentError) -> list[int]:
    """The integers of an iterable or an array of one axis, at most `most` of them; `error` for any other value."""
    axes = value.ndim if isinstance(value, np.ndarray) else 1
    if isinstance(value, str | bytes) or not isinstance(value, Iterable) or axes != 1:
        raise error(f"{name}: expected a list of integers, got {type(value).__name__}")
    found = list(islice(value, most + 1))
    if len(found) > most:
        raise error(f"{name}: more than {most} integers")
    for item in found:
        if isinstance(item, bool | np.bool_) or not isinstance(item, int | np.integer):
            raise error(f"{name}: expected integers, found {item!r:.60}")
    return [int(item) for item in found]


def count(value: Any, name: str, most: int, error: Error = ArgumentError, *, least: int = 1) -> int:
    """An integer from `least` to `most`; `error` for any other value."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        raise error(f"{name} {value!r:.60}: expected an integer from {least} to {most}")
    return int(value)


def seed_of(value: Any) -> int | None:
    """A seed of random noise: None for a fresh one, else 0 or more. ArgumentError for any other value."""
    return None if value is None else count(value, "seed", MAX_SEED, least=0)
