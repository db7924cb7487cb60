"""The words that label what is counted: few and fixed, so that no client can make more of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np

OTHER = "other"
# Outcome of a request -> what became of it.
OUTCOMES = {
    "answered": "answered",
    **dict.fromkeys(("observation", "arguments", "frame"), "refused"),
    "policy": "failed",
    **dict.fromkeys(("busy", "replaced", "gone", "late", "ending"), "dropped"),
}
ERRORS = ("observation", "arguments", "frame", "policy", "busy", "late", "ending", OTHER)  # of which the client is told
DROPPED = ("busy", "replaced", "gone", "late", "ending", OTHER)
STAGES = ("read", "wait", "preprocess", "prefix", "denoise", "fast", "model", "postprocess", "write", OTHER)
RULES = ("shape", "finite", "measured", "position", "velocity", "acceleration", "step", "gripper", "user", OTHER)
MISSES, GUARDS = "deadline_misses", "guards."
LARGEST = 1e6  # that a client may report at once


def known(word: str, words: Collection[str]) -> str:
    """The word, or OTHER."""
    return word if word in words else OTHER


def told(reported: Mapping[str, float]) -> Iterable[tuple[str, float]]:
    """What a client reported that can be counted: finite, not negative, not absurd."""
    for name, value in reported.items():
        if isinstance(value, int | float | np.number) and 0 < value <= LARGEST:  # also false for NaN
            yield str(name), float(value)


def guards(reported: Mapping[str, float]) -> dict[str, float]:
    """How many commands each rule of a client's guards changed or held back."""
    found: dict[str, float] = {}
    for name, value in told(reported):
        if name.startswith(GUARDS):
            rule = known(name.removeprefix(GUARDS), RULES)
            found[rule] = found.get(rule, 0.0) + value
    return found
