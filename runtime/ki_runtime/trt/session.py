"""TensorRT, TensorRT-RTX and the lean runtime on one GPU: engines of a bundle behind the session seam.

All sessions of a connection put their work on one stream, in the order of the calls, so outputs of one graph are
inputs of the next without waiting. A sequence of runs is recorded as one CUDA graph after its first time.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.dtypes import BY_NAME
from ki_edge.errors import BackendError
from ki_edge.graphs import GraphSpec
from ki_runtime.backends.backend import GraphOpener, SessionOptions, Setting
from ki_runtime.backends.session import Loaded
from ki_runtime.gpu.buffers import Gpu
from ki_runtime.gpu.cuda import Cuda
from ki_runtime.gpu.device import check_precision
from ki_runtime.gpu.identity import gpu_environment

from .api import Api
from .bindings import TensorRTSession
from .build import ensure_engines, rebuild
from .contexts import Scratch, refusing
from .engines import ACTING, Engines
from .selection import EngineSet, find
from .targets import check_served


def obstacle(bundle: Bundle | None, package: str) -> str | None:
    """Why TensorRT cannot run this bundle on this machine, or None; engines that can be built are no obstacle."""
    try:
        device = Cuda.load().device()
        api = Api.load(package)
        if bundle is not None:
            check_precision(bundle.manifest.precision, [device.capability])
        check_served(api, device)
        if bundle is not None and not api.can_build:
            find(bundle, api, device, trust=True)  # whether they are to be trusted is asked when they are loaded
    except BackendError as error:
        return str(error)
    return None


def connect(bundle: Bundle, package: str, options: SessionOptions) -> GraphOpener:
    """What opens a bundle's graphs. Engines that are missing are built if `options.build` says so.

    BackendError with the command that builds them if it does not, or if this TensorRT cannot.
    """
    cuda, api = Cuda.load(), Api.load(package)
    device = cuda.device()
    fitting = partial(find, bundle, api, device, verify=options.verify, trust=options.trust)
    if options.build:
        acting = ensure_engines(bundle, api, device, options.say, verify=options.verify, trust=options.trust)
    else:
        acting = _without_building(fitting, api)

    found = dict(acting.of)  # looked for once, however often a graph is opened

    def engines(graph: str) -> Engines:
        if graph not in found:
            found[graph] = fitting((graph,)).of[graph]
        return found[graph]

    can = options.build and api.can_build
    again = (lambda broken: rebuild(bundle, api, device, broken, options.say)) if can else None
    return Connection(api, Gpu(cuda), engines, bundle, options, again).open


def setting(bundle: Bundle, package: str, names: Sequence[str]) -> Setting:
    """Results depend on the engines, on the TensorRT that runs them, on the GPU and on its driver."""
    cuda, api = Cuda.load(), Api.load(package)
    engines = find(bundle, api, cuda.device(), names, trust=True)  # that was asked when they were loaded
    hashes = {key: value for name in names for key, value in engine_facts(engines.of[name], name).items()}
    folder = engines.path(names[0]).parent
    return Setting({**hashes, api.name: api.version_text, **gpu_environment(cuda)}, folder)


def engine_facts(engines: Engines, graph: str) -> dict[str, str]:
    """What tells one graph's engine from every other."""
    return {f"engine {graph}": engines.files[graph].sha256}


def _without_building(fitting: Callable[..., EngineSet], api: Api) -> EngineSet:
    """The engines that act; BackendError with all that can be done where there are none."""
    try:
        return fitting(ACTING)
    except BackendError as error:
        if not api.can_build:
            raise
        raise BackendError(f"{error}, or open it with build=True") from None


class Connection:
    """What the sessions of one bundle share: the stream, TensorRT's runtime, scratch memory, the engines' files.

    `engines(graph)`: where that graph's engine is; BackendError if there is none. `rebuild`: builds engines that do not
    load again; it is asked once.
    """

    def __init__(
        self,
        api: Api,
        gpu: Gpu,
        engines: Callable[[str], Engines],
        bundle: Bundle,
        options: SessionOptions,
        rebuild: Callable[[Engines], Engines] | None = None,
    ) -> None:
        self.api, self.gpu, self.options = api, gpu, options
        self.scratch = Scratch(gpu)
        self._engines, self._rebuild = engines, rebuild
        self._rebuilt: dict[Path, Engines] = {}  # the folder of engines that did not load -> those in their place
        self._sizes = graphs.sizes(bundle.manifest.config, len(bundle.manifest.vocabulary.ids))
        self._problem = ""  # the last error that TensorRT logged
        self._logger = api.logger(self._log)
        self._runtimes: dict[bool, Any] = {}  # whether it takes code of the host's

    def open(self, graph: GraphSpec) -> TensorRTSession:
        """Load one graph's engine.

        BackendError if the engine does not load or is not of this graph, DeviceMemoryError if the GPU has no room.
        """
        engines = self._engines(graph.name)
        engines = self._rebuilt.get(engines.folder, engines)
        identity = engine_facts(engines, graph.name)
        path = engines.path(graph.name)
        engine = self._load(path, lean=engines.identity.lean)
        if engine is None and self._rebuild is not None:
            again, self._rebuild = self._rebuild, None
            self.options.say(f"{self.failure(f'cannot load {path}')}; building it again")
            made = self._rebuilt[engines.folder] = again(engines)
            path, identity = made.path(graph.name), engine_facts(made, graph.name)
            engine = self._load(path, lean=made.identity.lean)
        if engine is None:
            raise self.failure(f"cannot load {path}; build it again")
        check_signature(path, graph, engine, self._sizes)  # of a foreign engine, contexts would fail unclearly
        session = TensorRTSession(self, graph, self._sizes, engine, path)
        session.loaded = Loaded(identity, path.parent)
        return session

    def failure(self, what: str) -> BackendError:
        """The error of something that TensorRT refused: what CUDA knows of it, else what TensorRT logged."""
        try:
            self.gpu.cuda.check(self.gpu.stream)
        except BackendError as error:
            return error
        logged, self._problem = self._problem, ""
        return BackendError(f"{self.api.title}: {what}{f': {logged}' if logged else ''}")

    def _load(self, path: Path, *, lean: bool) -> Any:
        """The engine, None if TensorRT refuses it though there is room."""
        try:
            size = path.stat().st_size
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                engine = self._deserialize(content, lean)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise BackendError(f"cannot read {path} ({error}); build it again") from error
        if engine is None:
            free, _ = self.gpu.cuda.memory()
            if free < size:
                raise self.gpu.cuda.full(size)
        return engine

    def _deserialize(self, content: mmap.mmap, lean: bool) -> Any:
        """The engine, None if TensorRT refuses it, by a word or by an exception."""
        with refusing(self.failure, "no runtime"):
            if lean not in self._runtimes:
                self._runtimes[lean] = self.api.runtime(self._logger, lean=lean)
        try:
            return self._runtimes[lean].deserialize_cuda_engine(content)
        except Exception as error:
            self._log("error", str(error) or type(error).__name__)
            return None

    def _log(self, severity: str, message: str) -> None:
        if severity == "error":
            self._problem = " ".join(message.split())


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
        fits = facts == (mode, BY_NAME[tensor.dtype].trt) and len(dims) == len(shape) and same
        if not fits or engine.get_tensor_location(name).name != "DEVICE":
            raise BackendError(
                f"{path}: '{name}' is {facts[0]} {facts[1]}{list(shape)}, expected {mode} "
                f"{BY_NAME[tensor.dtype].trt}{list(dims)}: the engine is not of this bundle; build it again"
            )
