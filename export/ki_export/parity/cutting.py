"""A graph cut into consecutive pieces that end where a transformer layer ends; every node is in exactly one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from ki_edge.errors import ExportError

LIMIT = 900_000_000  # bytes of weights in a piece, unless a single layer has more: two layers of π0.5's backbone
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
