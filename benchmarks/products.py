"""One matrix product in every engine that is installed: GFLOP/s, median of several runs.

    python benchmarks/products.py [--shape 542x2048x16384] [--threads N]
    python benchmarks/products.py --shape 50x1024x4096 --weights 16 --kinds int8

[m, k] x [k, n]: the up-projection of one backbone layer by default. With --weights so many products of the same shape
run one after the other, each with weights of its own, so that these come from memory as they do in a model. OpenVINO is
measured if it is installed (pip install 'ki-edge[openvino]').
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

RUNS = 15
Shape = tuple[int, int, int]
Run = Callable[[], object]


def rate(runs: list[Run], shape: Shape) -> float:
    """GFLOP/s of products that run in turn, by the median of RUNS rounds."""
    times = []
    for _ in range(RUNS + 2):
        start = time.perf_counter()
        for run in runs:
            run()
        times.append(time.perf_counter() - start)
    return 2e-9 * float(np.prod(shape)) * len(runs) / statistics.median(times[2:])


def openvino_run(shape: Shape, threads: int, precision: str) -> Run:
    """OpenVINO's CPU plugin with a precision hint."""
    engine, (m, k, n) = openvino(), shape
    ops = import_module("openvino.opset13")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((m, k), np.float32)
    given = ops.parameter([-1, k], np.float32)
    product = ops.matmul(given, ops.constant(rng.standard_normal((n, k), np.float32)), False, True)
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    compiled = engine.Core().compile_model(engine.Model([product], [given]), "CPU", settings)
    request = compiled.create_infer_request()
    request.set_input_tensor(engine.Tensor(x, shared_memory=True))
    return request.infer


def torch_run(shape: Shape, dtype: torch.dtype) -> Run:
    """PyTorch's linear layer."""
    m, k, n = shape
    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    return torch.inference_mode()(lambda: torch.nn.functional.linear(x, weight))


def makers(shape: Shape, threads: int) -> dict[str, Callable[[], Run]]:
    """Engine and kind of product -> what makes a run with weights of its own."""
    found: dict[str, Callable[[], Run]] = {}
    for kind in ("float32", INT8):
        for packed in (False, True):
            name = f"ONNX Runtime {kind}{', prepacked' if packed else ''}"
            found[name] = lambda kind=kind, packed=packed: gemm_run(Product(kind, *shape), threads, packed)
    for dtype in (torch.float32, torch.bfloat16):
        found[f"PyTorch {str(dtype).removeprefix('torch.')}"] = lambda dtype=dtype: torch_run(shape, dtype)
    for precision in ("f32", "bf16") if find_spec("openvino") else ():
        found[f"OpenVINO {precision}"] = lambda precision=precision: openvino_run(shape, threads, precision)
    return found


def _shape(text: str) -> Shape:
    m, k, n = (int(size) for size in text.split("x"))
    return m, k, n


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="One matrix product in every engine that is installed.")
    parser.add_argument("--shape", type=_shape, nargs="+", default=[(542, 2048, 16384)], metavar="MxKxN")
    parser.add_argument("--weights", type=int, default=1, metavar="N", help="products in turn (%(default)s)")
    parser.add_argument("--kinds", default="", metavar="TEXT", help="only names that hold this")
    parser.add_argument("--threads", type=int, default=cores())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(", ".join(f"{name} {value}" for name, value in describe().items()))
    for shape in options.shape:
        print(f"{'x'.join(map(str, shape))}, {options.weights} in turn")
        for name, make in makers(shape, options.threads).items():
            if options.kinds in name:
                runs = [make() for _ in range(options.weights)]
                print(f"{name:32} {rate(runs, shape):7.0f} GFLOP/s")


if __name__ == "__main__":
    main()
