"""Linear layers in 8 bits: int8 weights with a scale an output channel, activations quantised as they come, a row each.

A Gemm(x, W, b, transB=1) becomes, with m = max |x| / 127 of each row of x and s = max |W| / 127 of each row of W,

    y = (round(x / m) @ round(W / s)^T) * s * m + b

The product is exact in int32. Rows are tokens, and each has its own scale because a few tokens of a language model are
far larger than the rest: with one scale for all, the rest would be rounded away. Activations are unsigned around 128,
the form for which x86 has instructions.

ONNX Runtime applies s, a factor a column, while it stores the product (its operator MatMulIntegerToFloat). A factor a
row is a pass over memory of its own. So factors move to where they cost least: the gate of a residual branch, one
number a channel, into s; m behind the next layer where y is a factor of its input, as up_proj's is, and into the
cosines and sines where y is rotated.

A layer of many outputs is computed BLOCK outputs at a time (`blocks`): the product itself, and what follows, find them
in the processor's cache instead of in memory. Of a gated MLP all is done block by block, up to the sum
of what down_proj makes of each; each block of a row then has an m of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from .cleanup import clean_up
from .int8_parts import Int8Weight
from .quantizer import Quantizer
from .steps import use_engine_operators


def quantize(model: ir.Model, chosen: Callable[[str], bool]) -> list[Int8Weight]:
    """Rewrite every Gemm whose weight's name is `chosen`; what the chosen weights have become.

    The new initializers have no values yet: `ki_export.weights.int8` computes them. ValueError if a chosen weight is
    used in a way that cannot be quantised. For the end, after all exact passes.
    """
    quantizer = Quantizer(model.graph)
    found: dict[ir.Value, Int8Weight] = {}
    for node in list(model.graph):
        for weight in {value for value in node.inputs if value is not None and value.is_initializer()}:
            if not chosen(str(weight.name)):
                continue
            if not _is_linear(node, weight):
                raise ValueError(
                    f"'{weight.name}' is used by a {node.op_type} that is not x W^T + b: keep it in float32"
                )
            if weight.shape is None or weight.dtype != ir.DataType.FLOAT:
                raise ValueError(
                    f"'{weight.name}' is {weight.dtype}{weight.shape}: "
                    "only float32 weights of known shape are quantised"
                )
            found[weight] = Int8Weight.of(str(weight.name))
            quantizer.rewrite(node, weight)
    for weight in found:
        del model.graph.initializers[str(weight.name)]
    if found:
        use_engine_operators(model)
    clean_up(model)
    return list(found.values())


def _is_linear(node: ir.Node, weight: ir.Value) -> bool:
    if node.op_type != "Gemm" or node.inputs[1] is not weight or node.inputs[0] is weight:
        return False
    settings = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0}
    settings.update({name: node.attributes[name].value for name in settings if name in node.attributes})
    return settings == {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}
