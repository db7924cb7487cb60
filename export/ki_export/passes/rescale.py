"""Products of an MLP that would leave float16's range, made smaller by a power of two and larger again in float32.

With W_up / 2^k in place of W_up, gelu(gate) * up and its product with W_down are 2^k times smaller; behind W_down one
multiplication in float32 undoes it. Powers of two round nothing, so the float32 graph computes the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from .cleanup import clean_up

UP, DOWN = ".up_proj.weight", ".down_proj.weight"


def rescale(model: ir.Model, exponents: Mapping[str, int]) -> None:
    """For each `<layer>.mlp` with an exponent k > 0 that the graph has: undo 2^-k behind its down_proj.

    The weights file must hold W_up / 2^k. ValueError if a layer is not of that form.
    """
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "Gemm" else None
        if weight is None or not str(weight.name).endswith(DOWN):
            continue
        exponent = exponents.get(str(weight.name).removesuffix(DOWN), 0)
        if exponent:
            _check(node, str(weight.name).removesuffix(DOWN) + UP)
            _undo(model.graph, node, exponent)
    clean_up(model)


def _undo(graph: ir.Graph, node: ir.Node, exponent: int) -> None:
    output = node.outputs[0]
    factor = ir.node("Constant", [], attributes={"value": ir.tensor(np.array(2.0**exponent, np.float32))})
    users = list(output.uses())
    mul = ir.node("Mul", [output, factor.outputs[0]])
    mul.outputs[0].dtype, mul.outputs[0].shape = output.dtype, output.shape
    mul.outputs[0].name = f"{output.name}.rescaled"
    graph.insert_after(node, [factor, mul])
    for use in users:
        use.node.replace_input_with(use.idx, mul.outputs[0])


def _check(down: ir.Node, up: str) -> None:
    """The down_proj's input is a product with the output of `up`, without a bias."""
    value = down.inputs[0]
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type == "Reshape" and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    factors = list(producer.inputs) if producer is not None and producer.op_type == "Mul" else []
    if not any(_comes_from(factor, up) for factor in factors) or len(down.inputs) == 3:
        raise ValueError(f"{down.name}: its input is no product with '{up}', so it cannot be rescaled")


def _comes_from(value: ir.Value | None, weight: str) -> bool:
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type == "Reshape" and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    return (
        producer is not None
        and producer.op_type == "Gemm"
        and len(producer.inputs) == 2
        and producer.inputs[1] is not None
        and producer.inputs[1].name == weight
    )
