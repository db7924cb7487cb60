"""A process that holds one contender of the GPU benchmark and answers requests, a JSON line each (see gpu_process.py).

    {"do": "open", "contender": {...}}                       -> {"seconds": ...}
    {"do": "run", "case": {...}, "save": "actions.npy"}      -> {"prefix": ms, "denoise": ms, "total": ms}
    {"do": "peaks"}                                          -> {"bf16_tflops": ..., "copy_tbs": ...}

Every contender has its own process, because their CUDA libraries do not always like each other, one that crashes or
runs out of memory must not end the others, and its memory can be told from theirs.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in (".", "export", "runtime")]  # works where nothing is installed

from gpu_measure import Case, Observation, draw  # noqa: E402

from ki_edge.checkpoints import Checkpoint  # noqa: E402
from ki_edge.flow import denoise_times, step_size  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

GEMM, COPY_BYTES, TIMED = 8192, 1 << 32, 10


class BundleSide:
    """A bundle on one backend."""

    def __init__(self, path: Path, backend: str, batch: int, *, record: bool = False) -> None:
        if backend == "ort-cuda":
            load_cuda_libraries()
        if batch > 1 and backend in ("trt", "trt-rtx"):
            from ki_runtime.trt.build import BuildOptions, build_bundle

            build_bundle(path, backend, options=BuildOptions(batch=batch))
        from ki_runtime.policy.sampler import Sampler

        self._sampler = recording(path, backend) if record else Sampler.open(path, backend, build=True)
        self.config = self._sampler.config

    def run(self, observation: Observation, steps: int) -> tuple[np.ndarray, dict[str, float]]:
        """Actions, and the sampler's own times in milliseconds."""
        actions = self._sampler.sample_actions(
            *observation.arrays, state=observation.state, noise=observation.noise, num_steps=steps
        )
        timing = self._sampler.timing
        return actions, {"prefix": timing.prefix / 1e6, "denoise": timing.denoise / 1e6}


def recording(path: Path, backend: str) -> Any:
    """A sampler that asks a backend for CUDA graphs which it does not record by itself. The witness is not asked."""
    from ki_edge import graphs
    from ki_edge.bundle import Bundle
    from ki_runtime.backends.backend import SessionOptions
    from ki_runtime.backends.registry import connect
    from ki_runtime.policy.sampler import Sampler

    bundle = Bundle.open(path)
    connection = connect(bundle, backend, SessionOptions(record=True), graphs.specs(bundle.manifest.config))
    return Sampler(bundle, connection.open, connection.backend)


class TorchSide:
    """PyTorch's model on one device, eager or compiled, from host arrays to host arrays.

    `mode`: of torch.compile, None for eager. `padded`: as openpi's server runs it, all camera slots and the padded
    prompt, every layer to its end; otherwise the same tokens as the bundle's, through the same methods that become its
    graphs. Time modulations are computed each step.
    """

    def __init__(self, checkpoint: Path, dtype: str, device: str, mode: str | None, *, padded: bool) -> None:
        import torch

        from ki_export.bench.pytorch import load

        self._torch = torch
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

    def run(self, observation: Observation, steps: int) -> tuple[np.ndarray, dict[str, float]]:
        """Actions f32 [1, H, A], and milliseconds of prefix and denoise."""
        with self._torch.no_grad():
            return self._run(observation, steps)

    def _run(self, observation: Observation, steps: int) -> tuple[np.ndarray, dict[str, float]]:
        if self._compiled:
            self._torch.compiler.cudagraph_mark_step_begin()
        given = observation if self._padded else observation.trimmed()
        start = self._now()
        prefix = self._prefix(*(self._put(array) for array in given.arrays))
        middle = self._now()
        state = [] if given.state is None else [self._put(given.state)]
        x, dt = self._put(given.noise), self._torch.tensor(step_size(steps), device=self.device)
        for t in self._put(denoise_times(steps, self._convention)):
            x = self._step(x, t[None], dt, *prefix, *state).clone()
        actions = x.cpu().numpy()
        end = self._now()
        return actions, {"prefix": 1e3 * (middle - start), "denoise": 1e3 * (end - middle)}

    def _padded_prefix(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from ki_export.bench.pytorch import whole_prefix

        return whole_prefix(self._model, *inputs)

    def _one_step(self, x: Tensor, t: Tensor, dt: Tensor, *prefix_and_state: Tensor) -> Tensor:
        return self._model.denoise_step(x, self._model.modulation(t)[0], dt, *prefix_and_state)

    def _put(self, array: np.ndarray) -> Tensor:
        return self._torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)

    def _now(self) -> float:
        self._wait()
        return time.perf_counter()

    def _wait(self) -> None:
        """For everything that was started."""
        if self.device == "cuda":
            self._torch.cuda.synchronize()

    def peaks(self) -> dict[str, float]:
        """Of a bfloat16 product of 8192^3 in TFLOP/s, and of a 4 GB copy on the device in TB/s, read and written."""
        torch, (size, nbytes) = self._torch, (GEMM, COPY_BYTES) if self.device == "cuda" else (512, 1 << 24)
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        source = torch.ones(nbytes // 4, device=self.device)
        target = torch.empty_like(source)
        product = self._seconds(lambda: torch.mm(a, b))
        copy = self._seconds(lambda: target.copy_(source))
        return {"bf16_tflops": 2e-12 * size**3 / product, "copy_tbs": 2e-12 * nbytes / copy}

    def _seconds(self, run: Callable[[], object]) -> float:
        """Mean of several runs, after as many to warm up."""
        for _ in range(TIMED):
            run()
        start = self._now()
        for _ in range(TIMED):
            run()
        return (self._now() - start) / TIMED


def load_cuda_libraries() -> None:
    """CUDA and cuDNN as PyTorch or ONNX Runtime's own packages brought them, so that its CUDA provider loads."""
    with contextlib.suppress(Exception):
        import_module("torch")
    with contextlib.suppress(Exception):
        import_module("onnxruntime").preload_dlls()


def open_contender(contender: Mapping[str, Any]) -> Any:
    """The contender of a request, ready to run."""
    if contender["kind"] == "bundle":
        path, backend, batch = Path(contender["path"]), contender["backend"], contender.get("batch", 1)
        return BundleSide(path, backend, batch, record=bool(contender.get("record")))
    mode, padded = contender.get("mode"), bool(contender.get("padded"))
    return TorchSide(Path(contender["path"]), contender["dtype"], contender["device"], mode, padded=padded)


class Worker:
    """Answers requests about one contender."""

    def __init__(self) -> None:
        self._side: Any = None
        self._drawn: dict[Case, Observation] = {}

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What the request asks for; any error goes to the caller."""
        start = time.perf_counter()
        if request["do"] == "open":
            self._side = open_contender(request["contender"])
            return {"seconds": time.perf_counter() - start}
        if request["do"] == "peaks":
            return dict(self._side.peaks())
        return self._run(Case(**request["case"]), request.get("save"))

    def _run(self, case: Case, save: str | None) -> dict[str, Any]:
        if case not in self._drawn:
            self._drawn[case] = draw(self._side.config, case)
        start = time.perf_counter()
        actions, stages = self._side.run(self._drawn[case], case.steps)
        total = 1e3 * (time.perf_counter() - start)
        if save is not None:
            np.save(save, actions)
        return {**stages, "total": total}


def main() -> None:
    """Answer until the input ends. Whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = {"ok": True, **worker.answer(json.loads(line))}
        except Exception as error:  # whatever it is, it is an answer
            answer = {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
