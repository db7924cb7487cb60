"""A deep graph from a shallow one: the first layer of each stack of equal layers, stamped out.

Tracing costs seconds a layer, and all layers of a stack are the same but for their weights. So a model with two layers
a stack is traced, `Pattern` derives from the graph what leads from the first to the second, and copies of the first are
put between them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ki_export.passes.cleanup import clean_up

from .repetition import Pattern

SHALLOW = 2  # layers of a stack that are traced
Copies = dict[ir.Value, ir.Value]  # value of the first layer -> the same of another one


def stamp(model: ir.Model, depths: Mapping[str, int]) -> None:
    """Deepen the stacks of a cleaned graph. `depths`: prefix of the names of a stack's weights -> layers wanted.

    A stack that the graph has at all has SHALLOW layers there. IrregularError if they differ.
    """
    stamped = False
    for prefix, depth in depths.items():
        if any(name.startswith(prefix) for name in model.graph.initializers):
            _Stamp(model.graph, Pattern(model.graph, prefix), depth).deepen()
            stamped = True
    if stamped:
        clean_up(model)


class _Stamp:
    """Puts copies of the first layer between it and the second one, which becomes the last of `depth`."""

    def __init__(self, graph: ir.Graph, pattern: Pattern, depth: int) -> None:
        self._graph, self._pattern, self._depth = graph, pattern, depth
        own = {value: value for node in pattern.first for value in node.outputs}
        self._layers: list[Copies] = [own]
        # what belongs to the second layer and is used in the first: a modulation of the norm between them
        early = [value for node in pattern.indexed for value in node.outputs]
        self._next = {pattern.image[value]: value for value in early}

    def deepen(self) -> None:
        pattern, graph = self._pattern, self._graph
        twins = set(pattern.twins.values())
        last = next(node for node in graph if node in twins)
        self._rename()
        self._layers += [{} for _ in range(1, self._depth - 1)]
        self._layers.append({**pattern.image})
        for part in (pattern.indexed.keys(), set(pattern.first) - pattern.indexed.keys()):
            nodes = [node for node in pattern.first if node in part]
            for layer in range(1, self._depth - 1):
                graph.insert_before(last, [self._copy(node, layer) for node in nodes])
        for node in pattern.first:
            for place, value in enumerate(node.inputs):
                if value in self._next:
                    node.replace_input_with(place, self._layers[1][self._next[value]])
        for node, second in {**pattern.twins, **pattern.indexed}.items():
            self._attach(node, second)
        for node in pattern.lists:
            self._lengthen(node)

    def _copy(self, node: ir.Node, layer: int) -> ir.Node:
        inputs = [self._operand(node, place, layer) for place in range(len(node.inputs))]
        attributes = list(node.attributes.values())
        copy = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs))
        copy.name = f"{node.name}.{layer}"
        for value, output in zip(node.outputs, copy.outputs, strict=True):
            output.type, output.shape = value.type, value.shape
            output.name = self._pattern.renamed(str(value.name), layer)
            self._layers[layer][value] = output
        return copy

    def _operand(self, node: ir.Node, place: int, layer: int) -> ir.Value | None:
        """What a new layer has in the place of an operand of the first."""
        value, own = node.inputs[place], self._layers[0]
        if (node, place) in self._pattern.steps:
            return self._index(node, place, layer)
        if value is None or value.const_value is not None:
            return value
        if value in own:
            return self._layers[layer][value]
        if value in self._next:
            return self._layers[layer + 1][self._next[value]]
        image = self._pattern.image.get(value, value)
        if image in own:
            return self._layers[layer - 1][image]
        return self._weight(value, layer) if self._pattern.is_weight(value) else value

    def _attach(self, node: ir.Node, second: ir.Node) -> None:
        """Make a node of the second layer, the counterpart of `node`, one of the last layer."""
        for place, value in enumerate(second.inputs):
            if (node, place) in self._pattern.steps:
                second.replace_input_with(place, self._index(node, place, self._depth - 1))
            elif value in self._layers[0]:
                second.replace_input_with(place, self._layers[-2][value])

    def _lengthen(self, node: ir.Node) -> None:
        """Give a list its entries of the new layers."""
        inputs: list[ir.Value | None] = []
        for value in node.inputs:
            inputs += [layer[value] for layer in self._layers[:-1]] if value in self._layers[0] else [value]
        (output,) = node.outputs
        longer = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), name=node.name)
        longer.outputs[0].type, longer.outputs[0].shape = output.type, output.shape
        ir.convenience.replace_nodes_and_values(self._graph, node, [node], [longer], [output], longer.outputs)

    def _rename(self) -> None:
        """Call what is called after the second layer after the last one."""
        initializers = self._graph.initializers
        for value in [*initializers.values(), *(value for node in self._graph for value in node.outputs)]:
            name = str(value.name)
            if name.startswith(f"{self._pattern.prefix}1."):
                initializers.pop(name, None)
                value.name = self._pattern.renamed(name, self._depth - 1)
                if value.producer() is None:
                    initializers[value.name] = value

    def _weight(self, first: ir.Value, layer: int) -> ir.Value:
        name = self._pattern.renamed(str(first.name), layer)
        if name not in self._graph.initializers:
            self._graph.initializers[name] = ir.Value(name=name, type=first.type, shape=first.shape)
        return self._graph.initializers[name]

    def _index(self, node: ir.Node, place: int, layer: int) -> ir.Value:
        """The constant operand of a new layer, or of the last."""
        first = node.inputs[place]
        assert first is not None and first.const_value is not None
        number = int(first.const_value.numpy()) + layer * self._pattern.steps[node, place]
        name = f"{self._pattern.prefix}index.{number}"
        if name not in self._graph.initializers:
            tensor = ir.tensor(np.array(number, np.int64), name=name)
            kind, shape = ir.TensorType(tensor.dtype), ir.Shape(())
            self._graph.initializers[name] = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
        return self._graph.initializers[name]
