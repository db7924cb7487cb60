"""Knowledge insulation in one pass (Driess et al. 2025, arXiv 2505.23705).

    tokens = pictures + prompt (bidirectional) | FAST postfix (causal, sees the prefix) | action tokens in the expert
             (see the prefix's valid tokens and each other, never the postfix)

The expert reads stop_gradient(K), stop_gradient(V) of the prefix in every layer, so the flow loss cannot reach the
backbone. Nothing in the prefix sees the postfix, so its K/V are those of inference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ki_edge.errors import ArgumentError

from .gemma import KeysValues
from .layers import MASKED, Committed, key_bias
from .observation import Observation

if TYPE_CHECKING:
    from .pi05 import Pi05


class Losses(NamedTuple):
    """Unreduced: `flow` (v_t - u_t)^2 [B,H,A]; `fast` mean cross-entropy over each sample's postfix [B], or None.

    `free` bool [B,H]: the actions to learn from; the flow of the others, which were given or are not real, is 0.
    """

    flow: Tensor
    fast: Tensor | None
    free: Tensor

    def mean_flow(self, action_dim: int) -> Tensor:
        """Mean of the flow loss over free actions and their first `action_dim` numbers."""
        return self.flow[..., :action_dim].sum() / (self.free.sum().clamp(min=1) * action_dim)


def compute_loss(
    model: Pi05,
    observation: Observation,
    actions: Tensor,
    *,
    noise: Tensor,
    time: Tensor,
    delay: Tensor | None = None,
    real: Tensor | None = None,
) -> Losses:
    """Flow loss and, for an observation with a FAST postfix, its cross-entropy.

    actions f32 [B,H,A], or [R*B,H,A] where draws differ; noise f32 [R*B,H,A] and time f32 [R*B] in (0, 1], 1 is noise:
    R draws for each sample, draw by draw, which share one prefix (the returned flow is [R*B,H,A]).
    x_t = t * noise + (1 - t) * actions, u_t = noise - actions.

    `delay` i64 [R*B], 0 <= delay < H: so many first actions of each draw are given as they are, at time 0, and there is
    nothing to learn from them (arXiv 2512.05964). `real` bool [B,H]: the actions that were recorded; from the others,
    which hold the last one past an episode's end, nothing is learnt either.
    """
    observation.check(model.config)
    _check_shapes(model, observation, actions, noise, time)
    prefix, mask, fast = _read_prefix(model, observation)
    draws = len(noise) // len(observation.images)
    if draws > 1:
        prefix = [(k.repeat(draws, 1, 1, 1), v.repeat(draws, 1, 1, 1)) for k, v in prefix]
        mask = mask.repeat(draws, 1)
        actions = actions if len(actions) == len(noise) else actions.repeat(draws, 1, 1)
    committed, modulation, settled = _committed(model, time, delay)
    t = time[:, None, None]
    x_t, u_t = t * noise + (1.0 - t) * actions, noise - actions
    if settled is not None:
        x_t = torch.where(settled.mask, actions, x_t)
    v_t = model.velocity(x_t, modulation, prefix, mask, committed=settled)
    free = ~committed if real is None else ~committed & _checked(real, committed, len(observation.images))
    return Losses(flow=(v_t - u_t).square().masked_fill(~free[..., None], 0.0), fast=fast, free=free)


def joint_backbone(model: Pi05, observation: Observation) -> tuple[Tensor, list[KeysValues], Tensor]:
    """One backbone pass over prefix and postfix: logits [B,F,V] (row i predicts postfix token i), the prefix part of
    every layer's K/V, and the prefix mask."""
    x, mask, bias = embed_fast_sequence(model, observation)
    length = mask.shape[1]
    positions = torch.cat([mask, observation.fast_mask], dim=1).long().cumsum(dim=1) - 1  # type: ignore[list-item]
    wanted = predicting_tokens(observation, length)
    hidden, cache = model.backbone(x, model._rope(positions), bias, wanted=wanted)
    return model.backbone.unembed(hidden), [(k[:, :, :length], v[:, :, :length]) for k, v in cache], mask


def predicting_tokens(observation: Observation, length: int) -> Tensor:
    """The tokens behind which each token of the postfix stands, i64 [B,F]: the last one of the prompt, in a prefix of
    `length`, and the postfix but for its own last one."""
    assert observation.fast_tokens is not None
    last = length - observation.prompt_mask.shape[1] + observation.prompt_mask.sum(dim=1, keepdim=True) - 1
    rest = torch.arange(length, length + observation.fast_tokens.shape[1] - 1, device=last.device)
    return torch.cat([last, rest.expand(len(last), -1)], dim=1)


