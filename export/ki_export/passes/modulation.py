"""The rows of the time modulation taken apart once for all norms, and as vectors.

The tracer takes each norm's row out of `modulation` f32 [M, 3W] and splits it into scale, shift and gate [1, 1, W], six
nodes a norm. Three Splits of the whole give vectors [W], the scales with their 1 already added. A norm then has a
weight of its own, 1 + scale, which its kernel takes along, and needs none of ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .cleanup import clean_up
from .steps import Steps

MODULATION = "modulation"
PARTS = 3  # scale, shift, gate


def split_modulation(model: ir.Model) -> None:
    """Rewrite a graph with an input `modulation`, exactly. A norm whose row depends on the token keeps its form."""
    graph = model.graph
    rows = next((value for value in graph.inputs if value.name == MODULATION), None)
    found = [] if rows is None else [split for node in graph if (split := _split(node, rows)) is not None]
    if rows is None or rows.shape is None or not found:
        return
    count, width = int(rows.shape[0]), int(rows.shape[1]) // PARTS  # type: ignore[arg-type]
    steps = Steps()
    gains, shifts, gates = _vectors(steps, rows, count, width)
    first = next(iter(graph))
    graph.insert_before(first, steps.nodes)
    for split in found:
        scale, shift, gate = split.node.outputs
        for use in list(scale.uses()):
            gain = use.node.outputs[0]
            gain.replace_all_uses_with(gains[split.row])
        shift.replace_all_uses_with(shifts[split.row])
        gate.replace_all_uses_with(gates[split.row])
    weights = set(gains)
    for node in list(graph):
        if node.op_type == "Mul" and weights & set(node.inputs):
            _drop_ones(node, weights)
    clean_up(model)


@dataclass(frozen=True)
class _Split:
    """A node that takes row `row` apart."""

    node: ir.Node
    row: int


def _split(node: ir.Node, rows: ir.Value) -> _Split | None:
    """Whether a node is the Split of a row of the modulation, its scale only used as 1 + scale."""
    if node.op_type != "Split" or len(node.outputs) != PARTS or rows.shape is None:
        return None
    value, row = node.inputs[0], None
    while value is not None and value is not rows:
        producer = value.producer()
        if producer is None or producer.op_type not in ("Unsqueeze", "Gather"):
            return None
        if producer.op_type == "Gather":
            place = ir.convenience.get_const_tensor(producer.inputs[1]) if producer.inputs[1] is not None else None
            if row is not None or place is None or place.numpy().size != 1:
                return None
            row = int(place.numpy().reshape(()))
        value = producer.inputs[0]
    if value is None or row is None or not all(_adds_one(use.node) for use in node.outputs[0].uses()):
        return None
    return _Split(node, row % int(rows.shape[0]))  # type: ignore[arg-type]


def _adds_one(node: ir.Node) -> bool:
    other = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
    return (
        node.op_type == "Add" and other is not None and other.numpy().size == 1 and float(other.numpy().item()) == 1.0
    )


def _vectors(steps: Steps, rows: ir.Value, count: int, width: int) -> list[list[ir.Value]]:
    """1 + scale, shift and gate of each row, [W] each."""
    table = steps.add("Reshape", rows, steps.constant([count, PARTS, width], np.int64))
    steps.nodes.append(ir.node("Split", [table], attributes={"axis": 1, "num_outputs": PARTS}, num_outputs=PARTS))
    found = []
    for at, part in enumerate(steps.nodes[-1].outputs):
        flat = steps.add("Reshape", part, steps.constant([-1], np.int64))
        if at == 0:
            flat = steps.add("Add", flat, steps.constant(1.0, np.float32))
        steps.nodes.append(ir.node("Split", [flat], attributes={"axis": 0, "num_outputs": count}, num_outputs=count))
        vectors = list(steps.nodes[-1].outputs)
        for vector in vectors:
            vector.type, vector.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([width])
        found.append(vectors)
    return found


def _drop_ones(node: ir.Node, weights: set[ir.Value]) -> None:
    """A norm times ones times its weight: without the ones."""
    for at, value in enumerate(node.inputs):
        ones = value.producer() if value is not None and value not in weights else None
        if ones is None or ones.op_type != "Mul":
            continue
        constant = ir.convenience.get_const_tensor(ones.inputs[1]) if ones.inputs[1] is not None else None
        if constant is not None and (constant.numpy() == 1.0).all():
            node.replace_input_with(at, ones.inputs[0])
