"""The CUDA layer and tensors in device memory, over a fake of cuda-python in which nothing happens before a wait."""

import gc
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, BackendError, DeviceError
from ki_runtime.backends.session import HostBuffer
from ki_runtime.gpu import buffers, cuda
from ki_runtime.gpu.buffers import Gpu
from ki_runtime.gpu.cuda import ABSENT, LOST, Cuda, current_device
from ki_runtime.trt import contexts

from .fake_gpu import FakeCuda, real


@pytest.fixture
def runtime():
    return FakeCuda()


@pytest.fixture
def gpu(runtime):
    return Gpu(Cuda(runtime), staging=1024)


# ---------------------------------------------------------------- cuda-python


def test_every_name_exists_in_cuda_python():
    source = "".join(Path(module.__file__).read_text() for module in (cuda, buffers, contexts))
    names = {name for name in re.findall(r"\bcuda[A-Z]\w+(?:\.cuda[A-Z]\w+)?", source) if "{" not in name}
    names |= {f"cudaMemcpyKind.cudaMemcpy{way}" for way in ("HostToDevice", "DeviceToHost", "DeviceToDevice")}
    names |= {f"cudaDeviceAttr.cudaDevAttrComputeCapability{part}" for part in ("Major", "Minor")}
    names -= {"cudaMemcpyKind.cudaMemcpy", "cudaDeviceAttr.cudaDevAttr"}  # completed while running
    assert len(names) > 20
    plain = Cuda(real)
    assert [name for name in sorted(names) if plain.constant(name) is None] == []


def test_status_numbers_are_those_of_cuda_python():
    names = {real.cudaError_t(status).name for status in (*ABSENT, *LOST)}
    assert {"cudaErrorNoDevice", "cudaErrorInsufficientDriver", "cudaErrorIllegalAddress"} < names
    assert {"cudaErrorECCUncorrectable", "cudaErrorLaunchFailure", "cudaErrorLaunchTimeout"} < names
    assert real.cudaError_t.cudaErrorMemoryAllocation.value == cuda.OUT_OF_MEMORY


def test_a_machine_without_a_gpu():
    _, driver = real.cudaDriverGetVersion()
    if driver:
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(BackendError, match=r"^no NVIDIA driver on this machine$"):
        current_device()


def test_without_cuda_python(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(cuda, "import_module", missing)
    with pytest.raises(BackendError, match="cuda-python is not installed: pip install cuda-python"):
        Cuda.load()


def test_one_for_the_whole_process(monkeypatch):
    runtime, other = FakeCuda(), FakeCuda()
    monkeypatch.setattr(cuda, "import_module", lambda name: runtime)
    first = Cuda.load()
    runtime.fail["cudaStreamSynchronize"] = 700
    with pytest.raises(DeviceError):
        Gpu(Cuda.load()).synchronize()
    with pytest.raises(DeviceError):  # everyone knows of it
        first.device()
    assert Cuda.load() is first
    monkeypatch.setattr(cuda, "import_module", lambda name: other)
    assert Cuda.load() is not first


def test_the_layout_before_the_bindings_package(monkeypatch):
    def old(name):
        if name != "cuda.cudart":
            raise ModuleNotFoundError(name)
        return FakeCuda()

    monkeypatch.setattr(cuda, "import_module", old)
    assert current_device().name == "Orin"


def test_device(runtime):
    device = Cuda(runtime).device()
    assert (device.name, device.capability, device.memory) == ("Orin", (8, 7), 1 << 30)
    assert Cuda(runtime).driver() == "12.6"


# ---------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    "array",
    [
        np.float32(3.5).reshape(()),
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.arange(24, dtype=np.int32).reshape(4, 6)[:, ::2],
        np.array([[True, False, True]]),
        np.random.default_rng(0).integers(0, 256, (3, 1000), np.uint8),  # more than the staging holds
        np.arange(256, dtype=np.float32),  # exactly the staging
    ],
)
def test_write_and_read(gpu, array):
    buffer = gpu.allocate(array.shape, array.dtype.name)
    np.testing.assert_array_equal(buffer.read(), np.zeros_like(array))
    buffer.write(array)
    np.testing.assert_array_equal(buffer.read(), array)
    assert buffer.read().dtype == array.dtype and buffer.shape == array.shape


def test_writes_do_not_overtake_each_other(gpu, runtime):
    """Copies are under way until somebody waits: what they read must stay as it was."""
    arrays = [np.full(60, value, np.int32) for value in range(12)]  # 240 bytes each, 1024 of staging
    tensors = [gpu.allocate((60,), "int32") for _ in arrays]
    for tensor, array in zip(tensors, arrays, strict=True):
        tensor.write(array)
        array[:] = -1  # the caller's again
    assert runtime.queue
    assert [set(tensor.read().tolist()) for tensor in tensors] == [{value} for value in range(12)]


