"""How far a float32 bundle may be from its reference: one table, each bar with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Bar:
    """The largest absolute error allowed; `scaled`: times the reference's largest magnitude where that exceeds 1."""

    limit: float
    scaled: bool
    reason: str

    def at(self, magnitude: float) -> float:
        """The bar of a tensor whose reference reaches `magnitude`."""
        return self.limit * max(1.0, magnitude) if self.scaled else self.limit


KV_REASON = (
    "float32 sums of up to 16384 terms in another order: about 1e-6 of the largest value a layer; K/V of large models "
    "reach tens, hence scaled"
)

BARS = {
    "times": Bar(0.0, False, "the float32 times of both conventions are exact; any difference is the wrong convention"),
    "modulation": Bar(2e-5, True, "three small float32 dense layers, computed once a step count"),
    "prefix_mask": Bar(0.0, False, "boolean"),
    "prefix_k": Bar(2e-5, True, KV_REASON),
    "prefix_v": Bar(2e-5, True, KV_REASON),
    "x_next": Bar(2e-5, False, "one step from the reference's own x and K/V: nothing accumulates, x is of order 1"),
    "x": Bar(2e-5, False, "x after each step of the whole pipeline; openpi in float32 is itself 1.4e-6 from float64"),
    "actions": Bar(2e-5, False, "the last x: what the robot gets, before normalisation is undone"),
    "logits": Bar(2e-5, True, "as K/V; large vocabularies have logits of order 10"),
    "new_k": Bar(2e-5, True, KV_REASON),
    "new_v": Bar(2e-5, True, KV_REASON),
    "greedy_ids": Bar(0.0, False, "token ids are integers: one difference changes everything after it"),
}


@dataclass(frozen=True)
class Measurement:
    """One comparison. `place`: the layer or step, or None for a tensor as a whole. `error`: max abs, may be NaN."""

    case: str
    graph: str
    tensor: str
    place: int | None
    error: float
    magnitude: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    @property
    def where(self) -> str:
        """For people: graph, tensor and place."""
        kind = "layer" if self.tensor.endswith(("_k", "_v")) else "step"
        return f"{self.graph}: {self.tensor}" + ("" if self.place is None else f" {kind} {self.place}")

    @property
    def severity(self) -> float:
        """Error relative to the bar, above 1 if it failed."""
        if math.isnan(self.error):
            return math.inf
        if self.limit == 0:
            return 0.0 if self.error == 0 else math.inf
        return self.error / self.limit


def measure(
    case: str, graph: str, tensor: str, given: npt.ArrayLike, reference: npt.ArrayLike, place: int | None = None
) -> Measurement:
    """Compare arrays of one shape against the bar called `tensor`. Another shape, NaN or infinity fails."""
    ours, theirs = np.asarray(given, np.float64), np.asarray(reference, np.float64)
    magnitude = float(np.abs(theirs).max(initial=0.0))
    error = float(np.abs(ours - theirs).max(initial=0.0)) if ours.shape == theirs.shape else float("inf")
    return Measurement(case, graph, tensor, place, error, magnitude, BARS[tensor].at(magnitude))
