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
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in (".", "export", "runtime")]  # works where nothing is installed

from gpu_inputs import Case, Observation, draw  # noqa: E402


class BundleSide:
    """A bundle on one backend."""

    def __init__(self, path: Path, backend: str, batch: int) -> None:
        if backend == "ort-cuda":
            load_cuda_libraries()
        if batch > 1 and backend in ("trt", "trt-rtx"):
            from ki_runtime.trt.build import BuildOptions, build_bundle

            build_bundle(path, backend, options=BuildOptions(batch=batch))
        from ki_runtime.policy.sampler import Sampler

        self._sampler = Sampler.open(path, backend, build=True)
        self.config = self._sampler.config

    def run(self, observation: Observation, steps: int) -> tuple[np.ndarray, dict[str, float]]:
        """Actions, and the sampler's own times in milliseconds."""
        actions = self._sampler.sample_actions(
            *observation.arrays, state=observation.state, noise=observation.noise, num_steps=steps
        )
        timing = self._sampler.timing
        return actions, {"prefix": timing.prefix / 1e6, "denoise": timing.denoise / 1e6}


def load_cuda_libraries() -> None:
    """CUDA and cuDNN as PyTorch or ONNX Runtime's own packages brought them, so that its CUDA provider loads."""
    with contextlib.suppress(Exception):
        import_module("torch")
    with contextlib.suppress(Exception):
        import_module("onnxruntime").preload_dlls()


def open_contender(contender: Mapping[str, Any]) -> Any:
    """The contender of a request, ready to run."""
    if contender["kind"] == "bundle":
        return BundleSide(Path(contender["path"]), contender["backend"], contender.get("batch", 1))
    from gpu_torch import TorchSide

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
            from gpu_torch import measured_peaks

            return measured_peaks(self._side.device)
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
