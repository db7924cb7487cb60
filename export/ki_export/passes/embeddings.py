"""Graphs that take rows of the embedding table as an input, in the place of tokens: the table need not be on a device.

The rows are those of the weights file, widened to float32, so what follows them in the graph gives the same.
"""

from __future__ import annotations

import onnx_ir as ir

from .products import EMBEDDING


def take_rows(model: ir.Model, tokens: str, name: str) -> bool:
    """Replace the input `tokens` and the Gather that takes its rows by an input `name` f32 [..., width].

    False for a graph that has no such Gather. For the end, after all other passes: they know the table by its name.
    ValueError if something else depends on the tokens' values.
    """
    graph = model.graph
    table = graph.initializers.get(f"{EMBEDDING}.weight")
    gathers = (
        [] if table is None else [use.node for use in table.uses() if use.node.op_type == "Gather" and use.idx == 0]
    )
    if table is None or not gathers:
        return False
    place = next((at for at, value in enumerate(graph.inputs) if value.name == tokens), None)
    if place is None:
        return False
    given = graph.inputs[place]
    assert given.shape is not None and table.shape is not None
    width = table.shape[1]
    rows = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([*given.shape, width]))
    for gather in gathers:
        if _origin(gather.inputs[1]) is not given:
            raise ValueError(f"graph {graph.name}: '{gather.outputs[0].name}' is not gathered at '{tokens}'")
        for output in list(_widened(gather)):
            output.replace_all_uses_with(rows)
    _remove_unused(graph)
    twin = next(value for value in graph.inputs if value is not given and _same_shape(value, given))
    for use in list(given.uses()):
        if use.node.op_type != "Shape":
            raise ValueError(f"graph {graph.name}: {use.node.op_type} reads '{tokens}' too")
        use.node.replace_input_with(use.idx, twin)
    graph.inputs[place] = rows
    if not list(table.uses()):
        del graph.initializers[str(table.name)]
    return True


def _origin(value: ir.Value | None) -> ir.Value | None:
    """What a value was before Casts."""
    while value is not None and (node := value.producer()) is not None and node.op_type == "Cast":
        value = node.inputs[0]
    return value


def _widened(gather: ir.Node) -> list[ir.Value]:
    """The rows in float32: as they are gathered, or behind Casts that widen them. ValueError if others read them."""
    rows = gather.outputs[0]
    if rows.dtype == ir.DataType.FLOAT:
        return [rows]
    casts = [use.node for use in rows.uses()]
    if any(node.op_type != "Cast" or node.outputs[0].dtype != ir.DataType.FLOAT for node in casts):
        raise ValueError(
            f"'{rows.name}', rows of the embedding table in {rows.dtype}, are not widened where they are used"
        )
    return [node.outputs[0] for node in casts]


def _remove_unused(graph: ir.Graph) -> None:
    """Delete what lay between tokens and their rows, from its end."""
    for node in reversed(list(graph)):
        unused = all(not list(value.uses()) and not value.is_graph_output() for value in node.outputs)
        if unused and node.op_type in ("Gather", "Cast"):
            graph.remove(node, safe=True)


def _same_shape(value: ir.Value, other: ir.Value) -> bool:
    return value.shape is not None and other.shape is not None and list(value.shape) == list(other.shape)
