"""Starting weights for a model that is trained from nothing."""

from __future__ import annotations

import torch
from torch import nn

from ki_edge.config import Pi05Config
from ki_edge.model import Pi05


def from_scratch(config: Pi05Config, *, seed: int, knowledge_insulation: bool = True) -> Pi05:
    """A Pi05 with variance-preserving weights; residual branches start small, gates of the action expert open.

    Linear weights ~ N(0, 1/fan_in), the last linear of each branch divided by sqrt(2 * depth); embeddings such that
    embedding * sqrt(width) has unit variance.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Pi05(config, knowledge_insulation=knowledge_insulation)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0.0, fan_in**-0.5 * _branch_scale(config, name), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                std = 0.3 if name.endswith("position_embedding") else module.weight.shape[1] ** -0.5
                module.weight.normal_(0.0, std, generator=generator)
            if name.endswith(".dense"):
                width = config.expert.width
                module.weight.mul_(0.1)
                module.bias[2 * width :] = 1.0
    return model


def _branch_scale(config: Pi05Config, name: str) -> float:
    if not name.endswith(("o_proj", "out_proj", "down_proj", "fc2")) or not name.startswith(
        ("vision.", "backbone.", "expert.")
    ):
        return 1.0
    depth = config.vision.depth if name.startswith("vision.") else config.backbone.depth
    return float((2 * depth) ** -0.5)
