"""Transposes: two in a row become one, and one that moves nothing but axes of length 1 becomes a Reshape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .reshapes import constant_target


def simplify_transposes(model: ir.Model) -> None:
    """Needs the tracer's shapes. Before `simplify_reshapes`, which merges the new Reshapes with their neighbours."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Transpose":
            continue
        source, order = node.inputs[0], list(node.attributes["perm"].as_ints())
        while (before := source.producer() if source is not None else None) is not None:
            if before.op_type != "Transpose":
                break
            inner = before.attributes["perm"].as_ints()
            order = [inner[axis] for axis in order]
            source = before.inputs[0]
        node.replace_input_with(0, source)
        node.attributes["perm"] = ir.AttrInt64s("perm", order)
        target = constant_target(source, node.outputs[0])
        if target is not None and source is not None and source.shape is not None and _keeps_order(source.shape, order):
            constant = ir.node("Constant", [], attributes={"value": ir.tensor(np.array(target, np.int64))})
            reshape = ir.node("Reshape", [source, constant.outputs[0]])
            reshape.outputs[0].type, reshape.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
            ir.convenience.replace_nodes_and_values(
                graph, node, [node], [constant, reshape], node.outputs, reshape.outputs
            )


def _keeps_order(shape: ir.Shape, order: Sequence[int]) -> bool:
    """Elements stay where they are in memory: the axes longer than 1 keep their order."""
    moved = [axis for axis in order if shape[axis] != 1]
    return moved == sorted(moved)
