"""What is changed in a graph before the engine compiles it, so that it makes no copy of the largest weight."""

from __future__ import annotations

from typing import Any

from .devices import openvino

LARGE = 1 << 16  # numbers in a table that is worth it


def keep_tables_mapped(model: Any) -> int:
    """Part each table of embeddings from the factor behind it; how many there were.

    The engine multiplies the whole table by the factor when it compiles, and so holds gigabytes of its own in place of
    the file that is mapped. An operation in between that gives what it gets, PRelu with a slope of 1, hides the factor.
    """
    found = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Gather" or not _is_large_constant(node.input_value(0).get_node()):
            continue
        targets = [target for target in node.output(0).get_target_inputs() if _is_multiply(target.get_node())]
        if targets:
            ops = openvino().opset13
            same = ops.prelu(node.output(0), ops.constant([1.0], dtype="float32"))
            for target in targets:
                target.replace_source_output(same.output(0))
            found += 1
    return found


def _is_large_constant(node: Any) -> bool:
    if node.get_type_name() != "Constant" or node.get_element_type().get_type_name() != "f32":
        return False
    size = 1
    for dim in node.get_output_shape(0):
        size *= int(dim)
    return size >= LARGE


def _is_multiply(node: Any) -> bool:
    return bool(node.get_type_name() == "Multiply")
