"""The loss of a step as a module: what DDP and FSDP2 wrap, so that their hooks see one forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ki_edge.model import Pi05

from .batch import ACTIONS, Batch


@dataclass(frozen=True)
class Terms:
    """Of one batch. `total`: the weighted sum of the terms' shares of the whole step, scalar: it is what is minimised.

    `shares` f32 [3]: TERMS, each divided by its denominator of the whole step: the sum over all batches of a step, of all
    processes, is the step's mean. `flow` f32 [B], `tokens` f32 [B]: means of each sample, NaN where it has none; detached.
    """

    total: Tensor
    shares: Tensor
    flow: Tensor
    tokens: Tensor


class Objective(nn.Module):
    """A model and the weights of its loss terms. `weights` f32 [3], in the order of TERMS."""

    weights: Tensor

    def __init__(self, model: Pi05, weights: tuple[float, float, float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("weights", torch.tensor(weights), persistent=False)

    def forward(self, batch: Batch, counts: Tensor) -> Terms:
        """`counts` f64 [3]: `Batch.counts` summed over all batches of the step, of all processes."""
        losses = self.model.compute_loss(
            batch.observation,
            batch.actions if batch.given is None else batch.given,
            noise=batch.noise, time=batch.time, delay=batch.delay, real=batch.real,
        )  # fmt: skip
        draws = len(batch.noise) // len(batch)
        squares = losses.flow.unflatten(0, (draws, len(batch))) * batch.dims[None, :, None, :]
        each_flow = squares.sum(dim=(0, 2, 3))  # [B]
        numbers = batch.free.unflatten(0, (draws, len(batch))).sum(dim=(0, 2)) * batch.dims.sum(dim=1)
        is_action = batch.kind == ACTIONS
        tokens = torch.zeros_like(each_flow) if losses.fast is None else losses.fast
        sums = torch.stack([each_flow.sum(), tokens[is_action].sum(), tokens[~is_action].sum()])
        shares = sums / counts.clamp(min=1.0).to(sums.dtype)
        with torch.no_grad():
            nothing = torch.full_like(each_flow, torch.nan)
            flow = torch.where(numbers > 0, each_flow.detach() / numbers.clamp(min=1), nothing)
            seen = nothing if losses.fast is None else losses.fast.detach()
        return Terms((shares * self.weights).sum(), shares.detach(), flow, seen)
