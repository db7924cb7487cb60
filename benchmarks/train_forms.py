"""The same loss in other forms, for benchmarks/train.py: two passes, and openpi's one pass over both transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ki_edge.config import Pi05Config
from ki_edge.model import Observation, Pi05
from ki_edge.model.layers import key_bias, modulated_norm, norm_row, rotate
from ki_edge.model.loss import embed_fast_sequence, joint_backbone, postfix_cross_entropy


@dataclass(frozen=True)
class Sample:
    """A batch of random samples, one draw of the flow each."""

    observation: Observation
    actions: Tensor
    noise: Tensor
    time: Tensor

    @property
    def target(self) -> Tensor:
        """u_t [B,H,A]."""
        return self.noise - self.actions

    @property
    def x_t(self) -> Tensor:
        """Noisy actions [B,H,A]."""
        t = self.time[:, None, None]
        return t * self.noise + (1.0 - t) * self.actions

    @property
    def without_tokens(self) -> Observation:
        """The observation without its FAST postfix."""
        return replace(self.observation, fast_tokens=None, fast_mask=None)


def random_sample(config: Pi05Config, batch: int, cameras: int, prompt: int, postfix: int, seed: int = 0) -> Sample:
    """Everything valid, nothing padded."""
    random = torch.Generator().manual_seed(seed)
    size, chunk = config.vision.image_size, (batch, config.action_horizon, config.action_dim)

    def ids(length: int) -> Tensor:
        return torch.randint(0, config.vocab_size, (batch, length), generator=random)

    def mask(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.bool)

    images = torch.randint(0, 256, (batch, cameras, size, size, 3), dtype=torch.uint8, generator=random)
    observation = Observation(
        images, mask(batch, cameras), ids(prompt), mask(batch, prompt), ids(postfix), mask(batch, postfix)
    )
    numbers = (torch.randn(chunk, generator=random) for _ in range(2))
    return Sample(observation, *numbers, torch.rand(batch, generator=random) * 0.999 + 0.001)


def one_pass(model: Pi05, sample: Sample) -> Tensor:
    """The project's loss: prefix, postfix and expert once."""
    found = model.compute_loss(sample.observation, sample.actions, noise=sample.noise, time=sample.time)
    assert found.fast is not None
    return found.flow.mean() + found.fast.mean()


def flow_alone(model: Pi05, sample: Sample) -> Tensor:
    """The project's loss without tokens; of a model without insulation the flow trains all of it."""
    found = model.compute_loss(sample.without_tokens, sample.actions, noise=sample.noise, time=sample.time)
    return found.flow.mean()


def two_passes(model: Pi05, sample: Sample) -> Tensor:
    """As the seed documents write it: the backbone over everything for the tokens, logits at every place, then over
    the prefix once more for the flow.

    Its stop-gradient is on the prefix' embeddings alone, so that the flow trains the backbone's layers all the same.
    """
    x, mask, bias = embed_fast_sequence(model, sample.observation)
    length = mask.shape[1]
    hidden, _ = model.backbone(x, _rope(model, x), bias)
    logits = model.backbone.unembed(hidden[:, :-1])
    fast = postfix_cross_entropy(logits[:, length - 1 :], sample.observation).mean()
    again = x[:, :length].detach()
    _, cache = model.backbone(again, _rope(model, again), key_bias(mask))
    return fast + _flow(model, sample, cache, mask)


def two_passes_insulated(model: Pi05, sample: Sample) -> Tensor:
    """Two passes as insulation needs them: the second one learns nothing, and logits are those of the postfix alone."""
    fast = postfix_cross_entropy(joint_backbone(model, sample.observation)[0], sample.observation).mean()
    seen = sample.observation
    with torch.no_grad():
        x, mask = model.embed_prefix(seen.images, seen.camera_mask, seen.prompt_tokens, seen.prompt_mask)
        cache = model.backbone.keys_values(x, _rope(model, x), key_bias(mask))
    return fast + _flow(model, sample, cache, mask)


def _rope(model: Pi05, x: Tensor) -> tuple[Tensor, Tensor]:
    return model._rope(torch.arange(x.shape[1])[None].expand(len(x), -1))


def _flow(model: Pi05, sample: Sample, prefix: list[tuple[Tensor, Tensor]], mask: Tensor) -> Tensor:
    v_t = model.velocity(sample.x_t, model.modulation(sample.time), prefix, mask)
    return (v_t - sample.target).square().mean()


def joint_pass(model: Pi05, sample: Sample) -> Tensor:
    """openpi's training step in plain form: pictures camera by camera, then layer by layer the tokens of both
    transformers in one attention over all of them, with a mask of its own size and K/V repeated for each head."""
    seen = sample.observation
    alone = (
        model.embed_prefix(
            seen.images[:, at, None], seen.camera_mask[:, at, None], seen.prompt_tokens, seen.prompt_mask
        )
        for at in range(seen.images.shape[1])
    )
    patches = model.config.vision.patches
    pieces = [vectors[:, :patches] for vectors, _ in alone]
    prefix = torch.cat([*pieces, model.backbone.embed(seen.prompt_tokens)], dim=1)
    suffix, rows = model.embed_suffix(sample.x_t), model.modulation(sample.time)
    length, total = prefix.shape[1], prefix.shape[1] + suffix.shape[1]
    rope = model._rope(torch.arange(total)[None].expand(len(prefix), -1))
    segment = (torch.arange(total) >= length).long()
    bias = torch.where(segment[None, :] <= segment[:, None], 0.0, -2.3819763e38).expand(len(prefix), 1, total, total)
    for index, (ours, theirs) in enumerate(zip(model.backbone.stack, model.expert.stack, strict=True)):
        normed = ours.input_layernorm(prefix)
        modulated, gate = modulated_norm(suffix, norm_row(rows, 2 * index, None))
        mixed = _attend((ours.self_attn, normed), (theirs.self_attn, modulated), rope, bias)
        prefix = prefix + ours.self_attn.o_proj(mixed[:, :length])
        suffix = suffix + theirs.self_attn.o_proj(mixed[:, length:]) * gate
        prefix = prefix + ours.mlp(ours.post_attention_layernorm(prefix))
        modulated, gate = modulated_norm(suffix, norm_row(rows, 2 * index + 1, None))
        suffix = suffix + theirs.mlp(modulated) * gate
    model.backbone.norm(prefix)  # openpi computes it too
    v_t = model.action_out_proj(modulated_norm(suffix, norm_row(rows, -1, None))[0].float())
    return (v_t - sample.target).square().mean()


def _attend(
    ours: tuple[torch.nn.Module, Tensor],
    theirs: tuple[torch.nn.Module, Tensor],
    rope: tuple[Tensor, Tensor],
    bias: Tensor,
) -> Tensor:
    """Attention of all tokens [B,T,Hq*D], eager as transformers has it."""
    parts = []
    for name in ("q_proj", "k_proj", "v_proj"):
        heads = [getattr(module, name)(x) for module, x in (ours, theirs)]
        dim = ours[0].head_dim
        parts.append(torch.cat([part.view(*part.shape[:2], -1, dim) for part in heads], dim=1))
    q, k, v = rotate(parts[0], rope).transpose(1, 2), rotate(parts[1], rope).transpose(1, 2), parts[2].transpose(1, 2)
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    logits = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5 + bias
    mixed = torch.matmul(torch.softmax(logits, dim=-1, dtype=torch.float32).to(q.dtype), v)
    return mixed.transpose(1, 2).reshape(len(q), q.shape[2], -1)
