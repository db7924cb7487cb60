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
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .cleanup import clean_up
from .rotary import COSINES, ROTATION, SINES
from .steps import Steps, use_engine_operators

LEVELS = 127  # largest magnitude of a quantised value
ZERO = 128  # what stands for zero in activations
TINY = 1e-30  # instead of the largest magnitude of a row of zeros
GELU_DEPTH = 0.17005  # no Gelu, of either kind, is below the negative of this
PRODUCT = "MatMulIntegerToFloat"


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
    """A quantised activation: uint8 [rows, in], what a row's integers are to be multiplied with f32 [rows, 1]."""

    values: ir.Value
    factors: ir.Value


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
        self._plain: dict[ir.Value, QuantizedProduct] = {}  # layers' outputs that have no bias
        self._turned: dict[tuple[ir.Value, ir.Value], ir.Value] = {}  # a table of cosines or sines, times rows' factors

    def rewrite(self, gemm: ir.Node, parts: Int8Weight) -> None:
        """Put the products of `parts` in the place of a Gemm."""
        x, output, steps = gemm.inputs[0], gemm.outputs[0], Steps()
        if x is None or x.shape is None or output.shape is None:
            raise ValueError(f"the input of '{parts.weight}' has no shape")
        if x not in self._rows:
            self._rows[x] = self._quantize(steps, x)
        rows, initializers = self._rows[x], self._graph.initializers
        one, zero = steps.constant(1.0, np.float32), steps.constant(ZERO, np.uint8)
        scales = initializers[parts.scales]
        before = steps.add_to_engine(PRODUCT, rows.values, initializers[parts.values], one, scales, zero)
        y = steps.add("Mul", before, rows.factors)
        if len(gemm.inputs) == 3:
            y = steps.add("Add", y, gemm.inputs[2])
        for value in (before, y):
            value.type, value.shape = output.type, output.shape
        ir.convenience.replace_nodes_and_values(self._graph, gemm, [gemm], steps.nodes, [output], [y])
        if len(gemm.inputs) == 2:
            product = QuantizedProduct(y, before, rows.factors)
            if not self._rotate(product):
                self._gate(product)
                self._plain[y] = product

    def _quantize(self, steps: Steps, x: ir.Value) -> QuantizedActivation:
        deferred, low = self._defer_factors(x), _is_gelu(x)  # both look at who uses x so far
        last = steps.constant([-1], np.int64)
        bounds = [steps.add("ReduceMax", x, last, keepdims=0)]
        if low:
            bounds.append(steps.constant(GELU_DEPTH, np.float32))
        else:
            bounds.append(steps.add("Neg", steps.add("ReduceMin", x, last, keepdims=0)))
            bounds.append(steps.constant(TINY, np.float32))
        magnitude = steps.add("Max", *bounds)  # [rows]
        scales = steps.add("Mul", magnitude, steps.constant(1.0 / LEVELS, np.float32))
        values = steps.add("QuantizeLinear", x, scales, self._zeros_for(steps, x, scales), axis=0)
        factors = steps.add("Unsqueeze", scales, last)
        return QuantizedActivation(values, factors if deferred is None else steps.add("Mul", factors, deferred))

    def _zeros_for(self, steps: Steps, x: ir.Value, scales: ir.Value) -> ir.Value:
        """Zero points uint8 [rows]: one vector for all activations of so many rows."""
        assert x.shape is not None
        key = str(x.shape[0])
        if key not in self._zeros:
            shape = steps.add("Shape", scales)
            self._zeros[key] = steps.add("Expand", steps.constant(ZERO, np.uint8), shape)
        return self._zeros[key]

    def _defer_factors(self, x: ir.Value) -> ir.Value | None:
        """If `x` is a product of something with a quantised layer's output and serves nothing else, take the rows'
        factors out of that output and return them: a row's quantised values do not depend on them.
        """
        factor = _only_source(x)
        product = factor.producer()
        if product is None or product.op_type != "Mul" or not _serves_one(factor):
            return None
        for place, value in enumerate(product.inputs):
            assert value is not None
            source = _only_source(value)
            if source in self._plain and _serves_one(source) and _same_rows(source, x):
                layer, reshape = self._plain[source], value.producer()
                node, at = (product, place) if value is source else (reshape, 0)
                assert node is not None
                node.replace_input_with(at, layer.before)
                return layer.factors
        return None

    def _gate(self, product: QuantizedProduct) -> None:
        """If a layer's output is only multiplied by a vector, a number a channel, its weight's scales take it along."""
        user = _only_user(product.output)
        view = user if user is not None and user.op_type == "Reshape" else None
        gating = _only_user(view.outputs[0]) if view is not None else user
        if gating is None or gating.op_type != "Mul":
            return
        output = view.outputs[0] if view is not None else product.output
        gate = next((value for value in gating.inputs if value is not None and value is not output), None)
        if gate is None or gate.shape is None or list(gate.shape) != list(product.output.shape or [])[-1:]:
            return
        maker = product.before.producer()
        assert maker is not None
        gated = ir.node("Mul", [maker.inputs[3], gate])
        self._graph.insert_before(maker, gated)
        maker.replace_input_with(3, gated.outputs[0])
        gating.outputs[0].replace_all_uses_with(output)
        product.output.name = f"{product.output.name}.gated"  # the layer's own output does not exist any more

    def _rotate(self, product: QuantizedProduct) -> bool:
        """If a layer's output is only rotated, the cosines and sines take the rows' factors along."""
        view = _only_user(product.output)
        rotation = _only_user(view.outputs[0]) if view is not None and view.op_type == "Reshape" else None
        if view is None or rotation is None or rotation.op_type != ROTATION:
            return False
        steps = Steps()
        for place in (COSINES, SINES):
            table = rotation.inputs[place]
            assert table is not None
            if (table, product.factors) not in self._turned:
                self._turned[table, product.factors] = steps.add("Mul", table, product.factors)
            rotation.replace_input_with(place, self._turned[table, product.factors])
        self._graph.insert_before(view, steps.nodes)
        view.replace_input_with(0, product.before)
        return True


@dataclass(frozen=True, eq=False)
class QuantizedProduct:
    """A layer's `output`, what it is `before` its rows' `factors`, and these."""

    output: ir.Value
    before: ir.Value
    factors: ir.Value


def _is_gelu(x: ir.Value) -> bool:
    producer = _only_source(x).producer()
    return producer is not None and producer.op_type == "Gelu"


def _only_source(value: ir.Value) -> ir.Value:
    """What `value` is a reshaped view of, if nothing else looks at it; else itself."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Reshape" and _serves_one(value) and producer.inputs[0] is not None:
        return producer.inputs[0]
    return value


def _only_user(value: ir.Value) -> ir.Node | None:
    """The node that uses `value`, if it is one, as its first or second input, and no output of the graph."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _serves_one(value: ir.Value) -> bool:
    return _only_user(value) is not None


def _same_rows(one: ir.Value, other: ir.Value) -> bool:
    """Both are [rows, width] of the same sizes, so a Reshape between them keeps rows apart."""
    return one.shape is not None and other.shape is not None and list(one.shape) == list(other.shape)
