"""ONNX Runtime on the CPU, every tensor bound to memory that the runtime owns.

Prepacking copies a weight into the engine's own form, in anonymous memory, and lets go of its pages of the file: as
much memory, but none that other sessions share or that the system can take back. It pays where few rows meet a weight,
in the denoise graph (a third of the time in float32), and for 8-bit weights everywhere (two to three times as fast);
float32 weights of the other graphs stay in the mapped file (docs/precision.md has the figures). Weights of 16 bits are
widened while running, one at a time: the engine must neither fold the widening at load nor plan the memory of all
widened weights at once.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.dtypes import BY_NAME, LOW_PRECISIONS
from ki_edge.errors import ArgumentError, BackendError, BundleError
from ki_edge.graphs import Dim, GraphSpec, TensorSpec
from ki_edge.proc import cpu_info

from .backend import GraphOpener, SessionOptions, Setting
from .processor import processor
from .session import Binding, Buffer, HostBuffer, Session, first_line

ERRORS_ONLY = 3
# its kernel for a sum and a LayerNorm together takes five times as long as the two kernels
SLOW = ["SkipLayerNormFusion"]


@dataclass(frozen=True)
class WeightLayout:
    """How a bundle's weights are used: `packed` into the engine's own form, or `widened` from 16 bits while running."""

    packed: bool = False
    widened: bool = False


class OrtBinding:
    """One IoBinding; the OrtValues alias numpy arrays, which are kept alive here."""

    def __init__(self, session: Any, name: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        self._session = session
        self._name = name
        self._io = session.io_binding()
        for tensor, buffer in inputs.items():
            self._io.bind_ortvalue_input(tensor, _ort_value(buffer))
        for tensor, buffer in outputs.items():
            self._io.bind_ortvalue_output(tensor, _ort_value(buffer))
        self._buffers = (*inputs.values(), *outputs.values())

    def run(self) -> None:
        try:
            self._session.run_with_iobinding(self._io)
        except Exception as error:  # the library raises its own types and bare RuntimeError
            raise BackendError(f"onnxruntime failed in graph {self._name}: {first_line(error)}") from error


class OrtSession(Session):
    """An InferenceSession of the CPU provider."""

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        sizes: Mapping[str, int],
        options: SessionOptions,
        layout: WeightLayout | None = None,
    ) -> None:
        super().__init__(spec, sizes)
        try:
            self._session = load(path, options, layout or WeightLayout())
        except ArgumentError:
            raise
        except Exception as error:
            raise BackendError(
                f"onnxruntime {onnxruntime().__version__} cannot load {path}: {first_line(error)}; "
                "check the bundle with --verify, or upgrade onnxruntime"
            ) from error
        check_signature(path, spec.inputs, self._session.get_inputs(), sizes)
        check_signature(path, spec.outputs, self._session.get_outputs(), sizes)

    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer:
        return HostBuffer(np.zeros(shape, dtype))

    def _bind(self, buffers: Mapping[str, Buffer]) -> Binding:
        inputs = {tensor.name: buffers[tensor.name] for tensor in self.inputs}
        outputs = {tensor.name: buffers[tensor.name] for tensor in self.outputs}
        return OrtBinding(self._session, self.spec.name, inputs, outputs)


def obstacle(bundle: Bundle | None, package: str) -> str | None:
    """Why ONNX Runtime's CPU provider cannot run this bundle, or None."""
    if bundle is not None and (reason := of_engines(bundle)) is not None:
        return reason
    if bundle is not None and bundle.manifest.precision == "bfloat16":
        return (
            "ONNX Runtime has no bfloat16 products on a CPU: run the bundle on a GPU, "
            "or export with --precision fp32 or int8"
        )
    return None


def of_engines(bundle: Bundle) -> str | None:
    """Why no engine but TensorRT's runs a bundle whose products are in its eight or four bits; None for other bundles.

    Others would widen each weight whenever it is used: slower than float16, and not what was proven.
    """
    if bundle.manifest.precision not in LOW_PRECISIONS.values():
        return None
    return (
        f"precision {bundle.manifest.precision} is for TensorRT's engines: ki-build makes them on a GPU that has it; "
        "for a CPU export with --target ort and --precision fp32 or int8"
    )


def connect(bundle: Bundle, package: str, options: SessionOptions) -> GraphOpener:
    """What opens the bundle's graphs on the CPU."""
    return lambda graph: open_session(bundle, graph, options)


def setting(bundle: Bundle, package: str, names: Sequence[str]) -> Setting:
    """Results depend on the engine's version and on the processor, whose kernels it chooses."""
    environment = {"onnxruntime": str(onnxruntime().__version__), "processor": processor()}
    return Setting(environment, bundle.path / "engines" / "ort")


