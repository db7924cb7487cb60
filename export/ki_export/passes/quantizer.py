"""The rewriting of one graph's linear layers into products of bytes, layer by layer (see quantize.py)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .int8_parts import LEVELS, Int8Weight, block_name, blocks
from .rotary import COSINES, ROTATION, SINES
from .steps import Steps

ZERO = 128  # what stands for zero in activations
TINY = 1e-30  # instead of the largest magnitude of a row of zeros
GELU_DEPTH = 0.17005  # no Gelu, of either kind, is below the negative of this
PRODUCT = "MatMulIntegerToFloat"


@dataclass(frozen=True)
class QuantizedActivation:
    """A quantised activation: uint8 [rows, in], what a row's integers are to be multiplied with f32 [rows, 1]."""

    values: ir.Value
    factors: ir.Value


@dataclass(frozen=True, eq=False)
class QuantizedProduct:
    """A layer's `output`, what it is `before` its rows' `factors`, and these."""

    output: ir.Value
    before: ir.Value
    factors: ir.Value


@dataclass(frozen=True)
class _Layer:
    """The parts of a weight [out, width]."""

    parts: Int8Weight
    out: int
    width: int

    @property
    def blocks(self) -> int:
        return blocks(self.out)


class Quantizer:
    """Rewrites the Gemms of one graph in their order, and remembers what they can share."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._rows: dict[ir.Value, list[QuantizedActivation]] = {}  # more than one: of the blocks of a row
        self._zeros: dict[str, ir.Value] = {}  # by the number of rows
        self._plain: dict[ir.Value, QuantizedProduct] = {}  # layers' outputs that have no bias
        self._wide: dict[ir.Value, list[QuantizedProduct]] = {}  # the same of layers in blocks
        self._turned: dict[tuple[ir.Value, ir.Value], ir.Value] = {}  # a table of cosines or sines, times rows' factors

    def rewrite(self, gemm: ir.Node, weight: ir.Value) -> None:
        """Put products of the parts of `weight` f32 [out, in] in the place of a Gemm. ValueError without shapes."""
        x, output, steps = gemm.inputs[0], gemm.outputs[0], Steps()
        if x is None or x.shape is None or output.shape is None or weight.shape is None:
            raise ValueError(f"the input of '{weight.name}' has no shape")
        layer = _Layer(Int8Weight.of(str(weight.name)), *(int(str(size)) for size in weight.shape))
        if x not in self._rows:
            pieces = [(x, None)] if layer.blocks > 1 else self._pieces(steps, x)
            self._rows[x] = [self._quantize(steps, *piece) for piece in pieces]
        rows = self._rows[x]
        products: list[ir.Value] = []
        if len(rows) > 1:
            y = self._sum(steps, rows, layer)
        else:
            y, products = self._product(steps, rows[0], layer, output)
        biased = len(gemm.inputs) == 3
        if biased:
            y = steps.add("Add", y, gemm.inputs[2])
        y.type, y.shape = output.type, output.shape
        ir.convenience.replace_nodes_and_values(self._graph, gemm, [gemm], steps.nodes, [output], [y])
        if not biased:
            self._remember(y, [QuantizedProduct(y, product, rows[0].factors) for product in products])

    def _remember(self, y: ir.Value, products: list[QuantizedProduct]) -> None:
        """Of a layer without a bias: its factors may go elsewhere. Those of a sum cannot."""
        if len(products) > 1:
            self._wide[y] = products
        for product in products if len(products) == 1 else ():
            if not self._rotate(product):
                self._gate(product)
                self._plain[y] = product

    def _product(
        self, steps: Steps, row: QuantizedActivation, layer: _Layer, output: ir.Value
    ) -> tuple[ir.Value, list[ir.Value]]:
        """The layer's output, and before the rows' factors it, or the blocks of it."""
        count, found = layer.blocks, []
        for at in range(count):
            values, scales = (
                part if count == 1 else block_name(part, at) for part in (layer.parts.values, layer.parts.scales)
            )
            values_of = self._initializer(values, ir.DataType.INT8, layer.width, layer.out // count)
            scales_of = self._initializer(scales, ir.DataType.FLOAT, layer.out // count)
            found.append(_multiply(steps, row, values_of, scales_of))
        whole = found[0] if count == 1 else steps.add("Concat", *found, axis=-1)
        whole.type, whole.shape = output.type, output.shape
        return steps.add("Mul", whole, row.factors), found

    def _sum(self, steps: Steps, rows: list[QuantizedActivation], layer: _Layer) -> ir.Value:
        """The layer's output as the sum of what it makes of each block of a row."""
        scales, products = self._initializer(layer.parts.scales, ir.DataType.FLOAT, layer.out), []
        for at, row in enumerate(rows):
            name = block_name(layer.parts.values, at)
            values = self._initializer(name, ir.DataType.INT8, layer.width // len(rows), layer.out)
            products.append(steps.add("Mul", _multiply(steps, row, values, scales), row.factors))
        total = products[0]
        for product in products[1:]:
            total = steps.add("Add", total, product)
        return total

    def _initializer(self, name: str, dtype: ir.DataType, *dims: int) -> ir.Value:
        """One without a value yet, made where it is first asked for."""
        if name not in self._graph.initializers:
            self._graph.initializers.add(ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims)))
        return self._graph.initializers[name]

    def _pieces(self, steps: Steps, x: ir.Value) -> list[tuple[ir.Value, ir.Value | None]]:
        """What is quantised by itself, and rows' factors that it leaves out: `x`, or the blocks of it that come of the
        blocks of two layers as Gelu(one) * other.
        """
        product = _only_source(x).producer()
        if product is None or product.op_type != "Mul" or not _serves_one(_only_source(x)):
            return [(x, None)]
        for gated, other in (tuple(product.inputs), tuple(product.inputs)[::-1]):
            gelu = None if gated is None else gated.producer()
            if gelu is None or gelu.op_type != "Gelu" or other is None or gelu.inputs[0] is None:
                continue
            gate, up = _only_source(gelu.inputs[0]), _only_source(other)
            if gate in self._wide and up in self._wide and _same_rows(gate, x) and _same_rows(up, x):
                pairs = zip(self._wide[gate], self._wide[up], strict=True)
                return [(_gated(steps, gelu, *pair, x), pair[1].factors) for pair in pairs]
        return [(x, None)]

    def _quantize(self, steps: Steps, x: ir.Value, left_out: ir.Value | None = None) -> QuantizedActivation:
        low = _is_gelu(x)  # this and what follows look at who uses x so far
        deferred = self._defer_factors(x) if left_out is None else left_out
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


def _multiply(steps: Steps, row: QuantizedActivation, values: ir.Value, scales: ir.Value) -> ir.Value:
    one, zero = steps.constant(1.0, np.float32), steps.constant(ZERO, np.uint8)
    return steps.add_to_engine(PRODUCT, row.values, values, one, scales, zero)


def _gated(steps: Steps, gelu: ir.Node, gate: QuantizedProduct, up: QuantizedProduct, x: ir.Value) -> ir.Value:
    """A block of x [rows, width]: Gelu(gate) * up, but for the rows' factors of up."""
    settings = {name: attribute.value for name, attribute in gelu.attributes.items()}
    opened = steps.add("Gelu", steps.add("Mul", gate.before, gate.factors), **settings)
    piece = steps.add("Mul", opened, up.before)
    assert x.shape is not None
    piece.type, piece.shape = x.type, ir.Shape([x.shape[0], None])
    return piece


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
