"""Attention as one operator of opset 23, for engines that have a fused kernel for it.

MatMul, mask, Softmax, MatMul of a 16-bit graph become Attention(q, k, v, mask) with a boolean mask; queries are scaled
already. TensorRT imports the operator from 10.14 on, and in float32 not at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from .cleanup import clean_up
from .products import VALUES, matrix_products

OPSET = 23
CASTS = ("Cast",)
SHAPED = ("Unsqueeze", "Gather", "Reshape", "Expand", "Concat", "Transpose", "Squeeze")
FLOAT = ir.DataType.FLOAT


def fuse_attention(model: ir.Model) -> int:
    """Rewrite every attention whose products are both 16-bit; how many there were. The graph is of opset 23 then.

    ValueError if a mask is not one that is added to the scores.
    """
    found = matrix_products(model.graph)
    rows = {site.name: int(site.weight.shape[0]) for site in found if site.weight is not None and site.weight.shape}  # type: ignore[arg-type]
    fused = 0
    for site in [site for site in found if site.name.endswith(f".{VALUES}")]:
        width = rows[site.name.removesuffix(VALUES) + "q_proj"]
        if site.node.outputs[0].dtype != FLOAT and _fuse(model.graph, site.node, width):
            fused += 1
    if fused:
        model.opset_imports[""] = OPSET
        model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", OPSET)])
        clean_up(model)
    return fused


def _fuse(graph: ir.Graph, values: ir.Node, width: int) -> bool:
    """`width`: that of all heads' queries together."""
    softmax = _maker(_through(values.inputs[0], CASTS))
    add = _maker(_through(softmax.inputs[0], ("Reshape",)))
    scores = add.inputs[0] if add.op_type == "Add" else softmax.inputs[0]
    product = _maker(_through(scores, ("Reshape", *CASTS)))
    query, keys = product.inputs
    if query is None or keys is None or query.shape is None or product.outputs[0].dtype == FLOAT:
        return False
    steps: list[ir.Node] = []
    shared = width // (int(query.shape[1]) * int(query.shape[3]))  # type: ignore[arg-type]  # heads that share keys
    inputs: list[ir.Value | None] = [_unfolded(query, shared, steps), _untransposed(keys, steps), values.inputs[1]]
    if add.op_type == "Add":
        inputs.append(_mask(add, steps))
    attention = ir.node("Attention", inputs, attributes={"scale": 1.0})
    attention.outputs[0].type = values.outputs[0].type
    steps.append(attention)
    output = _folded(attention.outputs[0], shared, int(query.shape[3]), steps)  # type: ignore[arg-type]
    output.type, output.shape = values.outputs[0].type, values.outputs[0].shape
    ir.convenience.replace_nodes_and_values(graph, values, [values], steps, values.outputs, [output])
    return True


def _unfolded(query: ir.Value, shared: int, steps: list[ir.Node]) -> ir.Value:
    """Queries [B,heads,Q,D] from rows [B,1,Q*heads,D]: fused kernels want heads apart."""
    if shared == 1:
        return query
    assert query.shape is not None
    dims = [0, -1, shared, int(query.shape[3])]  # type: ignore[arg-type]
    apart = _step(steps, "Reshape", [query, _numbers(dims, steps)], dtype=query.dtype)
    return _step(steps, "Transpose", [apart], {"perm": ir.AttrInt64s("perm", [0, 2, 1, 3])}, dtype=query.dtype)


def _folded(output: ir.Value, shared: int, head_dim: int, steps: list[ir.Node]) -> ir.Value:
    """The inverse."""
    if shared == 1:
        return output
    swapped = _step(steps, "Transpose", [output], {"perm": ir.AttrInt64s("perm", [0, 2, 1, 3])}, dtype=output.dtype)
    return _step(steps, "Reshape", [swapped, _numbers([0, 1, -1, head_dim], steps)], dtype=output.dtype)


def _mask(add: ir.Node, steps: list[ir.Node]) -> ir.Value:
    """bool [B,1,1 or Q,S], True where a query may look. An axis of heads that share keys, along which it is 1, goes."""
    mask, scores = _boolean(add.inputs[1], steps), add.inputs[0]
    if scores is None or scores.shape is None:
        raise ValueError("a mask is added to scores of unknown shape: attention cannot be fused")
    return mask if len(scores.shape) == 4 else _step(steps, "Squeeze", [mask, _numbers([3], steps)])


def _numbers(numbers: Sequence[int], steps: list[ir.Node]) -> ir.Value:
    constant = ir.node("Constant", [], attributes={"value": ir.tensor(np.array(numbers, np.int64))})
    steps.append(constant)
    return constant.outputs[0]


def _boolean(value: ir.Value | None, steps: list[ir.Node]) -> ir.Value:
    """The condition behind a mask of zeros and very negative numbers, moved as the mask was."""
    node = _maker(value)
    if node.op_type == "Where" and node.inputs[0] is not None:
        return node.inputs[0]
    if node.op_type not in SHAPED:
        raise ValueError(f"a mask is made by {node.op_type}, so attention cannot be fused: leave out --attention fused")
    moved = len(node.inputs) if node.op_type == "Concat" else 1
    inputs = [_boolean(one, steps) for one in node.inputs[:moved]]
    shape = node.outputs[0].shape
    return _step(steps, node.op_type, [*inputs, *node.inputs[moved:]], dict(node.attributes), shape)


def _untransposed(keys: ir.Value, steps: list[ir.Node]) -> ir.Value:
    """K [B,heads,S,D] from the transposed operand of the product, in its type."""
    producer = _maker(keys)
    source = producer.inputs[0]
    transpose = _maker(source) if producer.op_type == "Cast" else producer
    if transpose.op_type != "Transpose" or transpose.inputs[0] is None:
        raise ValueError(f"keys are made by {transpose.op_type}, not transposed: attention cannot be fused")
    perm = list(transpose.attributes["perm"].as_ints())
    swapped = [*perm[:2], perm[3], perm[2]]
    value = transpose.inputs[0]
    if swapped != [0, 1, 2, 3]:
        shape = ir.Shape([value.shape[i] for i in swapped]) if value.shape is not None else None
        value = _step(steps, "Transpose", [value], {"perm": ir.AttrInt64s("perm", swapped)}, shape, value.dtype)
    if value.dtype != keys.dtype:
        cast = {"to": ir.AttrInt64("to", int(keys.dtype or FLOAT))}
        value = _step(steps, "Cast", [value], cast, value.shape, keys.dtype)
    return value


def _step(
    steps: list[ir.Node],
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, ir.Attr] | None = None,
    shape: ir.Shape | None = None,
    dtype: ir.DataType | None = ir.DataType.BOOL,
) -> ir.Value:
    node = ir.Node("", op_type, inputs, list((attributes or {}).values()))
    if dtype is not None:
        node.outputs[0].dtype = dtype
    node.outputs[0].shape = shape
    steps.append(node)
    return node.outputs[0]


def _maker(value: ir.Value | None) -> ir.Node:
    producer = value.producer() if value is not None else None
    if producer is None:
        raise ValueError(f"'{value.name if value is not None else ''}' is made by no node: attention cannot be fused")
    return producer


def _through(value: ir.Value | None, kinds: tuple[str, ...]) -> ir.Value:
    """Back over nodes of these kinds."""
    while value is not None and (producer := value.producer()) is not None and producer.op_type in kinds:
        value = producer.inputs[0]
    assert value is not None
    return value
