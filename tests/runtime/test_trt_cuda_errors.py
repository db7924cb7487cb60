"""Every failure of CUDA and of cuda-python is a typed error in one line."""

import gc

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, BackendError, DeviceError, DeviceMemoryError
from ki_runtime.gpu import cuda
from ki_runtime.gpu.buffers import Gpu
from ki_runtime.gpu.cuda import Cuda

from .fake_gpu import FakeCuda, real


@pytest.fixture
def runtime():
    return FakeCuda()


@pytest.fixture
def gpu(runtime):
    return Gpu(Cuda(runtime), staging=1024)


@pytest.mark.parametrize(
    "error", [ImportError("undefined symbol: x"), OSError("libfoo.so"), RuntimeError("Failed"), AttributeError("y")]
)
def test_a_broken_cuda_python(monkeypatch, error):
    def broken(name):
        raise error

    monkeypatch.setattr(cuda, "import_module", broken)
    with pytest.raises(BackendError, match=rf"^cuda-python cannot be imported \({error}\): pip install --upgrade"):
        Cuda.load()


@pytest.mark.parametrize(
    ("driver", "needed", "status", "message"),
    [
        (0, 13000, 35, "^no NVIDIA driver on this machine$"),
        (12060, 13000, 35, r"driver serves CUDA 12\.6, cuda-python is for CUDA 13: update .* 'cuda-python<13'"),
        (12060, 12060, 100, r"^no usable GPU: cudaErrorNoDevice \(.*\); the driver serves CUDA 12\.6$"),
    ],
)
def test_no_gpu(runtime, driver, needed, status, message):
    for name, version in {"cudaDriverGetVersion": driver, "cudaRuntimeGetVersion": needed}.items():
        setattr(runtime, name, lambda version=version: (real.cudaError_t(0), version))
    runtime.fail["cudaGetDeviceCount"] = status
    with pytest.raises(BackendError, match=message) as error:
        Cuda(runtime).device()
    assert not isinstance(error.value, DeviceError)


def test_out_of_memory_tells_how_much(runtime):
    runtime.memory = 64 << 20
    with pytest.raises(
        DeviceMemoryError, match=r"no room for 100 MiB in the memory of the GPU \(64 of 64 MiB .* free\)"
    ):
        Cuda(runtime).allocate(100 << 20)
    with pytest.raises(DeviceMemoryError, match=r"page-locked"):
        Cuda(runtime).allocate_pinned(100 << 20)


def test_a_lost_device_stays_lost(runtime, gpu):
    buffer = gpu.allocate((4,), "float32")
    runtime.fail["cudaStreamSynchronize"] = 700
    with pytest.raises(
        DeviceError, match=r"lost: cudaErrorIllegalAddress \(an illegal memory.*start this process again"
    ):
        buffer.read()
    made = len(runtime.calls)
    for use in (buffer.read, lambda: gpu.allocate((1,), "bool"), lambda: buffer.write(np.ones(4, np.float32))):
        with pytest.raises(DeviceError, match="in cudaStreamSynchronize"):
            use()
    gc.collect()
    assert len(runtime.calls) == made


def test_another_failure_is_not_a_lost_device(runtime, gpu):
    runtime.fail["cudaMemsetAsync"] = 1
    with pytest.raises(BackendError, match=r"CUDA failed in cudaMemsetAsync: cudaErrorInvalidValue") as error:
        gpu.allocate((4,), "float32")
    assert not isinstance(error.value, DeviceError | DeviceMemoryError)
    assert gpu.allocate((4,), "float32").read().tolist() == [0, 0, 0, 0]


RAISED = {  # by cuda-python, instead of a status
    "12.8 without a driver": (RuntimeError("Failed to dlopen libcuda.so.1"), "no NVIDIA driver on this machine"),
    "and at the next call": (RuntimeError('Function "cuDeviceGetCount" not found'), "no NVIDIA driver on this machine"),
    "a library": (OSError("libcudart.so.12: cannot open"), "CUDA failed in .*: OSError: libcudart"),
    "a module": (ImportError("DLL load failed"), "CUDA failed in .*: ImportError: DLL load failed"),
    "an older version": (AttributeError("no attribute"), "cuda-python has no cuda.*: pip install --upgrade"),
    "a newer status": (ValueError("1234 is not a valid cudaError_t"), "CUDA failed in .*: ValueError: 1234"),
    "nothing said": (RuntimeError(), "CUDA failed in .*: RuntimeError: RuntimeError"),
}


@pytest.mark.parametrize("case", RAISED)
def test_whatever_cuda_python_raises_is_typed(runtime, case):
    error, message = RAISED[case]
    for function, use in {
        "cudaGetDeviceCount": lambda: Cuda(runtime).device(),
        "cudaMalloc": lambda: Cuda(runtime).allocate(10),
        "cudaStreamBeginCapture": lambda: Cuda(runtime).record(77, lambda: None),
        "cudaStreamEndCapture": lambda: Cuda(runtime).record(77, lambda: None),
        "cudaGraphInstantiate": lambda: Cuda(runtime).record(77, lambda: None),
    }.items():
        runtime.fail[function] = error
        with pytest.raises(BackendError, match=message) as found:
            use()
        assert type(found.value) is BackendError and "\n" not in str(found.value)
        runtime.fail.clear()
        runtime.do_cudaStreamEndCapture(77)


def test_what_raises_behind_a_failure_does_not_hide_it(runtime):
    broken = RuntimeError("Failed to dlopen libcuda.so.1")

    def raise_it(*_):
        raise broken

    for name in ("cudaDriverGetVersion", "cudaRuntimeGetVersion", "cudaGetErrorName", "cudaGetErrorString"):
        setattr(runtime, name, raise_it)
    assert Cuda(runtime).driver() is None
    runtime.fail["cudaGetDeviceCount"] = 100
    with pytest.raises(BackendError, match=r"^no NVIDIA driver on this machine$"):
        Cuda(runtime).device()
    runtime.fail["cudaMalloc"] = 1
    with pytest.raises(BackendError, match="CUDA failed in cudaMalloc: error 1"):
        Cuda(runtime).allocate(1)
    runtime.fail["cudaFree"] = broken
    Cuda(runtime).release("cudaFree", 5)  # nobody could do anything about it
    runtime.fail["cudaStreamEndCapture"] = runtime.fail["cudaGetLastError"] = broken

    def refuse():
        raise ArgumentError("the first reason")

    with pytest.raises(ArgumentError, match="the first reason"):
        Cuda(runtime).record(77, refuse)


def test_a_constant_that_is_missing():
    with pytest.raises(BackendError, match=r"cuda-python has no cudaNothing\.cudaAtAll"):
        Cuda(real).constant("cudaNothing.cudaAtAll")


def test_a_failure_that_was_told_is_not_told_again(gpu, runtime):
    with pytest.raises(DeviceMemoryError):
        gpu.allocate((1 << 40,), "float32")
    gpu.cuda.check(gpu.stream)  # of a later, other failure
