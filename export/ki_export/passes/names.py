"""Name the output of every layer with weights after the layer, so that people and `localize` find it in the graph."""

from __future__ import annotations

import onnx_ir as ir

WEIGHT_INPUT = {"Gemm": 1, "Conv": 1, "LayerNormalization": 1, "Gather": 0}


def name_layers(model: ir.Model) -> None:
    """The Gemm of `backbone.layers.0.mlp.up_proj.weight` gives the value `backbone.layers.0.mlp.up_proj`."""
    taken = {value.name for node in model.graph for value in node.outputs} | set(model.graph.initializers)
    for node in model.graph:
        weight = node.inputs[WEIGHT_INPUT[node.op_type]] if node.op_type in WEIGHT_INPUT else None
        output = node.outputs[0]
        if weight is None or not weight.is_initializer() or weight.name is None or output.is_graph_output():
            continue
        name = weight.name.removesuffix(".weight")
        if name != weight.name and name not in taken:
            output.name = name
            taken.add(name)
