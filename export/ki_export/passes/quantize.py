"""Linear layers in 8 bits: int8 weights with a scale an output channel, activations quantised as they come, a row each.

A Gemm(x, W, b, transB=1) becomes, with m = max |x| / 127 of each row of x and s = max |W| / 127 of each row of W,

    y = (round(x / m) @ round(W / s)^T) * (max(m) * s) * (m / max(m)) + b

The product is exact in int32. Rows are tokens, and each has its own scale because a few tokens of a language model are
far larger than the rest: with one scale for all, the rest would be rounded away. Activations are unsigned around 128,
the form for which x86 has instructions. The two factors are apart because engines apply the first, a scalar times a
vector, while they store the product. The second, the row's share, is a pass over memory of its own; where the product
is a factor of the next layer's input, as up_proj's is, it is applied behind that layer, where rows are short.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from .cleanup import clean_up

LEVELS = 127  # largest magnitude of a quantised value
ZERO = 128  # what stands for zero in activations
TINY = 1e-30  # instead of the largest magnitude of a row of zeros


@dataclass(frozen=True)
class Int8Weight:
    """What stands for the initializer `weight` f32 [out, in]: names of `values` int8 [in, out], `scales` f32 [out]."""

    weight: str
    values: str
    scales: str

    @classmethod
    def of(cls, weight: str) -> Int8Weight:
        """The names that a weight's parts always have, so that graphs share them."""
        return cls(weight, f"{weight}.int8", f"{weight}.scale")


@dataclass(frozen=True)
class QuantizedActivation:
    """A quantised activation: uint8 [rows, in], scale f32 [] of its largest row, what each row has of it [rows, 1]."""

    values: ir.Value
    scale: ir.Value
    shares: ir.Value


def quantize(model: ir.Model, chosen: Callable[[str], bool]) -> list[Int8Weight]:
    """Rewrite every Gemm whose weight's name is `chosen`; what the chosen weights have become.

    The new initializers have no values yet: `ki_export.weights.int8` computes them. ValueError if a chosen weight is
    used in a way that cannot be quantised. For the end, after all exact passes.
    """
    quantizer = _Quantizer(model.graph)
    found: dict[ir.Value, Int8Weight] = {}
    for node in list(model.graph):
        for weight in {value for value in node.inputs if value is not None and value.is_initializer()}:
            if not chosen(str(weight.name)):
                continue
            if not _is_linear(node, weight):
                raise ValueError(
                    f"'{weight.name}' is used by a {node.op_type} that is not x W^T + b: keep it in float32"
                )
            if weight not in found:
                found[weight] = _split_weight(model.graph, weight)
            quantizer.rewrite(node, found[weight])
    for weight in found:
        del model.graph.initializers[str(weight.name)]
    clean_up(model)
    return list(found.values())


def _is_linear(node: ir.Node, weight: ir.Value) -> bool:
    if node.op_type != "Gemm" or node.inputs[1] is not weight or node.inputs[0] is weight:
        return False
    settings = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0}
    settings.update({name: node.attributes[name].value for name in settings if name in node.attributes})
    return settings == {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}


def _split_weight(graph: ir.Graph, weight: ir.Value) -> Int8Weight:
    shape = weight.shape
    if shape is None or weight.dtype != ir.DataType.FLOAT:
        raise ValueError(f"'{weight.name}' is {weight.dtype}{shape}: only float32 weights of known shape are quantised")
    names = Int8Weight.of(str(weight.name))
    for name, dtype, dims in (
        (names.values, ir.DataType.INT8, [shape[1], shape[0]]),
        (names.scales, ir.DataType.FLOAT, [shape[0]]),
    ):
        graph.initializers.add(ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims)))
    return names


