"""A graph in consecutive pieces, each run by an engine session of its own: the memory of a few layers.

Weights stay in the bundle's file, which each session maps and lets go when it is closed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError
from ki_edge.graphs import GraphSpec
from ki_runtime.backends.ort import check_signature, cpu_options, onnxruntime
from ki_runtime.backends.session import Binding, Buffer, HostBuffer, Session

from .cutting import Segment, cut

Array = npt.NDArray[Any]
BUDGET = 1_300_000_000  # bytes of weights of all open sessions: π0.5's whole denoise graph


class SegmentPool:
    """Engine sessions of segments whose weights are files in `folder`; the longest unused close to keep the budget.

    `on_run` is told each segment's name as it starts.
    """

    def __init__(self, folder: Path, budget: int = BUDGET, on_run: Callable[[str], object] = lambda name: None) -> None:
        self._folder, self._budget, self._on_run = folder, budget, on_run
        self._open: OrderedDict[Segment, Any] = OrderedDict()

    def run(self, segment: Segment, values: Mapping[str, Array]) -> dict[str, Array]:
        """A segment's outputs from its inputs among `values`. BackendError if the engine refuses it."""
        self._on_run(segment.name)
        feeds = {name: values[name] for name in segment.inputs}
        try:
            found = self._session(segment).run(list(segment.outputs), feeds)
        except Exception as error:  # the library raises its own types and bare RuntimeError
            raise BackendError(f"onnxruntime failed in {segment.name}: {str(error).strip().splitlines()[0]}") from error
        # copies: what the engine gives lies in a block of its own that a small value would keep alive
        return {name: np.array(value) for name, value in zip(segment.outputs, found, strict=True)}

    def _session(self, segment: Segment) -> Any:
        if segment not in self._open:
            while self._open and segment.nbytes + sum(other.nbytes for other in self._open) > self._budget:
                self._open.popitem(last=False)
            self._open[segment] = load(segment.model, self._folder)
        self._open.move_to_end(segment)
        return self._open[segment]


def load(model: onnx.ModelProto, folder: Path, *, optimized: bool = True) -> Any:
    """An engine session of a model in memory whose weights are files in `folder`, mapped as the runtime maps them."""
    ort = onnxruntime()
    options = cpu_options(packed=False)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class SegmentedSession(Session):
    """A bundle's graph in segments. BackendError if the engine cannot load the graph as a whole."""

    def __init__(self, bundle: Bundle, spec: GraphSpec, pool: SegmentPool) -> None:
        manifest, path = bundle.manifest, bundle.graph(spec.name)
        super().__init__(spec, graphs.sizes(manifest.config, len(manifest.vocabulary.ids)))
        try:
            proto = onnx.load(path, load_external_data=False)
            whole = load(proto, bundle.path, optimized=False)  # so that it reads nothing of the weights
        except Exception as error:
            raise BackendError(f"onnxruntime cannot load {path}: {str(error).strip().splitlines()[0]}") from error
        check_signature(path, spec.inputs, whole.get_inputs(), self.sizes)
        check_signature(path, spec.outputs, whole.get_outputs(), self.sizes)
        self.segments, self.pool = cut(proto), pool
        self._last: tuple[dict[str, Array], dict[str, Array]] | None = None

    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer:
        return HostBuffer(np.zeros(shape, dtype))

    def compute(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The graph's outputs. It does not run again with the inputs of the last time.

        The actions and the tokens of one observation share their prefix, and with a large model that is a minute.
        """
        if self._last is None or not _equal(self._last[0], feeds):
            self._last = None
            wanted = {tensor.name for tensor in self.outputs}
            found: dict[str, Array] = {}
            for made, _ in run_segments(self.segments, self.pool, feeds):
                found.update({name: value for name, value in made.items() if name in wanted})
            self._last = {name: value.copy() for name, value in feeds.items()}, found
        return self._last[1]

    def _bind(self, buffers: Mapping[str, Buffer]) -> Binding:
        return _Binding(self, buffers)


def _equal(some: Mapping[str, Array], others: Mapping[str, Array]) -> bool:
    return some.keys() == others.keys() and all(
        some[name].shape == others[name].shape and some[name].tobytes() == others[name].tobytes() for name in some
    )


class _Binding:
    """One segment after the other; a value is kept until the last segment that reads it has run."""

    def __init__(self, session: SegmentedSession, buffers: Mapping[str, Buffer]) -> None:
        self._session, self._buffers = session, buffers

    def run(self) -> None:
        values: dict[str, Array] = {}
        for tensor in self._session.inputs:
            buffer = self._buffers[tensor.name]
            assert isinstance(buffer, HostBuffer)
            values[tensor.name] = buffer.array
        for name, value in self._session.compute(values).items():
            self._buffers[name].write(value)


def run_segments(
    segments: Sequence[Segment], pool: SegmentPool, feeds: Mapping[str, Array]
) -> Iterator[tuple[dict[str, Array], Segment]]:
    """Run segments in order and give each one's outputs."""
    values = dict(feeds)
    for at, segment in enumerate(segments):
        made = pool.run(segment, values)
        yield made, segment
        needed = {name for later in segments[at + 1 :] for name in later.inputs}
        values = {name: value for name, value in {**values, **made}.items() if name in needed}
