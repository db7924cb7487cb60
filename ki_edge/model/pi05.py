"""π0.5: a PaliGemma backbone that reads pictures and a prompt, and an action expert that denoises action chunks.

Three methods are the whole inference and become the three graphs: `prefix_forward`, `denoise_step`, `fast_decode_step`.
The loss, the samplers and the export wrappers call the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import Pi05Config
from ..flow import MAX_PERIOD, MIN_PERIOD
from . import loss, sampling
from .gemma import ActionExpert, Backbone, KeysValues
from .layers import MASKED, Rope, key_bias, rope_angles
from .loss import Losses
from .observation import Observation
from .siglip import VisionTower

Prefix = tuple[Tensor, Tensor, Tensor]


class Pi05(nn.Module):
    """The policy network. Parameters are float32 unless loaded with another dtype."""

    decode_ids: tuple[int, ...] = ()  # FAST ids, "|" and <eos>: what constrained decoding may emit
    eos_id: int = 1

    def __init__(self, config: Pi05Config, *, knowledge_insulation: bool = True) -> None:
        super().__init__()
        self.config = config
        self.knowledge_insulation = knowledge_insulation
        self.vision = VisionTower(config.vision)
        self.projector = nn.Linear(config.vision.width, config.backbone.width)
        self.backbone = Backbone(config.backbone, config.vocab_size)
        self.expert = ActionExpert(config.expert)
        width = config.expert.width
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, dtype: torch.dtype = torch.float32) -> Pi05:
        """Load an openpi or LeRobot folder (see `ki_edge.model.checkpoint`) in eval mode."""
        from .checkpoint import Checkpoint

        return Checkpoint.open(path).load_model(dtype=dtype)

    # ------------------------------------------------------------------ the prefix

    def embed_prefix(
        self, images: Tensor, camera_mask: Tensor, prompt_tokens: Tensor, prompt_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Vectors [B,S,W] of all camera patches, then the prompt, and their validity mask bool [B,S]."""
        batch, cameras, height, width, _ = images.shape
        # to float first: TensorRT takes uint8 as an input of a Cast and nowhere else
        pixels = images.float().reshape(batch * cameras, height, width, 3).permute(0, 3, 1, 2) / 255.0 * 2.0 - 1.0
        patches = self.projector(self.vision(pixels))  # [B*N,P,W]
        patches = patches.reshape(batch, cameras * self.config.vision.patches, -1)
        text = self.backbone.embed(prompt_tokens)
        seen = camera_mask[:, :, None].expand(-1, -1, self.config.vision.patches).flatten(1)
        return torch.cat([patches.to(text.dtype), text], dim=1), torch.cat([seen, prompt_mask], dim=1)

    def prefix_forward(self, images: Tensor, camera_mask: Tensor, prompt_tokens: Tensor, prompt_mask: Tensor) -> Prefix:
        """Graph 1: K and V of every layer [L,B,K,S,D], and the prefix mask bool [B,S]."""
        x, mask = self.embed_prefix(images, camera_mask, prompt_tokens, prompt_mask)
        rope = self._rope(_positions(mask))
        keys, values = zip(*self.backbone.keys_values(x, rope, key_bias(mask)), strict=True)
        return torch.stack(keys), torch.stack(values), mask

    # ------------------------------------------------------------------ the action expert

    def time_condition(self, time: Tensor) -> Tensor:
        """Condition [b,W] of flow times f32 [b]: sines in float64, then two layers with silu after each."""
        steps = torch.linspace(0.0, 1.0, self.config.expert.width // 2, dtype=torch.float64, device=time.device)
        periods = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** steps
        angles = time.double()[:, None] * (2.0 * torch.pi / periods)
        embedding = torch.cat([angles.sin(), angles.cos()], dim=-1).float()
        silu = nn.functional.silu
        out: Tensor = silu(self.time_mlp_out(silu(self.time_mlp_in(embedding))))
        return out

    def modulation(self, time: Tensor) -> Tensor:
        """All adaRMS modulations of flow times f32 [b]: f32 [b,M,3W]."""
        return self.expert.modulation(self.time_condition(time))

    def embed_suffix(self, x_t: Tensor) -> Tensor:
        """Noisy actions f32 [B,H,A] -> action tokens [B,H,W] in the expert's type."""
        out: Tensor = self.action_in_proj(x_t).to(self.expert.stack[0].self_attn.q_proj.weight.dtype)
        return out

    def velocity(self, x_t: Tensor, modulation: Tensor, prefix: list[KeysValues], prefix_mask: Tensor) -> Tensor:
        """v_t f32 [B,H,A]: action tokens see valid prefix tokens and each other. modulation [b,M,3W], b is B or 1."""
        batch, horizon = x_t.shape[:2]
        first = prefix_mask.sum(dim=1, keepdim=True)
        rope = self._rope(first + torch.arange(horizon, device=x_t.device))
        seen = torch.cat([prefix_mask, prefix_mask.new_ones(batch, horizon)], dim=1)
        hidden = self.expert(self.embed_suffix(x_t), modulation, rope, prefix, key_bias(seen))
        out: Tensor = self.action_out_proj(hidden.float())
        return out

    def denoise_step(
        self, x_t: Tensor, modulation: Tensor, dt: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix_mask: Tensor
    ) -> Tensor:
        """Graph 2: one Euler step in float32, x_t + dt * v_t. modulation f32 [M,3W]; prefix_k, prefix_v [L,B,K,S,D]."""
        prefix = [(prefix_k[i], prefix_v[i]) for i in range(self.config.expert.depth)]
        return x_t + dt * self.velocity(x_t, modulation[None], prefix, prefix_mask)

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

        def with_cache(layer: int, new: KeysValues) -> KeysValues:
            return torch.cat([cache_k[layer], new[0]], dim=2), torch.cat([cache_v[layer], new[1]], dim=2)

        hidden, new = self.backbone(self.backbone.embed(tokens), self._rope(positions), bias, with_cache)
        rows = self.backbone.embed_tokens.weight if unembedding is None else unembedding
        parts = [rows] if isinstance(rows, Tensor) else rows
        logits = torch.cat([nn.functional.linear(hidden[:, -1], part) for part in parts], dim=-1).float()
        keys, values = zip(*new, strict=True)
        return logits, torch.stack(keys), torch.stack(values)

    # ------------------------------------------------------------------ both sides of the insulation

    def backbone_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters that learn from tokens: vision, projector, language model."""
        yield from (
            item for item in self.named_parameters() if item[0].startswith(("vision.", "projector.", "backbone."))
        )

    def expert_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters that learn from the flow loss."""
        inside = {name for name, _ in self.backbone_parameters()}
        yield from (item for item in self.named_parameters() if item[0] not in inside)

    def compute_loss(self, observation: Observation, actions: Tensor, *, noise: Tensor, time: Tensor) -> Losses:
        """See `ki_edge.model.loss.compute_loss`."""
        return loss.compute_loss(self, observation, actions, noise=noise, time=time)

    def token_loss(self, observation: Observation) -> Tensor:
        """Mean cross-entropy of each sample's postfix [B], without actions: the co-training loss of other tasks."""
        return loss.postfix_cross_entropy(self.fast_logits(observation), observation)

    def fast_logits(self, observation: Observation) -> Tensor:
        """Logits [B,F,V] of the FAST postfix: row i predicts fast_tokens[:, i]."""
        return loss.joint_backbone(self, observation)[0]

    def sample_actions(
        self,
        observation: Observation,
        *,
        noise: Tensor | None = None,
        num_steps: int = 10,
        time_convention: str = "openpi",
    ) -> Tensor:
        """See `ki_edge.model.sampling.sample_actions`."""
        return sampling.sample_actions(
            self, observation, noise=noise, num_steps=num_steps, time_convention=time_convention
        )

    def sample_fast_tokens(
        self,
        observation: Observation,
        *,
        max_tokens: int,
        forced: tuple[int, ...] = (),
        constrained: bool = True,
    ) -> Tensor:
        """See `ki_edge.model.sampling.sample_fast_tokens`."""
        return sampling.sample_fast_tokens(
            self, observation, max_tokens=max_tokens, forced=forced, constrained=constrained
        )

    def _rope(self, positions: Tensor) -> Rope:
        return rope_angles(positions, self.config.backbone.head_dim)


def _positions(mask: Tensor) -> Tensor:
    """Position of each prefix token: the number of valid tokens before it (masked ones repeat their predecessor's)."""
    return mask.long().cumsum(dim=1) - 1