def open_session(bundle: Bundle, graph: GraphSpec, options: SessionOptions) -> OrtSession:
    """Load one graph of a bundle on the CPU."""
    sizes = graphs.sizes(bundle.manifest.config, len(bundle.manifest.vocabulary.ids))
    return OrtSession(bundle.graph(graph.name), graph, sizes, options, weight_layout(bundle, graph.name, options))


def weight_layout(bundle: Bundle, graph: str, options: SessionOptions) -> WeightLayout:
    """How one graph of a bundle uses its weights."""
    widened = bundle.manifest.weights.get("types") == "stored"
    packed = bundle.manifest.precision == "int8" or (graph == graphs.DENOISE.name and not widened)
    return WeightLayout(packed if options.prepack is None else options.prepack, widened)


def load(model: Path | bytes, options: SessionOptions, layout: WeightLayout, folder: Path | None = None) -> Any:
    """The engine's session of a graph file, or of a graph in memory whose weights are files in `folder`.

    The engine's own errors, of many types; ArgumentError for a wrong number of threads.
    """
    engine = _engine_options(options, layout)
    if folder is not None:
        engine.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    off = [*SLOW, "ConstantFolding"] if layout.widened else SLOW
    return onnxruntime().InferenceSession(model, engine, providers=["CPUExecutionProvider"], disabled_optimizers=off)


def check_signature(path: Path, wanted: Sequence[TensorSpec], found: Sequence[Any], sizes: Mapping[str, int]) -> None:
    """BundleError unless the graph's tensors are those of graphs.py: names in order, element types, dimensions."""
    names, expected = [arg.name for arg in found], [tensor.name for tensor in wanted]
    if names != expected:
        raise BundleError(f"{path}: tensors {names} where {expected} are expected: export the checkpoint again")
    for tensor, arg in zip(wanted, found, strict=True):
        dims = tensor.resolve(sizes)
        fits = len(arg.shape) == len(dims) and all(map(_same_dim, dims, arg.shape))
        if not fits or arg.type != f"tensor({BY_NAME[tensor.dtype].ort})":
            raise BundleError(
                f"{path}: '{tensor.name}' is {arg.type}{arg.shape}, expected {tensor.dtype}{list(dims)}: "
                "the graph does not belong to this manifest; export the checkpoint again"
            )


def _same_dim(wanted: Dim, found: object) -> bool:
    """A constant must be equal or left open by the graph; a free dimension must not be a constant."""
    return found == wanted if isinstance(wanted, int) and isinstance(found, int) else not isinstance(found, int)


def _engine_options(options: SessionOptions, layout: WeightLayout) -> Any:
    threads = options.threads
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise ArgumentError(f"threads {threads!r}: expected a positive integer, or None for the engine's choice")
    engine = cpu_options(packed=layout.packed)
    engine.intra_op_num_threads = threads or 0
    engine.enable_mem_pattern = engine.enable_cpu_mem_arena = not layout.widened
    return engine


def cpu_options(*, packed: bool) -> Any:
    """The engine's options that every session on a CPU has, whoever opens it: products of bytes are exact everywhere.

    `packed`: whether weights are kept in memory in the engine's own form.
    """
    engine = onnxruntime().SessionOptions()
    engine.inter_op_num_threads = 1
    engine.log_severity_level = ERRORS_ONLY
    engine.add_session_config_entry("session.disable_prepacking", "0" if packed else "1")
    # else its threads go on spinning when a run has ended, against those of the graph that runs next
    engine.add_session_config_entry("session.force_spinning_stop", "1")
    _add_bytes_exactly(engine)
    return engine


def _add_bytes_exactly(engine: Any) -> None:
    """Set an engine's options so that products of bytes are added in 32 bits, on a CPU that does not anyway.

    CPUs with VNNI or AMX do. Other x86 adds pairs in 16 bits, which overflow; the engine has a way around that, which
    is several times slower and which it would take on every CPU if told to.
    """
    x86 = platform.machine() in ("x86_64", "AMD64")
    if x86 and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(cpu_info("flags").split()):
        engine.add_session_config_entry("session.x64quantprecision", "1")


def _ort_value(buffer: Buffer) -> Any:
    if not isinstance(buffer, HostBuffer):
        raise BackendError(f"onnxruntime on the CPU cannot bind a {type(buffer).__name__} of another backend")
    return onnxruntime().OrtValue.ortvalue_from_numpy(buffer.array)


def onnxruntime() -> Any:
    """The engine; imported when the first session is opened, so that this module can be imported without it.

    From 1.31 on it keeps an identifier of the machine in the home directory and reports its use over the network, at
    once when it is imported. A robot does not, unless its owner sets ORT_DISABLE_TELEMETRY=0.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return import_module("onnxruntime")
