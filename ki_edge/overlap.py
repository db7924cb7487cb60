"""How a chunk of actions is made to continue the one before it: weights of its actions, strengths of the steps.

While a policy thinks, the robot goes on with the chunk before, whose last actions lie over the first of the new one.
Real-time chunking (arXiv 2506.07339) pulls each denoising step towards them; a policy that is trained for it (arXiv
2512.05964) gets those that will have been executed as they are. Time runs as in `flow`: 1 is noise, 0 is data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from . import graphs
from .arguments import array_of, count
from .config import Pi05Config
from .errors import ArgumentError

F32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
Schedule = Literal["linear", "exponential"]
MAX_HORIZON = 4096
MAX_GUIDANCE = 1000.0


@dataclass(frozen=True, eq=False)
class Overlap:
    """What new chunks are to continue, in model space. ArgumentError if it is not of one batch, or not finite.

    actions    f32 [B,H,A], the chunks before from the new ones' first action on, held at their end
    weights    f32 [B,H] from 0 to 1, how much each of them counts while steps are guided; 0: not at all
    committed  bool [B,H], those that the policy is to take as they are, for one that is trained for it
    maximum    of a step's guidance; None: the number of steps
    """

    actions: F32
    weights: F32
    committed: Bool
    maximum: float | None = None

    def __post_init__(self) -> None:
        wanted = {"actions": (np.float32, 3), "weights": (np.float32, 2), "committed": (np.bool_, 2)}
        for name, (dtype, ranks) in wanted.items():
            given = array_of(getattr(self, name), f"overlap {name}")
            if given.dtype != dtype or given.ndim != ranks or given.shape[:2] != np.shape(self.actions)[:2]:
                raise ArgumentError(
                    f"overlap: {name} is {given.dtype} {list(given.shape)}, expected actions float32 [B, H, A], "
                    "weights float32 [B, H], committed bool [B, H]"
                )
            object.__setattr__(self, name, given)
        if not np.isfinite(self.actions).all():
            raise ArgumentError("overlap: its actions hold NaN or infinity")
        if not ((self.weights >= 0) & (self.weights <= 1)).all():
            raise ArgumentError("overlap: its weights must be from 0 to 1")
        check_maximum(self.maximum)

    def check(self, batch: int, horizon: int, action_dim: int) -> None:
        """ArgumentError unless it is for so many chunks of this shape."""
        if self.actions.shape != (batch, horizon, action_dim):
            raise ArgumentError(
                f"overlap: its actions are {list(self.actions.shape)}, expected {[batch, horizon, action_dim]}"
            )


def nothing_before(config: Pi05Config, batch: int) -> dict[str, npt.NDArray[np.generic]]:
    """The denoise graph's inputs of that kind, in their order, for chunks that follow none: zeros."""
    sizes = {**graphs.sizes(config, 0), "B": batch}
    return {
        tensor.name: np.zeros([int(dim) for dim in tensor.resolve(sizes)], tensor.dtype)
        for tensor in graphs.REAL_TIME[config.rtc]
    }


def check_maximum(maximum: float | None) -> None:
    """ArgumentError unless it can be the largest guidance of a step."""
    if maximum is None:
        return
    number = isinstance(maximum, int | float | np.number) and not isinstance(maximum, bool)
    if not number or not 0.0 < maximum <= MAX_GUIDANCE:
        raise ArgumentError(f"guidance {maximum!r:.40}: expected a number above 0 and up to {MAX_GUIDANCE:.0f}")


def prefix_weights(delay: int, end: int, horizon: int, schedule: Schedule = "exponential") -> F32:
    """How much each action of the chunk before counts, f32 [horizon].

    1 before `delay`, whose actions will have been executed when the new chunk is there; then falling, in a line or, as
    w (e^w - 1) / (e - 1) of that line's w, faster; 0 from `end` on. ArgumentError for what is out of range.
    """
    horizon = count(horizon, "horizon", MAX_HORIZON)
    end = count(end, "end", horizon, least=0)
    start = min(count(delay, "delay", horizon, least=0), end)
    if schedule not in get_args(Schedule):
        raise ArgumentError(f"schedule {schedule!r:.40}: expected one of {', '.join(get_args(Schedule))}")
    at = np.arange(horizon, dtype=np.float64)
    weights = np.clip((start - 1 - at) / (end - start + 1) + 1, 0.0, 1.0)
    if schedule == "exponential":
        weights = weights * np.expm1(weights) / np.expm1(1.0)
    weights[end:] = 0.0
    return np.asarray(weights, np.float32)


def guidance_weights(times: npt.ArrayLike, maximum: float) -> F32:
    """How strongly the step at each flow time pulls, f32 of the times' shape: min(c / r^2, maximum).

    With tau = 1 - t: c = (1 - tau) / tau, r^2 = (1 - tau)^2 / (tau^2 + (1 - tau)^2). Where tau is 0, at the first step,
    c is infinite.
    """
    check_maximum(maximum)
    t = np.asarray(times, np.float64)
    below = t * (1.0 - t)
    with np.errstate(divide="ignore"):
        free = np.where(below > 0.0, (t**2 + (1.0 - t) ** 2) / np.where(below > 0.0, below, 1.0), np.inf)
    return np.asarray(np.minimum(free, maximum), np.float32)
