"""Products in eight and four bits for strongly typed engines: their operands quantised and dequantised in the graph.

For the end, on graphs that `lower` has brought to 16 bits. A product Gemm(x, W, transB=1) of the base type becomes

    x -> [Mul 1/b] -> QuantizeLinear -> DequantizeLinear -+
    W.values, W.scales ----> DequantizeLinear ------------+-> Gemm -> Cast to float32, as before

and engines fuse the two DequantizeLinear with the Gemm into one product of low values. What they need for it: the
scales of operands are constants, one a tensor; those of weights one an output channel; every DequantizeLinear gives the
base type; nothing stands between a DequantizeLinear and the product. Where the operand is a Cast of a float32 value, it
is quantised from that, so that it is rounded once. Four bits have two scales, one in e4m3 for 16 inputs and one in
float32 for all, hence two DequantizeLinear in a chain; their activations are quantised by an operator of TensorRT's
own, which computes the blocks' scales as they come, or stay in the base type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from .cleanup import clean_up
from .low_plan import F32, Kind, LowPlan, LowProduct
from .products import MatrixProduct, matrix_products

OPSET = {"int8": 20, "fp8": 20, "nvfp4": 23}  # the first, of 20 on, that has the type
BLOCK = 16  # inputs that share a scale in nvfp4
TENSORRT = "trt"  # domain of the operator that quantises to four bits
DYNAMIC = "TRT_FP4DynamicQuantize"
TYPES = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN, "nvfp4": ir.DataType.FLOAT4E2M1}
BASES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
FLOAT, E4M3 = ir.DataType.FLOAT, ir.DataType.FLOAT8E4M3FN


@dataclass(frozen=True, eq=False)
class LowInitializer:
    """What stands for the initializer `weight` [out, in]: names of its parts, and how their numbers are made.

    `balance`: f32 [in] that its columns are multiplied by before they are rounded, None for ones.
    """

    weight: str
    kind: Kind
    balance: F32 | None = None

    @property
    def values(self) -> str:
        """Low values [out, in]."""
        return f"{self.weight}.values"

    @property
    def scales(self) -> str:
        """[out] of the base type; of nvfp4 e4m3 [out, in / 16]."""
        return f"{self.weight}.scales"

    @property
    def second(self) -> str:
        """f32 []: the scale of nvfp4's scales."""
        return f"{self.weight}.second"


def quantize_static(model: ir.Model, plan: LowPlan) -> list[LowInitializer]:
    """Rewrite the products of a lowered graph that `plan` has; what their weights have become.

    The new initializers have no values yet: `ki_export.weights.low_bits` computes them. ValueError if a product is not
    of the plan's base type or of a form that cannot be quantised.
    """
    sites = [site for site in matrix_products(model.graph) if site.name in plan.products]
    rewriter = _Rewriter(model.graph, plan)
    for site in sites:
        rewriter.rewrite(site, plan.products[site.name])
    for weight in rewriter.replaced:
        if not weight.uses():
            del model.graph.initializers[str(weight.name)]
    if sites:
        _raise_opset(model, max(OPSET[plan.products[site.name].kind] for site in sites))
    if rewriter.dynamic:
        model.opset_imports[TENSORRT] = 1
    clean_up(model)
    return list(rewriter.replaced.values())


def _raise_opset(model: ir.Model, opset: int) -> None:
    """The operators of our graphs mean the same from opset 20 on."""
    if model.opset_imports[""] < opset:
        model.opset_imports[""] = opset
        model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])


