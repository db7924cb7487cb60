"""From a module on the meta device to an ONNX graph with the contract's names, cleaned by the passes.

No weight is read: initializers carry names and shapes, and get their place in the weights file later. Two layers of
each kind are traced, and stamped out to the model's depth.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import onnx
import onnx_ir as ir
import torch

from ki_edge import graphs
from ki_edge.bundle import DecodeVocabulary
from ki_edge.config import Pi05Config
from ki_edge.dtypes import BY_NAME
from ki_edge.errors import ExportError
from ki_edge.graphs import GraphSpec
from ki_export.passes import PASSES

from .capture import capture
from .repetition import IrregularError
from .stamping import SHALLOW, stamp
from .wrappers import Traceable, traceables

MODULE = "model."  # where the wrappers hold the model
MIN_OPSET = 18
NOWHERE = "none"


def trace_all(
    config: Pi05Config, vocabulary: DecodeVocabulary, opset: int, say: Callable[[str], object] = lambda _: None
) -> dict[str, ir.Model]:
    """The graphs of a model, by name; fast_decode if there is a vocabulary. `say` gets a line a graph.

    ExportError if one cannot be traced.
    """
    sizes = graphs.sizes(config, len(vocabulary.ids))
    models = {}
    for traceable in traceables(config, vocabulary, SHALLOW):
        name, start = traceable.spec.name, time.perf_counter()
        try:
            models[name] = trace(traceable, opset, sizes)
        except IrregularError as error:
            say(f"{name}: {error}; tracing every layer, which takes longer")
            whole = {one.spec.name: one for one in traceables(config, vocabulary, None)}
            models[name] = trace(whole[name], opset, sizes)
        say(f"traced {name} ({time.perf_counter() - start:.1f} s)")
    return models


def pack(model: ir.Model) -> bytes:
    """A traced graph as bytes. Its weights have no values: any place in a file stands in for them."""
    empty = [value for value in model.graph.initializers.values() if value.const_value is None]
    for value in empty:
        shape = value.shape or ir.Shape([])
        value.const_value = ir.ExternalTensor(NOWHERE, 0, 0, ir.DataType.FLOAT, shape=shape, name=str(value.name))
    packed: bytes = ir.to_proto(model).SerializeToString()
    for value in empty:
        value.const_value = None
    return packed


def unpack(packed: bytes) -> ir.Model:
    """What `pack` packed."""
    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(packed))
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model


def trace(traceable: Traceable, opset: int, sizes: Mapping[str, int]) -> ir.Model:
    """The graph of one wrapper. `sizes`: constants of `graphs.sizes`. ExportError if the tracer or a pass fails."""
    spec = traceable.spec
    try:
        with quiet():
            model = capture(traceable, opset)
            prepare(model)
            for apply in PASSES:
                apply(model)
            stamp(model, traceable.depths)
            finish(model, spec, sizes)
    except IrregularError:
        raise
    except (torch.onnx.errors.OnnxExporterError, ValueError, RuntimeError) as error:
        first = str(error).strip().split("\n", 1)[0]
        raise ExportError(f"graph {spec.name} cannot be traced at opset {opset}: {first}; try --opset 20") from error
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
            if value.dtype != BY_NAME[tensor.dtype].onnx:
                raise ValueError(f"'{tensor.name}' is {value.dtype} in the graph, the contract says {tensor.dtype}")
            value.name, value.shape = tensor.name, ir.Shape(tensor.resolve(sizes))
    graph.name = spec.name
    opset = model.opset_imports[""]
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    model.producer_name = "ki-export"


@contextmanager
def quiet() -> Iterator[None]:
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
