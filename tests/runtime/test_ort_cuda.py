"""The CUDA backend of ONNX Runtime, run by its CPU provider over fake device memory, which is the host's."""

import numpy as np
import onnx
import pytest

from ki_edge import graphs
from ki_edge.errors import BackendError, BundleError, DeviceError, DeviceMemoryError
from ki_runtime.backends.backend import SessionOptions
from ki_runtime.backends.ort import OrtSession, onnxruntime
from ki_runtime.backends.session import Sequential, shape_of
from ki_runtime.gpu import cuda
from ki_runtime.gpu.buffers import Gpu
from ki_runtime.gpu.cuda import Cuda
from ki_runtime.gpu.ort_cuda import TRIAL, OrtCudaSession, check_placement, connect, obstacle, start

from .fake_gpu import FakeCuda
from .test_sessions import SIZES, euler_nodes, write_graph


class OnCpu(OrtCudaSession):
    """The same session with the provider that exists here. It computes at once, so copies must be done before."""

    provider, device = "CPUExecutionProvider", "cpu"


@pytest.fixture
def gpu():
    return Gpu(Cuda(FakeCuda()))


@pytest.fixture
def path(tmp_path):
    return write_graph(tmp_path / "denoise.onnx", graphs.DENOISE, euler_nodes())


def buffers_of(session, batch=1, length=6):
    symbols = {**SIZES, "B": batch, "S": length}
    return {t.name: session.allocate(shape_of(t, symbols), t.dtype) for t in (*session.inputs, *session.outputs)}


@pytest.mark.parametrize("record", [None, True])
def test_runs_over_device_addresses(path, gpu, record):
    session = OnCpu(path, graphs.DENOISE, SIZES, gpu, SessionOptions(record=record))
    host = OrtSession(path, graphs.DENOISE, SIZES, SessionOptions(threads=1))
    buffers, theirs = buffers_of(session), buffers_of(host)
    binding, expected = session.bind(buffers), host.bind(theirs)
    for seed in range(3):
        for name in ("x_t", "modulation", "dt"):
            value = np.random.default_rng(seed).standard_normal(buffers[name].shape).astype(np.float32)
            buffers[name].write(value)
            theirs[name].write(value)
        gpu.synchronize()
        binding.run()
        expected.run()
        np.testing.assert_array_equal(buffers["x_next"].read(), theirs["x_next"].read())


def test_a_loop_swaps_two_views_of_one_block(path, gpu):
    session = OnCpu(path, graphs.DENOISE, SIZES, gpu, SessionOptions())
    common = buffers_of(session)
    even, odd = (session.allocate((64,), "float32").view((1, 5, 6)) for _ in range(2))
    common["modulation"].write(np.ones(common["modulation"].shape, np.float32))
    common["dt"].write(np.float32(0.5).reshape(()))
    gpu.synchronize()
    steps = [session.bind({**common, "x_t": x, "x_next": y}) for x, y in ((even, odd), (odd, even), (even, odd))]
    sequence = session.sequence(steps)
    assert isinstance(sequence, Sequential)
    sequence.run()
    shift = 1.5 * common["modulation"].read().size
    np.testing.assert_allclose(odd.read(), np.full((1, 5, 6), shift, np.float32))


def test_the_options_that_are_asked_for(path, gpu, monkeypatch):
    """Names as ONNX Runtime's CUDA provider knows them; true float32, our stream, one graph for each binding."""
    asked = []

    def session(model, options, providers):
        asked.append((model, providers))
        raise RuntimeError("seen")

    monkeypatch.setattr(onnxruntime(), "InferenceSession", session)
    for record in (False, True):
        with pytest.raises(BackendError, match=r"cannot load .*denoise\.onnx on the GPU: seen"):
            start(path, gpu, record=record)
    (_, [(name, facts), fallback]), (_, [(_, recorded), _]) = asked
    assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert facts["use_tf32"] == "0" and facts["user_compute_stream"] == str(gpu.stream)
    assert (facts["enable_cuda_graph"], recorded["enable_cuda_graph"]) == ("0", "1")


def test_the_trial_graph_is_a_model(gpu):
    onnx.checker.check_model(onnx.load_from_string(TRIAL))
    start(TRIAL, gpu, record=False, provider="CPUExecutionProvider")


def test_a_provider_that_does_not_start(gpu):
    with pytest.raises(BackendError, match=r"does not start its CUDA provider here: CUDA 12\.x or cuDNN 9 is missing"):
        start(TRIAL, gpu, record=False)


def test_nothing_that_computes_is_left_to_the_cpu(tmp_path):
    ort = onnxruntime()
    helper = onnx.helper
    nodes = [helper.make_node("MatMul", ["a", "a"], ["b"]), helper.make_node("Shape", ["b"], ["s"])]
    info = helper.make_tensor_value_info
    outputs = [info("b", 1, ["n", "n"]), info("s", 7, [2])]
    graph = helper.make_graph(nodes, "g", [info("a", 1, ["n", "n"])], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="m: onnxruntime's CUDA provider leaves MatMul to the CPU"):
        check_placement(session, "CUDAExecutionProvider", "m")
    check_placement(session, "CPUExecutionProvider", "m")
    check_placement(object(), "CUDAExecutionProvider", "m")  # too old to tell


def test_a_foreign_graph_is_refused(tmp_path, gpu):
    path = write_graph(tmp_path / "d.onnx", graphs.DENOISE, euler_nodes(), changes={"x_t": ("float32", ["B", 4, 6])})
    with pytest.raises(BundleError, match="'x_t'"):
        OnCpu(path, graphs.DENOISE, SIZES, gpu, SessionOptions())


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (700, "CUDA failure 700", DeviceError),
        (0, "Failed to allocate memory for requested buffer of size 99", DeviceMemoryError),
        (0, "Non-zero status code\nmore", BackendError),
    ],
)
def test_a_run_that_fails(path, status, text, kind):
    runtime = FakeCuda()
    session = OnCpu(path, graphs.DENOISE, SIZES, Gpu(Cuda(runtime)), SessionOptions())
    binding = session.bind(buffers_of(session))

    class Broken:
        def run_with_iobinding(self, *_):
            raise RuntimeError(text)

    binding._session = Broken()
    runtime.fail["cudaGetLastError"] = status
    with pytest.raises(kind) as error:
        binding.run()
    assert type(error.value) is kind and "\n" not in str(error.value)


def test_obstacles(make_bundle, monkeypatch):
    bundle = make_bundle()
    assert obstacle(bundle, "onnxruntime").startswith("onnxruntime has no CUDA provider")
    monkeypatch.setattr(onnxruntime(), "get_available_providers", lambda: ["CUDAExecutionProvider"])
    runtime = FakeCuda()
    monkeypatch.setattr(cuda, "import_module", lambda name: runtime)
    assert obstacle(bundle, "onnxruntime") is None
    assert "int8 is for the CPU" in obstacle(make_bundle("int8", precision="int8"), "onnxruntime")
    runtime.capability = (7, 5)
    assert "bfloat16 needs" in obstacle(make_bundle("bf16", precision="bfloat16"), "onnxruntime")
    runtime.fail["cudaGetDeviceCount"] = 100
    assert obstacle(bundle, "onnxruntime").startswith("no usable GPU")
    with pytest.raises(BackendError, match="does not start its CUDA provider"):
        connect(bundle, "onnxruntime", SessionOptions())
