"""Rotary positions as the operator that ONNX Runtime has for them: one pass over queries or keys in place of five.

The tracer writes, for x [B, S, heads, D] and tables [B, S, 1, D],

    x * [cos, cos] + [x2, x1] * [-sin, sin]          x1, x2: the halves of x along its last axis
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .cleanup import clean_up
from .reshapes import simplify_reshapes
from .steps import Steps, use_engine_operators

ROTATION = "RotaryEmbedding"
COSINES, SINES = 2, 3  # places among its inputs
SETTINGS = {"interleaved": 0, "is_packed_batching": 0, "rotary_embedding_dim": 0, "num_heads": 0, "scale": 1.0}


def fuse_rotations(model: ir.Model) -> None:
    """Rewrite every rotation. All rows of a batch are one sequence to the operator, with a row of the tables each."""
    graph = model.graph
    tables: dict[ir.Value, ir.Value] = {}  # cosines or sines [B, S, 1, D / 2] -> [B * S, D / 2]
    for node in list(graph):
        found = _rotation(node)
        if found is None:
            continue
        steps, width = Steps(), _width(found.x)
        for table in (found.cosines, found.sines):
            if table not in tables:
                made = Steps()
                tables[table] = made.add("Reshape", table, made.constant([-1, found.half], np.int64))
                maker = table.producer()
                assert maker is not None
                graph.insert_after(maker, made.nodes)
        source = _made_by(found.x, "Reshape")
        rows = found.x if source is None else source.inputs[0]
        flat = steps.add("Reshape", rows, steps.constant([1, -1, width], np.int64))
        first = steps.constant([0], np.int64)
        turned = steps.add_to_engine(ROTATION, flat, first, tables[found.cosines], tables[found.sines], **SETTINGS)
        for value in (flat, turned):
            value.type = found.x.type
            if rows is not None and rows.shape is not None and len(rows.shape) == 2:
                value.shape = ir.Shape([1, rows.shape[0], width])
        heads = width // (2 * found.half)
        out = steps.add("Reshape", turned, _target(steps, found.x, heads, 2 * found.half))
        out.type, out.shape = node.outputs[0].type, node.outputs[0].shape
        ir.convenience.replace_nodes_and_values(graph, node, [node], steps.nodes, node.outputs, [out])
    if tables:
        use_engine_operators(model)
        simplify_reshapes(model)
        clean_up(model)


@dataclass(frozen=True, eq=False)
class _Rotation:
    x: ir.Value
    cosines: ir.Value
    sines: ir.Value
    half: int


def _rotation(node: ir.Node) -> _Rotation | None:
    """The rotation whose last node, an Add, this is; None if it is none."""
    if node.op_type != "Add":
        return None
    for straight, crossed in (node.inputs, reversed(node.inputs)):
        found = _match(straight, crossed)
        if found is not None:
            return found
    return None


def _match(straight: ir.Value | None, crossed: ir.Value | None) -> _Rotation | None:
    one, other = _made_by(straight, "Mul"), _made_by(crossed, "Mul")
    if one is None or other is None:
        return None
    x, cosines = one.inputs
    swapped, signed = (_made_by(value, "Concat") for value in other.inputs)
    if swapped is None or signed is None or len(swapped.inputs) != 2 or len(signed.inputs) != 2:
        return None
    second, first = swapped.inputs
    halves = _made_by(second, "Split")
    if halves is None or halves.inputs[0] is not x or [first, second] != list(halves.outputs):
        return None
    double, negative = _made_by(cosines, "Concat"), _made_by(signed.inputs[0], "Neg")
    if double is None or len(double.inputs) != 2 or double.inputs[0] is not double.inputs[1]:
        return None
    if negative is None or negative.inputs[0] is not signed.inputs[1]:
        return None
    table, sines = double.inputs[0], signed.inputs[1]
    if x is None or table is None or sines is None or table.shape is None or x.shape is None or len(x.shape) != 4:
        return None
    half = table.shape[-1]
    return _Rotation(x, table, sines, half) if isinstance(half, int) and len(table.shape) == 4 else None


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == op_type else None


def _width(x: ir.Value) -> int:
    assert x.shape is not None
    return int(x.shape[2]) * int(x.shape[3])  # type: ignore[arg-type]


def _target(steps: Steps, x: ir.Value, heads: int, dim: int) -> ir.Value:
    """What reshapes all rows back to x's shape: a constant where the length is one, else computed from x."""
    assert x.shape is not None
    if isinstance(x.shape[1], int):
        return steps.constant([-1, x.shape[1], heads, dim], np.int64)
    return steps.add("Shape", x)
