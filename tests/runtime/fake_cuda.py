"""cuda-python's runtime functions over host memory.

Nothing that is put on a stream happens before somebody waits for it, so a test sees every missing wait and every
staging that is reused too early. Names of enumerations are cuda-python's own.
"""

import ctypes
from types import SimpleNamespace

import numpy as np
from cuda.bindings import runtime as real

SUCCESS = real.cudaError_t.cudaSuccess
UNSUPPORTED, INVALIDATED = 900, 901  # of stream capture


def array_at(address, shape, dtype):
    count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * count).from_address(address), np.uint8).view(dtype).reshape(shape)


class FakeCuda:
    """What the runtime calls of `cuda.bindings.runtime`. `fail` {function: status} makes one call fail, an exception
    there is raised by every one. A failure is remembered until cudaGetLastError tells it.
    """

    def __init__(self, memory=1 << 30):
        self.memory, self.blocks = memory, {}
        self.fail, self.calls, self.last = {}, [], 0
        self.queue, self.capturing, self.invalid = [], None, False
        self.graphs = self.execs = self.launches = 0
        self.capability, self.name, self.shared = (8, 7), b"Orin\0\0", 1

    def __getattr__(self, name):
        function = self.__class__.__dict__.get(f"do_{name}")
        if function is None:
            return getattr(real, name)

        def call(*arguments):
            self.calls.append(name)
            if isinstance(self.fail.get(name), Exception):
                raise self.fail[name]
            status = self.fail.pop(name, 0)
            values = (None,) if status else function(self, *arguments)
            if isinstance(values, int):
                status, values = values, (None,)
            self.last = self.last if name == "cudaGetLastError" else status or self.last
            return (real.cudaError_t(status), *values)

        return call

    @property
    def free(self):
        return self.memory - sum(block.nbytes for block in self.blocks.values())

    def enqueue(self, work):
        (self.queue if self.capturing is None else self.capturing).append(work)

    def flush(self):
        while self.queue:
            self.queue.pop(0)()

    def forbidden(self):
        """Whether a call that a stream capture does not allow is made during one, which spoils it."""
        self.invalid |= self.capturing is not None
        return self.capturing is not None

    # ---- what cuda-python has

    def do_cudaGetDeviceCount(self):
        return (1,)

    def do_cudaGetDeviceProperties(self, device):
        return (SimpleNamespace(name=self.name, totalGlobalMem=self.memory),)

    def do_cudaDeviceGetAttribute(self, attribute, device):
        return (self.shared if "Integrated" in attribute.name else self.capability["Minor" in attribute.name],)

    def do_cudaDriverGetVersion(self):
        return (12060,)

    def do_cudaRuntimeGetVersion(self):
        return (12060,)

    def do_cudaMemGetInfo(self):
        return self.free, self.memory

    def do_cudaMalloc(self, size):
        if self.forbidden():
            return UNSUPPORTED
        if size > self.free:
            return 2
        block = np.full(size, 0xAB, np.uint8)
        self.blocks[block.ctypes.data] = block
        return (block.ctypes.data,)

    do_cudaMallocHost = do_cudaMalloc

    def do_cudaFree(self, address):
        if self.forbidden():
            return UNSUPPORTED
        self.flush()
        self.blocks.pop(address, None)
        return ()

    do_cudaFreeHost = do_cudaFree

    def do_cudaStreamCreateWithFlags(self, flags):
        return (77,)

    def do_cudaStreamDestroy(self, stream):
        return ()

    def do_cudaGetLastError(self):
        last, self.last = self.last, 0
        return last or ()

    def do_cudaStreamSynchronize(self, stream):
        if self.forbidden():
            return UNSUPPORTED
        self.flush()
        return ()

    def do_cudaMemsetAsync(self, address, value, size, stream):
        self.enqueue(lambda: ctypes.memset(address, value, size))
        return ()

    def do_cudaMemcpyAsync(self, to, source, size, kind, stream):
        self.enqueue(lambda: ctypes.memmove(to, source, size))
        return ()

    def do_cudaMemcpy2DAsync(self, to, to_pitch, source, pitch, width, rows, kind, stream):
        assert width <= min(to_pitch, pitch)
        for row in range(rows):
            self.do_cudaMemcpyAsync(to + row * to_pitch, source + row * pitch, width, kind, stream)
        return ()

    def do_cudaStreamBeginCapture(self, stream, mode):
        self.capturing, self.invalid = [], False
        return ()

    def do_cudaStreamEndCapture(self, stream):
        work, self.capturing = self.capturing, None
        if work is None or self.invalid:
            return INVALIDATED
        self.graphs += 1
        return (work,)

    def do_cudaGraphInstantiate(self, graph, flags):
        self.execs += 1
        return (list(graph),)

    def do_cudaGraphLaunch(self, graph, stream):
        self.launches += 1
        self.queue.extend(graph)
        return ()

    def do_cudaGraphDestroy(self, graph):
        self.graphs -= 1
        return ()

    def do_cudaGraphExecDestroy(self, graph):
        self.execs -= 1
        return ()