def embed_fast_sequence(model: Pi05, observation: Observation) -> tuple[Tensor, Tensor, Tensor]:
    """Prefix and postfix vectors [B,S+F,W], the prefix mask [B,S], the prefix-LM bias f32 [B,1,1,S+F,S+F]."""
    if observation.fast_tokens is None or observation.fast_mask is None:
        raise ArgumentError("this observation has no fast_tokens: give the FAST postfix to train or score it")
    prefix, mask = model.embed_prefix(
        observation.images, observation.camera_mask, observation.prompt_tokens, observation.prompt_mask
    )
    postfix = model.backbone.embed(observation.fast_tokens)
    batch, length, count = len(mask), mask.shape[1], postfix.shape[1]
    valid = torch.cat([mask, observation.fast_mask], dim=1)
    segment = torch.cat([mask.new_zeros(length, dtype=torch.long), torch.arange(1, count + 1, device=mask.device)])
    order = torch.where(
        segment[None, :] <= segment[:, None], 0.0, MASKED
    )  # a key is seen by its own and later segments
    bias = key_bias(valid) + order
    return torch.cat([prefix, postfix], dim=1), mask, bias.expand(batch, 1, 1, length + count, length + count)


def postfix_cross_entropy(logits: Tensor, observation: Observation) -> Tensor:
    """Mean cross-entropy of each sample over its valid postfix tokens, [B]."""
    if observation.fast_tokens is None or observation.fast_mask is None:
        raise ArgumentError("cross-entropy needs fast_tokens and fast_mask")
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), observation.fast_tokens.long(), reduction="none")
    weight = observation.fast_mask.float()
    return (each * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)


def _read_prefix(model: Pi05, observation: Observation) -> tuple[list[KeysValues], Tensor, Tensor | None]:
    """K/V of every layer as the expert sees them, the prefix mask, the postfix's cross-entropy [B] if there is one."""
    if observation.fast_tokens is not None:
        logits, cache, mask = joint_backbone(model, observation)
        if model.knowledge_insulation:
            cache = [(k.detach(), v.detach()) for k, v in cache]
        return cache, mask, postfix_cross_entropy(logits, observation)
    learns = torch.is_grad_enabled() and not model.knowledge_insulation
    with torch.set_grad_enabled(learns):  # insulated and without tokens there is nothing to keep for a backward pass
        x, mask = model.embed_prefix(
            observation.images, observation.camera_mask, observation.prompt_tokens, observation.prompt_mask
        )
        positions = mask.long().cumsum(dim=1) - 1
        return model.backbone.keys_values(x, model._rope(positions), key_bias(mask)), mask, None


def _committed(model: Pi05, time: Tensor, delay: Tensor | None) -> tuple[Tensor, Tensor, Committed | None]:
    """Which actions of each draw are given, bool [R*B,H]; the modulation of the others, and of these if there are any.

    Both modulations are computed at once, so that the expert's dense layers run once.
    """
    count, horizon = len(time), model.config.action_horizon
    if delay is None:
        return torch.zeros(count, horizon, dtype=torch.bool, device=time.device), model.modulation(time), None
    if delay.dtype != torch.int64 or tuple(delay.shape) != (count,):
        raise ArgumentError(f"delay: {delay.dtype} {list(delay.shape)}, expected torch.int64 {[count]}")
    # on an accelerator, whose queue a look at values would wait for, they are trusted
    if delay.device.type == "cpu" and not bool(((delay >= 0) & (delay < horizon)).all()):
        raise ArgumentError(f"delay: {int(delay.min())} to {int(delay.max())}, expected 0 to {horizon - 1}")
    mask = torch.arange(horizon, device=time.device) < delay[:, None]
    rows = model.modulation(torch.cat([time, time.new_zeros(1)]))
    return mask, rows[:-1], Committed(mask[..., None], rows[-1:])


def _checked(real: Tensor, committed: Tensor, batch: int) -> Tensor:
    """Which actions of each draw were recorded, bool [R*B,H]."""
    if real.dtype != torch.bool or tuple(real.shape) != (batch, committed.shape[1]):
        raise ArgumentError(f"real: {real.dtype} {list(real.shape)}, expected torch.bool {[batch, committed.shape[1]]}")
    return real.repeat(len(committed) // batch, 1)


def _check_shapes(model: Pi05, observation: Observation, actions: Tensor, noise: Tensor, time: Tensor) -> None:
    batch, count = len(observation.images), len(noise)
    if count == 0 or count % batch:
        raise ArgumentError(f"noise: {count} rows, expected a multiple of the batch of {batch}")
    chunk = (model.config.action_horizon, model.config.action_dim)
    wanted = {
        "actions": (actions, (count if len(actions) == count else batch, *chunk)),
        "noise": (noise, (count, *chunk)),
        "time": (time, (count,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ArgumentError(f"{name}: shape {list(tensor.shape)}, expected {list(shape)}")
