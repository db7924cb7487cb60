"""The CUDA runtime through cuda-python: every call checked, every failure a typed error.

Always the first device that CUDA shows (CUDA_VISIBLE_DEVICES chooses it), because a device is current per thread and a
policy may be called from any. Memory frees itself with its last reference, but never while a stream is being recorded.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any, ClassVar

from ki_edge.errors import BackendError, DeviceError, DeviceMemoryError
from ki_runtime.backends.session import first_line

from .cuda_errors import ABSENT, LOST, NO_DRIVER, OUT_OF_MEMORY, SUCCESS, raised
from .device import Device

MODULES = ("cuda.bindings.runtime", "cuda.cudart")  # of cuda-python from 12.6.1 on, and before
DEVICE = 0


class Cuda:
    """The runtime API. `runtime` is cuda-python's module; a test may pass another with the same functions."""

    _process: ClassVar[Cuda | None] = None  # what `load` gives everyone
    _loading: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._lost: str | None = None
        self._recording: int | None = None  # the thread that records
        self._one_recording = threading.Lock()
        self._doomed: list[tuple[str, Any]] = []  # released while a stream was being recorded

    @classmethod
    def load(cls) -> Cuda:
        """cuda-python's, one for the whole process, so that everybody knows of a lost device and of a recording.

        BackendError if it is not installed, or cannot be imported.
        """
        runtime = _import()
        with cls._loading:
            if cls._process is None or cls._process._runtime is not runtime:
                cls._process = cls(runtime)
            return cls._process

    @classmethod
    def in_use(cls) -> Cuda | None:
        """What `load` has given somebody in this process; None before."""
        return cls._process

    def call(self, function: str, *arguments: Any) -> Any:
        """The result of a runtime function (a tuple if there are several).

        DeviceError once the device is lost, DeviceMemoryError if it is full, BackendError for any other failure,
        whatever cuda-python raises included.
        """
        if self._lost is not None:
            raise DeviceError(self._lost)
        status, *values = self._raw(function, *arguments)
        if status != SUCCESS:
            if function != "cudaGetLastError":  # told now, so it must not be taken for the failure of a later call
                self._quietly("cudaGetLastError")
            raise self._error(function, status)
        return values[0] if len(values) == 1 else tuple(values)

    def constant(self, name: str) -> Any:
        """A constant of the runtime, "cudaStreamNonBlocking" or "cudaMemcpyKind.cudaMemcpyHostToDevice".

        BackendError if this cuda-python has none of that name.
        """
        value = self._runtime
        for part in name.split("."):
            try:
                value = getattr(value, part)
            except Exception as error:
                raise raised(name, error) from error
        return value

    def device(self) -> Device:
        """The GPU. BackendError if there is none or the driver does not serve this CUDA version."""
        self.call("cudaGetDeviceCount")
        properties = self.call("cudaGetDeviceProperties", DEVICE)
        name = properties.name
        return Device(
            name=(name.decode() if isinstance(name, bytes) else str(name)).strip("\0 "),
            capability=(self._attribute("ComputeCapabilityMajor"), self._attribute("ComputeCapabilityMinor")),
            memory=int(properties.totalGlobalMem),
            shared=bool(self._attribute("Integrated")),
            multiprocessors=self._attribute("MultiProcessorCount"),
        )

    def driver(self) -> str | None:
        """The newest CUDA version that the driver serves, "12.6"; None without a driver."""
        status, version = self._quietly("cudaDriverGetVersion")
        return f"{version // 1000}.{version % 1000 // 10}" if status == SUCCESS and version else None

    def memory(self) -> tuple[int, int]:
        """(free, all) bytes of the device."""
        free, total = self.call("cudaMemGetInfo")
        return int(free), int(total)

    def stream(self) -> int:
        """A new stream that does not wait for the default one."""
        return int(self.call("cudaStreamCreateWithFlags", self.constant("cudaStreamNonBlocking")))

    def synchronize(self, stream: int) -> None:
        """Wait for everything on a stream."""
        self.call("cudaStreamSynchronize", stream)

    def check(self, stream: int) -> None:
        """Raise what an earlier call or the work on a stream left behind; nothing if all is well."""
        self.call("cudaGetLastError")
        if self._recording != threading.get_ident():
            self.synchronize(stream)

    def allocate(self, size: int) -> Memory:
        """Device memory of so many bytes, not cleared."""
        return self._take("cudaMalloc", "cudaFree", size)

    def allocate_pinned(self, size: int) -> Memory:
        """Host memory that the device copies from and to by itself."""
        return self._take("cudaMallocHost", "cudaFreeHost", size)

    def record(self, stream: int, enqueue: Callable[[], None], keep: object = None) -> Recording:
        """What `enqueue` puts on `stream`, as a graph, which keeps `keep` alive; nothing of it runs now.

        BackendError if CUDA or `enqueue` refuses; the stream is as before then. One thread records at a time.
        """
        mode = self.constant("cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal")
        with self._one_recording:
            self.call("cudaStreamBeginCapture", stream, mode)
            self._recording = threading.get_ident()
            try:
                enqueue()
                graph = self.call("cudaStreamEndCapture", stream)
            except BaseException:
                status, graph = self._quietly("cudaStreamEndCapture", stream)  # no harm if it was ended above
                if status == SUCCESS:
                    self.release("cudaGraphDestroy", graph)
                self._quietly("cudaGetLastError")  # what failed is told now and must not reach the next call
                raise
            finally:
                self._recording = None
                self._release_doomed()
        try:
            return Recording(self, self.call("cudaGraphInstantiate", graph, 0), stream, keep)
        finally:
            self.release("cudaGraphDestroy", graph)

    def release(self, function: str, handle: Any) -> None:
        """Give a resource back; a device that is lost has none left, so failures do not matter."""
        if self._recording is not None:
            self._doomed.append((function, handle))
            return
        if self._lost is None:
            self._quietly(function, handle)
        self._release_doomed()

    def _release_doomed(self) -> None:
        while self._doomed and self._recording is None:
            function, handle = self._doomed.pop()
            if self._lost is None:
                self._quietly(function, handle)

    def _raw(self, function: str, *arguments: Any) -> tuple[int, Any]:
        """(status, values...) of a runtime function; BackendError if cuda-python raises instead."""
        try:
            status, *values = getattr(self._runtime, function)(*arguments)
            return int(status), *values
        except Exception as error:  # its versions raise RuntimeError, ImportError, AttributeError and ValueError here
            raise raised(function, error) from error

    def _quietly(self, function: str, *arguments: Any) -> tuple[int | None, Any]:
        """(status, value) of a function whose failure nobody can mend; status None if cuda-python raises."""
        try:
            status, *values = self._raw(function, *arguments)
        except BackendError:
            return None, None
        return status, values[0] if values else None

    def _take(self, function: str, release: str, size: int) -> Memory:
        try:
            return Memory(self, int(self.call(function, max(1, size))), size, release)
        except DeviceMemoryError:
            where = "GPU" if function == "cudaMalloc" else "host (page-locked)"
            raise self.full(size, where) from None

    def full(self, size: int, where: str = "GPU") -> DeviceMemoryError:
        """The error that so many bytes are not there; raises BackendError if the device does not answer any more."""
        free, total = self.memory()
        return DeviceMemoryError(
            f"no room for {size / 2**20:.0f} MiB in the memory of the {where} "
            f"({free / 2**20:.0f} of {total / 2**20:.0f} MiB of the GPU are free): end other programs that use it, "
            "export in a lower precision, or build for fewer cameras and a smaller batch"
        )

    def _attribute(self, name: str) -> int:
        return int(self.call("cudaDeviceGetAttribute", self.constant(f"cudaDeviceAttr.cudaDevAttr{name}"), DEVICE))

    def _error(self, function: str, status: int) -> BackendError:
        told = f"{self._text('cudaGetErrorName', status)} ({self._text('cudaGetErrorString', status)})"
        if status in ABSENT:
            return BackendError(self._absence(told))
        if status == OUT_OF_MEMORY:
            return DeviceMemoryError(f"the GPU is out of memory in {function}: end other programs that use it")
        if status in LOST:
            self._lost = f"the GPU was lost: {told} in {function}; no result can be trusted, start this process again"
            return DeviceError(self._lost)
        return BackendError(f"CUDA failed in {function}: {told}")

    def _absence(self, told: str) -> str:
        driver = self.driver()
        if driver is None:
            return NO_DRIVER
        status, needed = self._quietly("cudaRuntimeGetVersion")
        if status == SUCCESS and needed // 1000 > int(driver.split(".")[0]):
            major = needed // 1000
            return (
                f"the NVIDIA driver serves CUDA {driver}, cuda-python is for CUDA {major}: "
                f"update the driver, or pip install 'cuda-python<{major}'"
            )
        return f"no usable GPU: {told}; the driver serves CUDA {driver}"

    def _text(self, function: str, status: int) -> str:
        with suppress(Exception):  # an error newer than cuda-python
            _, text = getattr(self._runtime, function)(self._runtime.cudaError_t(status))
            return str(text.decode() if isinstance(text, bytes) else text)
        return f"error {status}"


