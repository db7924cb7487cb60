"""RMS norms in the form that ONNX Runtime runs as one kernel: x / sqrt(mean(x^2) + eps) * weight.

The tracer writes x * (1 / sqrt(...)), which it runs as six. A norm without a weight of its own (adaRMS: scale and shift
are computed) is given one of ones, because the kernel has one.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def divide_by_root(model: ir.Model) -> None:
    """Rewrite x * Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2)), eps))). The result differs by one rounding."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Mul":
            continue
        x, inverse = node.inputs
        root = _argument(inverse, "Reciprocal")
        squares = _argument(_argument(_argument(root, "Sqrt"), "Add"), "ReduceMean")
        if x is None or root is None or squares is None or _argument(squares, "Pow") is not x:
            continue
        output, width = node.outputs[0], x.shape[-1] if x.shape is not None else None
        new = [ir.node("Div", [x, root])]
        if not _has_weight(output) and isinstance(width, int):
            ones = ir.node("Constant", [], attributes={"value": ir.tensor(np.ones(width, np.float32))})
            new += [ones, ir.node("Mul", [new[0].outputs[0], ones.outputs[0]])]
        for value in (new[0].outputs[0], new[-1].outputs[0]):
            value.type, value.shape = output.type, output.shape
        ir.convenience.replace_nodes_and_values(graph, node, [node], new, [output], new[-1].outputs)


def _argument(value: ir.Value | None, op_type: str) -> ir.Value | None:
    """The first input of the `op_type` node that makes `value`, or None if another one does."""
    producer = value.producer() if value is not None else None
    return producer.inputs[0] if producer is not None and producer.op_type == op_type else None


def _has_weight(normed: ir.Value) -> bool:
    """All that follows is one product with what is computed from weights alone."""
    users = [user for user, _ in normed.uses()]
    if len(users) != 1 or users[0].op_type != "Mul":
        return False
    other = next((value for value in users[0].inputs if value is not normed), None)
    producer = other.producer() if other is not None else None
    return all(map(_is_fixed, producer.inputs if producer is not None else (other,)))


def _is_fixed(value: ir.Value | None) -> bool:
    return value is not None and (value.is_initializer() or ir.convenience.get_const_tensor(value) is not None)
