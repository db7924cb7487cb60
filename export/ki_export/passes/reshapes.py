"""Reshapes: chains become one, and target shapes become constants wherever 0 (keep) and one -1 can express them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def simplify_reshapes(model: ir.Model) -> None:
    """Needs the symbolic shapes of the tracer on every value."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Reshape":
            continue
        while (source := node.inputs[0]) is not None and (before := source.producer()) is not None:
            if before.op_type != "Reshape" or not _may_start_from(before.inputs[0], node):
                break
            node.replace_input_with(0, before.inputs[0])
        if source is not None and _same_shape(source, node.outputs[0]):
            node.outputs[0].replace_all_uses_with(source)
            continue
        target = constant_target(source, node.outputs[0])
        if target is not None:
            constant = ir.node("Constant", [], attributes={"value": ir.tensor(np.array(target, np.int64))})
            graph.insert_before(node, constant)
            node.replace_input_with(1, constant.outputs[0])
            node.attributes.pop("allowzero", None)


def _may_start_from(source: ir.Value | None, node: ir.Node) -> bool:
    """A constant target with 0 speaks of the axes of the present source; other targets are good for any."""
    target = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
    relative = target is not None and 0 in target.numpy()
    return not relative or constant_target(source, node.outputs[0]) is not None


def _same_shape(source: ir.Value, output: ir.Value) -> bool:
    before, after = source.shape, output.shape
    if before is None or after is None or output.is_graph_output() or len(before) != len(after):
        return False
    known = all(isinstance(dim, int) or dim.value is not None for dim in after)
    return known and all(a == b for a, b in zip(before, after, strict=True))


def constant_target(source: ir.Value | None, output: ir.Value) -> list[int] | None:
    """The target that reshapes `source` to the shape of `output`, if a constant can say it."""
    if source is None or source.shape is None or output.shape is None:
        return None
    target: list[int] = []
    for axis, dim in enumerate(output.shape):
        if isinstance(dim, int):
            target.append(dim)
        elif axis < len(source.shape) and source.shape[axis] == dim and dim.value is not None:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None
