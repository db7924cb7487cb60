"""Files from outside: regular ones only, of bounded size, and JSON that means what it says.

Whatever is wrong becomes one error of the caller's kind, whose message names the file. Nothing waits: a FIFO or a
device is refused before it is read.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ki_edge.errors import KiEdgeError

MAX_JSON = 16_000_000  # bytes; the largest manifest of a real model takes under a tenth
MAX_DEPTH = 64  # of nested objects and lists
MAX_SHOWN = 500  # characters of a path in a message
LARGEST_INT = 1 << 63
PIECE = 1 << 20  # bytes read at once
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape of half a character, or of one of a pair
Error = type[KiEdgeError]


def read_file(path: Path, most: int, error: Error) -> bytes:
    """All bytes of a regular file; `error` if it is missing, no regular file, or longer than `most` bytes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            content = _read(descriptor, most + 1) if regular else b""
        finally:
            os.close(descriptor)
    except ValueError as problem:  # a NUL in the name, or half a character
        raise error(f"{str(path)[:MAX_SHOWN]!r} cannot be a file name: {problem}") from None
    except OSError as problem:
        raise error(f"{str(path)[:MAX_SHOWN]} cannot be read: {problem.strerror}") from None
    if not regular:
        raise error(f"{path} is not a regular file")
    if len(content) > most:
        raise error(f"{path} has more than {most} bytes, more than such a file can have")
    return content


def read_json(path: Path, error: Error, most: int = MAX_JSON) -> Any:
    """The value of a JSON file. `error` as of `read_file` and `parse_json`."""
    return parse_json(read_file(path, most, error), str(path), error)


def read_object(path: Path, error: Error, most: int = MAX_JSON) -> dict[str, Any]:
    """The object of a JSON file. `error` as of `read_json`, and for any other value."""
    content = read_json(path, error, most)
    if not isinstance(content, dict):
        raise error(f"{path}: expected a JSON object, found {_kind(content)}")
    return content


def parse_json(
    content: bytes,
    where: str,
    error: Error,
    *,
    constant: Callable[[str], float] | None = None,
    number: Callable[[str], float] | None = None,
) -> Any:
    """The value of a JSON text. Numbers are finite, integers have at most 64 bits, strings are Unicode without NUL.

    `error`, which names `where`, for anything else, for a key that comes twice, and beyond MAX_DEPTH. `constant` and
    `number` read NaN and infinity, and numbers with a fraction, for callers who say themselves what is wrong with one.
    """
    try:
        value = json.loads(
            content.decode("utf-8-sig"),
            parse_constant=constant or _refuse_constant,
            parse_int=_integer,
            parse_float=number or _finite,
            object_pairs_hook=_object,
        )
        if b"\\u0000" in content or b"\0" in content:
            raise ValueError("a NUL character in it")
        if SURROGATE.search(content):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails for half a character
        if _deeper(value, MAX_DEPTH):
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
    except RecursionError:
        raise error(f"{where} is not valid JSON: nested too deep") from None
    except UnicodeError as problem:
        raise error(f"{where} is not valid JSON: its text is not UTF-8 ({problem.reason})") from None  # type: ignore[attr-defined]
    except ValueError as problem:
        raise error(f"{where} is not valid JSON: {problem}") from None
    return value


def _read(descriptor: int, most: int) -> bytes:
    pieces = []
    while most > 0 and (piece := os.read(descriptor, min(most, PIECE))):
        pieces.append(piece)
        most -= len(piece)
    return b"".join(pieces)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _integer(text: str) -> int:
    if len(text) > 20 or not -LARGEST_INT <= int(text) < LARGEST_INT:
        raise ValueError(f"the integer {text:.12}... has more than 64 bits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.20} is too large")
    return value


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.60} comes twice in an object")
    return found


def _deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested more than `depth` deep."""
    level = [value]
    for _ in range(depth + 1):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", bool: "a truth value", type(None): "null"}.get(type(value), "a number")
