"""What a policy's heads usually disagree by, kept in a file: the limit of later runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ki_edge.errors import ArgumentError
from ki_edge.files.reading import read_object
from ki_edge.files.writing import write_file

LEAST = 50  # checks that a limit is made of
MARGIN = 1.25  # of the 99 % quantile
MOST_BYTES = 1 << 16


def limit_of(found: Sequence[float]) -> dict[str, Any]:
    """What a file says of disagreements that were found in normal runs. ArgumentError for too few of them."""
    values = np.asarray(found, np.float64)
    check_enough(values.size)
    finite = values[np.isfinite(values)]
    if finite.size < 0.98 * values.size:
        raise ArgumentError(
            f"{values.size - finite.size} of {values.size} checks of this run found no actions in the policy's FAST "
            "tokens: its FAST head knows too little to check the other by"
        )
    p50, p95, p99 = np.percentile(finite, [50, 95, 99])
    facts = {"p50": p50, "p95": p95, "p99": p99, "max": finite.max()}
    return {
        "version": 1,
        "limit": round(MARGIN * float(p99), 6),
        "checks": int(values.size),
        "disagreement": {name: round(float(value), 6) for name, value in facts.items()},
    }


def check_enough(checks: float) -> None:
    """ArgumentError if so many checks, or the most that a run can have, are too few for a limit."""
    if checks < LEAST:
        raise ArgumentError(
            f"a limit of the self-check is made of at least {LEAST} checks, this run has room for {int(checks)}: "
            "run longer, or check more often"
        )


def save_limit(path: str | Path, found: Sequence[float]) -> float:
    """Write the file, and give the limit in it. Errors as of `limit_of`."""
    facts = limit_of(found)
    write_file(Path(path), json.dumps(facts, indent=1) + "\n", ArgumentError)
    return float(facts["limit"])


def read_limit(given: str) -> float:
    """A limit from a number or the file that holds it. ArgumentError for what is neither."""
    try:
        limit: Any = float(given)
    except ValueError:
        if not Path(given).is_file():
            raise ArgumentError(
                f"self-check limit {given!r:.200}: expected a number, or a file that --self-check-save wrote"
            ) from None
        limit = read_object(Path(given), ArgumentError, MOST_BYTES).get("limit")
        if limit is None:
            raise ArgumentError(
                f"{given:.200} holds no limit of a self-check: expected a file that --self-check-save wrote"
            ) from None
    if not isinstance(limit, int | float) or isinstance(limit, bool) or not 0.0 < limit < 1e9:
        raise ArgumentError(f"self-check limit {limit!r:.60} of {given!r:.200}: expected a number above 0")
    return float(limit)
