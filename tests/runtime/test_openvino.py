"""OpenVINO behind the session seam, where it is installed: the shipped policy against ONNX Runtime and its witness.

`make test-openvino` runs these in an environment that has it.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.errors import ArgumentError, BackendError
from ki_edge.overlap import Overlap
from ki_runtime.backends.backend import SessionOptions
from ki_runtime.backends.registry import connect
from ki_runtime.backends.session import shape_of
from ki_runtime.openvino.devices import openvino
from ki_runtime.policy.proof import standing
from ki_runtime.policy.proving import repeat_proof
from ki_runtime.policy.sampler import Sampler

if find_spec("openvino") is None:
    pytest.skip("pip install 'ki-edge[openvino]'", allow_module_level=True)
ov = openvino()
BAR = 2e-5  # that ONNX Runtime is held to
OPTIONS = SessionOptions(threads=1)


@pytest.fixture
def bundle(fetch_bundle, tmp_path):
    """A copy that may be written to."""
    return Bundle.open(shutil.copytree(fetch_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")))


@pytest.fixture(scope="module")
def samplers(fetch_bundle, tmp_path_factory):
    """The same bundle on OpenVINO and on ONNX Runtime."""
    folder = shutil.copytree(fetch_bundle, tmp_path_factory.mktemp("both") / "bundle")
    return tuple(Sampler.open(folder, name, threads=1, say=lambda line: None) for name in ("openvino", "ort"))


def observation(config, batch=1, cameras=2, tokens=9, seed=0):
    random = np.random.default_rng(seed)
    size = config.vision.image_size
    images = random.integers(0, 256, (batch, cameras, size, size, 3), np.uint8)
    mask = np.arange(tokens) < random.integers(1, tokens + 1, (batch, 1))
    return images, np.ones((batch, cameras), np.bool_), random.integers(3, 250, (batch, tokens)), mask


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize(("batch", "cameras", "tokens"), [(1, 2, 9), (1, 1, 1), (3, 2, 40), (2, 1, 17)])
def test_actions_are_those_of_onnxruntime(samplers, batch, cameras, tokens):
    inputs = observation(samplers[0].config, batch, cameras, tokens)
    for steps in (10, 3):
        ours, theirs = (each.sample_actions(*inputs, seed=1, num_steps=steps) for each in samplers)
        assert np.abs(ours - theirs).max() <= BAR
    trace, other = (each.trace(*inputs, seed=1) for each in samplers)
    np.testing.assert_allclose(trace.prefix_k, other.prefix_k, atol=BAR * max(1, np.abs(other.prefix_k).max()))
    np.testing.assert_array_equal(trace.prefix_mask, other.prefix_mask)
    assert np.abs(trace.x - other.x).max() <= BAR


def test_chunks_that_continue_the_one_before(samplers):
    sampler, other = samplers
    inputs, config = observation(sampler.config), sampler.config
    previous = sampler.sample_actions(*inputs, seed=1)
    weights = np.linspace(1, 0, config.action_horizon, dtype=np.float32)[None]
    overlap = Overlap(previous, weights, np.zeros(weights.shape, np.bool_))
    ours, theirs = (each.sample_actions(*inputs, seed=2, overlap=overlap) for each in (sampler, other))
    assert np.abs(ours - theirs).max() <= BAR
    assert np.abs(ours - sampler.sample_actions(*inputs, seed=2)).max() > 1e-3


def test_fast_tokens_are_those_of_onnxruntime(samplers):
    inputs = observation(samplers[0].config, batch=2)
    ours, theirs = (each.sample_fast_tokens(*inputs, max_tokens=12, forced=(3, 5)) for each in samplers)
    np.testing.assert_array_equal(ours, theirs)


def test_words_are_those_of_onnxruntime(words_bundle, tmp_path):
    folder = shutil.copytree(words_bundle, tmp_path / "words")
    found = []
    for name in ("openvino", "ort"):
        sampler = Sampler.open(folder, name, threads=1, say=lambda line: None)
        inputs = observation(sampler.config)
        found.append(sampler.sample_text_tokens(*inputs, allowed=range(200), eos_id=1, max_tokens=8))
    np.testing.assert_array_equal(*found)


# ---------------------------------------------------------------- memory


def test_tensors_lie_over_the_buffers(bundle):
    """No copy on the way in or out: the engine holds the very addresses, and steps update them in place."""
    opened = connect(bundle, "openvino", OPTIONS).open
    session = opened(graphs.specs(bundle.manifest.config)[1])
    symbols = {**session.sizes, "B": 1, "S": 40}
    tensors = (*session.inputs, *session.outputs)
    buffers = {tensor.name: session.allocate(shape_of(tensor, symbols), tensor.dtype) for tensor in tensors}
    large = session.allocate((1000,), "float32")
    buffers["x_next"] = large.view(buffers["x_t"].shape)
    buffers["prefix_mask"].array[...] = True
    buffers["x_t"].array[...] = 1.0
    binding = session.bind(buffers)
    binding.run()
    held = {name: session._request.get_tensor(port).data.ctypes.data for name, port in session._ports.items()}
    assert held == {name: buffer.array.ctypes.data for name, buffer in buffers.items()}
    first = buffers["x_next"].read()
    assert np.abs(first).max() > 0 and not large.array[first.size :].any()
    buffers["x_t"].array[...] = 2.0  # seen without binding again
    binding.run()
    assert np.abs(buffers["x_next"].read() - first).max() > 0.5


def test_one_request_serves_many_shapes_in_turn(samplers):
    sampler = samplers[0]
    for seed, (cameras, tokens) in enumerate([(2, 30), (1, 3), (2, 31), (1, 3), (2, 30)]):
        inputs = observation(sampler.config, 1, cameras, tokens, seed)
        ours, theirs = (each.sample_actions(*inputs, seed=seed) for each in samplers)
        assert np.abs(ours - theirs).max() <= BAR


def test_a_foreign_buffer_and_a_failing_run_are_told_in_one_line(bundle):
    session = connect(bundle, "openvino", OPTIONS).open(graphs.specs(bundle.manifest.config)[0])

    class Foreign:
        def __init__(self, buffer):
            self.shape, self.dtype = buffer.shape, buffer.dtype

    symbols = {**session.sizes, "B": 1, "N": 1, "T": 4, "S": session.sizes["P"] + 4}
    tensors = (*session.inputs, *session.outputs)
    buffers = {tensor.name: session.allocate(shape_of(tensor, symbols), tensor.dtype) for tensor in tensors}
    with pytest.raises(ArgumentError, match="cannot bind a Foreign"):
        session.bind({**buffers, "images": Foreign(buffers["images"])})
    wrong = [(session._ports["images"], ov.Tensor(np.zeros((1, 2), np.uint8)))]
    with pytest.raises(BackendError, match=r"^OpenVINO failed in graph prefix: .+") as caught:
        session.infer(wrong)
    assert "\n" not in str(caught.value)
    session.bind(buffers).run()  # and it goes on


# ---------------------------------------------------------------- devices and arithmetic


def test_float32_is_asked_for_and_never_less(bundle):
    session = connect(bundle, "openvino", OPTIONS).open(graphs.specs(bundle.manifest.config)[0])
    assert session._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert session._compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_products_of_tensorrts_engines_are_refused(bundle):
    """It would take them, and compute what nobody has proven, where a GPU was meant."""
    for precision in ("int8_static", "float8", "nvfp4"):
        low = replace(bundle, manifest=replace(bundle.manifest, precision=precision))
        with pytest.raises(BackendError, match=f"precision {precision} is for TensorRT's engines"):
            connect(low, "openvino")


def test_a_device_that_is_absent_is_told_with_those_there(bundle):
    there = ov.Core().available_devices
    missing = next(name for name in ("NPU", "GPU.7") if name not in there)
    with pytest.raises(BackendError, match=f"finds no {missing} here, only .*{there[0]}"):
        connect(bundle, f"openvino:{missing}")


def test_bfloat16_is_computed_where_the_cpu_has_it_and_else_refused(bundle):
    name = "openvino:CPU:bf16"
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(BackendError, match="has no bfloat16 arithmetic, only float32"):
            connect(bundle, name)
        return
    lines = []
    sampler = Sampler.open(bundle.path, name, threads=1, say=lines.append)
    exact = Sampler.open(bundle.path, "ort", threads=1, say=lines.append)
    inputs = observation(sampler.config)
    error = np.abs(sampler.sample_actions(*inputs, seed=1) - exact.sample_actions(*inputs, seed=1)).max()
    assert 1e-5 < error < 5e-2
    assert "openvino:CPU:bf16 (CPU, bfloat16)" in " ".join(lines)


# ---------------------------------------------------------------- proof and cache


def test_the_witness_proves_it_before_its_first_action(bundle):
    assert standing(bundle, "openvino").proven is None
    lines = []
    sampler = Sampler.open(bundle.path, "openvino", threads=1, say=lines.append)
    assert lines[0] == "openvino: runs the bundle's witness, once, before its first action"
    assert lines[-1].startswith("backend: openvino (CPU, float32); proven here on ")
    sampler.sample_fast_tokens(*observation(sampler.config), max_tokens=1, forced=(3,))
    record = next((bundle.path / "engines" / "openvino").glob("proof-*.json")).read_text()
    for fact in ('"openvino": "', '"device": "', '"processor": "', '"arithmetic": "float32"', '"compiled prefix": "'):
        assert fact in record
    assert [verdict.passed for verdict in repeat_proof(bundle, "openvino", lines.append)] == [True, True]
    lines.clear()
    Sampler.open(bundle.path, "openvino", threads=1, say=lines.append)
    assert len(lines) == 1  # nothing is proven again
    found = standing(bundle, "openvino")  # and whoever asks without opening it finds the verdict
    assert found.proven and found.text.startswith("proven here on ") and found.text.endswith("; FAST tokens too")


def test_a_damaged_compiled_graph_is_compiled_anew(bundle):
    folder = bundle.path / "engines" / "openvino"
    Sampler.open(bundle.path, "openvino", threads=1, say=lambda line: None)
    (kept,) = folder.glob("prefix-*.blob")
    good = kept.read_bytes()
    for bad in (b"", good[: len(good) // 2], b"\x00" * 100):
        kept.write_bytes(bad)
        Sampler.open(bundle.path, "openvino", threads=1, say=lambda line: None)
        assert kept.read_bytes()[:64] == good[:64]


def test_another_compiled_graph_is_proven_again(bundle):
    """The proof is about the bytes that run: what somebody put in their place must pass it too."""
    folder = bundle.path / "engines" / "openvino"
    lines = []
    Sampler.open(bundle.path, "openvino", threads=1, say=lines.append)
    (kept,) = folder.glob("denoise-*.blob")
    old = kept.read_bytes()
    kept.write_bytes(old + b"\n")  # the engine reads no further than its graph
    assert standing(bundle, "openvino").proven is None
    Sampler.open(bundle.path, "openvino", threads=1, say=lines.append)
    assert sum("runs the bundle's witness" in line for line in lines) == (1 if kept.read_bytes() == old else 2)
    assert standing(bundle, "openvino").proven


def test_a_compiled_graph_that_came_with_the_bundle_is_not_read(bundle, tmp_path, monkeypatch):
    """It would be parsed before anything is proven, and a bundle is copied from anywhere."""
    Sampler.open(bundle.path, "openvino", threads=1, say=lambda line: None)
    (kept,) = (bundle.path / "engines" / "openvino").glob("prefix-*.blob")
    before = kept.stat().st_mtime_ns
    Sampler.open(bundle.path, "openvino", threads=1, say=lambda line: None)
    assert kept.stat().st_mtime_ns == before
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    Sampler.open(bundle.path, "openvino", threads=1, say=lambda line: None)
    assert kept.stat().st_mtime_ns > before


def test_a_bundle_that_cannot_be_written_is_cached_for_the_user(bundle, tmp_path, monkeypatch):
    (bundle.path / "engines").write_text("in the way")  # as good as read-only, also for root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Sampler.open(bundle.path, "openvino", threads=1, say=lambda line: None)
    names = {path.suffix for path in (tmp_path / "cache" / "ki-edge" / "proofs").iterdir()}
    assert names == {".blob", ".json"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(bundle.path / "engines"))  # nothing can be written anywhere
    lines = []
    sampler = Sampler.open(bundle.path, "openvino", threads=1, say=lines.append)
    assert sampler.sample_actions(*observation(sampler.config), seed=0).shape[0] == 1


@pytest.mark.parametrize(
    "used",
    [
        "from ki_runtime.openvino.devices import devices, openvino; print(devices(openvino().Core())[0].name)",
        "from ki_runtime.doctor.cli import main; main([]); print('CPU' if 'openvino' in sys.modules else '')",
    ],
)
def test_it_reports_to_nobody(used, tmp_path):
    """Neither the engine nor the package openvino-telemetry, which it imports, opens a connection or leaves a file."""
    code = f"""
import sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        print("OPENED", event, arguments[:1], file=sys.stderr)
sys.addaudithook(watch)
{used}
"""
    of_ci = ("CI", "TF_BUILD", "JENKINS_URL")  # where they are set the package says nothing by itself
    home = {**{name: value for name, value in os.environ.items() if name not in of_ci}, "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, env=home
    )
    assert done.stdout.splitlines()[-1] == "CPU"
    assert "OPENED" not in done.stderr and not (tmp_path / "intel").exists()
