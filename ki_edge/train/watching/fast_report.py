"""What of train.html tells about FAST: fast.json, which the data write when the codec is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from .curves import Curve, chart, table

MOST_ROWS, MOST_VALUES = 64, 4096
WORDS = {
    "fast_ids": "FAST ids in the codec",
    "highest_id": "the first of them in the vocabulary, others follow downwards",
    "vocabulary": "words of the model's vocabulary",
    "steps_a_unit": "steps to which a coefficient of 1 is rounded",
    "longest_prompt_allowed": "tokens of a prompt, at most",
    "longest_postfix_allowed": "tokens of a chunk, at most",
    "datasets": "Tokens by dataset",
    "actions": "What FAST changes in a chunk at most, by number of an action",
    "chunks_by_fast_tokens": "chunks by their FAST tokens",
    "prompt_tokens_mean": "prompt, mean", "prompt_tokens_p99": "99 %", "prompt_tokens_max": "longest",
    "fast_tokens_mean": "FAST, mean", "fast_tokens_p99": "99 % of FAST", "fast_tokens_max": "longest FAST",
    "held_out_not_spelled": "of them not spelled",
    "mean_error": "mean over chunks", "largest_error": "largest", "mean_error_normalised": "mean, normalised",
    "largest_error_normalised": "largest, normalised",
}  # fmt: skip


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
    return WORDS.get(str(name), str(name).replace("_", " ")[:80])


def _text(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)[:200]
