"""The model's own samplers, in PyTorch: what every export is held to."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ki_edge.errors import ArgumentError
from ki_edge.flow import denoise_times, step_size
from ki_edge.overlap import Overlap

from .observation import Observation
from .steering import steering_inputs

if TYPE_CHECKING:
    from .pi import PiModel


@torch.no_grad()
def sample_actions(
    model: PiModel,
    observation: Observation,
    *,
    noise: Tensor | None = None,
    num_steps: int = 10,
    time_convention: str = "openpi",
    overlap: Overlap | None = None,
) -> Tensor:
    """Actions f32 [B,H,A] in model space: prefix once, then `num_steps` Euler steps from t = 1 (noise) to t = 0.

    `overlap`: the chunks before, which these continue. ArgumentError for one with committed actions of a π0.
    """
    *_, x_0 = denoise_trace(
        model, observation, noise=noise, num_steps=num_steps, time_convention=time_convention, overlap=overlap
    )
    return x_0


@torch.no_grad()
def denoise_trace(
    model: PiModel,
    observation: Observation,
    *,
    noise: Tensor | None = None,
    num_steps: int = 10,
    time_convention: str = "openpi",
    overlap: Overlap | None = None,
) -> list[Tensor]:
    """x_t before every step and after the last: num_steps + 1 tensors f32 [B,H,A]."""
    observation.check(model.config)
    shape = (len(observation.images), model.config.action_horizon, model.config.action_dim)
    device = observation.images.device
    x_t = torch.randn(shape, device=device) if noise is None else noise.float()
    if tuple(x_t.shape) != shape:
        raise ArgumentError(f"noise: shape {list(x_t.shape)}, expected {list(shape)}")
    denoising = denoise_times(num_steps, time_convention)
    times = torch.from_numpy(denoising).to(device)
    dt = torch.tensor(float(step_size(num_steps)), device=device)
    k, v, mask = prefix(model, observation)
    state = () if observation.state is None else (observation.state,)
    steering: Iterable[tuple[Tensor, ...]] = repeat((), num_steps)
    if overlap is not None:
        overlap.check(*shape)
        steering = steering_inputs(
            overlap, denoising, model.modulation, trained=_is_trained(model, overlap), device=device
        )
    trace = [x_t]
    for rows, more in zip(model.modulation(times), steering, strict=True):
        trace.append(model.denoise_step(trace[-1], rows, dt, k, v, mask, *state, *more))
    return trace


def _is_trained(model: PiModel, overlap: Overlap) -> bool:
    if not overlap.committed.any():
        return False
    if model.config.variant == "pi0":
        raise ArgumentError("overlap: a π0 has one time for all actions of a chunk, so none can be committed: guide it")
    return True


@torch.no_grad()
def sample_fast_tokens(
    model: PiModel, observation: Observation, *, max_tokens: int, forced: tuple[int, ...] = (), constrained: bool = True
) -> Tensor:
    """Greedy continuation of the prompt, ids int64 [B,<=max_tokens]; rows that ended are filled with <eos>.

    `forced` ids are fed first and are not returned. `constrained` allows only `model.decode_ids`. Decoding starts by
    feeding the last prompt token again, with its own cached K/V masked out.
    """
    observation.check(model.config)
    if max_tokens < 1:
        raise ArgumentError(f"max_tokens {max_tokens}: expected at least 1")
    if constrained and not model.decode_ids:
        raise ArgumentError("constrained decoding needs to know the FAST ids (no contract): pass constrained=False")
    device = observation.images.device
    every = model.decode_ids if constrained else range(model.config.vocab_size)
    ids = torch.tensor(every, device=device)
    k, v, mask = prefix(model, observation)
    rows = torch.arange(len(mask), device=device)
    valid, prompt = mask.sum(dim=1), observation.prompt_mask.sum(dim=1)
    mask = mask.clone()
    mask[rows, mask.shape[1] - observation.prompt_mask.shape[1] + prompt - 1] = False
    start = observation.prompt_tokens[rows, prompt - 1][:, None].long()
    tokens = torch.cat([start, start.new_tensor(forced).expand(len(mask), -1)], dim=1)
    positions = valid[:, None] - 1 + torch.arange(tokens.shape[1], device=device)
    done, out = mask.new_zeros(len(mask)), []
    for _ in range(max_tokens):
        logits, new_k, new_v = model.fast_decode_step(tokens, positions, k, v, mask, model.backbone.rows(ids))
        k, v = torch.cat([k, new_k], dim=3), torch.cat([v, new_v], dim=3)
        mask = torch.cat([mask, mask.new_ones(len(mask), tokens.shape[1])], dim=1)
        chosen = torch.where(done, model.eos_id, ids[logits.argmax(dim=-1)])
        out.append(chosen)
        done = done | (chosen == model.eos_id)
        if bool(done.all()):
            break
        tokens, positions = chosen[:, None], positions[:, -1:] + 1
    return torch.stack(out, dim=1)


def prefix(model: PiModel, observation: Observation) -> tuple[Tensor, Tensor, Tensor]:
    """`prefix_forward` of an observation."""
    return model.prefix_forward(
        observation.images, observation.camera_mask, observation.prompt_tokens, observation.prompt_mask
    )
