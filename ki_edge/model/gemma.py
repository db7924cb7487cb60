"""The two Gemma transformers: the PaliGemma backbone and the action expert, which meet in attention K/V only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ki_edge.config import GemmaConfig

from .layers import Committed, GatedMLP, Layer, Modulation, RMSNorm, Rope, attention, modulated_norm, norm_row, rotate

KeysValues = tuple[Tensor, Tensor]


class GemmaAttention(nn.Module):
    """Attention with shared K/V heads and rotary positions; keys are cached after rotation."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.width, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.width, bias=False)

    def keys_values(self, x: Tensor, rope: Rope) -> KeysValues:
        """K and V of x [B,S,W]: [B,K,S,D] each."""
        k, v = (self._heads(project(x), self.num_kv_heads) for project in (self.k_proj, self.v_proj))
        return rotate(k, rope).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, rope: Rope, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        q = rotate(self._heads(self.q_proj(x), self.num_heads), rope)
        out: Tensor = self.o_proj(attention(q, k, v, bias))
        return out

    def _heads(self, x: Tensor, count: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], count, self.head_dim)


class GemmaLayer(Layer):
    """Gemma layer: attention and MLP, each behind an RMSNorm."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width)
        self.self_attn = GemmaAttention(config)
        self.post_attention_layernorm = RMSNorm(config.width)
        self.mlp = GatedMLP(config.width, config.mlp_dim)

    def compute(
        self,
        x: Tensor,
        rope: Rope,
        bias: Tensor | None,
        past: KeysValues | None = None,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """x [B,S,W] -> the layer's output, and K and V of x [B,K,S,D]. It sees `past`, and itself, as `bias` says.

        `wanted` i64 [B,Q]: the tokens whose output is asked for, [B,Q,W]; None: all. Without a bias K and V are all
        that is asked for, and the output is None.
        """
        normed = self.input_layernorm(x)
        k, v = self.self_attn.keys_values(normed, rope)
        if bias is None:
            return None, k, v
        seen_k, seen_v = (k, v) if past is None else (torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2))
        if wanted is not None:
            x, normed, rope, bias = _rows(x, normed, rope, bias, wanted)
        x = x + self.self_attn(normed, rope, seen_k, seen_v, bias)
        return x + self.mlp(self.post_attention_layernorm(x)), k, v


def _rows(x: Tensor, normed: Tensor, rope: Rope, bias: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Rope, Tensor]:
    """What an attention needs of the `wanted` queries [B,Q] alone: x and norms [B,Q,W], positions, rows of the bias."""
    at = wanted[:, :, None]
    cos, sin = (part.expand(len(wanted), -1, -1, -1).take_along_dim(at[..., None], dim=1) for part in rope)
    if bias.shape[3] > 1:  # else the same for all queries
        bias = bias.take_along_dim(at[:, None, None], dim=3)
    return x.take_along_dim(at, dim=1), normed.take_along_dim(at, dim=1), (cos, sin), bias


class TableAdapter(Protocol):
    """What an adapter in training adds to the embedding's table, where the table itself is used."""

    def logits(self, hidden: Tensor) -> Tensor:
        """What it adds to the logits f32 [...,V]."""

    def rows(self, tokens: Tensor) -> Tensor:
        """What it adds to rows [n,W]."""


