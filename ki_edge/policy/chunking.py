"""The chunk that a robot still executes, as it goes into the next inference: kept in robot units, turned into the
model's for the state of the moment.

Kept normalised or relative to the state of its own observation it would be of another place by the time it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import count, numbers
from ki_edge.errors import ArgumentError
from ki_edge.overlap import F32, Overlap, Schedule, check_maximum, prefix_weights

from .contract import PolicyContract
from .normalize import LARGEST, Float64, NormStats
from .transforms import actions_to_model, pad_last

Way = Literal["guided", "trained"]
MOST_ROWS = 4096


@dataclass(frozen=True, eq=False)
class PreviousChunk:
    """What is left of the chunk that the robot executes while the next inference runs.

    actions  float64 [n, a], absolute, in robot units; row 0 acts in the control step in which the new chunk's row 0
             would. Rows past n are held: the last action again
    delay    how many of them will have been executed when the answer is there, 0 <= delay <= n

    ArgumentError for no rows, numbers that are not finite, or a delay out of range.
    """

    actions: Float64
    delay: int

    def __post_init__(self) -> None:
        given = numbers(self.actions, "previous actions")
        if given.ndim != 2 or 0 in given.shape or len(given) > MOST_ROWS:
            raise ArgumentError(f"previous actions: expected [n, a] with at least one row, got {list(given.shape)}")
        if (bad := np.flatnonzero(~np.isfinite(given).all(axis=1))).size:
            raise ArgumentError(f"previous actions: row {bad[0]} holds NaN or infinity")
        object.__setattr__(self, "actions", given)
        object.__setattr__(self, "delay", count(self.delay, "delay", len(given), least=0))

    def held(self, horizon: int) -> Float64:
        """[horizon, a]: its rows, then the last one again. ArgumentError if it has more."""
        if len(self.actions) > horizon:
            raise ArgumentError(
                f"previous actions: {len(self.actions)} rows, but a chunk has {horizon}: leave out those that were "
                "executed before the observation"
            )
        return np.concatenate([self.actions, np.repeat(self.actions[-1:], horizon - len(self.actions), axis=0)])


@dataclass(frozen=True)
class Guiding:
    """How a guided chunk is pulled towards the one before.

    `maximum` of a step's guidance, None: the number of steps; `schedule`: how the weights fall behind the delay;
    `end`: the row from which on they are 0, None: where the previous chunk ends. ArgumentError for
    what is out of range.
    """

    maximum: float | None = None
    schedule: Schedule = "linear"
    end: int | None = None

    def __post_init__(self) -> None:
        check_maximum(self.maximum)
        if self.end is not None:
            count(self.end, "end", MOST_ROWS, least=0)
        prefix_weights(0, 1, 1, self.schedule)


def overlap_of(
    previous: PreviousChunk,
    contract: PolicyContract,
    stats: NormStats,
    raw_state: npt.ArrayLike,
    *,
    way: Way,
    guiding: Guiding | None = None,
) -> Overlap:
    """A previous chunk in the model's space, as a batch of one, for the observation whose `raw_state` [s] this is.

    `stats` of the actions. The model's numbers past the robot's are 0, as it was trained on them. ArgumentError for a
    chunk that is not the contract's, or a delay beyond what the policy was trained for.
    """
    for given, kind in ((previous, PreviousChunk), (guiding or Guiding(), Guiding)):
        if not isinstance(given, kind):
            raise ArgumentError(f"expected a {kind.__name__} of ki_edge.policy.chunking, got {type(given).__name__}")
    if previous.actions.shape[1] != contract.action_dim:
        raise ArgumentError(
            f"previous actions: {previous.actions.shape[1]} numbers each, the policy's have {contract.action_dim}"
        )
    horizon, delay, guiding = contract.action_horizon, previous.delay, guiding or Guiding()
    actions = actions_to_model(contract, stats, previous.held(horizon), raw_state)
    if not (np.abs(actions) <= LARGEST).all():
        raise ArgumentError("previous actions: normalised they are too large for float32: are their units the robot's?")
    model: F32 = pad_last(actions, contract.model_action_dim).astype(np.float32)
    weights: F32 = np.zeros(horizon, np.float32)
    committed = np.zeros(horizon, np.bool_)
    if way == "trained":
        most = contract.rtc_max_delay or 0
        if delay > most:
            raise ArgumentError(f"delay {delay}: this policy was trained for delays up to {most}; slow the robot down")
        committed[:delay] = True
    else:
        end = len(previous.actions) if guiding.end is None else min(guiding.end, len(previous.actions))
        weights = prefix_weights(delay, max(end, delay), horizon, guiding.schedule)
    return Overlap(model[None], weights[None], committed[None], guiding.maximum)
