"""The real model's widths, two layers deep, one of them hot: to float16, held to the bars, compiled."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from ki_edge.checkpoints import Checkpoint
from ki_edge.model import Observation, load_model
from ki_export.arithmetic.session import arithmetic_sampler
from ki_export.exporter import export
from ki_export.graphs.tracing import quiet
from ki_export.options import ExportOptions
from ki_export.passes.attention import fuse_attention

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "random_checkpoint.py"
DISK = 9_000_000_000  # bytes that checkpoint, bundle and engines take
MEMORY = 9_000_000_000


def observed():
    """One recorded observation of one camera: the range audit takes each through the whole model."""
    rng = np.random.default_rng(3)
    return {
        "image/base_0_rgb": rng.integers(0, 256, (1, 224, 224, 3)).astype(np.uint8),
        "image_mask/base_0_rgb": np.ones(1, bool),
        "tokenized_prompt": rng.integers(2, 4096, (1, 16)).astype(np.int32),
        "tokenized_prompt_mask": np.ones((1, 16), bool),
    }


@pytest.fixture(scope="module")
def hot(tmp_path_factory):
    """The export of 0.6 B parameters (the vocabulary is small) whose first backbone layer leaves float16's range."""
    psutil = pytest.importorskip("psutil")
    folder = tmp_path_factory.mktemp("real")
    free, memory = shutil.disk_usage(folder).free, psutil.virtual_memory().available
    if free < DISK or memory < MEMORY:
        pytest.skip(f"needs {DISK / 1e9:.0f} GB of disk and {MEMORY / 1e9:.0f} GB of memory, there are "
                    f"{free / 1e9:.0f} and {memory / 1e9:.0f}")  # fmt: skip
    spec = importlib.util.spec_from_file_location("random_checkpoint", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.write_checkpoint(folder / "checkpoint", depth=2, vocab=4096, hot=0)
    np.savez(folder / "observed.npz", **observed())
    options = ExportOptions(target="trt-rtx", model_only=True, verify=False, calibrate=folder / "observed.npz")
    yield folder / "checkpoint", export(folder / "checkpoint", folder / "bundle", options)
    shutil.rmtree(folder)


def test_float16_holds_the_bars_at_real_widths(hot):
    path, bundle = hot
    assert bundle.manifest.weights["exponents"]  # it is hot
    model, sampler, rng = load_model(Checkpoint.open(path)), arithmetic_sampler(bundle), np.random.default_rng(5)
    config = model.config
    inputs = (
        rng.integers(0, 256, (1, 1, 224, 224, 3)).astype(np.uint8),
        np.ones((1, 1), bool),
        rng.integers(2, config.vocab_size, (1, 9)),
        np.ones((1, 9), bool),
    )
    noise = rng.standard_normal((1, config.action_horizon, config.action_dim), np.float32)
    with torch.no_grad():
        observation = Observation(*map(torch.from_numpy, inputs))
        expected = model.sample_actions(observation, noise=torch.from_numpy(noise), num_steps=10).numpy()
    given = sampler.sample_actions(*inputs, noise=noise, num_steps=10)
    assert np.abs(given - expected).max() <= 5e-3
    assert np.vdot(given, expected) / (np.linalg.norm(given) * np.linalg.norm(expected)) >= 0.99999


def test_all_graphs_compile_at_real_widths(hot):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed (x86 Linux only)")
    from ki_runtime.trt.build import BuildOptions, build_bundle

    _, bundle = hot
    engines = build_bundle(bundle.path, "trt-rtx", "8.6,12.0", BuildOptions(graphs=tuple(bundle.manifest.graphs)))
    sizes = {graph: engines.path(graph).stat().st_size for graph in engines.of}
    weights = bundle.weights().path.stat().st_size
    assert set(sizes) == {"prefix", "denoise", "fast_decode"}
    assert 0.45 * weights < sizes["prefix"] < weights  # once for both targets, and not in float32


@pytest.mark.parametrize("graph", ["prefix", "denoise", "fast_decode"])
def test_fused_attention_compiles_at_real_widths(hot, tmp_path, graph):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed (x86 Linux only)")
    from ki_runtime.trt.api import Api
    from ki_runtime.trt.compiling import Settings, compile_graph
    from ki_runtime.trt.profiles import profiles

    _, bundle = hot
    model = ir.load(bundle.graph(graph))
    with quiet():
        assert fuse_attention(model) == {"prefix": 4, "denoise": 2, "fast_decode": 2}[graph]
    path = bundle.path / f"{graph}.fused.onnx"  # beside the weights that it points into
    ir.save(model, path)
    settings = Settings(1 << 30, ((8, 6), (12, 0)), False, None)
    log = tmp_path / "log"
    made = compile_graph(Api.load("tensorrt_rtx"), path, profiles(bundle)[graph], tmp_path / "engine", log, settings)
    assert made.size == (tmp_path / "engine").stat().st_size > 10_000_000
