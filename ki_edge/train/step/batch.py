"""What one process computes at once: samples of a step, with all that was drawn for them.

Draws belong to (seed, step, row of the whole step's batch), so neither the number of processes nor accumulation changes
them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ki_edge.model import Observation

ACTIONS, TEXT = 0, 1  # kinds of a sample
TERMS = ("flow", "fast", "text")  # of the loss, in the order in which `counts` gives their denominators


@dataclass(frozen=True)
class Batch:
    """B samples, R draws of noise and time each, draw by draw.

    observation  pictures, prompts, and the postfix to learn: FAST tokens of an action sample, the answer of a text one
    actions      f32 [B,H,A], normalised, zeros past the robot's numbers; of a text sample zeros
    real         bool [B,H], actions that were recorded; of a text sample none
    dims         bool [B,A], numbers of an action that the robot has
    noise, time  f32 [R*B,H,A], f32 [R*B] in (0, 1]
    delay        i64 [R*B], how many first actions of a draw are given; None: none in this run
    given        f32 [R*B,H,A], the actions of each draw where they differ by draw (--rtc-offset); None: `actions`
    kind         i64 [B], ACTIONS or TEXT
    source       i64 [B], number of the dataset in the mixture
    task         i64 [B], number of the task among all tasks of the mixture
    row          i64 [B], number of the sample in its dataset: names it in messages
    """

    observation: Observation
    actions: Tensor
    real: Tensor
    dims: Tensor
    noise: Tensor
    time: Tensor
    kind: Tensor
    source: Tensor
    task: Tensor
    row: Tensor
    delay: Tensor | None = None
    given: Tensor | None = None

    def __len__(self) -> int:
        return len(self.kind)

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device."""
        return _map(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same in pinned memory; torch's DataLoader calls it."""
        return _map(self, lambda tensor: tensor.pin_memory())

    def counts(self) -> Tensor:
        """What each term of TERMS is a mean over, f64 [3]: numbers of free actions, samples with a postfix by kind."""
        free = self.free.reshape(-1, len(self), self.real.shape[1])
        numbers = (free * self.dims.sum(dim=1)[None, :, None]).sum()
        is_action, spelled = self.kind == ACTIONS, self.spelled
        return torch.stack([numbers, (spelled & is_action).sum(), (spelled & ~is_action).sum()]).double()

    @property
    def spelled(self) -> Tensor:
        """Which samples have a postfix, bool [B]: a chunk that is too long or cannot be spelled has none."""
        mask = self.observation.fast_mask
        return torch.zeros_like(self.kind, dtype=torch.bool) if mask is None else mask.any(dim=1)

    @property
    def free(self) -> Tensor:
        """The actions of each draw that there is something to learn of: recorded and not given, bool [R*B,H]."""
        draws, horizon = len(self.noise) // len(self), self.noise.shape[1]
        real = self.real.repeat(draws, 1)
        if self.delay is None:
            return real
        return real & (torch.arange(horizon, device=real.device) >= self.delay[:, None])


def _map(batch: Batch, move: Callable[[Tensor], Tensor]) -> Batch:
    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return move(value)
        if isinstance(value, Observation):
            return replace(value, **{field.name: moved(getattr(value, field.name)) for field in fields(value)})
        return value

    return replace(batch, **{field.name: moved(getattr(batch, field.name)) for field in fields(batch)})
