"""A bundle's graphs on one of OpenVINO's devices, every tensor bound to memory that the runtime owns.

A tensor of the engine's is made over each buffer's own memory, so that K/V and the Euler state go from one graph to the
next without a copy; on a GPU or NPU the buffers are host memory of its driver where it has such, else the engine
copies. Weights are mapped from the bundle's file. On a CPU the engine keeps those of matrix products a second time, in
its own order.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.errors import ArgumentError, BackendError, BundleError
from ki_edge.graphs import GraphSpec, TensorSpec
from ki_runtime.backends.backend import GraphOpener, SessionOptions, Setting
from ki_runtime.backends.ort import of_engines
from ki_runtime.backends.processor import processor
from ki_runtime.backends.session import Binding, Buffer, HostBuffer, Loaded, Session
from ki_runtime.backends.variant import Variant

from . import cache
from .devices import Device, check_rounding, failure, find, openvino, settings, version
from .mapped import let_go
from .rewriting import keep_tables_mapped

FORM = "1"  # of compiled graphs: another one whenever graphs are rewritten or compiled differently
TYPES = {"float32": "f32", "float16": "f16", "bool": "boolean", "uint8": "u8", "int32": "i32", "int64": "i64"}


@dataclass(frozen=True)
class Engine:
    """OpenVINO with one device and one rounding: what the registry asks of a backend's module."""

    variant: Variant

    def obstacle(self, bundle: Bundle | None, package: str) -> str | None:
        """Why it cannot run this bundle here, or None."""
        if bundle is not None and (reason := of_engines(bundle)) is not None:
            return reason
        if bundle is not None and bundle.manifest.precision == "int8":
            return (
                "OpenVINO misreads int8 graphs, whose activations have one scale a token: take ort for int8, or export "
                "with --target openvino --precision fp32 or bf16"
            )
        try:
            find(openvino().Core(), self.variant)
        except BackendError as error:
            return str(error)
        return None

    def connect(self, bundle: Bundle, package: str, options: SessionOptions) -> GraphOpener:
        """What opens the bundle's graphs on the device."""
        core = openvino().Core()
        return Connection(core, find(core, self.variant), self.variant, bundle, options).open

    def setting(self, bundle: Bundle, package: str, names: Sequence[str]) -> Setting:
        """Results depend on the engine's version, on the device, on the rounding, and on the graphs as compiled."""
        device, folder = find(openvino().Core(), self.variant), folder_of(bundle)
        environment = _identity(device, self.variant)
        for name in names:
            kept = next(cache.read(folder, name, _graph_identity(bundle, device, self.variant, name)), None)
            environment |= {} if kept is None else _compiled(name, kept)
        return Setting(environment, folder, self.variant.rounding)


def engine_of(variant: Variant) -> Engine:
    """The backend on that device, in that rounding."""
    return Engine(variant)


class Connection:
    """What the sessions of one bundle share: the engine's core, the device and its memory."""

    def __init__(self, core: Any, device: Device, variant: Variant, bundle: Bundle, options: SessionOptions) -> None:
        self.core, self.device, self.variant = core, device, variant
        self._bundle, self._options = bundle, options
        self._sizes = graphs.sizes(bundle.manifest.config, len(bundle.manifest.vocabulary.ids))

    def open(self, spec: GraphSpec) -> OpenVinoSession:
        """Load one graph: as it was compiled before, or compiled now and kept.

        What runs is always what was kept, so that a proof is about the same bytes at the next start.
        """
        path, folder = self._bundle.graph(spec.name), folder_of(self._bundle)
        identity = _graph_identity(self._bundle, self.device, self.variant, spec.name)
        for found in cache.read(folder, spec.name, identity):
            compiled = self._load(found)
            if compiled is not None:
                return self._session(path, spec, compiled, found, folder)
        kept = cache.keep(folder, spec.name, identity, self._compile(path, spec.name))
        compiled = self._load(kept)
        if compiled is None:
            raise BackendError(f"OpenVINO {version()} compiles {path} and does not load what it compiled; upgrade it")
        return self._session(path, spec, compiled, kept, folder)

    @cached_property
    def memory(self) -> Any:
        """What makes host tensors that the device reads where they are; None: any memory of the host will do."""
        if self.device.name == "CPU":
            return None
        try:
            return self.core.get_default_context(self.device.name).create_host_tensor
        except Exception:  # a device without such memory: the engine copies
            return None

    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer:
        """New memory, all zeros."""
        if self.memory is None or 0 in shape:
            return HostBuffer(np.zeros(shape, dtype))
        tensor = self.memory(getattr(openvino().Type, TYPES[dtype]), list(shape))
        array = tensor.data
        array[...] = 0
        return HostBuffer(array)  # a view keeps the driver's memory alive

    def let_go(self) -> None:
        """Let go of the pages of weights that were read so far."""
        let_go(self._bundle.weights().path)

    def _compile(self, path: Path, graph: str) -> bytes:
        """The graph compiled for the device, without weights."""
        try:
            model = self.core.read_model(str(path))
            keep_tables_mapped(model)
            compiled = self.core.compile_model(model, self.device.name, dict(self._settings))
            check_rounding(compiled, self.variant, graph)
            content = compiled.export_model()
        except BackendError:
            raise
        except Exception as error:  # the engine's own, a bare RuntimeError
            raise failure(f"{version()} cannot compile {path}", error) from error
        return bytes(content.getvalue() if hasattr(content, "getvalue") else content)

    def _load(self, found: cache.Compiled) -> Any:
        """The engine's model; None if it refuses a file, which is taken away."""
        weights = str(self._bundle.weights().path)
        try:
            settings = {**self._settings, "WEIGHTS_PATH": weights}
            return self.core.import_model(io.BytesIO(found.content), self.device.name, settings)
        except Exception:  # damaged, or of a build that calls itself the same
            cache.forget(found)
            return None

    def _session(
        self, path: Path, spec: GraphSpec, compiled: Any, found: cache.Compiled, folder: Path
    ) -> OpenVinoSession:
        check_rounding(compiled, self.variant, spec.name)
        session = OpenVinoSession(self, path, spec, self._sizes, compiled)
        self.let_go()
        session.loaded = Loaded(_compiled(spec.name, found), folder)
        return session

    @property
    def _settings(self) -> Mapping[str, Any]:
        return settings(self.variant, self._options.threads)


