"""PyTorch on a GPU: the model eager or compiled, from host arrays to host arrays.

`padded`: as openpi's server runs it, all camera slots and the padded prompt, every layer to its end; otherwise the same
tokens as the bundle's, through the same methods that become its graphs. Time modulations are computed each step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gpu_inputs import Observation
from torch import Tensor

from ki_edge.checkpoints import Checkpoint
from ki_edge.flow import denoise_times, step_size
from ki_export.bench.pytorch import load, whole_prefix

GEMM, COPY_BYTES, TIMED = 8192, 1 << 32, 10


class TorchSide:
    """One model on one device. `mode`: of torch.compile, None for eager."""

    def __init__(self, checkpoint: Path, dtype: str, device: str, mode: str | None, *, padded: bool) -> None:
        torch.set_float32_matmul_precision("highest")
        self.device, self._compiled, self._padded = device, mode is not None, padded
        self._model = load(checkpoint, dtype, torch.get_num_threads()).to(device)
        self._convention = Checkpoint.open(checkpoint).time_convention
        self._prefix, self._step = self._padded_prefix if padded else self._model.prefix_forward, self._one_step
        if mode is not None:
            self._prefix = torch.compile(self._prefix, mode=mode, dynamic=False)
            self._step = torch.compile(self._step, mode=mode, dynamic=False)

    @property
    def config(self):  # type: ignore[no-untyped-def]
        """Its geometry."""
        return self._model.config

    @torch.no_grad()
    def run(self, observation: Observation, steps: int) -> tuple[np.ndarray, dict[str, float]]:
        """Actions f32 [1, H, A], and milliseconds of prefix and denoise."""
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()
        given = observation if self._padded else observation.trimmed()
        start = self._now()
        prefix = self._prefix(*(self._put(array) for array in given.arrays))
        middle = self._now()
        state = [] if given.state is None else [self._put(given.state)]
        x, dt = self._put(given.noise), torch.tensor(step_size(steps), device=self.device)
        for t in self._put(denoise_times(steps, self._convention)):
            x = self._step(x, t[None], dt, *prefix, *state).clone()
        actions = x.cpu().numpy()
        end = self._now()
        return actions, {"prefix": 1e3 * (middle - start), "denoise": 1e3 * (end - middle)}

    def _padded_prefix(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return whole_prefix(self._model, *inputs)

    def _one_step(self, x: Tensor, t: Tensor, dt: Tensor, *prefix_and_state: Tensor) -> Tensor:
        return self._model.denoise_step(x, self._model.modulation(t)[0], dt, *prefix_and_state)

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def synchronize(device: str) -> None:
    """Wait for everything that was started."""
    if device == "cuda":
        torch.cuda.synchronize()


def measured_peaks(device: str) -> dict[str, float]:
    """Of a bfloat16 product of 8192^3 in TFLOP/s, and of a 4 GB copy on the device in TB/s, bytes read and written."""
    size, nbytes = (GEMM, COPY_BYTES) if device == "cuda" else (512, 1 << 24)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    product = _seconds(lambda: torch.mm(a, b), device)
    copy = _seconds(lambda: target.copy_(source), device)
    return {"bf16_tflops": 2e-12 * size**3 / product, "copy_tbs": 2e-12 * nbytes / copy}


def _seconds(run: Callable[[], object], device: str) -> float:
    """Mean of several runs, after as many to warm up."""
    for _ in range(TIMED):
        run()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(TIMED):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / TIMED
