"""The contenders of `sampler.py`: callables that run one inference and tell its stages' times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ki_edge.flow import denoise_times, step_size
from ki_edge.model import Pi05
from ki_edge.model.layers import key_bias, rope_angles
from ki_runtime.sampler import Sampler

F32 = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
Inputs = tuple[Array, Array, Array, Array]  # of the prefix graph, in its order


@dataclass(frozen=True)
class Run:
    """One inference: actions f32 [1,H,A], milliseconds of its two stages."""

    actions: F32
    prefix_ms: float
    denoise_ms: float

    @property
    def total_ms(self) -> float:
        return self.prefix_ms + self.denoise_ms


Contender = Callable[[], Run]


def whole_prefix(model: Pi05, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`prefix_forward` as openpi runs it: every layer to its end, and the final norm."""
    x, mask = model.embed_prefix(*inputs)
    rope = rope_angles(mask.long().cumsum(dim=1) - 1, model.config.backbone.head_dim)
    _, cache = model.backbone(x, rope, key_bias(mask))
    keys, values = zip(*cache, strict=True)
    return torch.stack(keys), torch.stack(values), mask


class TorchSide:
    """The PyTorch model, run in several ways."""

    def __init__(self, model: Pi05, noise: F32, convention: str, steps: int) -> None:
        self._model, self._noise = model, torch.from_numpy(noise)
        self._times = torch.from_numpy(denoise_times(steps, convention))
        self._dt = torch.tensor(step_size(steps))
        with torch.inference_mode():
            self._rows = list(model.modulation(self._times))

    def contender(self, inputs: Inputs, *, tail: bool, hoisted: bool) -> Contender:
        """`tail`: the last layer runs to its end. `hoisted`: modulations were computed beforehand."""
        model, tensors = self._model, [torch.from_numpy(np.ascontiguousarray(array)) for array in inputs]
        prefix_of = partial(whole_prefix, model) if tail else model.prefix_forward

        @torch.inference_mode()
        def run() -> Run:
            start = time.perf_counter()
            prefix = prefix_of(*tensors)
            middle = time.perf_counter()
            x = self._noise
            for step in range(len(self._rows)):
                row = self._rows[step] if hoisted else model.modulation(self._times[step : step + 1])[0]
                x = model.denoise_step(x, row, self._dt, *prefix)
            end = time.perf_counter()
            return Run(x.numpy(), 1e3 * (middle - start), 1e3 * (end - middle))

        return run


def count_gflop(run: Contender) -> float:
    """Floating-point operations of the matrix products of one PyTorch run, in 1e9."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops()) / 1e9


def bundle_contender(sampler: Sampler, inputs: Inputs, noise: F32, steps: int) -> Contender:
    """The runtime on the untrimmed inputs; trimming is part of what is measured, in the prefix."""

    def run() -> Run:
        start = time.perf_counter()
        actions = sampler.sample_actions(*inputs, noise=noise, num_steps=steps)
        total, denoise = 1e3 * (time.perf_counter() - start), sampler.timing.denoise / 1e6
        return Run(actions, total - denoise, denoise)

    return run
