"""A stamped graph is the graph of the whole model, node for node."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from torch import nn

import ki_export.tracing
from ki_edge import graphs
from ki_edge.bundle import DecodeVocabulary
from ki_edge.config import Pi05Config
from ki_edge.model.gemma import ExpertLayer, GemmaLayer
from ki_export.repetition import IrregularError
from ki_export.stamping import SHALLOW
from ki_export.tracing import trace_all
from ki_export.wrappers import traceables
from tests.export.conftest import CONFIG

NAMES = [spec.name for spec in graphs.GRAPHS]
SOME = DecodeVocabulary(600, 40, (1, 235))
ALL = DecodeVocabulary(0, CONFIG.vocab_size)


def deep(vision: int, depth: int, **changes) -> Pi05Config:
    parts = {name: replace(getattr(CONFIG, name), depth=depth) for name in ("backbone", "expert")}
    return replace(CONFIG, vision=replace(CONFIG.vision, depth=vision), **parts, **changes)


CASES = {
    "pi05": (deep(4, 5), ALL, 20),
    "depth 3": (deep(5, 3, pictures="float32"), SOME, 20),
    "pi0": (deep(1, 4, variant="pi0", state_width=4), SOME, 18),
    "two K/V heads": (
        replace(
            deep(3, 4),
            backbone=replace(CONFIG.backbone, depth=4, num_kv_heads=2),
            expert=replace(CONFIG.expert, depth=4, num_kv_heads=2),
        ),
        SOME,
        23,
    ),
}


def trace(config, vocabulary, opset, graph, layers):
    traceable = {one.spec.name: one for one in traceables(config, vocabulary, layers)}[graph]
    return ki_export.tracing.trace(traceable, opset, graphs.sizes(config, len(vocabulary.ids)))


def listing(model: ir.Model) -> list[object]:
    """All that a graph says, but for the names of values that no layer is called after."""
    numbers: dict[ir.Value, object] = {}

    def described(value: ir.Value | None) -> object:
        if value is None or value in numbers:
            return numbers.get(value)
        constant = value.const_value
        if value.is_initializer() and constant is not None:
            return str(constant.dtype), constant.numpy().tolist()
        return value.name, str(value.dtype), str(value.shape)

    lines: list[object] = []
    for at, node in enumerate(model.graph):
        attributes = sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())
        names = [value.name if "layers" in str(value.name) else None for value in node.outputs]
        types = [(str(value.dtype), str(value.shape)) for value in node.outputs]
        lines.append((node.op_type, attributes, [described(value) for value in node.inputs], names, types))
        numbers |= {value: (at, place) for place, value in enumerate(node.outputs)}
    ends = [[(value.name, described(value), str(value.shape)) for value in model.graph.outputs]]
    return [*lines, *ends, [(value.name, str(value.shape)) for value in model.graph.inputs], model.opset_imports]


@pytest.mark.parametrize("graph", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_stamped_is_traced(case, graph):
    config, vocabulary, opset = CASES[case]
    stamped = trace(config, vocabulary, opset, graph, SHALLOW)
    whole = trace(config, vocabulary, opset, graph, None)
    given, expected = listing(stamped), listing(whole)
    for line, (one, other) in enumerate(zip(given, expected, strict=False)):
        assert one == other, line
    assert len(given) == len(expected)
    names = [node.name for node in stamped.graph] + [value.name for node in stamped.graph for value in node.outputs]
    assert len(set(names)) == len(names)
