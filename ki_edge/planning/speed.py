"""How fast a training could be: products counted from the model's shapes, and bytes that devices exchange in a step.

What a device achieves of its peak is an assumption, which is named and printed with every figure.
"""

from __future__ import annotations

from dataclasses import dataclass

from ki_edge.config import GemmaConfig, Pi05Config

from .memory import F32, Need, Samples, Setup


@dataclass(frozen=True)
class Card:
    """A device. `memory` in bytes; `peak`: operations a second in bfloat16, dense, with sums in float32; `near`, `far`:
    bytes a second to devices of the same machine, and to others."""

    name: str
    memory: float
    peak: float
    near: float
    far: float


# The makers' data sheets; `far`: 400 Gbit/s for each device with NVLink, 100 Gbit/s for a machine of eight without.
CARDS = (
    Card("24 GB (RTX 4090)", 24e9, 165e12, 25e9, 1.6e9),
    Card("48 GB (L40S)", 48e9, 362e12, 25e9, 1.6e9),
    Card("80 GB (H100 SXM)", 80e9, 989e12, 450e9, 50e9),
)
MACHINE = 8  # devices of one machine
UTILISATION = 0.30  # of the peak, in plain PyTorch without fused attention


def forward_products(config: Pi05Config, samples: Samples) -> dict[str, float]:
    """Multiplications and additions of a forward pass of one sample, by stack."""
    vision, backbone = config.vision, config.backbone
    prefix = samples.cameras * vision.patches + samples.prompt
    tokens, horizon = prefix + samples.postfix, config.action_horizon + config.has_state
    of_vision = vision.depth * (
        2 * vision.patches * (4 * vision.width**2 + 2 * vision.width * vision.mlp_dim)
        + 4 * vision.patches**2 * vision.width
    )
    return {
        "vision": float(samples.cameras * of_vision),
        "backbone": float(
            (backbone.depth - 1) * _layer(backbone, tokens, tokens) + _last_layer(backbone, tokens, samples.postfix)
        ),
        "head": float(2 * samples.postfix * backbone.width * config.vocab_size),
        "expert": float(samples.draws * config.expert.depth * _layer(config.expert, horizon, prefix + horizon)),
    }


def step_products(config: Pi05Config, samples: Samples, setup: Setup) -> float:
    """Of one sample, forward and backward (twice a forward pass), and once more forward with checkpointing."""
    parts = forward_products(config, samples)
    again = 1 if setup.checkpointing else 0
    total = parts["expert"] * (3 + again) + 3 * parts["head"]
    learns = bool(samples.postfix) or not setup.insulated
    total += parts["backbone"] * ((3 + again) if learns else 1)
    return total + parts["vision"] * ((3 + again) if learns and "vision" not in setup.freeze else 1)


def exchanged(need: Need, setup: Setup) -> float:
    """Bytes that each device sends in a step of one batch: gradients of replicas in a ring; of shards weights for the
    forward and the backward pass, then gradients."""
    weights, share = need.parameters, (setup.devices - 1) / setup.devices
    if setup.strategy == "ddp":
        return 2 * share * F32 * weights.learning
    if setup.strategy == "fsdp2":
        low = 2 if setup.bfloat16 else F32
        return share * (2 * low * weights.inside + F32 * weights.outside + F32 * weights.learning)
    return 0.0


@dataclass(frozen=True)
class Speed:
    """Of a step on all devices. `compute`, `exchange`: seconds; `samples_per_s`: if the two overlap."""

    compute: float
    exchange: float
    samples_per_s: float


def speed(config: Pi05Config, samples: Samples, setup: Setup, need: Need, card: Card) -> Speed:
    """What a card would do of it."""
    compute = samples.batch * step_products(config, samples, setup) / (card.peak * UTILISATION)
    link = card.near if setup.devices <= MACHINE else card.far
    exchange = exchanged(need, setup) / link
    return Speed(compute, exchange, setup.devices * samples.batch / max(compute, exchange))


def _layer(config: GemmaConfig, tokens: int, keys: int) -> int:
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = config.width * (2 * heads + 2 * kv + 3 * config.mlp_dim)
    return 2 * tokens * matrices + 4 * tokens * keys * heads


def _last_layer(config: GemmaConfig, tokens: int, queries: int) -> int:
    """K and V of all tokens, and everything else of those that predict a token alone."""
    of_keys = 2 * config.num_kv_heads * config.head_dim * config.width
    return _layer(config, queries, tokens) + 2 * (tokens - queries) * of_keys
