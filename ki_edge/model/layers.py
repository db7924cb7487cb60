"""The pieces that SigLIP, the backbone and the action expert share.

Everything is written so that it exports cleanly: attention as two matrix products around a float32 softmax, query heads
folded into rows so that a K/V head is one matrix product, additive float32 masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MASKED = -1e9  # added to logits of keys that must not be seen: exp() of it is exactly zero in float32
ROPE_THETA = 10_000.0

Rope = tuple[Tensor, Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, softmax in float32.

    q [B,S,Hq,D]; k, v [B,K,C,D], each K/V head serving the next Hq/K query heads; bias f32 broadcastable to
    [B,1,1,S,C]. Returns [B,S,Hq*D] in q's dtype.
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    rows = q.reshape(batch, length, kv_heads, group * dim).transpose(1, 2).reshape(batch, kv_heads, length * group, dim)
    logits = torch.matmul(rows * dim**-0.5, k.transpose(-1, -2)).float()  # [B,K,S*G,C]
    if bias is not None and bias.shape[3] == 1:  # the same for all tokens
        logits = logits + bias[:, :, 0]
    elif bias is not None:
        masked = logits.reshape(batch, kv_heads, length, group, -1) + bias.transpose(2, 3)
        logits = masked.reshape(batch, kv_heads, length * group, k.shape[2])
    mixed = torch.matmul(torch.softmax(logits, dim=-1).to(q.dtype), v)  # [B,K,S*G,D]
    return mixed.reshape(batch, kv_heads, length, group * dim).transpose(1, 2).reshape(batch, length, heads * dim)


def key_bias(mask: Tensor) -> Tensor:
    """Additive attention bias f32 [B,1,1,1,C] that hides the keys where `mask` bool [B,C] is False."""
    return torch.where(mask, 0.0, MASKED)[:, None, None, None, :]


def rope_angles(positions: Tensor, head_dim: int) -> Rope:
    """[cos, cos] and [-sin, sin] of angle_j = position * theta^(-2j/D), f32 [B,S,1,D], for integer positions [B,S]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, :, None, None].float() * (1.0 / ROPE_THETA**exponents)  # 1/x: bit for bit as transformers
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Apply rotary positions to x [B,S,heads,D], half-split: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    cos, sin = (part.to(x.dtype) for part in rope)
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat([x2, x1], dim=-1) * sin


def rms_normalize(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-6) over the last axis, float32 result."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


class Layer(nn.Module):
    """A transformer layer, which is one `forward`: what is gathered, and computed again, as a whole.

    `recompute`: keep nothing of it for the backward pass but its inputs. Subclasses give `compute`.
    """

    recompute = False
    compute: Callable[..., Any]

    def forward(self, *inputs: Any) -> Any:
        """`compute` of the same inputs."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing is random
        return self.compute(*inputs)


class LayerNorm(nn.LayerNorm):
    """SigLIP's norm, in the type of what it norms, whatever its weights are in."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (part.to(x.dtype) for part in (self.weight, self.bias))
        return nn.functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """Gemma's norm: normalised x times (1 + weight)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return (rms_normalize(x) * (1.0 + self.weight.float())).to(x.dtype)


class Modulation(nn.Module):
    """The dense layer of one adaRMS norm; in the graphs it has already become a row of `modulation`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)

    def forward(self, condition: Tensor) -> Tensor:
        """Condition [b,W] -> scale, shift, gate, concatenated [b,3W], float32."""
        row: Tensor = self.dense(condition)
        return row


@dataclass(frozen=True)
class Committed:
    """Action tokens that are settled, whose flow time is 0 whatever the others' is.

    `mask` bool [B,H,1]; `modulation` f32 [c,M,3W] of that time, c is B or 1.
    """

    mask: Tensor
    modulation: Tensor


def norm_row(modulation: Tensor, norm: int, committed: Committed | None) -> Tensor:
    """Scale, shift and gate of one norm, f32 [b,1,3W] for all tokens, or [B,H,3W] where some are committed."""
    row = modulation[:, norm, None]
    return row if committed is None else torch.where(committed.mask, committed.modulation[:, norm, None], row)


def modulated_norm(x: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """adaRMS: x [B,H,W], row f32 [b,h,3W] (b is B or 1, h is H or 1) -> (normalised x * (1 + scale) + shift, gate
    [b,h,W])."""
    scale, shift, gate = row.chunk(3, dim=-1)
    return (rms_normalize(x) * (1.0 + scale) + shift).to(x.dtype), gate.to(x.dtype)


class GatedMLP(nn.Module):
    """Gemma's feed-forward: down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gated = nn.functional.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x)
        out: Tensor = self.down_proj(gated)
        return out
