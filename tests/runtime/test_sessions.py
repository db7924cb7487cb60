"""Buffers, bindings and backends: what the seam promises, and ONNX Runtime behind it on graphs of a few nodes."""

import time

import numpy as np
import pytest
from onnx import TensorProto, helper, save

from ki_edge import graphs
from ki_edge.errors import ArgumentError, BackendError, BundleError
from ki_runtime.backends.backend import SessionOptions
from ki_runtime.backends.ort import OrtSession, WeightLayout, load
from ki_runtime.backends.registry import BACKENDS, choose_backend, open_session
from ki_runtime.backends.session import HostBuffer, Storage, shape_of

from .conftest import CONFIG

SIZES = graphs.sizes(CONFIG, 42)
ONNX = {"float32": TensorProto.FLOAT, "bool": TensorProto.BOOL, "uint8": TensorProto.UINT8, "int32": TensorProto.INT32}


def write_graph(path, spec, nodes, constants=(), changes=None):
    """An ONNX file with the tensors of a GraphSpec; `changes` {name: (dtype, dims)} makes some of them wrong."""

    def info(tensor):
        dtype, dims = (changes or {}).get(tensor.name, (tensor.dtype, tensor.resolve(SIZES)))
        return helper.make_tensor_value_info(tensor.name, ONNX[dtype], dims)

    inputs, outputs = ([info(t) for t in tensors] for tensors in (spec.inputs, spec.outputs))
    graph = helper.make_graph(nodes, spec.name, inputs, outputs, list(constants))
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def euler_nodes():
    """x_next = x_t + dt * sum(modulation), and every other input used once with a factor of 0."""
    return [
        helper.make_node("ReduceSum", ["modulation"], ["m"], keepdims=0),
        helper.make_node("Mul", ["m", "dt"], ["step"]),
        helper.make_node("Add", ["x_t", "step"], ["x_next"]),
    ]


@pytest.fixture
def denoise(tmp_path):
    path = write_graph(tmp_path / "denoise.onnx", graphs.DENOISE, euler_nodes())
    return OrtSession(path, graphs.DENOISE, SIZES, SessionOptions(threads=1))


def denoise_buffers(session, batch=1, length=6):
    symbols = {**SIZES, "B": batch, "S": length}
    tensors = (*session.inputs, *session.outputs)
    return {tensor.name: session.allocate(shape_of(tensor, symbols), tensor.dtype) for tensor in tensors}


# ---------------------------------------------------------------- ONNX Runtime


