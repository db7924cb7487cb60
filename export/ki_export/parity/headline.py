"""What a comparison says first, in every precision: how far the actions are off, and how far they may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .bars import COSINE, MAX_ABS, Measurement

ACTIONS = ("actions", "actions_direction")  # the same numbers, each held to a measure of its own
Headline = Mapping[str, float]


def actions_error(measurements: Sequence[Measurement]) -> Headline | None:
    """Of all cases the least cosine and the largest error of a normalised action, and what their bars allow.

    Keys "cosine", "max_abs" and, where there is such a bar, "cosine_allowed", "max_abs_allowed". None if no actions
    were compared.
    """
    found = [m for m in measurements if m.tensor in ACTIONS]
    if not found:
        return None
    limits = {m.metric: m.limit for m in found}
    allowed = {"max_abs_allowed": limits[MAX_ABS]} if MAX_ABS in limits else {}
    if COSINE in limits:
        allowed["cosine_allowed"] = 1 - limits[COSINE]
    return {
        "cosine": float(np.min([m.cosine for m in found])),
        "max_abs": float(np.max([m.max_abs for m in found])),
        **allowed,
    }


def in_words(found: Headline) -> str:
    """Such as "actions: cosine 0.99999988 (at least 0.99999), largest error 3.2e-04 (at most 5.0e-03)"."""
    cosine, error = f"cosine {found['cosine']:.8f}", f"largest error {found['max_abs']:.1e}"
    if "cosine_allowed" in found:
        cosine += f" (at least {found['cosine_allowed']:.6g})"
    if "max_abs_allowed" in found:
        error += f" (at most {found['max_abs_allowed']:.1e})"
    return f"actions: {cosine}, {error}"
