"""The loss of a step as a module: what DDP and FSDP2 wrap, so that their hooks see one forward."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ki_edge.model import Pi05

from .batch import ACTIONS, Batch


class Terms(NamedTuple):
    """Of one batch. `total`: the weighted sum of the terms' shares of the whole step, scalar: it is what is minimised.

    `shares` f32 [3]: TERMS, each divided by its denominator of the whole step: the sum over all batches of a step, of
    all processes, is the step's mean. `flow`, `tokens` f32 [B]: means of each sample, NaN where it has none; detached.
    """

    total: Tensor
    shares: Tensor
    flow: Tensor
    tokens: Tensor


class Objective(nn.Module):
    """A model and the weights of its loss terms, in the order of TERMS.

    Where neither FAST nor text has a weight, postfixes are not read at all.
    """

    def __init__(self, model: Pi05, weights: tuple[float, float, float]) -> None:
        super().__init__()
        self.model = model
        self.tokens = any(weights[1:])
        self.weights = weights

    def forward(self, batch: Batch, counts: Tensor) -> Terms:
        """`counts` f64 [3]: `Batch.counts` summed over all batches of the step, of all processes."""
        observation = batch.observation if self.tokens else replace(batch.observation, fast_tokens=None, fast_mask=None)
        losses = self.model.compute_loss(
            observation,
            batch.actions if batch.given is None else batch.given,
            noise=batch.noise, time=batch.time, delay=batch.delay, real=batch.real,
        )  # fmt: skip
        each_flow, numbers = _by_sample(losses.flow, batch)
        is_action = batch.kind == ACTIONS
        tokens = torch.zeros_like(each_flow) if losses.fast is None else losses.fast
        nothing = torch.zeros_like(tokens)  # chosen, not indexed: nothing here waits for the device
        sums = [each_flow, torch.where(is_action, tokens, nothing), torch.where(is_action, nothing, tokens)]
        shares = torch.stack([term.sum() for term in sums]) / counts.clamp(min=1.0).to(each_flow.dtype)
        with torch.no_grad():
            absent = torch.full_like(each_flow, torch.nan)
            flow = torch.where(numbers > 0, each_flow.detach() / numbers.clamp(min=1), absent)
            seen = absent if losses.fast is None else torch.where(batch.spelled, losses.fast.detach(), absent)
        total = torch.stack([weight * share for weight, share in zip(self.weights, shares, strict=True)]).sum()
        return Terms(total, shares.detach(), flow, seen)


def _by_sample(flow: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of a flow loss [R*B,H,A]: its sum over each sample's draws and numbers [B], and how many there are [B]."""
    size = len(batch)
    squares = flow.reshape(-1, size, *flow.shape[1:]) * batch.dims[None, :, None, :]
    free = batch.free.reshape(-1, size, flow.shape[1])
    return squares.sum(dim=(0, 2, 3)), free.sum(dim=(0, 2)) * batch.dims.sum(dim=1)
