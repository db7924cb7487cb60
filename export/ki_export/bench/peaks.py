"""What this machine can do at most: matrix products in the engine in use, and reading memory.

Products are one-node graphs through the same ONNX Runtime with the same threads, at the shapes of the bundle's own
biggest ones, their weights both as they lie in the file and prepacked; the fastest of all is the peak. Bandwidth is
that of the fastest of three ways to read 512 MB with all threads: numpy's max and a product with a vector, an equal
part for each thread, and the engine's own product of one row.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from ki_runtime.backends.ort import cpu_options, onnxruntime

from .rounds import Contender, Samples
from .work import INT8, Product, Work

SHAPES = 2  # the biggest ones of each kind
LONG, MOST_REPEATS = 40_000_000_000, 8  # operations that are timed together, and products at most
MAX_WEIGHTS = 1 << 28  # elements
ARRAY_BYTES = 1 << 29
WIDTH = 4096  # numbers in a row of what is read
IR_VERSION, OPSET = 9, 20
TIME = "run"
READERS = ("reading max", "reading product", "reading row")
RunOnce = Callable[[], object]


@dataclass(frozen=True)
class GemmRate:
    """Measured rate of one product: p50 in GFLOP/s (GOP/s for int8)."""

    product: Product
    prepacked: bool
    gflops: float


@dataclass(frozen=True)
class Peaks:
    """The limits of this machine. `gflops` by kind of product, `bandwidth` in GB/s."""

    gflops: Mapping[str, float]
    bandwidth: float
    measured: tuple[GemmRate, ...]

    def limit_ms(self, flops: Mapping[str, int], nbytes: int) -> tuple[float, str]:
        """The least time for this work, in milliseconds, and what sets it: "compute" or "memory"."""
        compute = sum(count / (1e6 * self.gflops[kind]) for kind, count in flops.items())
        memory = nbytes / (1e6 * self.bandwidth)
        return max(compute, memory), "compute" if compute >= memory else "memory"


def biggest(works: Iterable[Work]) -> list[Product]:
    """The products that most operations go into, some of each kind that occurs."""
    total: Counter[Product] = Counter()
    for work in works:
        for product, times in work.products.items():
            if product.k * product.n <= MAX_WEIGHTS:
                total[replace(product, batch=1)] += times * product.flops
    kinds = sorted({product.kind for product in total})
    return [p for kind in kinds for p in [p for p, _ in total.most_common() if p.kind == kind][:SHAPES]]


class PeakContenders:
    """What to measure for the peaks, by name, and how to read the result."""

    def __init__(self, products: Iterable[Product], threads: int) -> None:
        self._threads = threads
        self._gemms = {
            f"gemm {p.kind} {p.m}x{p.k}x{p.n}{' prepacked' if packed else ''}": (p, packed)
            for p in products
            for packed in (False, True)
        }

    def contenders(self) -> dict[str, Contender]:
        """One for each product and layout, and one for the memory."""
        found = {
            name: _timed(gemm_run(p, self._threads, packed), _repeats(p)) for name, (p, packed) in self._gemms.items()
        }
        return {**found, **{name: _timed(run) for name, run in _readers(self._threads).items()}}

    def peaks(self, samples: Mapping[str, Samples]) -> Peaks:
        """The fastest of each kind."""
        rates = tuple(
            GemmRate(product, packed, product.flops / (1e6 * samples[name].p50(TIME)))
            for name, (product, packed) in self._gemms.items()
        )
        gflops = {
            kind: max(rate.gflops for rate in rates if rate.product.kind == kind)
            for kind in {rate.product.kind for rate in rates}
        }
        fastest = min(samples[name].p50(TIME) for name in READERS)
        return Peaks(gflops, ARRAY_BYTES / (1e6 * fastest), rates)


def gemm_run(product: Product, threads: int, prepacked: bool) -> RunOnce:
    """A one-node graph of this product, bound to its memory."""
    ort: Any = onnxruntime()
    options = cpu_options(packed=prepacked)
    options.intra_op_num_threads = threads
    model, x, y = _model(product)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(y))
    arrays = (x, y)  # the binding points into them

    def run() -> object:
        session.run_with_iobinding(binding)
        return arrays

    return run


def _model(product: Product) -> tuple[onnx.ModelProto, npt.NDArray[Any], npt.NDArray[Any]]:
    """(graph y = x times constant weights, x, memory of y). What is not int8 is float32, as this engine computes it."""
    rng = np.random.default_rng(0)
    m, k, n = product.m, product.k, product.n
    if product.kind == INT8:
        x = rng.integers(0, 256, (m, k)).astype(np.uint8)
        weights = [
            numpy_helper.from_array(rng.integers(-127, 128, (k, n)).astype(np.int8), "w"),
            numpy_helper.from_array(np.array(128, np.uint8), "zero"),
        ]
        node = helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"])
        kinds, y = (TensorProto.UINT8, TensorProto.INT32), np.zeros((m, n), np.int32)
        return _wrap(node, weights, product, kinds), x, y
    values = rng.standard_normal((m, k), np.float32)
    weights = [numpy_helper.from_array(rng.standard_normal((n, k), np.float32), "w")]
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT)
    return _wrap(node, weights, product, kinds), values, np.zeros((m, n), np.float32)


def _wrap(
    node: onnx.NodeProto, weights: list[TensorProto], product: Product, kinds: tuple[int, int]
) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", kinds[0], [product.m, product.k])
    y = helper.make_tensor_value_info("y", kinds[1], [product.m, product.n])
    graph = helper.make_graph([node], "product", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _readers(threads: int) -> dict[str, RunOnce]:
    """Ways to read ARRAY_BYTES once, by READERS."""
    rows = np.array_split(np.ones((ARRAY_BYTES // (4 * WIDTH), WIDTH), np.float32), threads)
    vector, pool = np.ones(WIDTH, np.float32), ThreadPoolExecutor(threads)
    row = Product("float32", 1, WIDTH, ARRAY_BYTES // (4 * WIDTH))
    runs: list[RunOnce] = [
        lambda: list(pool.map(np.max, rows)),
        lambda: list(pool.map(lambda part: part @ vector, rows)),
        gemm_run(row, threads, prepacked=False),
    ]
    return dict(zip(READERS, runs, strict=True))


def _repeats(product: Product) -> int:
    """How often in a row: what ran before a short one took the cache from it, which is no limit of the machine."""
    return int(min(MOST_REPEATS, max(1, LONG // product.flops)))


def _timed(run: RunOnce, repeats: int = 1) -> Contender:
    def timed() -> dict[str, float]:
        if repeats > 1:
            run()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return {TIME: 1e3 * (time.perf_counter() - start) / repeats}

    return timed
