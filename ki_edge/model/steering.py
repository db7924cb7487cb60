"""Real-time chunking inside a denoising step: what it is told of the chunk before, and what it makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ki_edge.overlap import F32, Overlap, guidance_weights

from .layers import Committed


@dataclass(frozen=True)
class Steering:
    """The denoise graph's inputs of that kind, in their order.

    previous              f32 [B,H,A], the chunk before in model space
    previous_weights      f32 [B,H], how much each of its actions counts
    guidance, time        f32 [], of this step
    committed             bool [B,H], actions that are settled; None for a policy that is not trained for it
    committed_modulation  f32 [M,R], the modulation at time 0
    """

    previous: Tensor
    previous_weights: Tensor
    guidance: Tensor
    time: Tensor
    committed: Tensor | None = None
    committed_modulation: Tensor | None = None

    def step(self, x_t: Tensor, dt: Tensor, velocity: Callable[..., Tensor]) -> Tensor:
        """One Euler step with the velocity corrected, f32 [B,H,A]; with all weights 0 exactly the step without."""
        if self.committed is None or self.committed_modulation is None:
            return x_t + dt * self._guided(x_t, velocity(x_t))
        mask = self.committed[..., None]
        x_t = torch.where(mask, self.previous, x_t)
        v_t = velocity(x_t, committed=Committed(mask, self.committed_modulation[None]))
        return torch.where(mask, self.previous, x_t + dt * self._guided(x_t, v_t))

    def _guided(self, x_t: Tensor, v_t: Tensor) -> Tensor:
        """Pulled so that what the step expects at time 0, x_t - t v_t, comes closer to the chunk before."""
        error = (self.previous - (x_t - self.time * v_t)) * self.previous_weights[..., None]
        return v_t - self.guidance * error


def steering_inputs(
    overlap: Overlap,
    times: F32,
    modulation: Callable[[Tensor], Tensor],
    *,
    trained: bool,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, ...]]:
    """The fields of `Steering` at each step; the last two for a policy that is `trained` for them."""
    previous, weights, committed = (
        torch.from_numpy(array).to(device) for array in (overlap.actions, overlap.weights, overlap.committed)
    )
    strengths = guidance_weights(times, len(times) if overlap.maximum is None else overlap.maximum)
    settled = (committed, modulation(torch.zeros(1, device=device))[0]) if trained else ()
    for strength, time in zip(strengths, times, strict=True):
        yield previous, weights, *(torch.tensor(value, device=device) for value in (strength, time)), *settled
