"""ONNX Runtime on a GPU: the CUDA provider over tensors in the runtime's own device memory, on one stream.

For GPUs without TensorRT. Products are true float32 where the graph says float32 (TF32 is off). Nothing that computes
may fall back to the CPU, which would be slow in silence; arithmetic on shapes stays there, where it belongs.

`record=True` asks the provider for CUDA graphs, one for each binding, whose addresses never change. It is off unless
asked for: the provider refuses graphs with a node that it lacks, and waits for the device after each replay.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError, DeviceMemoryError
from ki_edge.graphs import GraphSpec
from ki_runtime.backends.backend import GraphOpener, NotInstalled, SessionOptions, Setting
from ki_runtime.backends.ort import check_signature, of_engines, onnxruntime
from ki_runtime.backends.session import Binding, Bucket, Buffer, Session, first_line
from ki_runtime.gpu.device import check_precision

from .buffers import DeviceBuffer, Gpu, owned
from .cuda import Cuda
from .identity import gpu_environment

PROVIDER = "CUDAExecutionProvider"
LIBRARIES = ("nvidia-cudnn", "nvidia-cublas", "nvidia-cufft", "nvidia-curand", "nvidia-cuda-runtime")
QUIET = 4  # only what is fatal; a failure to start is told by the error that follows
COMPUTE = {
    *("Attention", "MultiHeadAttention", "Softmax", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv"),
    *("Gelu", "FastGelu", "BiasGelu", "LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization"),
}
# A graph to try a provider with: Identity of one float, opset 20.
TRIAL = (
    b'\x08\t:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x14"
)


def obstacle(bundle: Bundle | None, package: str) -> str | None:
    """Why ONNX Runtime cannot run this bundle on a GPU here, or None."""
    if PROVIDER not in onnxruntime().get_available_providers():
        return NotInstalled("onnxruntime has no CUDA provider (onnxruntime-gpu has)")
    try:
        device = Cuda.load().device()
        if bundle is not None:
            check_precision(bundle.manifest.precision, [device.capability])
            return of_engines(bundle)
    except BackendError as error:
        return str(error)
    return None


def connect(bundle: Bundle, package: str, options: SessionOptions) -> GraphOpener:
    """What opens a bundle's graphs on the GPU; BackendError if the provider does not start."""
    gpu = Gpu(Cuda.load())
    start(TRIAL, gpu, record=False)
    manifest = bundle.manifest
    sizes = graphs.sizes(manifest.config, len(manifest.vocabulary.ids))
    return lambda graph: OrtCudaSession(bundle.graph(graph.name), graph, sizes, gpu, options)


def setting(bundle: Bundle, package: str, names: Sequence[str]) -> Setting:
    """Results depend on the engine's version, on the libraries whose kernels it calls, on the GPU and on its driver."""
    facts = {"onnxruntime": str(onnxruntime().__version__), "libraries": _kernels(), **gpu_environment(Cuda.load())}
    return Setting(facts, bundle.path / "engines" / "ort-cuda")


def _kernels() -> str:
    """Versions of NVIDIA's libraries among the installed packages: they are upgraded on their own."""
    found = {(each.metadata["Name"] or "").lower(): each.version for each in distributions()}
    return " ".join(f"{name} {version}" for name, version in sorted(found.items()) if name.startswith(LIBRARIES))


def start(model: Path | bytes, gpu: Gpu, *, record: bool, provider: str = PROVIDER) -> Any:
    """An InferenceSession whose every computing node is on the GPU; BackendError otherwise."""
    ort = onnxruntime()
    _load_libraries(ort)
    engine = ort.SessionOptions()
    engine.log_severity_level = QUIET
    engine.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    facts = {  # no device_id: the first one is taken, and naming it brings a warning for each session (1.26 to 1.31)
        "user_compute_stream": str(gpu.stream),
        "use_tf32": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1" if record else "0",
    }
    wanted = [(provider, facts), "CPUExecutionProvider"] if provider == PROVIDER else [provider]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a provider is missing, which is checked below
            session = ort.InferenceSession(model, engine, providers=wanted)
    except Exception as error:
        raise _failure(f"onnxruntime {ort.__version__} cannot load {_name(model)} on the GPU", error) from error
    if session.get_providers()[0] != provider:
        raise BackendError(
            f"onnxruntime {ort.__version__} does not start its CUDA provider here: CUDA {ort_cuda(ort)} or cuDNN 9 is "
            "missing (pip install 'onnxruntime-gpu[cuda,cudnn]'), or the driver is too old"
        )
    check_placement(session, provider, _name(model))
    return session


