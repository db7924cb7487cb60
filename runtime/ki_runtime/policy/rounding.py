"""The witness's bars for an engine that rounds products more than the bundle's graphs say.

They are those that a bundle exported in that precision carries itself: the strictest that a published engine is held to
in float16, and for bfloat16 what products of 8 bits allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ki_edge.bundle.witness import Witness


@dataclass(frozen=True)
class Bars:
    """At least this much: largest error of an action, 1 - cosine, two runs apart; `tie` times the float32's ties."""

    actions: float
    direction: float
    apart: float
    tie: float


BARS: Mapping[str, Bars] = {  # tie: from 2e-5 of the largest logit to what the rounding leaves of it, 2 % and 0.2 %
    "bfloat16": Bars(5e-2, 1e-3, 1e-2, 1000.0),
    "float16": Bars(5e-3, 1e-5, 1e-3, 100.0),
}


def widened(witness: Witness, rounding: str) -> Witness:
    """The witness with the bars of this rounding, where they are wider than its own."""
    bars = BARS.get(rounding)
    if bars is None:
        return witness
    fast = witness.fast
    return replace(
        witness,
        max_abs=np.maximum(witness.max_abs, bars.actions),
        cosine_distance=max(witness.cosine_distance, bars.direction),
        apart=max(witness.apart, bars.apart),
        fast=None if fast is None else replace(fast, ties=fast.ties * np.float32(bars.tie)),
    )
