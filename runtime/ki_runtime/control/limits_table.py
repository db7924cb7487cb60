"""The limits as people read them."""

from __future__ import annotations

import numpy as np

from .limits import KINDS, Limits

HEADS = {"position": "position", "velocity": "velocity /s", "acceleration": "acceleration /s^2", "step": "step"}
NONE = "none"


def limit_lines(limits: Limits) -> list[str]:
    """A table by name, then where each kind of limit came from, and a warning where nothing limits a dimension."""
    columns = [["", *limits.names], *([head, *_cells(limits, kind)] for kind, head in HEADS.items())]
    if any(index is not None for index in limits.measured):
        columns.append(["measured by", *(NONE if at is None else f"state {at}" for at in limits.measured)])
    if any(limits.motion) or any(limits.gripper):
        columns.append(["remarks", *_remarks(limits)])
    widths = [max(map(len, column)) for column in columns]
    rows = zip(
        *([text.ljust(width) for text in column] for column, width in zip(columns, widths, strict=True)), strict=True
    )
    lines = ["limits of the action, in the robot's units", *("  ".join(row).rstrip() for row in rows), ""]
    lines += [line for kind in KINDS for line in _origins(limits, kind)]
    warning = limits.warning()
    return [*lines, *([warning] if warning else [])]


def _cells(limits: Limits, kind: str) -> list[str]:
    if kind == "position":
        pairs = zip(limits.low, limits.high, strict=True)
        return [NONE if np.isinf([low, high]).all() else f"{_end(low)} to {_end(high)}" for low, high in pairs]
    return [_end(value) for value in getattr(limits, kind)]


def _end(value: float) -> str:
    return NONE if np.isinf(value) else f"{value:.5g}"


def _remarks(limits: Limits) -> list[str]:
    """What is special about each dimension."""
    rows = zip(limits.gripper, limits.motion, strict=True)
    return [", ".join(["gripper"] * bool(gripper) + ["held by 0"] * bool(motion)) for gripper, motion in rows]


def _origins(limits: Limits, kind: str) -> list[str]:
    """One line for each source of a kind of limit, with the names that have it from there."""
    found: dict[str, list[str]] = {}
    for name, text, limited in zip(limits.names, limits.origin[kind], limits.limited(kind), strict=True):
        if text:
            found.setdefault(text if limited else f"none, by {text}", []).append(name)
    if not found:
        return [f"{kind}: no limit"]
    return [f"{kind} of {', '.join(names)}: {text}" for text, names in found.items()]
