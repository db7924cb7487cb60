"""Remove nodes that return their input: whole-range slices, casts to the same type."""

from __future__ import annotations

import onnx_ir as ir

INT64_MAX = 2**63 - 1


def remove_identities(model: ir.Model) -> None:
    """Bypass such nodes; `clean_up` deletes them."""
    graph = model.graph
    for node in list(graph):
        source, output = (node.inputs[0] if node.inputs else None), node.outputs[0]
        if source is None or output.is_graph_output():
            continue
        if _keeps_all(node) or _keeps_type(node):
            if source.shape is None:
                source.shape = output.shape
            output.replace_all_uses_with(source)


def _keeps_all(node: ir.Node) -> bool:
    if node.op_type != "Slice":
        return False
    operands = [ir.convenience.get_const_tensor(value) for value in node.inputs[1:] if value is not None]
    constants = [tensor.numpy() for tensor in operands if tensor is not None]
    if len(constants) != 4:  # starts, ends, axes, steps
        return False
    starts, ends, _, steps = constants
    return bool((starts == 0).all() and (ends == INT64_MAX).all() and (steps == 1).all())


def _keeps_type(node: ir.Node) -> bool:
    source = node.inputs[0]
    if node.op_type not in ("Cast", "Identity") or source is None:
        return False
    return node.op_type == "Identity" or source.dtype == ir.DataType(node.attributes["to"].as_int())
