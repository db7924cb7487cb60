"""A stamped graph is the graph of the whole model, node for node."""

import hashlib
from collections import Counter
from dataclasses import replace

import onnx_ir as ir
import pytest
from torch import nn

import ki_export.graphs.tracing
from ki_edge import graphs
from ki_edge.bundle import DecodeVocabulary
from ki_edge.config import Pi05Config
from ki_export.graphs.repetition import IrregularError
from ki_export.graphs.stamping import SHALLOW
from ki_export.graphs.tracing import trace_all
from ki_export.graphs.wrappers import traceables
from tests.export.conftest import CONFIG

NAMES = [spec.name for spec in graphs.GRAPHS]
SOME = DecodeVocabulary(600, 40, (1, 235))
ALL = DecodeVocabulary(0, CONFIG.vocab_size)


def deep(vision: int, depth: int, **changes) -> Pi05Config:
    parts = {name: replace(getattr(CONFIG, name), depth=depth) for name in ("backbone", "expert")}
    return replace(CONFIG, vision=replace(CONFIG.vision, depth=vision), **parts, **changes)


CASES = {
    "pi05": (deep(3, 4, rtc="trained"), ALL, 20),
    "depth 3": (deep(4, 3, pictures="float32"), SOME, 20),
    "pi0": (deep(1, 3, variant="pi0", state_width=4, rtc="guided"), SOME, 18),
    "two K/V heads": (
        replace(
            deep(3, 3),
            backbone=replace(CONFIG.backbone, depth=3, num_kv_heads=2),
            expert=replace(CONFIG.expert, depth=3, num_kv_heads=2),
        ),
        SOME,
        23,
    ),
}


def trace(config, vocabulary, opset, graph, layers):
    traceable = {one.spec.name: one for one in traceables(config, vocabulary, layers)}[graph]
    return ki_export.graphs.tracing.trace(traceable, opset, graphs.sizes(config, len(vocabulary.ids)))


def listing(model: ir.Model) -> Counter[str]:
    """All that a graph says, whatever its order, but for the names of values that no layer is called after."""
    made: dict[ir.Value, str] = {}

    def described(value: ir.Value | None) -> object:
        if value is None or value in made:
            return made.get(value)
        constant = value.const_value
        if value.is_initializer() and constant is not None:
            return str(constant.dtype), constant.numpy().tolist()
        return value.name, str(value.dtype), str(value.shape)

    lines: Counter[str] = Counter()
    for node in model.graph:
        attributes = sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())
        names = [value.name if "layers" in str(value.name) else None for value in node.outputs]
        types = [(str(value.dtype), str(value.shape)) for value in node.outputs]
        operands = [described(value) for value in node.inputs]
        line = hashlib.sha256(repr((node.op_type, attributes, operands, names, types)).encode()).hexdigest()
        made |= {value: f"{line}.{place}" for place, value in enumerate(node.outputs)}
        lines[line] += 1
    for value in (*model.graph.inputs, *model.graph.outputs):
        lines[repr((value.name, described(value), str(value.shape)))] += 1
    lines[str(model.opset_imports)] += 1
    return lines


@pytest.mark.parametrize("graph", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_stamped_is_traced(case, graph):
    config, vocabulary, opset = CASES[case]
    stamped = trace(config, vocabulary, opset, graph, SHALLOW)
    whole = trace(config, vocabulary, opset, graph, None)
    assert listing(stamped) == listing(whole)
    names = [node.name for node in stamped.graph] + [value.name for node in stamped.graph for value in node.outputs]
    assert len(set(names)) == len(names)


class Shifted(nn.Module):
    """A layer norm that does more than its neighbours'."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x) + 1.0


def irregular(monkeypatch, change):
    """What `traceables` gives, with a change of the module that is traced whenever it is a shallow one."""
    made = ki_export.graphs.tracing.traceables

    def changed(config, vocabulary, layers):
        found = made(config, vocabulary, layers)
        change(found[0].module.model)
        return found

    monkeypatch.setattr(ki_export.graphs.tracing, "traceables", changed)
    return changed


def test_irregular_layers_are_traced_whole(monkeypatch):
    def change(model):
        model.backbone.layers[1].input_layernorm = Shifted(model.backbone.layers[1].input_layernorm)

    changed = irregular(monkeypatch, change)
    config, said = deep(1, 3), []
    sizes = graphs.sizes(config, len(SOME.ids))
    with pytest.raises(IrregularError, match=r"layers backbone.layers.\* are not all alike"):
        ki_export.graphs.tracing.trace(changed(config, SOME, SHALLOW)[2], 20, sizes)
    found = trace_all(config, SOME, 20, said.append)
    whole = ki_export.graphs.tracing.trace(changed(config, SOME, None)[2], 20, sizes)
    assert listing(found["fast_decode"]) == listing(whole)
    assert any("tracing every layer" in line for line in said)
