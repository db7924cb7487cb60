"""TensorRT, TensorRT-RTX and the lean runtime on one GPU: engines of a bundle behind the session seam.

All sessions of a connection put their work on one stream, in the order of the calls, so outputs of one graph are
inputs of the next without waiting. A sequence of runs is recorded as one CUDA graph after its first time.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError, DeviceError
from ki_edge.graphs import GraphSpec

from ..backends import GraphOpener, SessionOptions, Setting
from ..session import Binding, Bucket, Buffer, Sequential, Session
from . import engines as stored
from .api import Api
from .buffers import DeviceBuffer, Gpu, owned
from .build import ensure_engines, rebuild
from .contexts import Context, EngineContexts, Scratch, Shapes
from .cuda import Cuda, Recording
from .engines import Engines
from .facts import gpu_facts
from .profiles import PROMPT_BUCKET
from .requirements import check_precision

CACHE_BUCKET = 64  # places in a FAST cache
ELEMENT_TYPES = {"uint8": "UINT8", "bool": "BOOL", "int32": "INT32", "float32": "FLOAT"}


def obstacle(bundle: Bundle | None, package: str) -> str | None:
    """Why TensorRT cannot run this bundle on this machine, or None; engines that can be built are no obstacle."""
    try:
        device = Cuda.load().device()
        api = Api.load(package)
        if bundle is not None:
            check_precision(bundle.manifest.precision, [device.capability])
            if not api.can_build:
                stored.find(bundle, api, device)
    except BackendError as error:
        return str(error)
    return None


def connect(bundle: Bundle, package: str, options: SessionOptions) -> GraphOpener:
    """What opens a bundle's graphs. Engines that do not exist yet are built now, if this TensorRT can."""
    cuda, api = Cuda.load(), Api.load(package)
    device = cuda.device()
    engines = ensure_engines(bundle, api, device, options.say, verify=options.verify)
    again = (lambda broken: rebuild(bundle, api, device, broken, options.say)) if api.can_build else None
    return Connection(api, Gpu(cuda), engines, bundle, options, again).open


def setting(bundle: Bundle, package: str, names: Sequence[str]) -> Setting:
    """Results depend on the engines, on the TensorRT that runs them, on the GPU and on its driver."""
    cuda, api = Cuda.load(), Api.load(package)
    engines = stored.find(bundle, api, cuda.device())
    folder = engines.path(names[0]).parent  # BackendError if that graph was left out
    hashes = {f"engine {name}": engines.files[name].sha256 for name in names}
    return Setting({**hashes, api.name: api.version_text, **gpu_facts(cuda)}, folder)


class Connection:
    """What the sessions of one bundle share: the stream, TensorRT's runtime, scratch memory, the engines' files.

    `rebuild`: builds engines that do not load again; it is asked once.
    """

    def __init__(
        self,
        api: Api,
        gpu: Gpu,
        engines: Engines,
        bundle: Bundle,
        options: SessionOptions,
        rebuild: Callable[[Engines], Engines] | None = None,
    ) -> None:
        self.api, self.gpu, self.options = api, gpu, options
        self.scratch = Scratch(gpu)
        self._engines, self._rebuild = engines, rebuild
        self._sizes = graphs.sizes(bundle.manifest.config, len(bundle.manifest.vocabulary.ids))
        self._problem = ""  # the last error that TensorRT logged
        self._logger = api.logger(self._log)
        self._runtime = api.runtime(self._logger, lean=engines.identity.lean)

    def open(self, graph: GraphSpec) -> TensorRTSession:
        """Load one graph's engine.

        BackendError if the engine does not load or is not of this graph, DeviceMemoryError if the GPU has no room.
        """
        path = self._engines.path(graph.name)
        engine = self._load(path)
        if engine is None and self._rebuild is not None:
            again, self._rebuild = self._rebuild, None
            self.options.say(f"{self.failure(f'cannot load {path}')}; building it again")
            self._engines = again(self._engines)
            path = self._engines.path(graph.name)
            engine = self._load(path)
        if engine is None:
            raise self.failure(f"cannot load {path}; build it again")
        check_signature(path, graph, engine, self._sizes)
        return TensorRTSession(self, graph, self._sizes, engine, path)

    def failure(self, what: str) -> BackendError:
        """The error of something that TensorRT refused: what CUDA knows of it, else what TensorRT logged."""
        try:
            self.gpu.cuda.check(self.gpu.stream)
        except BackendError as error:
            return error
        logged, self._problem = self._problem, ""
        return BackendError(f"{self.api.title}: {what}{f': {logged}' if logged else ''}")

    def _load(self, path: Path) -> Any:
        """The engine, None if TensorRT refuses it though there is room."""
        try:
            size = path.stat().st_size
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                engine = self._runtime.deserialize_cuda_engine(content)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise BackendError(f"cannot read {path} ({error}); build it again") from error
        if engine is None:
            free, _ = self.gpu.cuda.memory()
            if free < size:
                raise self.gpu.cuda.full(size)
        return engine

    def _log(self, severity: str, message: str) -> None:
        if severity == "error":
            self._problem = " ".join(message.split())


