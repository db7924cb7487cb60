"""What π0.5 and π0 share: a PaliGemma backbone that reads pictures and a prompt, and the interface to their experts.

Three methods are the whole inference and become the three graphs: `prefix_forward`, `denoise_step`, `fast_decode_step`.
The loss, the samplers and the export wrappers call the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ki_edge.config import Pi05Config, Variant
from ki_edge.errors import ArgumentError
from ki_edge.flow import MAX_PERIOD, MIN_PERIOD

from . import sampling
from .gemma import Backbone
from .layers import MASKED, Committed, Rope, key_bias, rope_angles
from .siglip import VisionTower
from .steering import Steering

Prefix = tuple[Tensor, Tensor, Tensor]


class PiModel(nn.Module):
    """The policy network but for its action expert. Parameters are float32 unless loaded with another dtype."""

    variant: Variant
    expert: nn.Module
    decode_ids: tuple[int, ...] = ()  # FAST ids, "|" and <eos>: what constrained decoding may emit
    eos_id: int = 1

    # of the action expert: what a step is told about its time, f32 [b] -> f32 [b,M,R], and
    # velocity(x_t, modulation, prefix, prefix_mask, *state) -> v_t f32 [B,H,A]; a π0.5's also takes committed=
    modulation: Callable[[Tensor], Tensor]
    velocity: Callable[..., Tensor]

    def __init__(self, config: Pi05Config, expert: nn.Module) -> None:
        super().__init__()
        if config.variant != self.variant:
            raise ArgumentError(f"a {type(self).__name__} cannot have the geometry of a '{config.variant}': use build")
        self.config = config
        self.vision = VisionTower(config.vision)
        self.projector = nn.Linear(config.vision.width, config.backbone.width)
        self.backbone = Backbone(config.backbone, config.vocab_size)
        self.expert = expert
        self.action_in_proj = nn.Linear(config.action_dim, config.expert.width)
        self.action_out_proj = nn.Linear(config.expert.width, config.action_dim)

    # ------------------------------------------------------------------ the prefix

    def embed_prefix(
        self, images: Tensor, camera_mask: Tensor, prompt_tokens: Tensor, prompt_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Vectors [B,S,W] of all camera patches, then the prompt, and their validity mask bool [B,S]."""
        batch, cameras, height, width, _ = images.shape
        # to float first: TensorRT takes uint8 as an input of a Cast and nowhere else
        pixels = images.float().reshape(batch * cameras, height, width, 3).permute(0, 3, 1, 2)
        if images.dtype == torch.uint8:  # float pictures are in [-1, 1] already
            pixels = pixels / 255.0 * 2.0 - 1.0
        patches = self.projector(self.vision(pixels))  # [B*N,P,W]
        patches = patches.reshape(batch, cameras * self.config.vision.patches, -1)
        text = self.backbone.embed(prompt_tokens)
        seen = camera_mask[:, :, None].expand(-1, -1, self.config.vision.patches).reshape(batch, -1)
        return torch.cat([patches.to(text.dtype), text], dim=1), torch.cat([seen, prompt_mask], dim=1)

    def prefix_forward(self, images: Tensor, camera_mask: Tensor, prompt_tokens: Tensor, prompt_mask: Tensor) -> Prefix:
        """Graph 1: K and V of every layer [L,B,K,S,D], and the prefix mask bool [B,S]."""
        x, mask = self.embed_prefix(images, camera_mask, prompt_tokens, prompt_mask)
        rope = self._rope(_positions(mask))
        keys, values = zip(*self.backbone.keys_values(x, rope, key_bias(mask)), strict=True)
        return torch.stack(keys), torch.stack(values), mask

    # ------------------------------------------------------------------ the action expert

    def time_embedding(self, time: Tensor) -> Tensor:
        """Sines, then cosines, of flow times f32 [b]: f32 [b,W], computed in float64."""
        steps = torch.linspace(0.0, 1.0, self.config.expert.width // 2, dtype=torch.float64, device=time.device)
        periods = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** steps
        angles = time.double()[:, None] * (2.0 * torch.pi / periods)
        return torch.cat([angles.sin(), angles.cos()], dim=-1).float()

    def denoise_step(
        self,
        x_t: Tensor,
        modulation: Tensor,
        dt: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        prefix_mask: Tensor,
        *more: Tensor,
    ) -> Tensor:
        """Graph 2: one Euler step in float32, x_t + dt * v_t. modulation f32 [M,R]; prefix_k, prefix_v [L,B,K,S,D].

        `more`: the graph's other inputs in their order: the state f32 [B,Z] of a π0, then, where the step is to follow
        a chunk before, the fields of `Steering`.
        """
        states = int(self.config.has_state)
        prefix = [(prefix_k[i], prefix_v[i]) for i in range(self.config.expert.depth)]

        def velocity(x: Tensor, **settled: Committed) -> Tensor:
            return self.velocity(x, modulation[None], prefix, prefix_mask, *more[:states], **settled)

        if len(more) == states:
            return x_t + dt * velocity(x_t)
        return Steering(*more[states:]).step(x_t, dt, velocity)

    # ------------------------------------------------------------------ FAST

    def fast_decode_step(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache_k: Tensor,
        cache_v: Tensor,
        cache_mask: Tensor,
        unembedding: Tensor | Sequence[Tensor] | None = None,
    ) -> Prefix:
        """Graph 3: logits f32 [B,F] after the last of Q new tokens, and the new tokens' K, V [L,B,K,Q,D].

        tokens, positions int [B,Q]; cache_k, cache_v [L,B,K,C,D]; cache_mask bool [B,C]. New tokens see the valid cache
        and, causally, each other. `unembedding` [F,W], whole or in parts: the rows that can be predicted; the whole
        embedding without it.
        """
        count = tokens.shape[1]
        order = torch.arange(count, device=tokens.device)
        among = torch.where(order[None, :] <= order[:, None], 0.0, MASKED)  # [Q,Q]
        past = key_bias(cache_mask).expand(-1, 1, 1, count, -1)
        bias = torch.cat([past, among.expand(tokens.shape[0], 1, 1, count, count)], dim=-1)

        cache = [(cache_k[layer], cache_v[layer]) for layer in range(self.config.backbone.depth)]
        hidden, new = self.backbone(self.backbone.embed(tokens), self._rope(positions), bias, cache)
        rows = self.backbone.embed_tokens.weight if unembedding is None else unembedding
        parts = [rows] if isinstance(rows, Tensor) else rows
        logits = torch.cat([nn.functional.linear(hidden[:, -1], part) for part in parts], dim=-1).float()
        keys, values = zip(*new, strict=True)
        return logits, torch.stack(keys), torch.stack(values)

    # ------------------------------------------------------------------ parameters and samplers

    def backbone_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters that learn from tokens: vision, projector, language model."""
        yield from (
            item for item in self.named_parameters() if item[0].startswith(("vision.", "projector.", "backbone."))
        )

    def expert_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters that learn from the flow loss."""
        inside = {name for name, _ in self.backbone_parameters()}
        yield from (item for item in self.named_parameters() if item[0] not in inside)

    sample_actions = sampling.sample_actions
    sample_fast_tokens = sampling.sample_fast_tokens

    def _rope(self, positions: Tensor) -> Rope:
        return rope_angles(positions, self.config.backbone.head_dim)


def _positions(mask: Tensor) -> Tensor:
    """Position of each prefix token: the number of valid tokens before it (masked ones repeat their predecessor's)."""
    return mask.long().cumsum(dim=1) - 1
