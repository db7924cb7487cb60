"""π0: the flow time is mixed into the action tokens, and the state is a token of the action expert before them.

The expert itself is a plain Gemma. Facts: openpi models/pi0.py and models_pytorch/pi0_pytorch.py (`pi05` false).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError

from .gemma import KeysValues, PlainExpert
from .layers import MASKED, key_bias
from .pi import PiModel


class Pi0(PiModel):
    """The policy network with its plain expert. For inference: training one is not supported."""

    variant = "pi0"
    expert: PlainExpert

    def __init__(self, config: Pi05Config) -> None:
        super().__init__(config, PlainExpert(config.expert))
        width = config.expert.width
        self.state_proj = nn.Linear(config.state_size, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)

    def modulation(self, time: Tensor) -> Tensor:
        """The embedding of flow times f32 [b]: f32 [b,1,W]."""
        return self.time_embedding(time)[:, None]

    def embed_suffix(self, x_t: Tensor, modulation: Tensor, state: Tensor) -> Tensor:
        """State f32 [B,A], then noisy actions f32 [B,H,A] with their time [b,1,W]: [B,1+H,W] in the expert's type."""
        actions = self.action_in_proj(x_t)
        timed = torch.cat([actions, modulation.expand_as(actions)], dim=-1)  # [B,H,2W]
        timed = self.action_time_mlp_out(nn.functional.silu(self.action_time_mlp_in(timed)))
        tokens = torch.cat([self.state_proj(state)[:, None], timed], dim=1)
        return tokens.to(self.expert.stack[0].self_attn.q_proj.weight.dtype)

    def velocity(
        self, x_t: Tensor, modulation: Tensor, prefix: list[KeysValues], prefix_mask: Tensor, state: Tensor
    ) -> Tensor:
        """v_t f32 [B,H,A]: the state token sees valid prefix tokens and itself, action tokens see everything valid.

        modulation [b,1,W], b is B or 1; state f32 [B,A], as the policy normalises it, zeros past the robot's numbers.
        """
        batch, horizon = x_t.shape[:2]
        order = torch.arange(1 + horizon, device=x_t.device)
        rope = self._rope(prefix_mask.long().sum(dim=1, keepdim=True) + order)
        first = order.clamp(max=1)  # the state token is 0, all action tokens are 1
        among = torch.where(first[None, :] <= first[:, None], 0.0, MASKED)  # [1+H,1+H]
        past = key_bias(prefix_mask).expand(-1, 1, 1, 1 + horizon, -1)
        bias = torch.cat([past, among.expand(batch, 1, 1, 1 + horizon, 1 + horizon)], dim=-1)
        hidden = self.expert(self.embed_suffix(x_t, modulation, state), rope, prefix, bias)
        out: Tensor = self.action_out_proj(hidden[:, 1:].float())
        return out

    def compute_loss(self, *_: object, **__: object) -> None:
        """ArgumentError: only π0.5 is trained."""
        raise ArgumentError("a π0 cannot be trained here: train it with openpi or LeRobot, or train a π0.5")
