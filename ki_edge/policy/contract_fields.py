"""The types and sizes of a policy contract's fields, whoever constructs it: a file, a preset or a program."""

from __future__ import annotations

import math
import types
import unicodedata
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ki_edge.errors import ContractError

# The largest values that are believed: far above every known policy, and nothing is allocated on the word of a file.
LIMITS = {
    "state_dim": 4096, "action_dim": 4096, "model_action_dim": 4096, "action_horizon": 4096, "execute": 4096,
    "rtc_max_delay": 4096,
    "image_size": 4096, "max_token_len": 1 << 16, "num_steps": 1000, "size": 1 << 24, "id_offset": 1 << 24,
    "max_tokens": 4096,
}  # fmt: skip
MAX_CAMERAS = 64
MAX_LENGTH = 4096  # entries of a mask or of a list of names
MAX_NAME = 500  # characters of a name
MAX_PROMPT = 10_000  # characters of the default prompt
MAX_HZ = 1_000_000.0


def check_fields(contract: Any) -> None:
    """ContractError, which names the field, for a value of another type than declared, or beyond any policy's."""
    for name, kind in _kinds(type(contract)).items():
        _check(kind, getattr(contract, name), name)
    if len(contract.cameras) > MAX_CAMERAS:
        raise _error("cameras", f"at most {MAX_CAMERAS} slots, got {len(contract.cameras)}")
    hz = contract.control_hz
    if hz is not None and not (math.isfinite(hz) and hz <= MAX_HZ):
        raise _error("control_hz", f"expected at most {MAX_HZ:.0f}, got {hz!r:.40}")


_HINTS: dict[Any, dict[str, Any]] = {}


def _kinds(kind: Any) -> dict[str, Any]:
    """Name -> type of a dataclass's fields; kept, since finding them takes longer than all checks."""
    if kind not in _HINTS:
        hints = get_type_hints(kind)
        _HINTS[kind] = {field.name: hints[field.name] for field in fields(kind)}
    return _HINTS[kind]


def _check(kind: Any, value: Any, where: str) -> None:
    """One value against its annotation: dataclass, tuple, Literal, optional or plain type."""
    origin, choices = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is not None:
            _check(next(choice for choice in choices if choice is not type(None)), value, where)
    elif origin is Literal:
        if not isinstance(value, str) or value not in choices:
            raise _error(where, f"expected one of {', '.join(choices)}, got {value!r:.60}")
    elif origin is tuple:
        _check_tuple(choices, value, where)
    elif is_dataclass(kind):
        _check_nested(kind, value, where)
    else:
        _check_plain(kind, value, where)


def _check_nested(kind: Any, value: Any, where: str) -> None:
    if not isinstance(value, kind):
        raise _error(where, f"expected {kind.__name__}, got {value!r:.60}")
    for name, inner in _kinds(kind).items():
        _check(inner, getattr(value, name), f"{where}.{name}")


def _check_tuple(choices: tuple[Any, ...], value: Any, where: str) -> None:
    if not isinstance(value, tuple | list):
        raise _error(where, f"expected a tuple, got {value!r:.60}")
    if len(value) > MAX_LENGTH or (choices[-1] is not Ellipsis and len(value) != len(choices)):
        number = MAX_LENGTH if choices[-1] is Ellipsis else len(choices)
        raise _error(where, f"expected {number} values{' at most' * (number == MAX_LENGTH)}, got {value!r:.60}")
    for item in value:
        _check(choices[0], item, where)


def _check_plain(kind: Any, value: Any, where: str) -> None:
    name = where.rpartition(".")[2]
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise _error(where, f"expected {kind.__name__}, got {value!r:.60}")
    if kind is int and abs(value) > LIMITS.get(name, MAX_LENGTH):
        raise _error(where, f"{value!r:.40} is more than any policy has ({LIMITS.get(name, MAX_LENGTH)})")
    if kind is str:
        text = name == "default_prompt"
        most = MAX_PROMPT if text else MAX_NAME
        if len(value) > most or not (_is_text(value) if text else value.isprintable()):
            raise _error(where, f"expected up to {most} characters without control characters, got {value!r:.60}")


def _is_text(value: str) -> bool:
    """Any language's, which may need invisible characters, but none that controls a terminal."""
    return all(char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs") for char in value)


def _error(where: str, what: str) -> ContractError:
    return ContractError(f"policy contract: {where}: {what}")