class OpenVinoBinding:
    """Tensors over the buffers of every input and output, which are kept alive here."""

    def __init__(self, session: OpenVinoSession, tensors: Sequence[tuple[Any, Any]]) -> None:
        self._session, self._tensors = session, tensors

    def run(self) -> None:
        self._session.infer(self._tensors)


class OpenVinoSession(Session):
    """A compiled graph with one request, whose tensors are changed from run to run."""

    def __init__(
        self, connection: Connection, path: Path, spec: GraphSpec, sizes: Mapping[str, int], compiled: Any
    ) -> None:
        super().__init__(spec, sizes)
        self._connection = connection
        check_signature(path, spec.inputs, compiled.inputs, sizes)
        check_signature(path, spec.outputs, compiled.outputs, sizes)
        self._ports = {name: port for port in (*compiled.inputs, *compiled.outputs) for name in port.get_names()}
        self._compiled, self._request = compiled, compiled.create_infer_request()
        self._bound: dict[int, Any] = {}  # port -> the tensor that the request has there
        self._fresh = True  # the first run copies more weights into the engine's own order

    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer:
        return self._connection.allocate(shape, dtype)

    def infer(self, tensors: Sequence[tuple[Any, Any]]) -> None:
        """Run over these (port, tensor). BackendError for whatever the engine raises."""
        try:
            for at, (port, tensor) in enumerate(tensors):
                if self._bound.get(at) is not tensor:
                    self._request.set_tensor(port, tensor)
                    self._bound[at] = tensor
            self._request.start_async()  # `infer` would compute in this thread, which the engine's own then wait for
            self._request.wait()
            if self._fresh:
                self._fresh = False
                self._connection.let_go()
        except Exception as error:
            self._bound.clear()
            raise failure(f"failed in graph {self.spec.name}", error) from error

    def _bind(self, buffers: Mapping[str, Buffer]) -> Binding:
        return OpenVinoBinding(self, [(self._ports[name], _tensor(buffer)) for name, buffer in buffers.items()])


def check_signature(path: Path, wanted: Sequence[TensorSpec], found: Sequence[Any], sizes: Mapping[str, int]) -> None:
    """BundleError unless the graph's tensors are those of graphs.py: names in order, element types, dimensions."""
    names, expected = [sorted(port.get_names()) for port in found], [[tensor.name] for tensor in wanted]
    if names != expected:
        raise BundleError(f"{path}: tensors {names} where {expected} are expected: export the checkpoint again")
    for tensor, port in zip(wanted, found, strict=True):
        dims = tensor.resolve(sizes)
        shape = [None if dim.is_dynamic else dim.get_length() for dim in port.get_partial_shape()]
        kind = port.get_element_type().get_type_name()
        fits = len(shape) == len(dims) and all(
            have is None or (isinstance(want, int) and have == want) for want, have in zip(dims, shape, strict=True)
        )
        if not fits or kind != TYPES[tensor.dtype]:
            raise BundleError(
                f"{path}: '{tensor.name}' is {kind}{shape}, expected {tensor.dtype}{list(dims)}: the graph does not "
                "belong to this manifest; export the checkpoint again"
            )


def _tensor(buffer: Buffer) -> Any:
    """The engine's tensor over a buffer's own memory."""
    if not isinstance(buffer, HostBuffer):
        raise ArgumentError(f"OpenVINO cannot bind a {type(buffer).__name__} of another backend")
    return openvino().Tensor(buffer.array, shared_memory=True)


def _identity(device: Device, variant: Variant) -> dict[str, str]:
    where = device.title if device.name == "CPU" else f"{device.name} {device.title}"
    return {"openvino": version(), "device": where, "processor": processor(), "arithmetic": variant.rounding}


def _graph_identity(bundle: Bundle, device: Device, variant: Variant, graph: str) -> dict[str, str]:
    """What a compiled graph depends on."""
    manifest = bundle.manifest
    files = (bundle.graph(graph).name, str(manifest.weights["file"]))
    hashes = {name: str(manifest.files[name].get("sha256")) for name in files}
    return {"form": FORM, **_identity(device, variant), **hashes}


def _compiled(graph: str, found: cache.Compiled) -> dict[str, str]:
    """A compiled graph in the record of a proof."""
    return {f"compiled {graph}": found.sha256}


def folder_of(bundle: Bundle) -> Path:
    """Where compiled graphs and proofs lie."""
    return bundle.path / "engines" / "openvino"
