"""What a verdict holds for: engine, GPU, driver and versions, as each backend tells them."""

import json
from types import SimpleNamespace

import pytest

from ki_edge.errors import BackendError
from ki_runtime.backends import ort as ort_session
from ki_runtime.backends import processor
from ki_runtime.backends.registry import BACKENDS
from ki_runtime.gpu import identity
from ki_runtime.gpu import ort_cuda as ort_cuda_session
from ki_runtime.gpu.cuda import Cuda
from ki_runtime.gpu.identity import gpu_environment
from ki_runtime.trt import session

from .fake_gpu import FakeCuda


@pytest.fixture
def kernel_module(tmp_path, monkeypatch):
    path = tmp_path / "version"
    monkeypatch.setattr(identity, "KERNEL_MODULE", path)
    return path


def test_a_gpu_by_name_identity_and_driver(kernel_module, monkeypatch):
    cuda = FakeCuda()
    found = gpu_environment(Cuda(cuda))
    assert found == {"GPU": "Orin (8.7)", "GPU id": "unknown", "driver": "CUDA 12.6"}
    opened = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (builder)\nGCC\n"
    kernel_module.write_text(opened)
    assert gpu_environment(Cuda(cuda))["driver"] == "580.159.04 CUDA 12.6"
    kernel_module.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue\n")
    properties = cuda.do_cudaGetDeviceProperties(0)[0]
    properties.uuid = SimpleNamespace(bytes=bytes(range(16)))
    monkeypatch.setattr(FakeCuda, "do_cudaGetDeviceProperties", lambda self, device: (properties,))
    found = gpu_environment(Cuda(cuda))
    assert found["GPU id"] == "000102030405060708090a0b0c0d0e0f" and found["driver"] == "550.54.15 CUDA 12.6"
    cuda.fail = {"cudaGetDeviceCount": 100}
    with pytest.raises(BackendError, match="no usable GPU"):
        gpu_environment(Cuda(cuda))


def test_onnxruntime_by_version_and_processor(make_bundle, kernel_module, monkeypatch):
    bundle, backend = make_bundle(), next(b for b in BACKENDS if b.name == "ort")
    found = backend.setting(bundle, ("prefix",))
    assert found.environment["backend"] == "ort" and found.folder == bundle.path / "engines" / "ort"
    assert found.environment["onnxruntime"] == ort_session.onnxruntime().__version__
    lines = "model name\t: Some CPU\nmodel\t\t: 17\nflags\t\t: fpu avx2 avx512_vnni\n"
    monkeypatch.setattr(processor, "cpu_info", lambda name: _line(lines, name))
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    assert processor.processor() == "x86_64 Some CPU 17 avx2 avx512_vnni"
    monkeypatch.setattr(ort_cuda_session.Cuda, "load", classmethod(lambda cls: Cuda(FakeCuda())))
    assert {"onnxruntime", "libraries", "GPU", "GPU id", "driver"} <= set(
        ort_cuda_session.setting(bundle, "", ()).environment
    )


def _line(text, name):
    lines = (line for line in text.splitlines() if line.split(":")[0].strip() == name)
    return next(lines, "").partition(":")[2].strip()


def test_the_processor_of_this_machine_has_a_name():
    assert len(ort_session.processor().split()) >= 2 and "\n" not in ort_session.processor()


def test_tensorrt_without_engines_cannot_be_proven(make_bundle, monkeypatch, kernel_module):
    from .test_doctor import put_engines

    bundle = make_bundle()
    cuda, api = FakeCuda(), SimpleNamespace(name="tensorrt", version_text="10.3.0", version=(10, 3, 0), is_rtx=False)
    api.is_lean, api.title, api.can_build = False, "TensorRT 10.3.0", True
    monkeypatch.setattr(session.Cuda, "load", classmethod(lambda cls: Cuda(cuda)))
    monkeypatch.setattr(session.Api, "load", classmethod(lambda cls, name: api))
    with pytest.raises(BackendError, match="no TensorRT engines"):
        session.setting(bundle, "tensorrt", ("prefix",))
    put_engines(bundle)
    found = session.setting(bundle, "tensorrt", ("prefix", "denoise"))
    recorded = json.loads(next(bundle.path.glob("engines/*/engine.json")).read_text())["graphs"]
    assert {found.environment[f"engine {name}"] for name in ("prefix", "denoise")} == {
        recorded[name]["sha256"] for name in ("prefix", "denoise")
    }
    assert found.environment["tensorrt"] == "10.3.0" and found.folder.parent == bundle.path / "engines"
