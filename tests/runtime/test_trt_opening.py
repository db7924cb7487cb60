"""Whether TensorRT can run a bundle here, and that the names it is called by exist."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from ki_edge import graphs
from ki_edge.errors import BackendError
from ki_runtime.backends.backend import SessionOptions
from ki_runtime.gpu.cuda import Cuda
from ki_runtime.gpu.device import Device
from ki_runtime.trt import bindings, contexts, session
from ki_runtime.trt.engines import ACTING, FAST
from ki_runtime.trt.session import obstacle

from .fake_cuda import FakeCuda
from .published import publish


@pytest.fixture
def here(monkeypatch):
    """A machine with a GPU; here(can_build, capability)."""
    cuda = FakeCuda()

    def make(capability=(8, 7), **changes):
        cuda.capability = capability
        api = SimpleNamespace(**{"can_build": True, "is_rtx": False, **changes})
        monkeypatch.setattr(session.Cuda, "load", classmethod(lambda cls: Cuda(cuda)))
        monkeypatch.setattr(session.Api, "load", classmethod(lambda cls, name: api))
        return cuda

    return make


def test_engines_that_can_be_built_are_no_obstacle(here, make_bundle):
    here()
    assert obstacle(make_bundle(), "tensorrt") is None


def test_rtx_has_engines_for_some_gpus_alone(here, make_bundle):
    """As an H100 told: it is Hopper, and TensorRT-RTX 1.7 compiles for GeForce, RTX and Ampere."""
    rtx = {"is_rtx": True, "title": "TensorRT-RTX 1.7.1", "capabilities": ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))}
    here((9, 0), **rtx)
    told = obstacle(make_bundle(), "tensorrt_rtx")
    assert told.startswith("TensorRT-RTX 1.7.1 cannot compile for compute capability 9.0, only for 8.0, 8.6, 8.9, ")
    assert told.endswith("for other GPUs use TensorRT itself, or onnxruntime-gpu")
    assert obstacle(None, "tensorrt_rtx") == told
    here((8, 9), **rtx)
    assert obstacle(None, "tensorrt_rtx") is None


def test_the_lean_runtime_needs_engines(here, make_bundle, monkeypatch):
    here(can_build=False, name="tensorrt_lean", version_text="10.3.0", is_rtx=False, is_lean=True, version=(10, 3))
    assert re.search("has no TensorRT engines.*ki-build", obstacle(make_bundle(), "tensorrt_lean"))
    assert "--lean (run where tensorrt is installed)" in obstacle(make_bundle("other"), "tensorrt_lean")
    assert obstacle(None, "tensorrt_lean") is None


@pytest.mark.parametrize("verify", [False, True])
def test_verifying_reaches_the_engines(here, make_bundle, monkeypatch, verify):
    asked = []

    def ensure(*arguments, verify, trust):
        asked.append((verify, trust))
        raise BackendError("enough")

    here()
    for build, name in ((True, "ensure_engines"), (False, "find")):
        monkeypatch.setattr(session, name, ensure)
        with pytest.raises(BackendError, match="enough"):
            session.connect(make_bundle(name), "tensorrt", SessionOptions(verify=verify, trust=verify, build=build))
    assert asked == [(verify, verify)] * 2


def test_nothing_is_built_unasked(here, make_bundle, monkeypatch):
    here(name="tensorrt", version_text="10.3.0", is_rtx=False, is_lean=False, version=(10, 3))
    monkeypatch.setattr(session, "ensure_engines", None)
    monkeypatch.setattr(session, "rebuild", None)
    bundle = make_bundle()
    with pytest.raises(BackendError) as error:
        session.connect(bundle, "tensorrt", SessionOptions())
    assert str(error.value) == (
        f"{bundle.path} has no TensorRT engines; build them here: ki-build {bundle.path}, or open it with build=True"
    )


def test_fast_without_an_engine_is_one_line(here, make_bundle, monkeypatch):
    """The others come from their folder, and are not asked for again."""
    here(
        name="tensorrt",
        version_text="10.3.0",
        is_rtx=False,
        is_lean=False,
        version=(10, 3),
        logger=lambda sink: None,
        title="TensorRT",
    )
    bundle = make_bundle()
    made = publish(bundle, device=Device("Orin", (8, 7)), graphs=ACTING)
    loaded = []
    monkeypatch.setattr(session.Connection, "_load", lambda self, path, lean: loaded.append(path))
    open_graph = session.connect(bundle, "tensorrt", SessionOptions())
    for spec in (graphs.PREFIX, graphs.DENOISE):
        with pytest.raises(BackendError, match="cannot load"):  # only reached
            open_graph(spec)
    assert loaded == [made.path(name) for name in ACTING]
    with pytest.raises(BackendError, match=r"has no TensorRT engine of fast_decode; .* --graphs fast_decode$"):
        open_graph(graphs.FAST_DECODE)
    publish(bundle, device=Device("Orin", (8, 7)), graphs=(FAST,))  # built meanwhile
    with pytest.raises(BackendError, match=r"cannot load .*fast_decode"):
        open_graph(graphs.FAST_DECODE)


@pytest.mark.parametrize(
    ("precision", "capability", "message"),
    [("int8", (8, 7), "int8 is for the CPU"), ("bfloat16", (7, 5), r"bfloat16 needs compute capability 8\.0")],
)
def test_precisions_that_cannot_run(here, make_bundle, precision, capability, message):
    here(capability)
    assert re.search(message, obstacle(make_bundle(precision=precision), "tensorrt"))


def test_no_gpu_is_told_before_tensorrt_is_imported(here, monkeypatch):
    cuda = here()
    cuda.fail["cudaGetDeviceCount"] = 100
    monkeypatch.setattr(session.Api, "load", None)
    assert obstacle(None, "tensorrt").startswith("no usable GPU")


CLASSES = {"context": "IExecutionContext", "engine": "ICudaEngine", "runtime": "Runtime", "config": "IRuntimeConfig"}
RTX_ONLY = {"create_runtime_cache", "set_runtime_cache", "cuda_graph_strategy", "is_stream_capturable"}
RTX_ONLY |= {"dynamic_shapes_kernel_specialization_strategy"}


def used_names():
    """{class: names} of TensorRT that the session's source uses."""
    source = "".join(Path(module.__file__).read_text() for module in (session, bindings, contexts))
    found = {kind: set(re.findall(rf"\b_?{kind}\.(\w+)", source)) for kind in CLASSES}
    found["context"] = {name for name in found["context"] if name not in {"enqueue", "recordable"}} | {
        "is_stream_capturable"
    }
    found["config"] |= {"create_runtime_cache"}
    return {CLASSES[kind]: names for kind, names in found.items()}


@pytest.mark.parametrize("package", ["tensorrt_rtx", "tensorrt_lean"])
def test_every_name_exists_in_tensorrt(package):
    module = importlib.import_module(package)
    names = used_names()
    assert {"execute_async_v3", "set_tensor_address", "infer_shapes"} < names["IExecutionContext"]
    assert {"get_tensor_profile_shape", "create_execution_context", "device_memory_size_v2"} < names["ICudaEngine"]
    for owner, members in names.items():
        known = set(dir(getattr(module, owner)))
        assert members - known <= (RTX_ONLY if package == "tensorrt_lean" else set()), owner
    assert module.ExecutionContextAllocationStrategy.USER_MANAGED.name == "USER_MANAGED"
    assert {"FLOAT", "INT32", "UINT8", "BOOL"} <= set(module.DataType.__members__)
    assert {"INPUT", "OUTPUT"} <= set(module.TensorIOMode.__members__)
    assert "DEVICE" in module.TensorLocation.__members__
    if package == "tensorrt_rtx":
        assert {"serialize", "deserialize"} <= set(dir(module.IRuntimeCache))
        assert "EAGER" in module.DynamicShapesKernelSpecializationStrategy.__members__
        assert "DISABLED" in module.CudaGraphStrategy.__members__
