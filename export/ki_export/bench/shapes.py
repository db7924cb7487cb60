"""Shapes of every tensor in a graph once its free dimensions have values.

onnx infers node by node; what a graph computes from shapes, to reshape by, is computed on the way. (Inference of the
whole graph at once gives up where such a number goes through a Reshape.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, TypeProto, defs, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from ki_edge.graphs import GraphSpec

Value = npt.NDArray[np.generic]
SMALL = 64  # elements: no list of dimensions is longer
NBITS = "MatMulNBits"
# operators of ONNX Runtime's own domain whose first output is the product of the first two inputs
PRODUCTS = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", NBITS)
ROTATION = "RotaryEmbedding"  # one of them whose output is as its input


class Shapes:
    """Shape and element type of each named tensor."""

    def __init__(self, model: onnx.ModelProto, spec: GraphSpec, sizes: Mapping[str, int]) -> None:
        """Infer a graph's shapes from the sizes of the symbols of its inputs (graphs.py). The graph stays as it is."""
        self._opsets = {opset.domain: opset.version for opset in model.opset_import}
        self._types: dict[str, TypeProto] = {}
        self._values: dict[str, Value] = {}  # of small tensors that are known before the graph runs
        for tensor in model.graph.initializer:
            self._types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
            if math.prod(tensor.dims) <= SMALL and not tensor.external_data:
                self._values[tensor.name] = numpy_helper.to_array(tensor)
        for value in model.graph.input:
            dims = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.tensor(value.name).dims]
            self._types[value.name] = helper.make_tensor_type_proto(value.type.tensor_type.elem_type, dims)
        for node in model.graph.node:
            self._visit(node)

    def of(self, name: str) -> tuple[int, ...]:
        """The shape; KeyError with the name if some dimension is unknown."""
        tensor = self._types[name].tensor_type
        if not tensor.HasField("shape") or not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            raise KeyError(name)
        return tuple(dim.dim_value for dim in tensor.shape.dim)

    def type_of(self, name: str) -> int:
        """The element type as onnx numbers it; KeyError if the tensor is unknown."""
        return int(self._types[name].tensor_type.elem_type)

    def nbytes(self, name: str) -> int:
        """Size of the whole tensor; KeyError as in `of`."""
        return math.prod(self.of(name)) * int(helper.tensor_dtype_to_np_dtype(self.type_of(name)).itemsize)

    def _visit(self, node: onnx.NodeProto) -> None:
        inputs = [name for name in node.input if name]
        if any(name not in self._types for name in inputs):
            return
        if node.op_type in PRODUCTS:
            self._types[node.output[0]] = self._product(node)
        elif node.op_type == ROTATION:
            self._types[node.output[0]] = self._types[node.input[0]]
        elif node.domain in ("", "ai.onnx"):
            self._infer(node, inputs)
            self._compute(node, inputs)

    def _infer(self, node: onnx.NodeProto, inputs: list[str]) -> None:
        version = self._opsets.get(node.domain, self._opsets.get("", 1))
        found = onnx.shape_inference.infer_node_outputs(
            defs.get_schema(node.op_type, version, ""),
            node,
            {name: self._types[name] for name in inputs},
            {name: numpy_helper.from_array(self._values[name], name) for name in inputs if name in self._values},
            opset_imports=[helper.make_opsetid("", version)],
        )
        self._types.update(found)

    def _compute(self, node: onnx.NodeProto, inputs: list[str]) -> None:
        """The value of a small tensor that follows from shapes and constants alone."""
        if node.op_type == "Shape":
            try:
                shape = self.of(inputs[0])
            except KeyError:
                return
            bounds = {attribute.name: attribute.i for attribute in node.attribute}
            self._values[node.output[0]] = np.array(shape[bounds.get("start", 0) : bounds.get("end")], np.int64)
        elif inputs and all(name in self._values for name in inputs) and not _is_float(self._types, node.output[0]):
            results = ReferenceEvaluator(node).run(None, {name: self._values[name] for name in inputs})
            if all(np.size(result) <= SMALL for result in results):
                self._values.update(zip(node.output, map(np.asarray, results), strict=True))

    def _product(self, node: onnx.NodeProto) -> TypeProto:
        rows = self.of(node.input[0])[:-1]
        columns = {a.name: a.i for a in node.attribute}["N"] if node.op_type == NBITS else self.of(node.input[1])[-1]
        return helper.make_tensor_type_proto(TensorProto.FLOAT, [*rows, columns])


def _is_float(types: Mapping[str, TypeProto], name: str) -> bool:
    return name not in types or types[name].tensor_type.elem_type not in (TensorProto.INT64, TensorProto.INT32)