def check_placement(session: Any, provider: str, name: str) -> None:
    """BackendError if a node that computes was left to the CPU; older versions of onnxruntime cannot tell."""
    tell = getattr(session, "get_provider_graph_assignment_info", None)
    parts = [] if tell is None else [part for part in tell() if part.ep_name != provider]
    left = sorted({node.op_type for part in parts for node in part.get_nodes()} & COMPUTE)
    if left:
        raise BackendError(
            f"{name}: onnxruntime's CUDA provider leaves {', '.join(left)} to the CPU, which would be slow: "
            "upgrade onnxruntime-gpu, or export in another precision"
        )


def ort_cuda(ort: Any) -> str:
    """The CUDA version that onnxruntime was built for, "12.x"."""
    version = str(getattr(ort, "cuda_version", "") or "12")
    return f"{version.split('.')[0]}.x"


class OrtCudaSession(Session):
    """An InferenceSession of the CUDA provider. `provider` and `device` are what a test without a GPU replaces."""

    provider, device = PROVIDER, "cuda"

    def __init__(
        self, path: Path, spec: GraphSpec, sizes: Mapping[str, int], gpu: Gpu, options: SessionOptions
    ) -> None:
        super().__init__(spec, sizes)
        self._gpu, self._records = gpu, bool(options.record)
        self._session = start(path, gpu, record=self._records, provider=self.provider)
        self._graph_ids = count(1)
        if self._records:
            self.prompt_bucket, self.cache_bucket = Bucket(16), Bucket(64)
        check_signature(path, spec.inputs, self._session.get_inputs(), sizes)
        check_signature(path, spec.outputs, self._session.get_outputs(), sizes)

    def allocate(self, shape: tuple[int, ...] | Any, dtype: str) -> Buffer:
        return self._gpu.allocate(shape, dtype)

    def _bind(self, buffers: Mapping[str, Buffer]) -> Binding:
        tensors = {name: owned(buffer, self._gpu) for name, buffer in buffers.items()}
        options = onnxruntime().RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self._records:
            options.add_run_config_entry("gpu_graph_id", str(next(self._graph_ids)))
        binding = self._session.io_binding()
        for tensor in self.inputs:
            binding.bind_input(*self._place(tensor.name, tensors[tensor.name]))
        for tensor in self.outputs:
            binding.bind_output(*self._place(tensor.name, tensors[tensor.name]))
        return OrtCudaBinding(self._session, binding, options, self._gpu, self.spec.name, tensors)

    def _place(self, name: str, buffer: DeviceBuffer) -> tuple[Any, ...]:
        kind: type[np.generic] = buffer.dtype.type
        return name, self.device, 0, kind, buffer.shape, buffer.address


class OrtCudaBinding:
    """An IoBinding over device addresses; a run only puts its work on the stream."""

    def __init__(
        self, session: Any, binding: Any, options: Any, gpu: Gpu, name: str, buffers: Mapping[str, DeviceBuffer]
    ) -> None:
        self._session, self._binding, self._options = session, binding, options
        self._gpu, self._name = gpu, name
        self._buffers = buffers  # kept alive

    def run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            self._gpu.cuda.check(self._gpu.stream)  # a device that is lost says so itself
            raise _failure(f"onnxruntime failed in graph {self._name}", error) from error


def _failure(what: str, error: Exception) -> BackendError:
    line = first_line(error)
    full = any(words in str(error) for words in ("Failed to allocate memory", "cudaErrorMemoryAllocation"))
    if full:
        return DeviceMemoryError(f"{what}: {line}; end other programs that use the GPU, or export in a lower precision")
    return BackendError(f"{what}: {line}")


def _name(model: Path | bytes) -> str:
    return "a trial graph" if isinstance(model, bytes) else str(model)


def _load_libraries(ort: Any) -> None:
    """Load CUDA and cuDNN from their wheels, where onnxruntime can; its prints do not belong into a report."""
    load = getattr(ort, "preload_dlls", None)
    if load is not None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            load()
