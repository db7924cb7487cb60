"""openpi's frames: msgpack in which an array is a map of its bytes, type and shape. Never pickle.

    array     {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [n, ...]}
    number    {b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f4"}

What comes in is bounded before anything is made of it: arrays of plain numbers and texts, whose bytes fit their shape.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from ki_edge.arguments import array_of
from ki_edge.errors import ArgumentError, BackendError

from .measuring import MOST_TEXT, check_size

MOST_BYTES = 64 << 20  # of a frame that comes in: a chunk of actions is a few kB, a policy's metadata too
SENT, TAKEN = "biufSU", "biufSU"  # kinds of numpy types
PLAIN_KIND = re.compile(r"[<>|=]?[biufSU][0-9]{1,8}")  # what `dtype.str` gives
MOST_AXES = 32
MOST_EMPTY = 1 << 16  # texts of no length in an array, for which numpy takes room nevertheless
NEEDS = "a policy on another machine needs {}: pip install 'ki-edge[remote]'"


def pack(value: Any) -> bytes:
    """A frame. ArgumentError for what has no place in one, such as arrays of objects."""
    try:
        packed: bytes = _msgpack().packb(value, default=_packed)
    except ArgumentError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(f"this cannot be sent: {' '.join(str(error).split())[:200]}") from None
    return packed


def unpack(frame: bytes, where: str, most: int = MOST_BYTES) -> Any:
    """What a frame of at most `most` bytes holds; arrays are read-only views of its bytes.

    BackendError, which begins with `where`, for anything malformed.
    """
    if len(frame) > most:
        raise BackendError(f"{where} sent a frame of {len(frame)} bytes, at most {most} are read")
    msgpack = _msgpack()
    try:
        check_size(frame)
        return msgpack.unpackb(
            frame, object_hook=_unpacked, max_str_len=MOST_TEXT, max_bin_len=len(frame), max_ext_len=0
        )
    except Exception as error:  # of msgpack's many kinds, of numpy for types that are none
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")
        raise BackendError(f"{where} sent a frame that is not of openpi's form ({reason})") from None


def _packed(value: Any) -> Any:
    if isinstance(value, np.generic):
        _check_kind(value.dtype, SENT)
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    array = value if isinstance(value, np.ndarray) else array_of(value, "a part of the observation")
    _check_kind(array.dtype, SENT)
    return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}


def _unpacked(found: dict[Any, Any]) -> Any:
    if b"__ndarray__" in found:
        shape, data = found[b"shape"], found[b"data"]
        kind = _kind_of(found)
        whole = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        fits = whole and len(shape) <= MOST_AXES and math.prod(shape) * kind.itemsize == len(data)
        if not fits or not isinstance(data, bytes) or (not kind.itemsize and math.prod(shape) > MOST_EMPTY):
            raise ValueError(f"an array of {kind} {shape!r:.60} in {len(data)} bytes")
        return np.frombuffer(data, kind).reshape(shape) if data else np.zeros(shape, kind)
    if b"__npgeneric__" in found:
        kind, value = _kind_of(found), found[b"data"]
        if not isinstance(value, str if kind.kind == "U" else bytes if kind.kind == "S" else int | float):
            raise ValueError(f"a {kind} that is a {type(value).__name__}")  # bytes(n) would be n bytes
        return kind.type(value)
    return found


def _kind_of(found: dict[Any, Any]) -> np.dtype[Any]:
    name = found[b"dtype"]
    if not isinstance(name, str) or not PLAIN_KIND.fullmatch(name):  # numpy takes seconds to read a long one
        raise ArgumentError(f"an array of {name!r:.60} cannot be sent: expected numbers or text")
    kind = np.dtype(name)
    _check_kind(kind, TAKEN)
    return kind


def _check_kind(kind: np.dtype[Any], known: str) -> None:
    if kind.kind not in known or kind.subdtype is not None:
        raise ArgumentError(f"an array of {kind!s:.60} cannot be sent: expected numbers or text")


def _msgpack() -> Any:
    try:
        import msgpack
    except ModuleNotFoundError as error:
        raise BackendError(NEEDS.format(error.name)) from error
    return msgpack