class Backbone(nn.Module):
    """PaliGemma's language model. Input vectors are already embedded and scaled."""

    adapter: TableAdapter | None = None

    def __init__(self, config: GemmaConfig, vocab_size: int) -> None:
        super().__init__()
        self.width = config.width
        self.embed_tokens = nn.Embedding(vocab_size, config.width)
        self.layers = nn.ModuleList(GemmaLayer(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)

    @property
    def stack(self) -> list[GemmaLayer]:
        """The layers, with their type."""
        return cast("list[GemmaLayer]", list(self.layers))

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B,T] -> [B,T,W], times sqrt(W)."""
        vectors: Tensor = self.embed_tokens(tokens) * self.width**0.5
        return vectors

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits f32 [...,V] of hidden states [...,W], with the embedding's own table."""
        logits = nn.functional.linear(hidden, self.embed_tokens.weight).float()
        return logits if self.adapter is None else logits + self.adapter.logits(hidden)

    def rows(self, tokens: Tensor) -> Tensor:
        """Rows [n,W] of the embedding's table, of ids [n]."""
        rows: Tensor = self.embed_tokens.weight[tokens]
        return rows if self.adapter is None else rows + self.adapter.rows(tokens)

    def keys_values(self, x: Tensor, rope: Rope, bias: Tensor) -> list[KeysValues]:
        """K/V of every layer. The last layer's attention and MLP feed nothing but logits, so they do not run."""
        cache = []
        for layer in self.stack[:-1]:
            x, k, v = layer(x, rope, bias)
            cache.append((k, v))
        _, k, v = self.stack[-1](x, rope, None)
        return [*cache, (k, v)]

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        bias: Tensor,
        past: Sequence[KeysValues] | None = None,
        *,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, list[KeysValues]]:
        """All layers and the final norm: hidden states [B,S,W] and the new K/V.

        `past`: K/V that each layer sees besides the new ones. `wanted` i64 [B,Q]: the tokens whose hidden states are
        asked for, [B,Q,W]; of the others the last layer computes K and V alone.
        """
        cache = []
        for index, layer in enumerate(self.stack):
            last = index == len(self.stack) - 1
            x, k, v = layer(x, rope, bias, None if past is None else past[index], wanted if last else None)
            cache.append((k, v))
        out: Tensor = self.norm(x)
        return out, cache


class ExpertLayer(Layer):
    """Gemma layer whose norms are modulated and whose branches are gated by the flow time."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.input_layernorm = Modulation(config.width)
        self.self_attn = GemmaAttention(config)
        self.post_attention_layernorm = Modulation(config.width)
        self.mlp = GatedMLP(config.width, config.mlp_dim)

    def compute(self, x: Tensor, rows: tuple[Tensor, Tensor], rope: Rope, prefix: KeysValues, bias: Tensor) -> Tensor:
        """x [B,H,W] -> the layer's output; `rows`: scale, shift and gate of both norms."""
        normed, gate = modulated_norm(x, rows[0])
        own_k, own_v = self.self_attn.keys_values(normed, rope)
        k = torch.cat([prefix[0], own_k], dim=2)  # [B,K,S+H,D]
        v = torch.cat([prefix[1], own_v], dim=2)
        x = x + self.self_attn(normed, rope, k, v, bias) * gate
        normed, gate = modulated_norm(x, rows[1])
        out: Tensor = x + self.mlp(normed) * gate
        return out


class ActionExpert(nn.Module):
    """The small transformer that turns noisy actions into a velocity."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ExpertLayer(config) for _ in range(config.depth))
        self.norm = Modulation(config.width)

    @property
    def stack(self) -> list[ExpertLayer]:
        """The layers, with their type."""
        return cast("list[ExpertLayer]", list(self.layers))

    @property
    def modulations(self) -> list[Modulation]:
        """The dense layers of all norms in the order of their use. They run before the layers do, all at once."""
        norms = [norm for layer in self.stack for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        return [*norms, self.norm]

    def modulation(self, condition: Tensor) -> Tensor:
        """All modulation rows of a time condition [b,W]: f32 [b,M,3W]."""
        return torch.stack([norm(condition) for norm in self.modulations], dim=1)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: Rope,
        prefix: list[KeysValues],
        bias: Tensor,
        committed: Committed | None = None,
    ) -> Tensor:
        """Action tokens [B,H,W] -> final normed hidden states [B,H,W]; modulation [b,M,3W], b is B or 1.

        `committed`: the tokens that are modulated otherwise.
        """
        for index, layer in enumerate(self.stack):
            rows = (norm_row(modulation, 2 * index, committed), norm_row(modulation, 2 * index + 1, committed))
            x = layer(x, rows, rope, prefix[index], bias)
        return modulated_norm(x, norm_row(modulation, -1, committed))[0]


class PlainExpert(nn.Module):
    """π0's action expert: small Gemma layers as they are, nothing modulated, nothing gated."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GemmaLayer(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)

    @property
    def stack(self) -> list[GemmaLayer]:
        """The layers, with their type."""
        return cast("list[GemmaLayer]", list(self.layers))

    def forward(self, x: Tensor, rope: Rope, prefix: list[KeysValues], bias: Tensor) -> Tensor:
        """Suffix tokens [B,Q,W] -> final normed hidden states [B,Q,W]; bias over the keys of prefix and suffix."""
        for layer, past in zip(self.stack, prefix, strict=True):
            x, _, _ = layer(x, rope, bias, past)
        out: Tensor = self.norm(x)
        return out