class _Rewriter:
    """Rewrites one graph. `replaced`: weights and what they have become; `dynamic`: TensorRT's own operator is used."""

    def __init__(self, graph: ir.Graph, plan: LowPlan) -> None:
        self._graph, self._plan, self._base = graph, plan, BASES[plan.base]
        self.replaced: dict[ir.Value, LowInitializer] = {}
        self._dequantized: dict[ir.Value, ir.Value] = {}  # a weight and its base-typed values
        self.dynamic = False

    def rewrite(self, site: MatrixProduct, product: LowProduct) -> None:
        """Replace a product's operands by what is dequantised of them."""
        node = site.node
        if node.outputs[0].dtype != self._base:
            raise ValueError(f"{site.name} is in {node.outputs[0].dtype}, not in the plan's {self._plan.base}")
        steps = _Steps(self._graph, node)
        left, right = node.inputs[:2]
        assert left is not None and right is not None
        balance = self._plan.balances.get(product.balance) if product.balance else None
        node.replace_input_with(0, self._operand(steps, left, product, product.operand, balance))
        if site.weight is not None:
            node.replace_input_with(1, self._weight(steps, site, product.kind, balance))
        elif product.other is None or product.kind == "nvfp4":
            raise ValueError(f"{site.name} has no weight: it takes int8 or fp8, with a scale for both operands")
        else:
            node.replace_input_with(1, self._operand(steps, right, product, product.other, None))

    def _operand(self, steps: _Steps, x: ir.Value, product: LowProduct, scale: float, balance: F32 | None) -> ir.Value:
        """`x` of the base type as it is after rounding, of the base type."""
        source = self._source(x)
        if balance is not None:
            factors = steps.constant(1.0 / balance, source.dtype or FLOAT)
            source = steps.add("Mul", [source, factors], source.dtype, x.shape)
        if product.kind == "nvfp4":
            return self._blocks(steps, source, scale)
        low = TYPES[product.kind]
        zero = steps.constant(np.zeros((), np.float32), low)
        inputs = [source, steps.constant(np.float32(scale), source.dtype or FLOAT), zero]
        rounded = steps.add("QuantizeLinear", inputs, low, x.shape)
        return steps.add(
            "DequantizeLinear", [rounded, steps.constant(np.float32(scale), self._base), zero], self._base, x.shape
        )

    def _source(self, x: ir.Value) -> ir.Value:
        """The float32 value that `x` is a Cast of, or `x`."""
        cast = x.producer()
        if cast is not None and cast.op_type == "Cast" and cast.inputs[0] is not None:
            return cast.inputs[0] if cast.inputs[0].dtype == FLOAT else x
        return x

    def _blocks(self, steps: _Steps, source: ir.Value, scale: float) -> ir.Value:
        """Activations of nvfp4: blocks of four bits with scales computed as they come; without a scale, as they are."""
        shape = source.shape
        x = source if source.dtype == self._base else steps.cast(source, self._base)
        if not scale:
            return x
        if shape is None:
            raise ValueError(f"'{source.name}' has no shape")
        self.dynamic = True
        blocks = ir.Shape([*list(shape)[:-1], int(shape[-1]) // BLOCK])  # type: ignore[arg-type]
        second = steps.constant(np.float32(scale), FLOAT)
        how = {"axis": -1, "block_size": BLOCK, "scale_type": int(E4M3)}
        quantize = ir.Node(TENSORRT, DYNAMIC, [x, second], ir.convenience.convert_attributes(how), num_outputs=2)
        steps.insert(quantize)
        for value, dtype, dims in zip(quantize.outputs, (TYPES["nvfp4"], E4M3), (shape, blocks), strict=True):
            value.type, value.shape = ir.TensorType(dtype), dims
        values, scales = quantize.outputs
        whole = steps.add("DequantizeLinear", [scales, second], FLOAT, blocks)
        wide = steps.add("DequantizeLinear", [values, whole], FLOAT, shape, axis=-1, block_size=BLOCK)
        return steps.cast(wide, self._base)

    def _weight(self, steps: _Steps, site: MatrixProduct, kind: Kind, balance: F32 | None) -> ir.Value:
        """A weight of the base type from its low values; one for all products that take it."""
        weight = site.weight
        assert weight is not None
        if weight not in self._dequantized:
            self._dequantized[weight] = self._split(steps, site, LowInitializer(str(weight.name), kind, balance))
        return self._dequantized[weight]

    def _split(self, steps: _Steps, site: MatrixProduct, parts: LowInitializer) -> ir.Value:
        weight, kind = site.weight, parts.kind
        assert weight is not None
        if site.node.op_type != "Gemm" or weight.shape is None or site.node.attributes["transB"].as_int() != 1:
            raise ValueError(f"{site.name} is no x W^T")
        self.replaced[weight] = parts
        rows, columns = weight.shape.numpy()
        values = self._initializer(parts.values, TYPES[kind], [rows, columns])
        if kind != "nvfp4":
            scales = self._initializer(parts.scales, self._base, [rows])
            return steps.add("DequantizeLinear", [values, scales], self._base, weight.shape, axis=0)
        if columns % BLOCK:
            raise ValueError(f"{site.name} has {columns} inputs, which are no blocks of {BLOCK}")
        blocks = self._initializer(parts.scales, E4M3, [rows, columns // BLOCK])
        whole = steps.add("DequantizeLinear", [blocks, self._initializer(parts.second, FLOAT, [])], FLOAT, blocks.shape)
        wide = steps.add("DequantizeLinear", [values, whole], FLOAT, weight.shape, axis=1, block_size=BLOCK)
        return steps.cast(wide, self._base)

    def _initializer(self, name: str, dtype: ir.DataType, dims: Sequence[int]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims))
        self._graph.initializers.add(value)
        return value


class _Steps:
    """New nodes before a product, in their order."""

    def __init__(self, graph: ir.Graph, before: ir.Node) -> None:
        self._graph, self._before = graph, before

    def insert(self, node: ir.Node) -> None:
        """Put a node before the product."""
        self._graph.insert_before(self._before, node)

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        dtype: ir.DataType | None,
        shape: ir.Shape | None,
        **attributes: Any,
    ) -> ir.Value:
        """A node's only output."""
        node = ir.node(op_type, inputs, attributes=attributes)
        output = node.outputs[0]
        output.type, output.shape = None if dtype is None else ir.TensorType(dtype), shape
        self.insert(node)
        return output

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A Cast of a value."""
        return self.add("Cast", [value], dtype, value.shape, to=int(dtype))

    def constant(self, values: Any, dtype: ir.DataType) -> ir.Value:
        """Float32 numbers in another type, as a constant."""
        numbers = np.asarray(values, np.float32).astype(dtype.numpy())
        tensor = ir.tensor(numbers, dtype=dtype)
        return self.add("Constant", [], tensor.dtype, ir.Shape(numbers.shape), value=tensor)
