"""New nodes of a rewrite in their order, and operators of ONNX Runtime's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

ENGINE = "com.microsoft"  # the domain of ONNX Runtime's own operators
ENGINE_OPSET = 1


class Steps:
    """Nodes that are to be inserted into a graph together."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def add(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """The first output of a new node of standard ONNX."""
        self.nodes.append(ir.node(op_type, inputs, attributes=attributes))
        return self.nodes[-1].outputs[0]

    def add_to_engine(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """The first output of a new node with an operator of ONNX Runtime's own."""
        self.nodes.append(ir.node(op_type, inputs, attributes=attributes, domain=ENGINE))
        return self.nodes[-1].outputs[0]

    def constant(self, number: Any, dtype: Any) -> ir.Value:
        """A new constant."""
        tensor = ir.tensor(np.array(number, dtype))
        self.nodes.append(ir.node("Constant", [], attributes={"value": tensor}))
        return self.nodes[-1].outputs[0]


def use_engine_operators(model: ir.Model) -> None:
    """Declare that a graph has operators of ONNX Runtime's own."""
    model.opset_imports[ENGINE] = ENGINE_OPSET
