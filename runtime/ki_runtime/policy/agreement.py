"""How far the two heads of a policy are apart: the actions of its flow, and those that its FAST tokens say."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ki_edge.errors import ArgumentError
from ki_edge.policy.normalize import NormStats

Float64 = npt.NDArray[np.float64]


def usual_range(stats: Mapping[str, NormStats], name: str, size: int) -> Float64 | None:
    """How far each number of `name` ("actions", "state") usually ranges, f64 [size], robot units.

    From the 1 % to the 99 % quantile, else four standard deviations; infinite where it hardly moved. None if the
    statistics do not say.
    """
    known = stats.get(name)
    if known is None:
        return None
    if known.q01 is not None and known.q99 is not None:
        scale = known.q99 - known.q01
    elif known.std is not None:
        scale = 4.0 * known.std
    else:
        return None
    wide = np.asarray(scale, np.float64)[:size]
    return np.where(wide > 0, wide, np.inf) if len(wide) == size else None


class Agreement:
    """Compares chunks in shares of each number's usual range. ArgumentError if the statistics do not tell it."""

    def __init__(self, stats: Mapping[str, NormStats], action_dim: int) -> None:
        scale = usual_range(stats, "actions", action_dim)
        if scale is None or not np.isfinite(scale).any():
            raise ArgumentError(
                "the policy's statistics do not say how far its actions range, which is what its two heads are "
                "compared by: export it with --norm-stats"
            )
        self._moving = np.isfinite(scale)
        self._scale = scale[self._moving]

    def disagreement(self, flow: Float64, fast: Float64) -> float:
        """Root mean square of the difference of two chunks [n, a] in robot units, over all that moves; 0: the same.

        1 is the whole range of an action. Infinite where one of them is not finite.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            apart = (np.asarray(flow, np.float64) - np.asarray(fast, np.float64))[:, self._moving] / self._scale
            found = float(np.sqrt(np.mean(np.square(apart))))
        return found if np.isfinite(found) else float("inf")
