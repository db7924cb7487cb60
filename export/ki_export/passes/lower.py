"""Matrix products in 16 bits, everything between them in float32, written into the graph for strongly typed engines.

Operands of a product are cast to the low type, its weight is stored in it, and its result is rounded to it; biases,
norms, softmax, rotations, gates, the residual stream and the Euler state stay float32. Values that are only moved
(reshaped, transposed) between two products stay low. Engines fuse a Cast into the kernel beside it, so that what
float32 costs is arithmetic in registers, not memory traffic.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from .cleanup import clean_up
from .products import EMBEDDING, matrix_products

MOVES = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity")
FLOAT = ir.DataType.FLOAT


def lower(model: ir.Model, dtype: ir.DataType, kept: Callable[[str], bool]) -> set[str]:
    """Rewrite a float32 graph to `dtype` products; the names of the initializers that are of that type now.

    Products whose site's name is `kept` stay float32. The embedding table has one type for all its users. Graph inputs
    and outputs keep their types.
    """
    lowering = _Lowering(model.graph, dtype)
    for site in [site for site in matrix_products(model.graph) if not kept(site.name)]:
        lowering.product(site.node, site.weight)
    table = model.graph.initializers.get(f"{EMBEDDING}.weight")
    if table is not None and not kept(EMBEDDING):
        lowering.table(table)
    lowering.move()
    clean_up(model)
    return {str(value.name) for value in lowering.weights if str(value.name) in model.graph.initializers}


class _Lowering:
    """Rewrites one graph. `weights`: initializers that became low."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self._graph, self._dtype = graph, dtype
        self._low: dict[ir.Value, ir.Value] = {}  # float32 value -> the same in low
        self.weights: set[ir.Value] = set()

    def product(self, node: ir.Node, weight: ir.Value | None) -> None:
        """Cast a product's operands down and its result up; add the bias in float32."""
        for at, value in enumerate(node.inputs[:2]):
            assert value is not None
            if value is weight:
                value.dtype = self._dtype
                self.weights.add(value)
            else:
                node.replace_input_with(at, self._lowered(value, node))
        output = node.outputs[0]
        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) == 3 else None
        low = ir.Value(name=f"{output.name}.low", type=ir.TensorType(self._dtype), shape=output.shape)
        inputs = list(node.inputs[:2])
        attributes = list(node.attributes.values())
        product = ir.Node("", node.op_type, inputs, attributes, outputs=[low], name=node.name)
        up = cast(low, FLOAT)
        new = [product, up]
        if bias is not None:
            new.append(ir.node("Add", [up.outputs[0], bias]))
        result = new[-1].outputs[0]
        result.dtype, result.shape = FLOAT, output.shape
        ir.convenience.replace_nodes_and_values(self._graph, node, [node], new, [output], [result])

    def table(self, table: ir.Value) -> None:
        """Store a table low; rows that are gathered from it are widened."""
        table.dtype = self._dtype
        self.weights.add(table)
        for use in list(table.uses()):
            if use.node.op_type == "Gather" and use.idx == 0:
                widen_rows(self._graph, use.node, self._dtype)

    def _lowered(self, value: ir.Value, user: ir.Node) -> ir.Value:
        """`value` in the low type: what it was widened from, or a Cast of it."""
        if value not in self._low:
            lowered = cast(value, self._dtype)
            producer = value.producer()
            if producer is None:
                first = next(iter(self._graph))
                self._graph.insert_before(first, lowered)
            else:
                self._graph.insert_after(producer, lowered)
            self._low[value] = lowered.outputs[0]
        return self._low[value]

    def move(self) -> None:
        """Take Casts to the other side of moves where that joins a pair of them, until nothing changes."""
        changed = True
        while changed:
            changed = False
            for node in [node for node in self._graph if node.op_type == "Cast"]:
                changed |= self._join(node)

    def _join(self, down: ir.Node) -> bool:
        """A Cast to low of a value that was widened, moved and serves no other purpose: move it low instead."""
        value = down.inputs[0]
        if value is None or down.outputs[0].dtype != self._dtype or value.dtype != FLOAT:
            return False
        moves: list[ir.Node] = []
        while (producer := value.producer()) is not None and producer.op_type in MOVES:
            moves.append(producer)
            value = producer.inputs[0]
            assert value is not None
        if producer is None or producer.op_type != "Cast" or producer.inputs[0] is None:
            return False
        low = producer.inputs[0]
        if low.dtype != self._dtype:
            return False
        for move in reversed(moves):
            copy = ir.Node("", move.op_type, [low, *move.inputs[1:]], list(move.attributes.values()))
            copy.outputs[0].dtype, copy.outputs[0].shape = self._dtype, move.outputs[0].shape
            self._graph.insert_after(move, copy)
            low = copy.outputs[0]
        down.outputs[0].replace_all_uses_with(low)
        self._graph.remove(down, safe=True)
        return True


def widen_rows(graph: ir.Graph, gather: ir.Node, dtype: ir.DataType) -> None:
    """Let a Gather take rows of `dtype`, and its users a Cast of them."""
    rows = gather.outputs[0]
    users = list(rows.uses())
    widened = cast(rows, FLOAT)
    rows.dtype = dtype
    graph.insert_after(gather, widened)
    for use in users:
        use.node.replace_input_with(use.idx, widened.outputs[0])


def cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    """A Cast of a value, to be put into the graph."""
    node = ir.node("Cast", [value], attributes={"to": int(dtype)})
    node.outputs[0].dtype, node.outputs[0].shape = dtype, value.shape
    node.outputs[0].name = f"{value.name}.{'float32' if dtype == FLOAT else 'low'}"
    return node