class Memory:
    """`size` bytes at `address`, given back with the last reference."""

    def __init__(self, cuda: Cuda, address: int, size: int, release: str) -> None:
        self.address, self.size = address, size
        weakref.finalize(self, cuda.release, release, address).atexit = False


class Recording:
    """A graph that was recorded from a stream, with whatever it needs to stay; the graph goes first."""

    def __init__(self, cuda: Cuda, graph: Any, stream: int, keep: object = None) -> None:
        self._cuda, self._graph, self._stream, self._keep = cuda, graph, stream, keep
        weakref.finalize(self, cuda.release, "cudaGraphExecDestroy", graph).atexit = False

    def launch(self) -> None:
        """Put the whole graph on its stream."""
        self._cuda.call("cudaGraphLaunch", self._graph, self._stream)


def current_device() -> Device:
    """The GPU of this machine. BackendError if cuda-python, the driver or the GPU is missing."""
    return Cuda.load().device()


def _import() -> Any:
    """cuda-python's module of runtime functions."""
    broken: Exception | None = None
    for name in MODULES:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
        except Exception as error:  # a library that it wants is missing, or is another than it was built for
            broken = broken or error
    if broken is not None:
        raise BackendError(f"cuda-python cannot be imported ({first_line(broken)}): pip install --upgrade cuda-python")
    raise BackendError("cuda-python is not installed: pip install cuda-python (of the driver's CUDA version)")