def test_threads_rest_when_a_run_has_ended():
    """They would spin on against those of the next graph: prefix and denoise each have their own."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [400, 400]) for name in "xwy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", tensors[:2], tensors[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = load(model.SerializeToString(), SessionOptions(threads=2), WeightLayout(True, False))
    feeds = dict.fromkeys("xw", np.ones((400, 400), np.float32))
    spent = []
    for _ in range(5):
        session.run(None, feeds)
        before = time.process_time()
        time.sleep(0.1)
        spent.append(time.process_time() - before)
    assert min(spent) < 0.003


def test_bound_outputs_are_the_buffers_themselves(denoise):
    buffers = denoise_buffers(denoise)
    binding = denoise.bind(buffers)
    x = np.arange(30, dtype=np.float32).reshape(1, 5, 6)
    buffers["x_t"].write(x)
    buffers["dt"].write(np.asarray(-0.5, np.float32))
    buffers["modulation"].write(np.full(buffers["modulation"].shape, 0.25, np.float32))
    binding.run()
    shift = -0.5 * 0.25 * np.prod(buffers["modulation"].shape)
    np.testing.assert_array_equal(buffers["x_next"].array, x + np.float32(shift))
    buffers["x_t"].write(x + 1)  # an update in place is seen without binding again
    binding.run()
    np.testing.assert_array_equal(buffers["x_next"].read(), x + 1 + np.float32(shift))


def test_views_share_memory_with_the_engine(denoise):
    large = denoise.allocate((1000,), "float32")
    buffers = {**denoise_buffers(denoise), "x_next": large.view((1, 5, 6))}
    buffers["x_t"].write(np.ones((1, 5, 6), np.float32))
    denoise.bind(buffers).run()
    assert large.read()[:31].tolist() == [1.0] * 30 + [0.0]


def test_bindings_outlive_the_callers_buffers(denoise):
    binding = denoise.bind(denoise_buffers(denoise, batch=3))
    np.full((1 << 16,), 7.0)  # would land in memory that was freed
    binding.run()


def test_run_once(denoise):
    random = np.random.default_rng(0)
    shapes = {t.name: shape_of(t, {**SIZES, "B": 2, "S": 4}) for t in denoise.inputs}
    feeds = {t.name: random.standard_normal(shapes[t.name]).astype(t.dtype) for t in denoise.inputs}
    expected = feeds["x_t"] + feeds["dt"] * feeds["modulation"].sum()
    np.testing.assert_allclose(denoise.run(feeds)["x_next"], expected, rtol=1e-4)
    del feeds["dt"]
    with pytest.raises(ArgumentError, match="input 'dt' is missing"):
        denoise.run(feeds)


def test_run_once_knows_the_length_of_the_prefix(tmp_path):
    nodes = [
        helper.make_node("Cast", ["prompt_mask"], ["text"], to=TensorProto.BOOL),
        helper.make_node("Unsqueeze", ["camera_mask", "one"], ["wide"]),
        helper.make_node("Tile", ["wide", "repeats"], ["tiled"]),
        helper.make_node("Flatten", ["tiled"], ["seen"], axis=1),
        helper.make_node("Concat", ["seen", "text"], ["prefix_mask"], axis=1),
        helper.make_node("Cast", ["prefix_mask"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["values", "axes"], ["column"]),
        helper.make_node("Tile", ["column", "kv"], ["prefix_k"]),
        helper.make_node("Identity", ["prefix_k"], ["prefix_v"]),
    ]
    constants = [
        helper.make_tensor("one", TensorProto.INT64, [1], [2]),
        helper.make_tensor("repeats", TensorProto.INT64, [3], [1, 1, SIZES["P"]]),
        helper.make_tensor("axes", TensorProto.INT64, [3], [0, 2, 4]),
        helper.make_tensor("kv", TensorProto.INT64, [5], [SIZES["L"], 1, 1, 1, SIZES["D"]]),
    ]
    path = write_graph(tmp_path / "prefix.onnx", graphs.PREFIX, nodes, constants)
    session = OrtSession(path, graphs.PREFIX, SIZES, SessionOptions(threads=1))
    feeds = {
        "images": np.zeros((2, 3, 4, 4, 3), np.uint8),
        "camera_mask": np.array([[True, False, True]] * 2),
        "prompt_tokens": np.ones((2, 5), np.int32),
        "prompt_mask": np.arange(5) < np.array([[2], [5]]),
    }
    outputs = session.run(feeds)
    assert outputs["prefix_k"].shape == (2, 2, 1, 3 * SIZES["P"] + 5, 4)
    assert outputs["prefix_mask"].sum(axis=1).tolist() == [2 * SIZES["P"] + 2, 2 * SIZES["P"] + 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_t": ("float32", ["B", 4, 6])}, r"'x_t' is tensor\(float\)\['B', 4, 6\], expected float32\['B', 5, 6\]"),
        ({"prefix_k": ("float32", [2, "B", 1, "S", 8])}, "'prefix_k'"),
        ({"dt": ("float32", [1])}, "'dt'"),
        ({"x_next": ("float32", [1, 5, 6])}, "'x_next'"),  # a batch fixed at 1
        ({"prefix_mask": ("float32", ["B", "S"])}, r"'prefix_mask' is tensor\(float\)"),
    ],
)
def test_a_foreign_graph_is_refused(tmp_path, changes, message):
    nodes = [helper.make_node("Identity", ["x_t"], ["x_next"])]
    path = write_graph(tmp_path / "denoise.onnx", graphs.DENOISE, nodes, changes=changes)
    with pytest.raises(BundleError, match=message):
        OrtSession(path, graphs.DENOISE, SIZES, SessionOptions())


def test_a_graph_of_another_name_is_refused(tmp_path):
    path = write_graph(tmp_path / "denoise.onnx", graphs.DENOISE, euler_nodes())
    with pytest.raises(BundleError, match=r"tensors \['x_t', .* where \['images'"):
        OrtSession(path, graphs.PREFIX, SIZES, SessionOptions())


def test_a_damaged_graph_is_one_line(make_bundle):
    with pytest.raises(BackendError, match=r"cannot load .*denoise\.onnx: .*--verify") as error:
        open_session(make_bundle(), graphs.DENOISE, choose_backend("ort"), SessionOptions())
    assert "\n" not in str(error.value)


def test_open_takes_the_sizes_of_the_manifest(make_bundle, tmp_path):
    bundle = make_bundle()
    write_graph(bundle.graph("denoise"), graphs.DENOISE, euler_nodes())
    session = open_session(bundle, graphs.DENOISE, choose_backend("auto"), SessionOptions())
    assert session.sizes == SIZES


def test_a_failure_of_the_engine_is_a_backend_error(tmp_path):
    nodes = [  # x_t [B, 5, 6] + mask [B, S]: fits only where S is 6 or 1
        helper.make_node("Cast", ["prefix_mask"], ["seen"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x_t", "seen"], ["x_next"]),
    ]
    path = write_graph(tmp_path / "denoise.onnx", graphs.DENOISE, nodes)
    session = OrtSession(path, graphs.DENOISE, SIZES, SessionOptions())
    session.bind(denoise_buffers(session, length=6)).run()
    with pytest.raises(BackendError, match=r"onnxruntime failed in graph denoise: .*") as error:
        session.bind(denoise_buffers(session, length=4)).run()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_threads_must_be_positive(tmp_path, threads):
    path = write_graph(tmp_path / "denoise.onnx", graphs.DENOISE, euler_nodes())
    with pytest.raises(ArgumentError, match="threads"):
        OrtSession(path, graphs.DENOISE, SIZES, SessionOptions(threads=threads))


# ---------------------------------------------------------------- the seam


def test_bind_names_the_tensor(denoise):
    buffers = denoise_buffers(denoise)
    with pytest.raises(ArgumentError, match="no buffer for 'dt'"):
        denoise.bind({name: buffer for name, buffer in buffers.items() if name != "dt"})
    with pytest.raises(ArgumentError, match=r"'prefix_mask' is bool\[1, 7\], expected bool\[1, 6\]"):
        denoise.bind({**buffers, "prefix_mask": denoise.allocate((1, 7), "bool")})
    with pytest.raises(ArgumentError, match="'x_t' is int32"):
        denoise.bind({**buffers, "x_t": denoise.allocate((1, 5, 6), "int32")})
    with pytest.raises(ArgumentError, match=r"'x_next' is float32\[2, 5, 6\], expected float32\[1, 5, 6\]"):
        denoise.bind({**buffers, "x_next": denoise.allocate((2, 5, 6), "float32")})


def test_foreign_buffers_are_refused(denoise):
    class DeviceBuffer:
        shape, dtype = (1, 5, 6), np.dtype("float32")

    with pytest.raises(BackendError, match="cannot bind a DeviceBuffer"):
        denoise.bind({**denoise_buffers(denoise), "x_t": DeviceBuffer()})


def test_host_buffer():
    buffer = HostBuffer(np.zeros((2, 3), np.float32))
    for wrong in (np.zeros((3, 2), np.float32), np.zeros((2, 3), np.float64)):
        with pytest.raises(ArgumentError, match="cannot write"):
            buffer.write(wrong)
    buffer.write(np.ones((2, 3), np.float32))
    copy = buffer.read()
    copy[:] = 5
    assert (buffer.read() == 1).all()


def test_place_writes_where_it_should():
    cache = HostBuffer(np.zeros((1, 1, 1, 6, 2), np.float32))
    cache.place(HostBuffer(np.ones((1, 1, 1, 2, 2), np.float32)), 3)
    assert cache.array[0, 0, 0, :, 0].tolist() == [0, 0, 0, 1, 1, 0]


def test_storage_grows_and_never_shrinks(denoise):
    storage, spec = Storage(denoise), graphs.DENOISE.tensor("prefix_k")
    small = storage.take(spec, {**SIZES, "B": 1, "S": 4})
    assert np.shares_memory(small.array, storage.take(spec, {**SIZES, "B": 1, "S": 3}).array) and storage.growths == 1
    large = storage.take(spec, {**SIZES, "B": 1, "S": 5})
    assert storage.growths == 2 and not np.shares_memory(small.array, large.array)
    assert np.shares_memory(large.array, storage.take(spec, {**SIZES, "B": 1, "S": 4}).array)


def test_backend_that_cannot_be_imported(make_bundle):
    broken = type(BACKENDS[0])("broken", "ki_runtime.no_such_module", ("numpy",), "pip install broken")
    with pytest.raises(BackendError, match=r"'broken' cannot be imported: .*; pip install broken"):
        open_session(make_bundle(), graphs.DENOISE, broken, SessionOptions())