class _Quantizer:
    """Rewrites the Gemms of one graph in their order, and remembers what they can share."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._rows: dict[ir.Value, QuantizedActivation] = {}
        self._zeros: dict[str, ir.Value] = {}  # by the number of rows
        self._shared: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}  # a product: itself before its shares, the shares

    def rewrite(self, gemm: ir.Node, parts: Int8Weight) -> None:
        """Put the products of `parts` in the place of a Gemm."""
        x, output, steps = gemm.inputs[0], gemm.outputs[0], _Steps()
        if x is None or x.shape is None or output.shape is None:
            raise ValueError(f"the input of '{parts.weight}' has no shape")
        if x not in self._rows:
            self._rows[x] = self._quantize(steps, x)
        rows, initializers = self._rows[x], self._graph.initializers
        product = steps.add("MatMulInteger", rows.values, initializers[parts.values], steps.constant(ZERO, np.uint8))
        product = steps.add("Cast", product, to=int(ir.DataType.FLOAT))
        before = steps.add("Mul", product, steps.add("Mul", rows.scale, initializers[parts.scales]))
        y = steps.add("Mul", before, rows.shares)
        if len(gemm.inputs) == 3:
            y = steps.add("Add", y, gemm.inputs[2])
        else:
            self._shared[y] = before, rows.shares
        for value in (before, y):
            value.type, value.shape = output.type, output.shape
        ir.convenience.replace_nodes_and_values(self._graph, gemm, [gemm], steps.nodes, [output], [y])

    def _quantize(self, steps: _Steps, x: ir.Value) -> QuantizedActivation:
        deferred = self._defer_shares(x)
        last = steps.constant([-1], np.int64)
        largest = steps.add("ReduceMax", x, last, keepdims=0)
        smallest = steps.add("Neg", steps.add("ReduceMin", x, last, keepdims=0))
        magnitude = steps.add("Max", largest, smallest, steps.constant(TINY, np.float32))  # [rows]
        scales = steps.add("Mul", magnitude, steps.constant(1.0 / LEVELS, np.float32))
        values = steps.add("QuantizeLinear", x, scales, self._zeros_for(steps, x, scales), axis=0)
        scale = steps.add("ReduceMax", scales, keepdims=0)
        shares = steps.add("Unsqueeze", steps.add("Div", scales, scale), last)
        return QuantizedActivation(values, scale, shares if deferred is None else steps.add("Mul", shares, deferred))

    def _zeros_for(self, steps: _Steps, x: ir.Value, scales: ir.Value) -> ir.Value:
        """Zero points uint8 [rows]: one vector for all activations of so many rows."""
        assert x.shape is not None
        key = str(x.shape[0])
        if key not in self._zeros:
            shape = steps.add("Shape", scales)
            self._zeros[key] = steps.add("Expand", steps.constant(ZERO, np.uint8), shape)
        return self._zeros[key]

    def _defer_shares(self, x: ir.Value) -> ir.Value | None:
        """If `x` is a product of something with a quantised layer's output and serves nothing else, take the shares
        out of that output and return them: a row's quantised values do not depend on them.
        """
        factor = _only_source(x)
        product = factor.producer()
        if product is None or product.op_type != "Mul" or not _serves_one(factor):
            return None
        for place, value in enumerate(product.inputs):
            assert value is not None
            source = _only_source(value)
            if source in self._shared and _serves_one(source) and _same_rows(source, x):
                before, shares = self._shared[source]
                reshape = value.producer()
                node, at = (product, place) if value is source else (reshape, 0)
                assert node is not None
                node.replace_input_with(at, before)
                return shares
        return None


def _only_source(value: ir.Value) -> ir.Value:
    """What `value` is a reshaped view of, if nothing else looks at it; else itself."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Reshape" and _serves_one(value) and producer.inputs[0] is not None:
        return producer.inputs[0]
    return value


def _serves_one(value: ir.Value) -> bool:
    return len(list(value.uses())) == 1 and not value.is_graph_output()


def _same_rows(one: ir.Value, other: ir.Value) -> bool:
    """Both are [rows, width] of the same sizes, so a Reshape between them keeps rows apart."""
    return one.shape is not None and other.shape is not None and list(one.shape) == list(other.shape)


class _Steps:
    """New nodes in their order."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def add(self, op_type: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
        self.nodes.append(ir.node(op_type, inputs, attributes=attributes))
        return self.nodes[-1].outputs[0]

    def constant(self, number: Any, dtype: Any) -> ir.Value:
        tensor = ir.tensor(np.array(number, dtype))
        self.nodes.append(ir.node("Constant", [], attributes={"value": tensor}))
        return self.nodes[-1].outputs[0]
