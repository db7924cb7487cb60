"""Running counts without CumSum, which TensorRT runs as a loop of one step a token, and at first for floats alone.

A count up to each place is the sum over a lower triangle; of zeros and ones it is exact in float32 up to 2^24.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def count_by_sums(model: ir.Model) -> None:
    """Rewrite every CumSum along the last axis of a mask [B,S] that was cast to int64.

    ValueError for a CumSum of another form.
    """
    for node in [node for node in model.graph if node.op_type == "CumSum"]:
        counted = node.inputs[0]
        cast = counted.producer() if counted is not None else None
        if cast is None or cast.op_type != "Cast" or cast.inputs[0] is None or node.outputs[0].dtype != INT64:
            raise ValueError(f"{node.name}: a CumSum of something else than a mask")
        _rewrite(model.graph, node, cast.inputs[0])


def _rewrite(graph: ir.Graph, node: ir.Node, mask: ir.Value) -> None:
    new: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        new.append(ir.node(op_type, inputs, attributes=attributes))
        return new[-1].outputs[0]

    def constant(numbers: int | list[int]) -> ir.Value:
        new.append(ir.node("Constant", [], attributes={"value": ir.tensor(np.array(numbers, np.int64))}))
        return new[-1].outputs[0]

    length = add("Squeeze", add("Shape", mask, start=1, end=2))
    places = add("Range", constant(0), length, constant(1))
    until = add("LessOrEqual", places, add("Unsqueeze", places, constant([1])))  # [S,S], row i: places up to i
    until.dtype = ir.DataType.BOOL
    ones = add("Cast", add("Unsqueeze", mask, constant([1])), to=int(FLOAT))
    sums = add("ReduceSum", add("Mul", ones, add("Cast", until, to=int(FLOAT))), constant([-1]), keepdims=0)
    counts = add("Cast", sums, to=int(INT64))
    counts.dtype, counts.shape = INT64, node.outputs[0].shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs, [counts])
