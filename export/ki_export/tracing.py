"""From a module on the meta device to an ONNX graph with the contract's names, cleaned by the passes.

No weight is read: initializers carry names and shapes, and get their place in the weights file later.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import onnx
import onnx_ir as ir
import torch

from ki_edge.errors import ExportError
from ki_edge.graphs import GraphSpec

from .passes import PASSES
from .wrappers import Traceable

MODULE = "model."  # where the wrappers hold the model
MIN_OPSET = 18
ONNX_TYPES = {
    "uint8": ir.DataType.UINT8,
    "bool": ir.DataType.BOOL,
    "int32": ir.DataType.INT32,
    "float32": ir.DataType.FLOAT,
}


def trace(traceable: Traceable, opset: int, sizes: Mapping[str, int]) -> ir.Model:
    """The graph of one wrapper. `sizes`: constants of `graphs.sizes`. ExportError if the tracer or a pass fails."""
    spec = traceable.spec
    try:
        with _quiet():
            model = _export(traceable, opset)
            prepare(model)
            for apply in PASSES:
                apply(model)
            finish(model, spec, sizes)
    except (torch.onnx.errors.OnnxExporterError, ValueError, RuntimeError) as error:
        first = str(error).strip().split("\n", 1)[0]
        raise ExportError(f"graph {spec.name} cannot be traced at opset {opset}: {first}; try --opset 20") from error
    return model


def _export(traceable: Traceable, opset: int) -> ir.Model:
    program = torch.onnx.export(
        traceable.module,
        traceable.inputs,
        dynamo=True,
        optimize=False,
        verbose=False,
        opset_version=opset,
        dynamic_shapes=traceable.dynamic_shapes,
        input_names=[tensor.name for tensor in traceable.spec.inputs],
        output_names=[tensor.name for tensor in traceable.spec.outputs],
    )
    if program is None:
        raise RuntimeError("the tracer gave no program")
    model: ir.Model = program.model
    return model


def prepare(model: ir.Model) -> None:
    """Initializers under the model's own parameter names, and without values."""
    initializers = model.graph.initializers
    for name, value in list(initializers.items()):
        del initializers[name]
        value.name, value.const_value = name.removeprefix(MODULE), None
        initializers[value.name] = value


def finish(model: ir.Model, spec: GraphSpec, sizes: Mapping[str, int]) -> None:
    """Types and symbolic dims of the contract on inputs and outputs; our own name and the oldest file version."""
    graph = model.graph
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            if value.dtype != ONNX_TYPES[tensor.dtype]:
                raise ValueError(f"'{tensor.name}' is {value.dtype} in the graph, the contract says {tensor.dtype}")
            value.name, value.shape = tensor.name, ir.Shape(tensor.resolve(sizes))
    graph.name = spec.name
    opset = model.opset_imports[""]
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    model.producer_name = "ki-export"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what tracer and passes say about packages that are not installed and weights that have no values."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
