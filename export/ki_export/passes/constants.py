"""Fold shape arithmetic and other small constants. Initializers have no values here, so no weight can be folded.

The tracer leaves sequences (SequenceAt) and computed axes that ONNX parsers for accelerators reject; after this pass
there are none.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import optimizer

MAX_ELEMENTS = 65536


def fold_constants(model: ir.Model) -> None:
    """Replace every node that depends on constants alone by its value."""
    _fold(model)
    for node in list(model.graph):
        if node.op_type == "Pow" and all(_value(operand) is not None for operand in node.inputs):
            _fold_power(model.graph, node)
    _fold(model)


def _fold(model: ir.Model) -> None:
    optimizer.fold_constants(
        model,
        input_size_limit=MAX_ELEMENTS,
        output_size_limit=MAX_ELEMENTS,
        should_fold=lambda node: False if node.op_type == "Pow" else None,
    )


def _fold_power(graph: ir.Graph, node: ir.Node) -> None:
    """Rotary frequencies with the model's own pow: numpy's differs in the last bit, 1e-4 rad at position 1000."""
    base, exponent = (torch.from_numpy(np.array(_value(operand))) for operand in node.inputs)
    output = node.outputs[0]
    tensor = ir.tensor(torch.pow(base, exponent).numpy(), name=output.name)
    shape = ir.Shape(tensor.shape.numpy())
    constant = ir.Value(name=output.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    output.name = None
    output.replace_all_uses_with(constant)
    graph.remove(node, safe=True)
    graph.register_initializer(constant)


def _value(value: ir.Value | None) -> np.ndarray | None:  # type: ignore[type-arg]
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()
