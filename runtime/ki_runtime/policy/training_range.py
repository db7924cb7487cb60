"""A warning for states far from everything that a policy was trained on, such as degrees where it knows radians."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.normalize import NormStats

Float64 = npt.NDArray[np.float64]
# How far a normalised state may be: q01 and q99 are at -1 and 1, so this is 4.5 times their distance beyond them;
# a Gaussian's q99 is 2.3 standard deviations from its mean, and the same distance beyond is 23.
FAR = {"quantile": 10.0, "zscore": 23.0}
STILL = 1e-3  # a range below this share of its values is that of a dimension that hardly moved: it tells no unit
SHOWN = 4


class TrainingRange:
    """Tells once that a state is far outside the training range."""

    def __init__(self, contract: PolicyContract, stats: Mapping[str, NormStats], say: Callable[[str], object]) -> None:
        self._say = say
        self._low: Float64 | None = None
        kind, known = contract.normalization_of("state"), stats.get("state")
        if kind not in FAR or known is None:
            return
        first, second = (known.q01, known.q99) if kind == "quantile" else (known.mean, known.std)
        if first is None or second is None:
            return
        centre, half = ((first + second) / 2, (second - first) / 2) if kind == "quantile" else (first, second)
        half = np.where(half > STILL * np.abs(centre), half, np.inf)[: contract.state_dim]
        centre = centre[: contract.state_dim]
        with np.errstate(invalid="ignore"):
            self._low, self._high = centre - FAR[kind] * half, centre + FAR[kind] * half
        self._seen = known.q01, known.q99

    def look(self, state: Float64) -> None:
        """`state` float64 [s] in robot units (ALOHA: in the model's convention)."""
        if self._low is None:
            return
        bad = np.flatnonzero((state < self._low) | (state > self._high))
        if bad.size:
            self._low = None
            shown = ", ".join(f"state[{i}] is {state[i]:.4g}{self._trained(int(i))}" for i in bad[:SHOWN])
            more = f" and {bad.size - SHOWN} more" if bad.size > SHOWN else ""
            self._say(f"the state is far outside the training range: {shown}{more}; check its units and its order")

    def _trained(self, dim: int) -> str:
        low, high = self._seen
        return "" if low is None or high is None else f" (trained on {low[dim]:.4g} to {high[dim]:.4g})"
