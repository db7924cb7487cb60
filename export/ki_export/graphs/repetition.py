"""What the second layer of a stack of equal layers is to the first, derived from a graph that has both.

    image[value of layer 0] = the same value of layer 1

Found upwards from the two layers' weights and then downwards through equal nodes, it holds the layer's own values and
weights, what the layer takes from its predecessor (the residual stream), what belongs to a layer and is computed before
all of them (a slice of the cache, whose index grows by a fixed step), and what all layers share (masks, rotations), its
own image. Every difference between the two layers that is none of these is refused, and so is every use of a layer's
values but by its successor or in a list with one entry a layer (the stacked K/V). A layer begins where its first weight
is used: what comes between that and the weights before it belongs to its predecessor.
"""

from __future__ import annotations

import onnx_ir as ir


class IrregularError(ValueError):
    """The second layer of a stack is not the first one over again."""


class Pattern:
    """A repetition. IrregularError if it is none.

    `first`: the nodes of the first layer in their order; `twins`: those of the second, by their counterparts in the
    first; `indexed`: the same of nodes that no weight of the stack leads to; `steps`: operands of nodes of the first
    layer that are constants which grow from layer to layer, and by how much; `lists`: nodes with an operand a layer.
    """

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.prefix = prefix
        self.image: dict[ir.Value, ir.Value] = {}
        self.twins: dict[ir.Node, ir.Node] = {}
        self.indexed: dict[ir.Node, ir.Node] = {}
        self.steps: dict[tuple[ir.Node, int], int] = {}
        self.lists: dict[ir.Node, None] = {}
        self._deepest: dict[ir.Node, int] = {}  # the last layer whose weights lead to a node, -1: none do
        self._carried: set[tuple[ir.Value, ir.Value]] = set()
        for node in graph:
            self._deepest[node] = max((self._layer(value) for value in node.inputs if value is not None), default=-1)
        layer = [node for node in graph if self._deepest[node] == 0]
        for name, second in graph.initializers.items():
            if self._layer(second) == 1:
                self._anchor(graph.initializers.get(self.renamed(name, 0)), second)
        self._descend(layer)
        members = {*layer, *self.indexed}
        self.first = [node for node in graph if node in members and not any(map(self._shared, node.outputs))]
        self._check_weights(graph)
        self._check_uses(members)

    def renamed(self, name: str, layer: int) -> str:
        """The name in another layer of what is called `name` in the first or second."""
        rest = name.removeprefix(f"{self.prefix}0.").removeprefix(f"{self.prefix}1.")
        return f"{name}.{layer}" if rest == name else f"{self.prefix}{layer}.{rest}"

    # ------------------------------------------------------------------ upwards from the weights

    def _anchor(self, first: ir.Value | None, second: ir.Value) -> None:
        if first is None:
            raise self._irregular(f"'{second.name}' has no counterpart in the first layer")
        uses, others = list(first.uses()), list(second.uses())
        if [use.idx for use in uses] != [use.idx for use in others] or _type(first) != _type(second):
            raise self._irregular(f"'{second.name}' is another or is used in another way than '{first.name}'")
        self._record(first, second)
        for use, other in zip(uses, others, strict=True):
            self._pair_nodes(use.node, other.node, self.twins)

    def _pair_nodes(self, first: ir.Node, second: ir.Node, kind: dict[ir.Node, ir.Node]) -> None:
        if kind.get(first) is second:
            return
        types = [[_type(value) for value in node.outputs] for node in (first, second)]
        if first in kind or _kind(first) != _kind(second) or types[0] != types[1]:
            raise self._irregular(f"{second.name} ({second.op_type}) is not {first.name} ({first.op_type}) over again")
        kind[first] = second
        for output, other in zip(first.outputs, second.outputs, strict=True):
            self._record(output, other)
        for place in range(len(first.inputs)):
            self._pair(first, second, place)

    def _pair(self, first: ir.Node, second: ir.Node, place: int) -> None:
        """An operand of nodes that are each other's counterpart."""
        value, other = first.inputs[place], second.inputs[place]
        if value is None or other is None or (value.const_value is not None and other.const_value is not None):
            if value is not other:
                self.steps[first, place] = self._step(value, other)
            return
        self._record(value, other)
        if value is other or self.is_weight(value):
            return
        producers = value.producer(), other.producer()
        depths = self._layer(value), self._layer(other)
        if depths == (-1, 0):
            self._carry(value, other)
        elif None in producers or depths not in ((0, 1), (-1, -1)) or value.index() != other.index():
            raise self._irregular(f"'{other.name}' of {second.name} takes the place of '{value.name}'")
        else:
            self._pair_nodes(*producers, self.twins if depths == (0, 1) else self.indexed)  # type: ignore[arg-type]

    def _carry(self, value: ir.Value, other: ir.Value) -> None:
        """`other`, of the first layer, is to the second one what `value` is to the first; so is what both come from."""
        if (value, other) in self._carried:
            return
        self._carried.add((value, other))
        if any(self._deepest[use.node] == 0 for use in value.uses()):
            if _type(value) != _type(other):
                raise self._irregular(
                    f"it takes '{value.name}' {_type(value)}, and gives '{other.name}' {_type(other)}"
                )
            self._record(value, other)
        producer, second = value.producer(), other.producer()
        if producer is None or second is None or _kind(producer) != _kind(second):
            return
        for source, match in zip(producer.inputs, second.inputs, strict=True):
            if source is None or match is None or source is match:
                continue
            one, two = source.producer(), match.producer()
            if two is not None and self._deepest[two] == 0:
                self._carry(source, match)
            elif one is not None and two is not None and self._deepest[two] < 0 and _kind(one) == _kind(two):
                self._pair_nodes(one, two, self.indexed)  # of the next layer, but used before its first weight

    # ------------------------------------------------------------------ downwards from there

    def _descend(self, layer: list[ir.Node]) -> None:
        for node in layer:
            if node in self.twins or any(map(self._shared, node.outputs)):
                continue
            operands = [value if value is None else self.image.get(value, value) for value in node.inputs]
            users = [use.node for value in operands if value is not None for use in value.uses()]
            for user in users:
                if self._deepest[user] == 1 and _kind(user) == _kind(node) and list(user.inputs) == operands:
                    self._pair_nodes(node, user, self.twins)
                    break
            else:
                if node.op_type == "Shape":  # its operand has one symbolic shape in all layers
                    self._record(node.outputs[0], node.outputs[0])

    # ------------------------------------------------------------------ checks

    def _check_weights(self, graph: ir.Graph) -> None:
        second = set(self.twins.values())
        for name, value in graph.initializers.items():
            for use in value.uses() if self.is_weight(value) else ():
                inside = self._deepest[use.node] == 0 if self._layer(value) == 0 else use.node in second
                if not inside or self._layer(value) > 1:
                    raise self._irregular(f"'{name}' is used outside its layer, by {use.node.name}")

    def _check_uses(self, layer: set[ir.Node]) -> None:
        """The first layer's values are used in it, by the next one, and in lists."""
        following = {*self.twins.values(), *self.indexed.values()}
        for node in [*self.first, *self.indexed.values()]:
            for value in node.outputs:
                if value.is_graph_output():
                    raise self._irregular(f"'{value.name}' of the first is an output of the graph")
                for use in value.uses():
                    before = node in self.indexed and self._deepest[use.node] < 0  # what the first layer starts from
                    if not before and use.node not in layer and use.node not in following:
                        self._check_entry(value, use.node, use.idx)

    def _check_entry(self, value: ir.Value, user: ir.Node, place: int) -> None:
        after = [*user.inputs, None][place + 1]
        if user.op_type != "Concat" or after is None or self.image.get(value) is not after:
            raise self._irregular(f"'{value.name}' of the first is used far behind it, by {user.name}")
        self.lists[user] = None

    def _step(self, value: ir.Value | None, other: ir.Value | None) -> int:
        numbers = [_integer(value), _integer(other)]
        if numbers[0] is None or numbers[1] is None:
            names = [None if one is None else one.name for one in (value, other)]
            raise self._irregular(f"constant {names[1]} takes the place of {names[0]}, and they are no indices")
        return numbers[1] - numbers[0]

    def _record(self, value: ir.Value, other: ir.Value) -> None:
        if self.image.setdefault(value, other) is not other:
            raise self._irregular(f"'{value.name}' becomes '{self.image[value].name}' and '{other.name}'")

    def _shared(self, value: ir.Value) -> bool:
        return self.image.get(value) is value

    def is_weight(self, value: ir.Value) -> bool:
        """Whether a value is a weight of one of the layers."""
        return value.is_initializer() and self._layer(value) >= 0

    def _layer(self, value: ir.Value) -> int:
        """The deepest layer whose weights lead to a value."""
        producer, name = value.producer(), str(value.name)
        if producer is not None:
            return self._deepest[producer]
        known = value.is_initializer() and name.startswith(self.prefix)
        return int(name.removeprefix(self.prefix).split(".", 1)[0]) if known else -1

    def _irregular(self, reason: str) -> IrregularError:
        return IrregularError(f"layers {self.prefix}* are not all alike: {reason}")


def _kind(node: ir.Node) -> tuple[object, ...]:
    """Operator, attributes, and how many operands and results there are."""
    attributes = {name: (attribute.type, attribute.value) for name, attribute in node.attributes.items()}
    return node.op_identifier(), attributes, len(node.inputs), len(node.outputs)


def _type(value: ir.Value) -> tuple[object, object]:
    return value.dtype, value.shape


def _integer(value: ir.Value | None) -> int | None:
    """The number of a constant scalar index."""
    tensor = value.const_value if value is not None else None
    return (
        int(tensor.numpy()) if tensor is not None and tensor.dtype == ir.DataType.INT64 and not tensor.shape else None
    )
