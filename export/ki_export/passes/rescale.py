"""Products whose weights are stored divided by a power of two, made larger again in float32.

Where a weight or a result does not fit float16's range, W / 2^k takes the place of W and the result is multiplied by
2^k. Powers of two round nothing: with the divided weights, the float32 graph computes the same bits. In an MLP the
factor of up_proj can be left for down_proj to undo, which makes the product between them smaller by it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from .cleanup import clean_up
from .products import matrix_products


def rescale(model: ir.Model, factors: Mapping[str, int]) -> None:
    """Multiply the result of each product in `factors` (site -> k) by 2^k, before its bias is added."""
    for site in matrix_products(model.graph):
        exponent = factors.get(site.name, 0)
        if exponent:
            _multiply(model.graph, site.node, exponent)
    clean_up(model)


def _multiply(graph: ir.Graph, node: ir.Node, exponent: int) -> None:
    output = node.outputs[0]
    product = ir.Node("", node.op_type, list(node.inputs[:2]), list(node.attributes.values()), name=node.name)
    factor = ir.node("Constant", [], attributes={"value": ir.tensor(np.array(2.0**exponent, np.float32))})
    new = [product, factor, ir.node("Mul", [product.outputs[0], factor.outputs[0]])]
    if len(node.inputs) == 3:
        new.append(ir.node("Add", [new[-1].outputs[0], node.inputs[2]]))
    for made in (product, *new[2:]):
        made.outputs[0].type, made.outputs[0].shape = output.type, output.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], new, [output], [new[-1].outputs[0]])
