"""The seam between the runtime and an inference engine: buffers on a device, and one graph that runs over them.

A backend subclasses `Session` and gives `allocate` and `bind`. Whatever is bound stays where it is: the outputs of one
session are bound as the inputs of another, so K/V and the Euler state never pass through the host.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ki_edge.errors import ArgumentError
from ki_edge.graphs import GraphSpec, TensorSpec

Array = npt.NDArray[Any]


class Buffer(Protocol):
    """Memory of one tensor where the backend computes; opaque to everyone but its backend."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def write(self, array: Array) -> None:
        """Copy a host array of the same shape and dtype in."""

    def read(self) -> Array:
        """A copy on the host, after everything that was run before."""

    def view(self, shape: Sequence[int]) -> Buffer:
        """The first elements of the same memory as a contiguous tensor of another shape."""

    def place(self, source: Buffer, at: int) -> None:
        """Copy K/V `source` [..., n, D] to the places at..at+n of this buffer [..., C, D]."""


class Binding(Protocol):
    """A graph with memory for every input and output."""

    def run(self) -> None:
        """Run once. Reads the bound inputs as they are now and overwrites the bound outputs; allocates nothing."""


class Sequential:
    """Bindings that run one after another."""

    def __init__(self, bindings: Sequence[Binding]) -> None:
        self._bindings = tuple(bindings)

    def run(self) -> None:
        for binding in self._bindings:
            binding.run()


@dataclass(frozen=True)
class Bucket:
    """Sizes that a masked dimension is padded to, so that an engine meets few shapes: multiples of `step`.

    `limit`: the engine's largest size, where it has one; a size beyond it stays as it is, for the engine to refuse.
    """

    step: int = 1
    limit: int | None = None

    def fit(self, size: int) -> int:
        """The size that `size` is padded to."""
        padded = -(-size // self.step) * self.step
        return padded if self.limit is None else max(size, min(padded, self.limit))


@dataclass(frozen=True)
class Loaded:
    """What a session was made of: environment that tell it from every other, and the folder where it lies."""

    environment: Mapping[str, str]
    folder: Path


class Session(ABC):
    """One loaded graph. `sizes` holds the constant symbols of graphs.py; buffers may be shared within a backend.

    `prompt_bucket` and `cache_bucket`: the lengths T of a prompt and C of a FAST cache that the engine should meet.
    """

    prompt_bucket = Bucket()
    cache_bucket = Bucket()

    def __init__(self, spec: GraphSpec, sizes: Mapping[str, int]) -> None:
        self.spec = spec
        self.sizes = dict(sizes)
        self.loaded: Loaded | None = None  # what was loaded, where that is more than the bundle's own graph
        self.replays: int | None = None  # of records so far; None for a backend that never records

    def stop_recording(self) -> None:  # noqa: B027
        """Run one by one from now on; for sequences that were not recorded yet."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.spec.outputs

    @abstractmethod
    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer:
        """New memory, all zeros."""

    @abstractmethod
    def _bind(self, buffers: Mapping[str, Buffer]) -> Binding:
        """Bind checked buffers."""

    def bind(self, buffers: Mapping[str, Buffer]) -> Binding:
        """Tie a buffer to every input and output. ArgumentError names the tensor that is missing or does not fit."""
        symbols = dict(self.sizes)
        for tensor in (*self.inputs, *self.outputs):
            if tensor.name not in buffers:
                raise ArgumentError(f"graph {self.spec.name}: no buffer for '{tensor.name}'")
            match_shape(self.spec.name, tensor, buffers[tensor.name], symbols)
        return self._bind({tensor.name: buffers[tensor.name] for tensor in (*self.inputs, *self.outputs)})

    def sequence(self, bindings: Sequence[Binding]) -> Binding:
        """Bindings of this session as one that runs them in order; a backend may record them and replay the record."""
        return Sequential(bindings)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once from host arrays to host arrays: for tests and comparisons, not for loops."""
        buffers: dict[str, Buffer] = {}
        symbols = dict(self.sizes)
        for tensor in self.inputs:
            if tensor.name not in feeds:
                raise ArgumentError(f"graph {self.spec.name}: input '{tensor.name}' is missing")
            buffers[tensor.name] = self.allocate(feeds[tensor.name].shape, tensor.dtype)
            buffers[tensor.name].write(feeds[tensor.name])
            match_shape(self.spec.name, tensor, buffers[tensor.name], symbols)
        if "S" not in symbols and {"N", "T"} <= set(symbols):
            symbols["S"] = symbols["N"] * symbols["P"] + symbols["T"]
        for tensor in self.outputs:
            buffers[tensor.name] = self.allocate(shape_of(tensor, symbols), tensor.dtype)
        self.bind(buffers).run()
        return {tensor.name: buffers[tensor.name].read() for tensor in self.outputs}


def shape_of(tensor: TensorSpec, symbols: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of a tensor once every symbol has a value; KeyError for one that has none."""
    return tuple(dim if isinstance(dim, int) else symbols[dim] for dim in tensor.dims)


def match_shape(graph: str, tensor: TensorSpec, buffer: Buffer, symbols: dict[str, int]) -> None:
    """Check a buffer against its spec and learn the symbols it defines."""
    fits = buffer.dtype == np.dtype(tensor.dtype) and len(buffer.shape) == len(tensor.dims)
    for dim, size in zip(tensor.dims, buffer.shape, strict=False):
        fits = fits and size == (dim if isinstance(dim, int) else symbols.setdefault(dim, size))
    if not fits:
        wanted = f"{tensor.dtype}{list(tensor.resolve(symbols))}"
        raise ArgumentError(f"graph {graph}: '{tensor.name}' is {buffer.dtype}{list(buffer.shape)}, expected {wanted}")


def first_line(error: BaseException) -> str:
    """What an engine says, without the trace that follows, of bounded length."""
    return str(error).strip().split("\n", 1)[0].strip()[:300] or type(error).__name__


def check_write(array: Array, buffer: Buffer) -> None:
    """ArgumentError unless the array has the buffer's shape and dtype."""
    if array.shape != buffer.shape or array.dtype != buffer.dtype:
        have = f"{buffer.dtype}{list(buffer.shape)}"
        raise ArgumentError(f"cannot write {array.dtype}{list(array.shape)} into a buffer of {have}")


class HostBuffer:
    """A buffer in the host's memory, for backends that compute there."""

    def __init__(self, array: Array) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def write(self, array: Array) -> None:
        check_write(array, self)
        np.copyto(self.array, array)

    def read(self) -> Array:
        return self.array.copy()

    def view(self, shape: Sequence[int]) -> HostBuffer:
        return HostBuffer(self.array.reshape(-1)[: math.prod(shape)].reshape(shape))

    def place(self, source: Buffer, at: int) -> None:
        assert isinstance(source, HostBuffer)
        self.array[..., at : at + source.shape[-2], :] = source.array


class Storage:
    """Named memory that grows and never shrinks: a smaller shape is a view of what a larger one allocated.

    Prompts differ by a token from one observation to the next; with this, they cost no allocation.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._blocks: dict[str, Buffer] = {}
        self.growths = 0  # how often a block was replaced; buffers taken before do not alias the new one

    def take(self, tensor: TensorSpec, symbols: Mapping[str, int]) -> Buffer:
        """The buffer of `tensor` with the shape that `symbols` give it."""
        shape = shape_of(tensor, symbols)
        count = math.prod(shape)
        block = self._blocks.get(tensor.name)
        if block is None or block.shape[0] < count:
            self._blocks[tensor.name] = block = self._session.allocate((count,), tensor.dtype)
            self.growths += 1
        return block.view(shape)
