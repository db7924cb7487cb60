"""A graph in consecutive pieces, each run by an engine session of its own: the memory of a few layers.

Every node of the graph is in exactly one piece, and pieces end where a transformer layer ends. Weights stay in the
bundle's file, which each session maps and lets go when it is closed.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError, ExportError
from ki_edge.graphs import GraphSpec
from ki_runtime.ort_session import check_signature
from ki_runtime.session import Binding, Buffer, HostBuffer, Session

Array = npt.NDArray[Any]
LIMIT = 900_000_000  # bytes of weights in a piece, unless a single layer has more: two layers of π0.5's backbone
BUDGET = 1_300_000_000  # bytes of weights of all open sessions: π0.5's whole denoise graph
LAYER = re.compile(r".*\blayers\.\d+(?=\.)")
GATHERS = ("Gather", "GatherND", "GatherElements")  # touch only the rows that they take


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive nodes of a graph as a model. `inputs` and `outputs`: values that other pieces or the caller hold.

    `nbytes`: memory of its weights when it runs.
    """

    name: str
    model: onnx.ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nbytes: int

    def with_outputs(self, names: Sequence[str]) -> Segment:
        """The same piece that also gives those float32 values among `names` that its nodes compute."""
        types = _types(self.model)
        added = [name for name in names if name not in self.outputs and _is_float(types.get(name))]
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        model.graph.output.extend(_info(name, types, self.name) for name in added)
        return Segment(self.name, model, self.inputs, (*self.outputs, *added), self.nbytes)


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
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
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


def cut(model: onnx.ModelProto, limit: int = LIMIT) -> list[Segment]:
    """The segments of a model loaded without its weights, each of whole layers with at most `limit` bytes of weights.

    A single layer may have more. ExportError if the type of a value between two segments is not known.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    groups: list[list[onnx.NodeProto]] = []
    size = 0
    for block in _blocks(_schedule(model.graph.node, initializers), initializers):
        added = _weight_bytes(block, initializers)
        if not groups or size + added > limit:
            groups.append([])
            size = 0
        groups[-1] += block
        size += added
    return _models(model, groups, initializers)


def _schedule(nodes: Sequence[onnx.NodeProto], initializers: Mapping[str, Any]) -> list[onnx.NodeProto]:
    """The nodes in an order that works, with whatever is computed from weights alone just before its first use."""
    makers: dict[str, onnx.NodeProto] = {}  # of values computed from weights alone
    for node in nodes:
        if all(not name or name in initializers or name in makers for name in node.input):
            makers.update(dict.fromkeys(node.output, node))
    order: list[onnx.NodeProto] = []
    done: set[int] = set()

    def place(node: onnx.NodeProto) -> None:
        for name in node.input:
            if name in makers and id(makers[name]) not in done:
                place(makers[name])
        done.add(id(node))
        order.append(node)

    constants = {id(node) for node in makers.values()}
    for node in nodes:
        if id(node) not in constants:
            place(node)
    for node in nodes:  # constants that nothing but the graph's outputs uses
        if id(node) not in done:
            place(node)
    return order


def _blocks(nodes: Sequence[onnx.NodeProto], initializers: Mapping[str, Any]) -> Iterator[list[onnx.NodeProto]]:
    """The nodes cut before the first one that uses weights of another layer than those before it."""
    block: list[onnx.NodeProto] = []
    layer: str | None = None
    for node in nodes:
        names = [name for name in node.input if name in initializers and _external(initializers[name])]
        if names:
            found = LAYER.match(names[0])
            mine = found[0] if found else names[0]
            if layer is not None and mine != layer:
                yield block
                block = []
            layer = mine
        block.append(node)
    yield block


def _external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _weight_bytes(nodes: Sequence[onnx.NodeProto], initializers: Mapping[str, Any]) -> int:
    """Memory that the weights of some nodes take while they run: 16-bit ones are there twice, once widened."""
    names = set()
    for node in nodes:
        names.update(node.input[1:] if node.op_type in GATHERS else node.input)
    total = 0
    for name in names & set(initializers):
        elements, kind = math.prod(initializers[name].dims), initializers[name].data_type
        width = onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
        total += elements * (6 if width == 2 else width)
    return total


def _models(
    model: onnx.ModelProto, groups: Sequence[Sequence[onnx.NodeProto]], initializers: Mapping[str, Any]
) -> list[Segment]:
    """A model for each group of nodes. Its inputs are what it reads and does not make, its outputs what others read."""
    types = _types(model)
    wanted = [{name for node in group for name in node.input if name} for group in groups]
    results = {output.name for output in model.graph.output}
    segments = []
    for at, group in enumerate(groups):
        made = dict.fromkeys(name for node in group for name in node.output if name)
        inputs = sorted(wanted[at] - set(made) - set(initializers))
        later = results.union(*wanted[at + 1 :])
        outputs = [name for name in made if name in later]
        title = model.graph.name if len(groups) == 1 else f"{model.graph.name} part {at + 1} of {len(groups)}"
        graph = onnx.GraphProto(name=model.graph.name, node=group)
        graph.input.extend(_info(name, types, title) for name in inputs)
        graph.output.extend(_info(name, types, title) for name in outputs)
        graph.initializer.extend(initializers[name] for name in initializers if name in wanted[at])
        part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
        part.graph.CopyFrom(graph)
        segments.append(Segment(title, part, tuple(inputs), tuple(outputs), _weight_bytes(group, initializers)))
    return segments


def _types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {value.name: value.type for value in (*graph.value_info, *graph.input, *graph.output)}


def _is_float(kind: onnx.TypeProto | None) -> bool:
    return kind is not None and kind.tensor_type.elem_type == onnx.TensorProto.FLOAT


def _info(name: str, types: Mapping[str, onnx.TypeProto], title: str) -> onnx.ValueInfoProto:
    if name not in types:
        raise ExportError(f"{title}: the type of its value '{name}' is not known: export the checkpoint again")
    return onnx.ValueInfoProto(name=name, type=types[name])
