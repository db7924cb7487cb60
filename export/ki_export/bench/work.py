"""Operations and bytes of an ONNX graph, counted from the graph; its weights stay where they are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from ki_edge.dtypes import BY_ONNX, FLOAT32, FLOATS
from ki_edge.errors import BundleError
from ki_edge.graphs import GraphSpec

from .shapes import ROTATION, Shapes

INT8 = "int8"
PACKED: Mapping[int, int] = {TensorProto.INT4: 2, TensorProto.UINT4: 2}  # elements in a byte
# operators that multiply matrices and that nobody here can count: better named than taken for nothing
UNCOUNTED = frozenset({"Attention", "ConvInteger", "ConvTranspose", "Einsum", "GRU", "LSTM", "QLinearConv", "RNN"})


@dataclass(frozen=True)
class Product:
    """A matrix product [m, k] x [k, n], `batch` of them, computed in the type `kind`."""

    kind: str
    m: int
    k: int
    n: int
    batch: int = 1

    @property
    def flops(self) -> int:
        """One multiplication and one addition for each element of k."""
        return 2 * self.batch * self.m * self.k * self.n


@dataclass(frozen=True)
class Work:
    """What one run of a graph must do. `products` with how often each occurs; `uncounted`: operators left out."""

    products: Mapping[Product, int]
    read: int  # bytes of weights and inputs; of a table that is looked up, only the rows
    written: int  # bytes of outputs
    uncounted: tuple[str, ...] = ()

    @property
    def flops(self) -> dict[str, int]:
        """Operations by the type in which they are computed."""
        found: Counter[str] = Counter()
        for product, times in self.products.items():
            found[product.kind] += times * product.flops
        return dict(found)

    @property
    def bytes(self) -> int:
        """What has to cross the memory bus if every tensor of the graph's surface does so once."""
        return self.read + self.written


def count(path: Path, spec: GraphSpec, sizes: Mapping[str, int]) -> Work:
    """Work of a graph file whose symbols (graphs.py) have these sizes.

    BundleError if a shape on the way to a matrix product cannot be inferred.
    """
    graph = onnx.load(path, load_external_data=False)
    shapes = Shapes(graph, spec, sizes)
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}
    products: Counter[Product] = Counter()
    uncounted: set[str] = set()
    for node in graph.graph.node:
        if node.op_type in COUNTERS:
            try:
                products[COUNTERS[node.op_type](node, shapes)] += 1
            except KeyError as error:
                raise BundleError(
                    f"{path}: {node.op_type} '{node.name}': the shape of {error} cannot be inferred, so its work "
                    "cannot be counted; export the checkpoint again"
                ) from None
        elif node.op_type in UNCOUNTED or (node.domain not in ("", "ai.onnx") and node.op_type != ROTATION):
            uncounted.add(f"{node.domain}:{node.op_type}".lstrip(":"))
    names = [value.name for value in graph.graph.input if value.name not in constants]
    read = sum(map(shapes.nbytes, names)) + sum(_read(graph, tensor, shapes) for tensor in constants.values())
    written = sum(shapes.nbytes(value.name) for value in graph.graph.output)
    return Work(dict(products), read, written, tuple(sorted(uncounted)))


Counted = Callable[[onnx.NodeProto, Shapes], Product]


def _gemm(node: onnx.NodeProto, shapes: Shapes) -> Product:
    a, b = shapes.of(node.input[0]), shapes.of(node.input[1])
    m, k = reversed(a) if _attribute(node, "transA") else a
    n = b[0] if _attribute(node, "transB") else b[1]
    return Product(_kind(node, shapes), m, k, n)


def _matmul(node: onnx.NodeProto, shapes: Shapes) -> Product:
    """MatMul and its relatives, whose second operand is [..., k, n]."""
    a, b = shapes.of(node.input[0]), shapes.of(node.input[1])
    k, n = a[-1], b[-1] if len(b) > 1 else 1
    rows = math.prod(a[:-1])
    if math.prod(b[:-2]) == 1:  # one second operand for all rows
        return Product(_kind(node, shapes), rows, k, n)
    batch = math.prod(shapes.of(node.output[0])[:-2])
    return Product(_kind(node, shapes), a[-2] if len(a) > 1 else 1, k, n, batch)


def _matmul_nbits(node: onnx.NodeProto, shapes: Shapes) -> Product:
    """com.microsoft MatMulNBits: weights of a few bits, packed; the sizes are attributes."""
    rows = math.prod(shapes.of(node.input[0])[:-1])
    kind = INT8 if _attribute(node, "accuracy_level") == 4 else _kind(node, shapes)
    return Product(kind, rows, _attribute(node, "K"), _attribute(node, "N"))


def _conv(node: onnx.NodeProto, shapes: Shapes) -> Product:
    """A convolution as the product that it is: one row for each place of the output."""
    weight, out = shapes.of(node.input[1]), shapes.of(node.output[0])
    groups = _attribute(node, "group") or 1
    places = out[0] * math.prod(out[2:])
    return Product(_kind(node, shapes), places, math.prod(weight[1:]), weight[0] // groups, groups)


COUNTERS: Mapping[str, Counted] = {
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "DynamicQuantizeMatMul": _matmul,
    "MatMulNBits": _matmul_nbits,
    "Conv": _conv,
}


def _kind(node: onnx.NodeProto, shapes: Shapes) -> str:
    if node.op_type in ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
        return INT8
    dtype = BY_ONNX.get(shapes.type_of(node.input[0]), FLOAT32)
    return dtype.name if dtype.stored in FLOATS else FLOAT32.name


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), 0)


def _read(graph: onnx.ModelProto, tensor: TensorProto, shapes: Shapes) -> int:
    """Bytes of a constant that a run reads: of one that is only looked up, the rows that are taken."""
    users = [node for node in graph.graph.node if tensor.name in node.input]
    whole = shapes.nbytes(tensor.name) // PACKED.get(tensor.data_type, 1)
    if users and all(node.op_type == "Gather" and node.input[0] == tensor.name for node in users):
        return min(whole, sum(shapes.nbytes(node.output[0]) for node in users))
    return whole
