"""Execution contexts of one engine: each fixed to the shapes of one set of buffers, all sharing one scratch memory.

A context keeps its shapes, because a change of shapes rebuilds its state. What is recorded into a CUDA graph has a
context of its own for every run in it, which is never used again: a plan may keep addresses in host memory that a
recorded node reads, so every replay would use those that its context was given last. NVIDIA's rule is one context for
each recorded graph; a graph of ten runs over ten sets of addresses needs ten. Eager runs give TensorRT their addresses
anew each time, so those of one shape share a context.

Scratch memory is given to the contexts rather than taken by each. All of them run on one stream, one after another,
recorded or not, so they share it; whoever was given a piece keeps it alive, and it never moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ki_edge.errors import BackendError, KiEdgeError
from ki_edge.files.reading import read_file
from ki_edge.files.writing import write_file
from ki_runtime.backends.session import first_line
from ki_runtime.gpu.buffers import Gpu
from ki_runtime.gpu.cuda import Memory

from .api import Api
from .profiles import within

MAX_KERNELS = 1 << 30  # bytes of a file of compiled kernels
Shape = tuple[int, ...]
Shapes = tuple[tuple[str, Shape], ...]
Failure = Callable[[str], BackendError]


@contextmanager
def refusing(failure: Failure, what: str) -> Iterator[None]:
    """Whatever TensorRT's bindings raise within becomes `failure(what)` with its reason."""
    try:
        yield
    except KiEdgeError:
        raise
    except Exception as error:
        raise failure(f"{what}: {first_line(error)}") from error


class Scratch:
    """Device memory for whatever runs now. Contexts keep the piece that they were given."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._memory: Memory | None = None

    def take(self, size: int) -> Memory:
        """A piece of at least so many bytes, the same one as before if that is large enough."""
        if self._memory is None or self._memory.size < size:
            self._memory = self._gpu.cuda.allocate(size)
        return self._memory


class EngineContexts:
    """Makes contexts of one engine. `failure(what)` gives the error of a call that the engine refused."""

    def __init__(self, api: Api, gpu: Gpu, engine: Any, scratch: Scratch, kernels: Path, failure: Failure) -> None:
        self._api, self._gpu, self._engine, self._scratch = api, gpu, engine, scratch
        self._failure = failure
        self._kernels = _Kernels(engine, kernels) if api.is_rtx else None

    def open(self, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> Context:
        """A new context for these shapes. BackendError if no profile holds them or the engine gives other outputs."""
        with refusing(self._failure, "no execution context"):
            return self._open(inputs, outputs)

    def _open(self, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> Context:
        dynamic = {name: shape for name, shape in inputs.items() if -1 in tuple(self._engine.get_tensor_shape(name))}
        profile = self._profile(dynamic)
        context, memory = self._create(profile)  # shapes are set within a profile, so it is chosen first
        for name, shape in dynamic.items():
            if not context.set_input_shape(name, shape):
                raise self._failure(f"'{name}' {list(shape)}")
        with refusing(self._failure, "its shapes are not known"):  # of outputs: once every input has its own
            missing = ", ".join(context.infer_shapes())
        if missing:
            raise self._failure(f"its shapes are not known: {missing}")
        for name, shape in outputs.items():
            found = tuple(context.get_tensor_shape(name))
            if found != shape:
                raise self._failure(f"the engine gives '{name}' as {list(found)}, expected {list(shape)}")
        return Context(context, self._gpu.stream, memory, self._failure)

    def limit(self, name: str, axis: int) -> int | None:
        """The largest size of a dimension that some profile holds; None if the engine leaves it open."""
        ranges = [self._range(name, index)[1] for index in range(self._engine.num_optimization_profiles)]
        return max((most[axis] for most in ranges), default=None)

    def keep_kernels(self) -> None:
        """Write down what was compiled on this GPU since the last time, where engines are finished at run time."""
        if self._kernels is not None:
            self._kernels.write()

    def _create(self, profile: int) -> tuple[Any, Memory]:
        strategy = self._api.module.ExecutionContextAllocationStrategy.USER_MANAGED
        choice = strategy if self._kernels is None else self._kernels.config(self._api.module, strategy)
        context = self._engine.create_execution_context(choice)
        if context is None:
            (free, _), need = self._gpu.cuda.memory(), int(self._engine.device_memory_size_v2)
            raise self._gpu.cuda.full(need) if free < need else self._failure("no execution context")
        if not context.set_optimization_profile_async(profile, self._gpu.stream):
            raise self._failure(f"optimization profile {profile}")
        memory = self._scratch.take(int(self._engine.device_memory_size_v2))
        context.set_device_memory(memory.address, memory.size)  # before its first run: it has taken none of its own
        self._gpu.synchronize()  # the switch of profiles is work on the stream, and must not become part of a recording
        return context, memory

    def _profile(self, shapes: Mapping[str, Shape]) -> int:
        """The first profile that holds these shapes."""
        outside: list[str] = []
        for index in range(self._engine.num_optimization_profiles):
            found = [(name, shape, *self._range(name, index)) for name, shape in shapes.items()]
            beyond = [item for item in found if not within(*item[1:])]
            if not beyond:
                return index
            outside += [f"'{n}' is {list(s)}, built for {list(least)} to {list(most)}" for n, s, least, most in beyond]
        raise self._failure(f"outside of the shapes of its engine: {'; '.join(outside)}")

    def _range(self, name: str, profile: int) -> tuple[Shape, Shape]:
        least, _, most = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(least), tuple(most)


class Context:
    """An execution context whose shapes never change."""

    def __init__(self, context: Any, stream: int, scratch: Memory, failure: Failure) -> None:
        self._context, self._stream, self._scratch, self._failure = context, stream, scratch, failure
        self._addresses: dict[str, int] = {}

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Put one run over these tensors on the stream."""
        with refusing(self._failure, "running it"):
            for name, address in addresses.items():
                if self._addresses.get(name) != address:
                    if not self._context.set_tensor_address(name, address):
                        raise self._failure(f"the address of '{name}'")
                    self._addresses[name] = address
            if not self._context.execute_async_v3(self._stream):
                raise self._failure("running it")

    def recordable(self) -> bool:
        """Whether its runs can be recorded; engines that cannot tell are tried."""
        tell = getattr(self._context, "is_stream_capturable", None)
        return tell is None or bool(tell(self._stream))


class _Kernels:
    """TensorRT-RTX finishes kernels on the GPU that runs them; they are kept in a file beside the engine.

    They are compiled for a shape before its first run, not while later runs use slower ones, so that what is recorded
    is final.
    """

    def __init__(self, engine: Any, path: Path) -> None:
        self._engine, self._path, self._size = engine, path, 0
        self._cache = engine.create_runtime_config().create_runtime_cache()
        if path.is_file():
            self._size = path.stat().st_size
            self._cache.deserialize(
                read_file(path, MAX_KERNELS, BackendError)
            )  # False for another driver or GPU: it starts empty

    def config(self, module: Any, strategy: Any) -> Any:
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = module.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = module.CudaGraphStrategy.DISABLED
        config.set_runtime_cache(self._cache)
        return config

    def write(self) -> None:
        content = bytes(memoryview(self._cache.serialize()))
        if len(content) == self._size:
            return
        self._size = len(content)
        with suppress(BackendError):  # a bundle that cannot be written compiles them again at the next start
            write_file(self._path, content, BackendError)
