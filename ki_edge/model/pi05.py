"""π0.5: the flow time modulates every norm of the action expert, and the state is words of the prompt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ki_edge.config import Pi05Config

from . import loss
from .gemma import ActionExpert, KeysValues
from .layers import Committed, key_bias
from .loss import Losses
from .observation import Observation
from .pi import PiModel


class Pi05(PiModel):
    """The policy network with its adaRMS expert.

    `knowledge_insulation`: whether the flow loss stops at the backbone's K/V. Whether the backbone learns FAST tokens
    is another matter: it does where an observation brings them.
    """

    variant = "pi05"
    expert: ActionExpert

    def __init__(self, config: Pi05Config, *, knowledge_insulation: bool = True) -> None:
        super().__init__(config, ActionExpert(config.expert))
        self.knowledge_insulation = knowledge_insulation
        width = config.expert.width
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)

    def time_condition(self, time: Tensor) -> Tensor:
        """Condition [b,W] of flow times f32 [b]: their embedding through two layers with silu after each."""
        silu = nn.functional.silu
        out: Tensor = silu(self.time_mlp_out(silu(self.time_mlp_in(self.time_embedding(time)))))
        return out

    def modulation(self, time: Tensor) -> Tensor:
        """All adaRMS modulations of flow times f32 [b]: f32 [b,M,3W]."""
        return self.expert.modulation(self.time_condition(time))

    def embed_suffix(self, x_t: Tensor) -> Tensor:
        """Noisy actions f32 [B,H,A] -> action tokens [B,H,W] in the expert's type."""
        out: Tensor = self.action_in_proj(x_t).to(self.expert.stack[0].self_attn.q_proj.weight.dtype)
        return out

    def velocity(
        self,
        x_t: Tensor,
        modulation: Tensor,
        prefix: list[KeysValues],
        prefix_mask: Tensor,
        *,
        committed: Committed | None = None,
    ) -> Tensor:
        """v_t f32 [B,H,A]: action tokens see valid prefix tokens and each other. modulation [b,M,3W], b is B or 1.

        `committed`: actions of x_t that are settled, and their modulation.
        """
        batch, horizon = x_t.shape[:2]
        first = prefix_mask.long().sum(dim=1, keepdim=True)
        rope = self._rope(first + torch.arange(horizon, device=x_t.device))
        seen = torch.cat([prefix_mask, prefix_mask.new_ones(batch, horizon)], dim=1)
        hidden = self.expert(self.embed_suffix(x_t), modulation, rope, prefix, key_bias(seen), committed)
        out: Tensor = self.action_out_proj(hidden.float())
        return out

    def compute_loss(
        self,
        observation: Observation,
        actions: Tensor,
        *,
        noise: Tensor,
        time: Tensor,
        delay: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Losses:
        """See `ki_edge.model.loss.compute_loss`."""
        return loss.compute_loss(self, observation, actions, noise=noise, time=time, delay=delay, real=real)

    def token_loss(self, observation: Observation) -> Tensor:
        """Mean cross-entropy of each sample's postfix [B], without actions: the co-training loss of other tasks."""
        return loss.postfix_cross_entropy(loss.joint_backbone(self, observation)[0], observation)

    def fast_logits(self, observation: Observation) -> Tensor:
        """Logits [B,F,V] of the FAST postfix: row i predicts fast_tokens[:, i]."""
        return loss.joint_backbone(self, observation)[0]