def test_what_does_not_fit_is_refused(gpu):
    buffer = gpu.allocate((2, 3), "float32")
    for wrong in (np.zeros((3, 2), np.float32), np.zeros((2, 3), np.float64)):
        with pytest.raises(ArgumentError, match=r"cannot write .* into a buffer of float32\[2, 3\]"):
            buffer.write(wrong)
    with pytest.raises(ValueError, match="exceeds"):
        buffer.view((7,))
    with pytest.raises(BackendError, match="HostBuffer of another backend"):
        buffer.place(HostBuffer(np.zeros((1, 3), np.float32)), 0)
    with pytest.raises(BackendError, match="another connection"):
        buffer.place(Gpu(gpu.cuda).allocate((1, 3), "float32"), 0)
    for at in (-1, 2):
        with pytest.raises(ValueError, match="does not fit"):
            buffer.place(gpu.allocate((1, 3), "float32"), at)


def test_views_share_memory(gpu):
    block = gpu.allocate((10,), "float32")
    view = block.view((2, 3))
    view.write(np.arange(6, dtype=np.float32).reshape(2, 3))
    del block
    assert view.view((4,)).read().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("count", "at"), [(1, 0), (2, 3), (5, 2), (7, 0), (1, 6)])
def test_place_equals_the_hosts(gpu, count, at):
    """[L, B, K, n, D] into [L, B, K, C, D], against numpy."""
    random = np.random.default_rng(0)
    cache, block = random.standard_normal((2, 3, 2, 7, 4)), random.standard_normal((2, 3, 2, count, 4))
    ours, theirs = gpu.allocate(cache.shape, "float32"), gpu.allocate(block.shape, "float32")
    ours.write(cache.astype(np.float32))
    theirs.write(block.astype(np.float32))
    ours.place(theirs, at)
    host = HostBuffer(cache.astype(np.float32))
    host.place(HostBuffer(block.astype(np.float32)), at)
    np.testing.assert_array_equal(ours.read(), host.read())


def test_memory_is_given_back(gpu, runtime):
    free = runtime.free
    block = gpu.allocate((1000,), "float32")
    view = block.view((10,))
    del block
    gc.collect()
    assert runtime.free == free - 4000
    del view
    gc.collect()
    assert runtime.free == free


# ---------------------------------------------------------------- recording


def test_a_recording_replays_on_the_data_of_the_day(gpu, runtime):
    cache, block = gpu.allocate((1, 4, 2), "float32"), gpu.allocate((1, 1, 2), "float32")
    recording = gpu.cuda.record(gpu.stream, lambda: cache.place(block, 2))
    assert cache.read().sum() == 0  # recorded, not run
    for value in (1, 5):
        block.write(np.full((1, 1, 2), value, np.float32))
        recording.launch()
        assert cache.read()[0, :, 0].tolist() == [0, 0, value, 0]
    assert (runtime.graphs, runtime.execs, runtime.launches) == (0, 1, 2)
    del recording
    gc.collect()
    assert runtime.execs == 0


def test_memory_freed_during_a_recording_waits(gpu, runtime):
    held = [gpu.allocate((1000,), "float32")]
    free = runtime.free
    recording = gpu.cuda.record(gpu.stream, held.clear)
    assert recording is not None and runtime.free == free + 4000


@pytest.mark.parametrize("failing", ["work", "sync", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_recording_that_fails_leaves_the_stream_usable(gpu, runtime, failing):
    buffer = gpu.allocate((2,), "float32")

    def work():
        if failing == "work":
            raise BackendError("refused")
        if failing == "sync":
            gpu.synchronize()  # not allowed now

    if failing.startswith("cuda"):
        runtime.fail[failing] = 1
    with pytest.raises(BackendError):
        gpu.cuda.record(gpu.stream, work)
    assert runtime.capturing is None and runtime.graphs == 0 and runtime.execs == 0
    buffer.write(np.ones(2, np.float32))
    assert buffer.read().tolist() == [1, 1]


@pytest.mark.parametrize("shared", [0, 1])
def test_whether_the_gpu_s_memory_is_the_hosts(shared):
    runtime = FakeCuda()
    runtime.shared = shared
    assert Cuda(runtime).device().shared is bool(shared)


def test_threads_record_one_after_the_other(runtime):
    """And what one of them records keeps nobody else's memory, nor another's wait."""
    shared, order = Cuda(runtime), []
    inside, leave = threading.Event(), threading.Event()

    def first():
        inside.set()
        order.append("first")
        assert leave.wait(60)
        order.append("first ends")

    threads = [threading.Thread(target=shared.record, args=(77, first))]
    threads[0].start()
    assert inside.wait(60)
    threads.append(threading.Thread(target=shared.record, args=(77, lambda: order.append("second"))))
    threads[1].start()
    shared.release("cudaFree", 12345)
    assert "cudaFree" not in runtime.calls and order == ["first"]
    leave.set()
    for thread in threads:
        thread.join(60)
    assert order == ["first", "first ends", "second"] and runtime.calls.count("cudaFree") == 1
