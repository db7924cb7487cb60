"""One engine as a session: its bindings, run one by one or as one recorded CUDA graph.

What is recorded never shares an execution context with anything else, see `contexts`. A recording is made at the first
run of a sequence: each of its bindings gets a context, runs in it once, which settles the shapes as TensorRT asks for
and is this call's result, and is then recorded from it. After that nobody touches these contexts; they live as long as
the recording. Contexts for runs that are not recorded are made when the first of them comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

from ki_edge import graphs
from ki_edge.errors import BackendError, DeviceError, DeviceMemoryError
from ki_edge.graphs import GraphSpec
from ki_runtime.backends.backend import SessionOptions
from ki_runtime.backends.session import Binding, Bucket, Buffer, Session
from ki_runtime.gpu.buffers import DeviceBuffer, Gpu, owned
from ki_runtime.gpu.cuda import Recording

from .api import Api
from .contexts import Context, EngineContexts, Scratch, Shape, Shapes
from .profiles import PROMPT_BUCKET

CACHE_BUCKET = 64  # places in a FAST cache
RECORD_TRIES = 3  # of one sequence, where memory was short


class Shared(Protocol):
    """What the sessions of one connection share."""

    api: Api
    gpu: Gpu
    options: SessionOptions
    scratch: Scratch

    def failure(self, what: str) -> BackendError: ...


class TensorRTSession(Session):
    """One engine. Its contexts live as long as the bindings that use them.

    `records`: whether sequences are recorded: not once the engine or CUDA has refused it.
    """

    def __init__(self, shared: Shared, spec: GraphSpec, sizes: Mapping[str, int], engine: Any, path: Path) -> None:
        super().__init__(spec, sizes)
        self._gpu, self._say, self._shared = shared.gpu, shared.options.say, shared
        self.contexts = EngineContexts(
            shared.api, self._gpu, engine, shared.scratch, path.with_suffix(".kernels"), self._failure
        )
        self._eager: WeakValueDictionary[Shapes, Context] = WeakValueDictionary()
        self.records, self._short, self.replays = shared.options.record is not False, False, 0
        if spec.name == graphs.PREFIX.name:
            self.prompt_bucket = Bucket(PROMPT_BUCKET, self.contexts.limit("prompt_mask", 1))
        if spec.name == graphs.FAST_DECODE.name:
            self.cache_bucket = Bucket(CACHE_BUCKET, self.contexts.limit("cache_mask", 1))

    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer:
        return self._gpu.allocate(shape, dtype)

    def sequence(self, bindings: Sequence[Binding]) -> Binding:
        return Recorded(self, [binding for binding in bindings if isinstance(binding, TensorRTBinding)])

    def record(self, runs: Sequence[Run]) -> Recording | None:
        """Runs that were done once each, as one CUDA graph, which keeps them; None if it cannot be, which is said."""
        try:
            if not all(run.recordable() for run in runs):
                raise BackendError("the engine cannot be recorded")
            return self._gpu.cuda.record(self._gpu.stream, lambda: enqueue_all(runs), runs)
        except DeviceError:
            raise
        except DeviceMemoryError as error:
            self.postpone(error)
        except BackendError as error:
            self._say(f"graph {self.spec.name} runs without CUDA graphs, slower: {error}")
            self.records = False
        return None

    def replayed(self) -> None:
        """A record was launched."""
        self.replays = (self.replays or 0) + 1

    def stop_recording(self) -> None:
        self.records = False

    def postpone(self, error: DeviceMemoryError) -> None:
        """Say, once, that there was no room for a recording; later sequences may have it."""
        if not self._short:
            self._say(f"graph {self.spec.name} runs without CUDA graphs, slower, until there is more memory: {error}")
        self._short = True

    def eager_context(self, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> Context:
        """The context in which everything of these shapes runs that is not recorded."""
        shapes = tuple(inputs.items())
        context = self._eager.get(shapes)
        if context is None:
            context = self._eager[shapes] = self.contexts.open(inputs, outputs)
        return context

    def _bind(self, buffers: Mapping[str, Buffer]) -> Binding:
        return TensorRTBinding(self, {name: owned(buffer, self._gpu) for name, buffer in buffers.items()})

    def _failure(self, what: str) -> BackendError:
        return self._shared.failure(f"graph {self.spec.name}: {what}")


class TensorRTBinding:
    """An engine with memory for every tensor."""

    def __init__(self, session: TensorRTSession, buffers: Mapping[str, DeviceBuffer]) -> None:
        self._session = session
        self._buffers = buffers  # kept alive
        self._addresses = {name: buffer.address for name, buffer in buffers.items()}
        self._context: Context | None = None

    def run(self) -> None:
        if self._context is None:
            self._context = self._with_shapes(self._session.eager_context)
        self._context.enqueue(self._addresses)

    def alone(self) -> Run:
        """The same as a run with a context of its own."""
        return Run(self._with_shapes(self._session.contexts.open), self._addresses)

    def _with_shapes(self, make: Callable[[Mapping[str, Shape], Mapping[str, Shape]], Context]) -> Context:
        parts = self._session.inputs, self._session.outputs
        inputs, outputs = ({t.name: self._buffers[t.name].shape for t in part} for part in parts)
        return make(inputs, outputs)


class Run:
    """A context and the only addresses that it is ever given."""

    def __init__(self, context: Context, addresses: Mapping[str, int]) -> None:
        self._context, self._addresses = context, addresses

    def enqueue(self) -> None:
        self._context.enqueue(self._addresses)

    def recordable(self) -> bool:
        return self._context.recordable()


def enqueue_all(runs: Sequence[Run]) -> None:
    """Put them on the stream in their order."""
    for run in runs:
        run.enqueue()


class Recorded:
    """Bindings that run one by one the first time, and as one CUDA graph from then on.

    Where there was no memory for that they run one by one, and the next runs try again, RECORD_TRIES times in all.
    """

    def __init__(self, session: TensorRTSession, bindings: Sequence[TensorRTBinding]) -> None:
        self._session, self._bindings = session, tuple(bindings)
        self._recording: Recording | None = None
        self._tries, self._settled = RECORD_TRIES, False

    def run(self) -> None:
        if self._recording is not None:
            self._recording.launch()  # reads the inputs as they are now, at the addresses that were recorded
            self._session.replayed()
            return
        runs = self._runs() if self._session.records and self._tries else None
        if runs is None:
            for binding in self._bindings:
                binding.run()
        else:
            enqueue_all(runs)  # this call's result; new shapes need one run before they can be recorded
            self._recording = self._session.record(runs)  # on the same stream; what is recorded does not run now
        if not self._settled or runs is not None:
            self._session.contexts.keep_kernels()
        self._settled = True

    def _runs(self) -> list[Run] | None:
        self._tries -= 1
        try:
            return [binding.alone() for binding in self._bindings]
        except DeviceMemoryError as error:
            self._session.postpone(error)
            return None
