"""What of train.html tells about FAST: fast.json, which the data write when the codec is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from .curves import Curve, chart, table

MOST_ROWS, MOST_VALUES = 64, 4096


def fast_section(content: Mapping[str, Any]) -> str:
    """HTML: what is single as a table, lists of objects as tables, lists of numbers as curves over their places."""
    single = [(name, value) for name, value in content.items() if not isinstance(value, list | dict)]
    parts = [table(("what", "value"), [(_words(name), _text(value)) for name, value in single])] if single else []
    for name, value in content.items():
        if isinstance(value, dict):
            value = [
                {"": inner, **entry} if isinstance(entry, dict) else {"": inner, "value": entry}
                for inner, entry in value.items()
            ]
        if not isinstance(value, list) or not value:
            continue
        if all(isinstance(entry, dict) for entry in value):
            parts.append(f"<h3>{escape(_words(name))}</h3>" + _objects(value[:MOST_ROWS]))
        elif all(isinstance(entry, int | float) for entry in value):
            y = np.array(value[:MOST_VALUES], np.float64)
            curve = Curve(_words(name), np.arange(len(y), dtype=np.float64), y, 4)
            parts.append(chart([curve], axis=_words(name).rpartition(" ")[2], zero=True, height=150))
    return "".join(parts)


def _objects(entries: Sequence[Mapping[str, Any]]) -> str:
    heads = list(dict.fromkeys(str(name) for entry in entries for name in entry))
    rows = [[_text(entry.get(name)) for name in heads] for entry in entries]
    return table([_words(name) for name in heads], rows)


def _words(name: object) -> str:
    return str(name).replace("_", " ")[:80]


def _text(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)[:200]
