"""A JSON object that a person wrote, taken apart: every key known and of its kind, or one line says which is not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ki_edge.errors import RobotError

MOST = 10_000  # entries of a list


class Fields:
    """Keys of an object, each taken once. `where`: what messages call it. RobotError for what is wrong."""

    def __init__(self, given: Any, where: str, known: Iterable[str]) -> None:
        self.where, self._known = where, tuple(known)
        if not isinstance(given, Mapping):
            raise RobotError(f"{where}: expected an object with {', '.join(self._known)}, got {given!r:.60}")
        if unknown := [str(key) for key in given if key not in self._known]:
            raise RobotError(
                f"{where}: unknown key {', '.join(unknown)[:200]}; there is {', '.join(self._known) or 'none'}"
            )
        self._given = given

    def __contains__(self, key: str) -> bool:
        return self._given.get(key) is not None

    def any(self, key: str) -> Any:
        """The value as it is; RobotError if it is missing or null."""
        value = self._given.get(key)
        if value is None:
            raise RobotError(f"{self.where}: {key} is missing")
        return value

    def text(self, key: str) -> str:
        return str(self._of(key, str, "text"))

    def flag(self, key: str) -> bool:
        return bool(self._of(key, bool, "true or false"))

    def number(self, key: str, least: float = -math.inf, most: float = math.inf) -> float:
        value = self.any(key)
        if not _is_number(value) or not least <= value <= most:
            bounds = "" if math.isinf(least) and math.isinf(most) else f" from {least:g} to {most:g}"
            raise RobotError(f"{self.where}: {key} is {value!r:.60}, expected a number{bounds}")
        return float(value)

    def count(self, key: str, least: int = 1, most: int = 1 << 31) -> int:
        value = self.any(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise RobotError(f"{self.where}: {key} is {value!r:.60}, expected an integer from {least} to {most}")
        return value

    def numbers(self, key: str, size: int | None = None) -> tuple[float, ...]:
        """A list of numbers, of that size if one is given."""
        values = self._list(key, "a list of numbers" if size is None else f"a list of {size} numbers")
        if not all(_is_number(value) for value in values) or (size is not None and len(values) != size):
            wanted = "numbers" if size is None else f"{size} numbers"
            raise RobotError(f"{self.where}: {key} is {values!r:.60}, expected a list of {wanted}")
        return tuple(map(float, values))

    def counts(self, key: str) -> tuple[int, ...]:
        """A list of integers from 0 on, at least one."""
        values = self._list(key, "a list of integers")
        good = all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 for value in values)
        if not good or not values:
            raise RobotError(f"{self.where}: {key} is {values!r:.60}, expected a list of integers from 0 on")
        return tuple(values)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of different texts, at least one."""
        values = self._list(key, "a list of names")
        if not values or not all(isinstance(value, str) and value for value in values):
            raise RobotError(f"{self.where}: {key} is {values!r:.60}, expected a list of names")
        if twice := [value for at, value in enumerate(values) if value in values[:at]]:
            raise RobotError(f"{self.where}: {key} has {twice[0]!r:.60} twice")
        return tuple(values)

    def object(self, key: str) -> Mapping[str, Any]:
        """An object with any keys."""
        value = self.any(key)
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise RobotError(f"{self.where}: {key} is {value!r:.60}, expected an object")
        return value

    def _list(self, key: str, what: str) -> list[Any]:
        value = self.any(key)
        if not isinstance(value, list | tuple) or len(value) > MOST:
            raise RobotError(f"{self.where}: {key} is {value!r:.60}, expected {what}")
        return list(value)

    def _of(self, key: str, kind: type, what: str) -> Any:
        value = self.any(key)
        if not isinstance(value, kind):
            raise RobotError(f"{self.where}: {key} is {value!r:.60}, expected {what}")
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
