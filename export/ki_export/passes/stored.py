"""Weights in the type in which the checkpoint stores them, widened to float32 where they are used.

The bundle can then share the checkpoint's own 16-bit file. Widening bfloat16 or float16 is exact, so results are those
of float32 weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir


def keep_stored_types(model: ir.Model, types: Mapping[str, ir.DataType]) -> None:
    """Give each initializer named in `types` that type, and its users a Cast of it; a Gather, of the rows it takes."""
    order = {node: at for at, node in enumerate(model.graph)}
    for name, stored in types.items():
        value = model.graph.initializers[name]
        if stored == ir.DataType.FLOAT:
            continue
        shape, users = value.shape, list(value.uses())
        value.dtype = stored
        whole = [use for use in users if use.node.op_type != "Gather" or use.idx != 0]
        for use in users:
            if use not in whole:
                _widen_rows(model.graph, use.node, stored)
        if whole:
            cast = _cast(value, f"{name}.float32", shape)
            model.graph.insert_before(min((use.node for use in whole), key=lambda node: order[node]), cast)
            for use in whole:
                use.node.replace_input_with(use.idx, cast.outputs[0])


def _widen_rows(graph: ir.Graph, gather: ir.Node, stored: ir.DataType) -> None:
    rows = gather.outputs[0]
    users = list(rows.uses())
    cast = _cast(rows, f"{rows.name}.float32", rows.shape)
    rows.dtype = stored
    graph.insert_after(gather, cast)
    for use in users:
        use.node.replace_input_with(use.idx, cast.outputs[0])


def _cast(value: ir.Value, name: str, shape: ir.Shape | None) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)})
    node.outputs[0].name, node.outputs[0].shape = name, shape
    node.outputs[0].dtype = ir.DataType.FLOAT
    return node
