"""Linear layers as Gemm with transB, so that a weight [out, in] is used as the checkpoint stores it.

The tracer writes MatMul(x, Transpose(W)) + b. An engine folds that Transpose by keeping a second copy of every weight;
Gemm(x, W, b, transB=1) on a two-dimensional view needs none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

Sizes = dict[tuple[str, ...], ir.Value]  # leading dims -> the value that holds them


def use_stored_weights(model: ir.Model) -> None:
    """Rewrite every MatMul whose right side is a transposed initializer, with the Add of a bias behind it."""
    sizes: Sizes = {}
    for node in list(model.graph):
        if node.op_type == "MatMul" and (weight := _transposed_weight(node.inputs[1])) is not None:
            _rewrite(model.graph, node, weight, sizes)
        elif node.op_type == "Gemm" and (weight := _transposed_weight(node.inputs[1])) is not None:
            node.replace_input_with(1, weight)
            node.attributes["transB"] = ir.AttrInt64("transB", 1)


def _transposed_weight(value: ir.Value | None) -> ir.Value | None:
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "Transpose" or list(producer.attributes["perm"].as_ints()) != [1, 0]:
        return None
    weight = producer.inputs[0]
    return weight if weight is not None and weight.is_initializer() else None


def _rewrite(graph: ir.Graph, node: ir.Node, weight: ir.Value, sizes: Sizes) -> None:
    x = node.inputs[0]
    if x is None or x.shape is None or weight.shape is None:
        raise ValueError(f"linear layer {node.name}: its input or weight has no shape")
    last = _add_of_bias(node)
    rows_out, rows_in = weight.shape.numpy()
    leading = list(x.shape)[:-1]
    bias = [value for value in last.inputs if value is not node.outputs[0]] if last is not node else []
    new: list[ir.Node] = []

    def add(op_type: str, inputs: Sequence[ir.Value | None], **attributes: int) -> ir.Value:
        new.append(ir.node(op_type, inputs, attributes=attributes))
        return new[-1].outputs[0]

    def constant(*numbers: int) -> ir.Value:
        new.append(ir.node("Constant", [], attributes={"value": ir.tensor(np.array(numbers, np.int64))}))
        return new[-1].outputs[0]

    if len(leading) == 1:
        out = add("Gemm", [x, weight, *bias], transB=1)
    else:
        flat = add("Reshape", [x, constant(-1, rows_in)])
        flat.type, flat.shape = x.type, ir.Shape([_rows(leading), rows_in])
        rows = add("Gemm", [flat, weight, *bias], transB=1)
        rows.type, rows.shape = x.type, ir.Shape([_rows(leading), rows_out])
        key = tuple(str(dim) for dim in leading)
        if key not in sizes:  # nodes are visited in their order, so the first Shape precedes all its users
            sizes[key] = add("Shape", [x], start=0, end=len(leading))
        out = add("Reshape", [rows, add("Concat", [sizes[key], constant(rows_out)], axis=0)])
    out.type, out.shape = x.type, ir.Shape([*leading, rows_out])
    ir.convenience.replace_nodes_and_values(graph, last, [last], new, last.outputs, [out])


def _add_of_bias(node: ir.Node) -> ir.Node:
    """The Add of a one-dimensional initializer that follows `node`, or `node` itself."""
    users = [user for user, _ in node.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Add":
        others = [value for value in users[0].inputs if value is not node.outputs[0]]
        if len(others) == 1 and others[0] is not None and others[0].is_initializer():
            shape = others[0].shape
            if shape is not None and len(shape) == 1:
                return users[0]
    return node


def _rows(leading: Sequence[int | ir.SymbolicDim]) -> int | ir.SymbolicDim:
    """Product of the leading dims, symbolic unless all are known."""
    if all(isinstance(dim, int) for dim in leading):
        return int(np.prod([int(dim) for dim in leading]))  # type: ignore[arg-type]
    return ir.SymbolicDim("*".join(f"({dim})" for dim in leading))
