"""The least time that one inference can take on known devices: the roofline of each stage, summed.

    time of a stage = max(operations / peak, bytes / bandwidth)

Operations count multiply and add; weights are read once by the vision tower and the backbone and once a step by the
action expert. Peaks are the vendors' figures for dense matrix products (16-bit with float32 accumulation, 8-bit).
"""

from __future__ import annotations

from dataclasses import dataclass

from ki_edge.config import GemmaConfig, Pi05Config
from ki_runtime.doctor.boards import BOARDS, Board

Device = Board
DEVICES = tuple(board for board in BOARDS if board.peak16)


@dataclass(frozen=True)
class Stage:
    """Weights that a stage reads, operations of its matrix products, and how often it runs."""

    name: str
    weights: int
    operations: float
    runs: int = 1


def stages(config: Pi05Config, *, cameras: int, prompt: int, steps: int) -> tuple[Stage, ...]:
    """Vision, prefix and denoising of one inference with `cameras` present and a prompt of `prompt` tokens."""
    vision, backbone, expert = config.vision, config.backbone, config.expert
    tokens, horizon = cameras * vision.patches + prompt, config.action_horizon + config.has_state
    tower = vision.depth * (4 * vision.width**2 + 2 * vision.width * vision.mlp_dim)
    attention = 4 * vision.patches**2 * vision.width * vision.depth
    live = backbone_weights(backbone)
    heads = backbone.num_heads * backbone.head_dim
    action = expert.depth * layer_weights(expert)
    return (
        Stage("vision", tower, cameras * (2.0 * tower * vision.patches + attention)),
        Stage("prefix", live, 2.0 * live * tokens + 4.0 * tokens**2 * heads * (backbone.depth - 1)),
        Stage(
            "denoise",
            action,
            2.0 * action * horizon + 4.0 * horizon * (tokens + horizon) * heads * expert.depth,
            steps,
        ),
    )


def floor_ms(stage: Stage, device: Device, weight_bytes: int) -> float:
    """Milliseconds of a stage with weights and products of 2 bytes or 1."""
    peak = device.peak16 if weight_bytes == 2 else device.peak8
    seconds = max(stage.operations / (1e12 * peak), weight_bytes * stage.weights / (1e9 * device.bandwidth))
    return 1e3 * stage.runs * seconds


def layer_weights(config: GemmaConfig) -> int:
    """Weights of the matrices of one transformer layer."""
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return config.width * (2 * query + 2 * kv + 3 * config.mlp_dim)


def backbone_weights(config: GemmaConfig) -> int:
    """Weights that the prefix reads: of the last layer only K and V reach the action expert."""
    kv = config.num_kv_heads * config.head_dim
    return (config.depth - 1) * layer_weights(config) + 2 * config.width * kv
