"""Tensors on a GPU: memory on one stream, and the pinned staging through which the host reads and writes it."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import BackendError
from ki_runtime.backends.session import Array, Buffer, check_write

from .cuda import Cuda, Memory

Bytes = npt.NDArray[np.uint8]
STAGING = 4 << 20  # bytes; larger tensors pass in pieces
ALIGNMENT = 256


class Gpu:
    """One stream of one GPU. Everything on it happens in the order of the calls; buffers belong to their stream."""

    def __init__(self, cuda: Cuda, staging: int = STAGING) -> None:
        self.cuda = cuda
        self.stream = cuda.stream()
        weakref.finalize(self, cuda.release, "cudaStreamDestroy", self.stream).atexit = False
        self._pinned = cuda.allocate_pinned(staging)
        self._staging = host_bytes(self._pinned.address, staging)
        self._used = 0  # bytes of the staging that copies under way may still read

    def allocate(self, shape: Sequence[int], dtype: str) -> DeviceBuffer:
        """A new tensor, all zeros."""
        kind = np.dtype(dtype)
        memory = self.cuda.allocate(math.prod(shape) * kind.itemsize)
        self.cuda.call("cudaMemsetAsync", memory.address, 0, memory.size, self.stream)
        return DeviceBuffer(self, memory, tuple(shape), kind)

    def upload(self, address: int, data: Bytes) -> None:
        """Copy to the device; returns when `data` may change again, which is before it arrives."""
        while data.size:
            if self._used >= self._staging.size:
                self.synchronize()
            piece = data[: self._staging.size - self._used]
            self._staging[self._used : self._used + piece.size] = piece
            self._copy(address, self._pinned.address + self._used, piece.size, "HostToDevice")
            self._used += -(-piece.size // ALIGNMENT) * ALIGNMENT
            address, data = address + piece.size, data[piece.size :]

    def download(self, address: int, out: Bytes) -> None:
        """Copy to the host, after everything that was put on the stream before."""
        while out.size:
            if self._used >= self._staging.size:
                self.synchronize()
            count, at = min(out.size, self._staging.size - self._used), self._used
            self._copy(self._pinned.address + at, address, count, "DeviceToHost")
            self.synchronize()
            out[:count] = self._staging[at : at + count]
            address, out = address + count, out[count:]

    def copy_rows(self, to: tuple[int, int], source: tuple[int, int], width: int, rows: int) -> None:
        """Copy `rows` of `width` bytes on the device; `to` and `source` are (address, bytes from row to row)."""
        kind = self.cuda.constant("cudaMemcpyKind.cudaMemcpyDeviceToDevice")
        self.cuda.call("cudaMemcpy2DAsync", *to, *source, width, rows, kind, self.stream)

    def synchronize(self) -> None:
        """Wait for everything on the stream."""
        self.cuda.synchronize(self.stream)
        self._used = 0

    def _copy(self, to: int, source: int, size: int, kind: str) -> None:
        way = self.cuda.constant(f"cudaMemcpyKind.cudaMemcpy{kind}")
        self.cuda.call("cudaMemcpyAsync", to, source, size, way, self.stream)


class DeviceBuffer:
    """A contiguous tensor at the start of a piece of device memory."""

    def __init__(self, gpu: Gpu, memory: Memory, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.gpu = gpu
        self._memory = memory
        self.shape, self.dtype = shape, dtype

    @property
    def address(self) -> int:
        """Where it lies on the device."""
        return self._memory.address

    def write(self, array: Array) -> None:
        check_write(array, self)
        self.gpu.upload(self.address, np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def read(self) -> Array:
        out = np.empty(self.shape, self.dtype)
        self.gpu.download(self.address, out.reshape(-1).view(np.uint8))
        return out

    def view(self, shape: Sequence[int]) -> DeviceBuffer:
        if math.prod(shape) > math.prod(self.shape):
            raise ValueError(f"a view of {list(shape)} exceeds the buffer's {list(self.shape)}")
        return DeviceBuffer(self.gpu, self._memory, tuple(shape), self.dtype)

    def place(self, source: Buffer, at: int) -> None:
        block = owned(source, self.gpu)
        *rows, capacity, width = self.shape
        *same, count, last = block.shape
        if (same, last, block.dtype) != (rows, width, self.dtype) or not 0 <= at <= capacity - count:
            raise ValueError(f"{block.dtype}{list(block.shape)} does not fit {list(self.shape)} at {at}")
        row = width * self.dtype.itemsize
        to, whence = (self.address + at * row, capacity * row), (block.address, count * row)
        self.gpu.copy_rows(to, whence, count * row, math.prod(rows))


def owned(buffer: Buffer, gpu: Gpu) -> DeviceBuffer:
    """The buffer, if it lives on this stream; BackendError otherwise."""
    if not isinstance(buffer, DeviceBuffer):
        raise BackendError(f"a GPU backend cannot use a {type(buffer).__name__} of another backend")
    if buffer.gpu is not gpu:
        raise BackendError("a buffer of another connection: open all graphs that share buffers through one `connect`")
    return buffer


def host_bytes(address: int, size: int) -> Bytes:
    """Host memory at an address as an array; the memory must outlive it."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
