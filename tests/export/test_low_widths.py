"""Eight and four bits at the real model's widths, one layer deep: all three graphs compiled, and how large they are.

Weights are made as they are read, so there is no checkpoint on the disk; scales are constants, which cost the same.
"""

import importlib.util
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from ki_edge.bundle import DecodeVocabulary
from ki_edge.checkpoints.layout.keys import parameter_shapes
from ki_edge.checkpoints.layout.source import StoredTensor, TensorSource
from ki_export.graphs.checker import check
from ki_export.graphs.tracing import pack, quiet, trace_all, unpack
from ki_export.passes.low_plan import LowPlan, LowProduct
from ki_export.passes.products import EMBEDDING, matrix_products
from ki_export.precision.decision import Decision, apply, forms
from ki_export.precision.low_models import quantize_models
from ki_export.weights.weights import attach, place_weights, sources
from ki_runtime.trt.profiles import profiles

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "random_checkpoint.py"
VOCABULARY = DecodeVocabulary(2048, 1024)
TARGETS = {"int8": ((8, 6),), "fp8": ((8, 9), (12, 0)), "nvfp4": ((12, 0),)}
BYTES = {"int8": 1.0, "fp8": 1.0, "nvfp4": 0.5625}  # of a parameter, its block's scale included
PIECE = 4_194_319  # a prime number, so that no rows repeat; at least a piece of a source
DISK, MEMORY = 3_000_000_000, 3_000_000_000


class Made(TensorSource):
    """Every tensor of a configuration, cut out of one piece of noise."""

    def __init__(self, config):
        self.tensors = {key: StoredTensor("F32", shape) for key, shape in parameter_shapes(config).items()}
        self.files = ()
        noise = np.random.default_rng(0).standard_normal(PIECE).astype(np.float32)
        self._noise = np.concatenate([noise, noise])

    def rows(self, key, start, stop):
        shape = self.tensors[key].shape
        row, count = int(np.prod(shape[1:])), int(np.prod(shape[1:])) * (stop - start)
        first = (zlib.crc32(key.encode()) + start * row) % PIECE
        values = self._noise[first : first + count] if count <= PIECE else np.resize(self._noise[first:], count)
        return (values * np.float32(row**-0.5)).reshape(stop - start, *shape[1:])


@pytest.fixture(scope="module")
def rtx():
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed (x86 Linux only)")
    from ki_runtime.trt.api import Api

    return Api.load("tensorrt_rtx")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(configuration, packed float32 graphs by name), one layer of the real widths and a small vocabulary."""
    psutil, disk = pytest.importorskip("psutil"), shutil.disk_usage(tmp_path_factory.getbasetemp())
    if disk.free < DISK or psutil.virtual_memory().available < MEMORY:
        pytest.skip(f"needs {DISK / 1e9:.0f} GB of disk and {MEMORY / 1e9:.0f} GB of memory")
    spec = importlib.util.spec_from_file_location("random_checkpoint", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    config = script.geometry(1, 4096)
    return config, {name: pack(model) for name, model in trace_all(config, VOCABULARY, 20).items()}


def low_graphs(kind, config, packed, folder):
    """Write a bundle's graphs and weights: every product low, FAST decoding too; parameters that are low, by graph."""
    models = {name: unpack(data) for name, data in packed.items()}
    with quiet():
        low16 = apply(Decision("fp16"), models)
    stored = forms(Decision("fp16"), low16, {name: sources(model, VOCABULARY) for name, model in models.items()})
    sites = {site.name: site for model in models.values() for site in matrix_products(model.graph)}
    attention = {} if kind == "int8" else {"other": 0.0625}
    products = {
        name: LowProduct(kind, 0.03125) if site.weight is not None else LowProduct("fp8", 0.03125, **attention)
        for name, site in sites.items()
        if name != EMBEDDING and (site.weight is not None or attention)
    }
    with quiet():
        low = quantize_models(models, LowPlan(kind, products, base="fp16", fast=True), {})
    origins = {name: sources(model, VOCABULARY) for name, model in models.items()}
    used = {rows.key for found in origins.values() for rows in found.values()}
    weights = place_weights(SimpleNamespace(source=Made(config), path=folder), folder, used, forms=stored, low=low)
    counts = {}
    for name, model in models.items():
        attach(model, origins[name], weights)
        ir.save(model, folder / f"{name}.onnx")
        check(folder / f"{name}.onnx")
        values = [v for at, v in model.graph.initializers.items() if at.endswith(".values")]
        others = [v for at, v in model.graph.initializers.items() if not at.endswith((".values", ".scales", ".second"))]
        counts[name] = sum(np.prod(v.shape.numpy()) for v in values), sum(v.const_value.nbytes for v in others)
    return counts, weights


@pytest.mark.parametrize("kind", TARGETS)
def test_graphs_compile_and_their_weights_are_small(kind, real, rtx, tmp_path):
    from ki_runtime.trt.compiling import Settings, compile_graph

    config, packed = real
    counts, weights = low_graphs(kind, config, packed, tmp_path)
    entries = weights.index.entries
    low = [key.removesuffix(".values") for key in entries if key.endswith(".values")]
    scales = sum(entries[key + ".scales"].nbytes for key in low) if kind == "nvfp4" else 0
    parameters = sum(np.prod(entries[key + ".values"].shape) * (2 if kind == "nvfp4" else 1) for key in low)
    assert sum(entries[key + ".values"].nbytes for key in low) + scales == BYTES[kind] * parameters > 5e7
    manifest = SimpleNamespace(config=config, contract=None, vocabulary=VOCABULARY, has_fast=True)
    shapes = profiles(manifest)
    for graph in counts if kind == "nvfp4" else ("prefix", "denoise"):  # FAST in low bits is no bundle's default
        low_parameters, other_bytes = counts[graph]
        settings, log = Settings(1 << 30, TARGETS[kind], False, None), tmp_path / "log"
        engine = tmp_path / "engine"
        made = compile_graph(rtx, tmp_path / f"{graph}.onnx", shapes[graph], engine, log, settings)
        wanted = BYTES[kind] * low_parameters + other_bytes
        assert wanted < made.size < 1.1 * wanted + 12e6, f"{graph}: {made.size / 1e6:.1f} MB of {wanted / 1e6:.1f}"
