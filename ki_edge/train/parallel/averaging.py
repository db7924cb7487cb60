"""The moving average of the weights: what a checkpoint holds and what is evaluated."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .sharding import local


class MovingAverage:
    """Of the parameters that learn; where they are sharded, of this process' shards. With decay 0 it keeps nothing."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._weights = dict(parameters)
        self.values = {name: value.detach().clone() for name, value in parameters.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the optimiser's step number `step`, from 0 on. A young average forgets faster."""
        if self.values:
            decay = min(self.decay, (1 + step) / (10 + step))
            ours = [local(value) for value in self.values.values()]
            torch._foreach_lerp_(ours, [local(self._weights[name]) for name in self.values], 1.0 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average, bit for bit; once more puts them back."""
        for name, value in self.values.items():
            weight, average = local(self._weights[name]), local(value)
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