class TensorRTSession(Session):
    """One engine. Its contexts live as long as the bindings that use them."""

    def __init__(
        self, connection: Connection, spec: GraphSpec, sizes: Mapping[str, int], engine: Any, path: Path
    ) -> None:
        super().__init__(spec, sizes)
        self._connection, self._gpu = connection, connection.gpu
        self._contexts = EngineContexts(
            connection.api, self._gpu, engine, connection.scratch, path.with_suffix(".kernels"), self._failure
        )
        self._open: WeakValueDictionary[Shapes, Context] = WeakValueDictionary()
        self._records = connection.options.record is not False
        if spec.name == graphs.PREFIX.name:
            self.prompt_bucket = Bucket(PROMPT_BUCKET, self._contexts.limit("prompt_tokens", 1))
        if spec.name == graphs.FAST_DECODE.name:
            self.cache_bucket = Bucket(CACHE_BUCKET, self._contexts.limit("cache_mask", 1))

    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer:
        return self._gpu.allocate(shape, dtype)

    def sequence(self, bindings: Sequence[Binding]) -> Binding:
        return Recorded(self, bindings)

    def record(self, bindings: Sequence[Binding]) -> Recording | None:
        """The bindings as one CUDA graph; None if they cannot be recorded, which is said once."""
        chain = Sequential(bindings)
        try:
            if not all(binding.recordable for binding in bindings if isinstance(binding, TensorRTBinding)):
                raise BackendError("the engine cannot be recorded")
            return self._gpu.cuda.record(self._gpu.stream, chain.run)
        except DeviceError:
            raise
        except BackendError as error:
            if self._records:
                self._connection.options.say(f"graph {self.spec.name} runs without CUDA graphs, slower: {error}")
            self._records = False
            return None
        finally:
            self._contexts.keep_kernels()

    def keep_kernels(self) -> None:
        """Write down the kernels that were finished on this GPU, for the next start."""
        self._contexts.keep_kernels()

    @property
    def records(self) -> bool:
        return self._records

    def _bind(self, buffers: Mapping[str, Buffer]) -> Binding:
        tensors = {name: owned(buffer, self._gpu) for name, buffer in buffers.items()}
        inputs, outputs = ({t.name: tensors[t.name].shape for t in part} for part in (self.inputs, self.outputs))
        shapes = tuple(inputs.items())
        context = self._open.get(shapes)
        if context is None:
            context = self._open[shapes] = self._contexts.open(inputs, outputs)
        return TensorRTBinding(context, tensors)

    def _failure(self, what: str) -> BackendError:
        return self._connection.failure(f"graph {self.spec.name}: {what}")


class TensorRTBinding:
    """An engine with memory for every tensor."""

    def __init__(self, context: Context, buffers: Mapping[str, DeviceBuffer]) -> None:
        self._context = context
        self._buffers = buffers  # kept alive
        self._addresses = {name: buffer.address for name, buffer in buffers.items()}

    @property
    def recordable(self) -> bool:
        return self._context.recordable()

    def run(self) -> None:
        self._context.enqueue(self._addresses)


class Recorded:
    """Bindings that run one by one the first time, which settles their shapes, and as one CUDA graph from then on.

    Where nothing is recorded they run one by one forever.
    """

    def __init__(self, session: TensorRTSession, bindings: Sequence[Binding]) -> None:
        self._session, self._bindings = session, tuple(bindings)
        self._recording: Recording | None = None
        self._settled = False

    def run(self) -> None:
        if self._recording is not None:
            self._recording.launch()
            return
        for binding in self._bindings:
            binding.run()
        if self._session.records:
            self._recording = self._session.record(self._bindings)
        elif not self._settled:
            self._session.keep_kernels()
        self._settled = True


def check_signature(path: Path, spec: GraphSpec, engine: Any, sizes: Mapping[str, int]) -> None:
    """BackendError unless the engine's tensors are those of graphs.py, all on the device."""
    found = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    wanted = {tensor.name: tensor for tensor in (*spec.inputs, *spec.outputs)}
    if found != set(wanted):
        raise BackendError(f"{path}: tensors {sorted(found)} where {sorted(wanted)} are expected: build it again")
    for name, tensor in wanted.items():
        mode = "INPUT" if tensor in spec.inputs else "OUTPUT"
        facts = (engine.get_tensor_mode(name).name, engine.get_tensor_dtype(name).name)
        dims, shape = tensor.resolve(sizes), tuple(engine.get_tensor_shape(name))
        same = all(isinstance(want, str) or have in (-1, want) for want, have in zip(dims, shape, strict=False))
        fits = facts == (mode, ELEMENT_TYPES[tensor.dtype]) and len(dims) == len(shape) and same
        if not fits or engine.get_tensor_location(name).name != "DEVICE":
            raise BackendError(
                f"{path}: '{name}' is {facts[0]} {facts[1]}{list(shape)}, expected {mode} "
                f"{ELEMENT_TYPES[tensor.dtype]}{list(dims)}: the engine is not of this bundle; build it again"
            )
