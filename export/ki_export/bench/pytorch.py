"""PyTorch's side: the same model the way openpi's policy server runs it, eager and on the CPU.

Every camera slot goes through the vision tower, an absent one as a black picture with its mask off; the prompt is
padded to its full length; all backbone layers run to their end although nothing uses more than their K/V; K/V are
computed once, and each step computes its own time modulation (openpi pi0_pytorch.py, sample_actions). In bfloat16 the
parameters that openpi keeps in float32 stay so.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ki_edge.checkpoints import Checkpoint
from ki_edge.config import Pi05Config, Pictures
from ki_edge.errors import ArgumentError
from ki_edge.flow import denoise_times, step_size
from ki_edge.model import PiModel, load_model
from ki_edge.model.layers import key_bias, rope_angles

from .stages import F32, Inputs


def load(checkpoint: Path, dtype: str, threads: int, pictures: Pictures = "uint8") -> PiModel:
    """The model in one dtype; PyTorch computes with `threads` threads from then on."""
    torch.set_num_threads(threads)
    return load_model(Checkpoint.open(checkpoint).with_pictures(pictures), dtype=getattr(torch, dtype))


def check_same_model(model: PiModel, config: Pi05Config, checkpoint: Path) -> None:
    """ArgumentError if a checkpoint has another geometry than the bundle."""
    if model.config != config:
        raise ArgumentError(
            f"{checkpoint}: its model has another geometry than the first bundle's, so there is no ratio"
        )


class TorchSide:
    """One model and the inputs of one case. `actions`: of the last run, f32 [1, H, A]."""

    def __init__(self, model: PiModel, inputs: Inputs, noise: F32, *, convention: str, steps: int) -> None:
        self._model = model
        self._tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in inputs.arrays]
        self._state = [] if inputs.state is None else [torch.from_numpy(inputs.state)]
        self._noise = torch.from_numpy(noise)
        self._times = torch.from_numpy(denoise_times(steps, convention))
        self._dt = torch.tensor(step_size(steps))
        self.actions = noise

    @torch.inference_mode()
    def run(self) -> dict[str, float]:
        """One inference with the time of its stages."""
        start = time.perf_counter()
        prefix = whole_prefix(self._model, *self._tensors)
        middle = time.perf_counter()
        x = self._noise
        for t in self._times:
            x = self._model.denoise_step(x, self._model.modulation(t[None])[0], self._dt, *prefix, *self._state)
        end = time.perf_counter()
        self.actions = x.numpy()
        return {"prefix": 1e3 * (middle - start), "denoise": 1e3 * (end - middle), "total": 1e3 * (end - start)}


def whole_prefix(model: PiModel, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`prefix_forward` as openpi runs it: every layer to its end, and the final norm."""
    x, mask = model.embed_prefix(*inputs)
    rope = rope_angles(mask.long().cumsum(dim=1) - 1, model.config.backbone.head_dim)
    _, cache = model.backbone(x, rope, key_bias(mask))
    keys, values = zip(*cache, strict=True)
    return torch.stack(keys), torch.stack(values), mask
