"""One matrix product of the backbone in every engine that is installed: GFLOP/s, median of several runs.

    python benchmarks/products.py [--rows 542] [--threads N]

[rows, 2048] x [2048, 16384]: the up-projection of one backbone layer. OpenVINO is measured if it is installed
(pip install 'ki-edge[openvino]').
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch

from ki_export.bench.machine import cores, describe
from ki_export.bench.peaks import gemm_run
from ki_export.bench.work import INT8, Product
from ki_runtime.openvino.devices import openvino

K, N, RUNS = 2048, 16384, 9


def rate(run: Callable[[], object], rows: int) -> float:
    """GFLOP/s of a product, by the median of RUNS."""
    run(), run()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 2e-9 * rows * K * N / statistics.median(times)


def openvino_run(rows: int, threads: int, precision: str) -> Callable[[], object]:
    """OpenVINO's CPU plugin with a precision hint."""
    engine = openvino()
    ops = import_module("openvino.opset13")

    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, K), np.float32)
    given = ops.parameter([-1, K], np.float32)
    product = ops.matmul(given, ops.constant(rng.standard_normal((N, K), np.float32)), False, True)
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    compiled = engine.Core().compile_model(engine.Model([product], [given]), "CPU", settings)
    request = compiled.create_infer_request()
    request.set_input_tensor(engine.Tensor(x, shared_memory=True))
    return request.infer


def torch_run(rows: int, dtype: torch.dtype) -> Callable[[], object]:
    """PyTorch's linear layer."""
    x, weight = torch.randn(rows, K).to(dtype), torch.randn(N, K).to(dtype)
    return torch.inference_mode()(lambda: torch.nn.functional.linear(x, weight))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="One matrix product in every engine that is installed.")
    parser.add_argument("--rows", type=int, default=542, help="tokens (%(default)s)")
    parser.add_argument("--threads", type=int, default=cores())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, threads = options.rows, options.threads
    runs = {}
    for kind in ("float32", INT8):
        for packed in (False, True):
            product = Product(kind, rows, K, N)
            runs[f"ONNX Runtime {kind}{', prepacked' if packed else ''}"] = gemm_run(product, threads, packed)
    for dtype in (torch.float32, torch.bfloat16):
        runs[f"PyTorch {str(dtype).removeprefix('torch.')}"] = torch_run(rows, dtype)
    if find_spec("openvino"):
        for precision in ("f32", "bf16"):
            runs[f"OpenVINO {precision}"] = openvino_run(rows, threads, precision)
    print(", ".join(f"{name} {value}" for name, value in describe().items()))
    for name, run in runs.items():
        print(f"{name:32} {rate(run, rows):7.0f} GFLOP/s")


if __name__ == "__main__":
    main()
