"""The least time that one inference can take on known devices: the roofline of each stage, summed.

    time of a stage = max(operations / peak, bytes / bandwidth)

Operations count multiply and add; weights are read once by the vision tower and the backbone and once a step by the
action expert. Peaks are the vendors' figures for dense products (16-bit with float32 accumulation, 8-bit, 4-bit).
"""

from __future__ import annotations

from dataclasses import dataclass

from ki_edge.checkpoints.layout.counts import count_weights
from ki_edge.config import Pi05Config
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
    count, vision, backbone, expert = count_weights(config), config.vision, config.backbone, config.expert
    patches, heads = vision.patches, backbone.num_heads * backbone.head_dim
    tokens, horizon = cameras * patches + prompt, config.action_horizon + config.has_state
    tower, live, action = (part.matrices for part in (count.vision, count.backbone, count.expert))
    seeing = 2.0 * tower * patches + 4 * patches**2 * vision.width * vision.depth
    reading = 2.0 * live * tokens + 4.0 * tokens**2 * heads * (backbone.depth - 1)
    acting = 2.0 * action * horizon + 4.0 * horizon * (tokens + horizon) * heads * expert.depth
    return (
        Stage("vision", tower, cameras * seeing),
        Stage("prefix", live, reading),
        Stage("denoise", action, acting, steps),
    )


def floor_ms(stage: Stage, device: Device, weight_bytes: float) -> float:
    """Milliseconds of a stage with weights and products of 2 bytes, 1, or fewer where the device has such products."""
    peak = device.peak16 if weight_bytes >= 2 else device.peak8 if weight_bytes >= 1 else device.peak4 or device.peak8
    seconds = max(stage.operations / (1e12 * peak), weight_bytes * stage.weights / (1e9 * device.bandwidth))
    return 1e3 * stage.runs * seconds
