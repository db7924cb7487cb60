"""AdamW, with moments in float32 or in 8 bits."""

from __future__ import annotations

from typing import Any

import torch

from ki_edge.errors import ArgumentError
from ki_edge.train.step.settings import TrainSettings


def new_optimizer(groups: list[dict[str, Any]], settings: TrainSettings, device: torch.device) -> torch.optim.Optimizer:
    """The settings' optimiser over groups of parameters. ArgumentError if what it needs is not installed."""
    rate, betas = settings.learning_rate, (settings.beta1, settings.beta2)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=device.type == "cuda")
    raise ArgumentError("optimizer adamw8bit: not yet")
