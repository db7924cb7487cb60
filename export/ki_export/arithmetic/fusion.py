"""Which products of a graph have two dequantised operands, and so are computed on the low values themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

MOVES = ("Cast", "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Identity")
DEQUANTIZE = "DequantizeLinear"


@dataclass(frozen=True, eq=False)
class Side:
    """One operand: the node that dequantises it, the one that dequantises its blocks' scales, what moves it after."""

    node: ir.Node
    scales: ir.Node | None
    moves: tuple[ir.Node, ...]

    @property
    def low(self) -> list[ir.Value]:
        """Its values, their scales and, of blocks, the scale of these."""
        values, scale = self.node.inputs[:2]
        scales = (scale,) if self.scales is None else self.scales.inputs[:2]
        return [value for value in (values, *scales) if value is not None]

    @property
    def read(self) -> list[ir.Value]:
        """Values that computing it takes."""
        return self.low + [value for move in self.moves for value in move.inputs[1:] if value is not None]


@dataclass(frozen=True, eq=False)
class Fused:
    """The two sides of a product."""

    left: Side
    right: Side

    @property
    def read(self) -> list[ir.Value]:
        return self.left.read + self.right.read


def fused_products(nodes: list[ir.Node]) -> tuple[Mapping[ir.Node, Fused], set[ir.Node]]:
    """Products of two dequantised operands, and the nodes that serve nothing but them."""
    found = {}
    for node in nodes:
        if node.op_type not in ("Gemm", "MatMul") or len(node.inputs) != 2:
            continue
        left, right = (_side(value) for value in node.inputs)
        if left is not None and right is not None:
            found[node] = Fused(left, right)
    sides = [side for product in found.values() for side in (product.left, product.right)]
    chains = {node for side in sides for node in (side.node, side.scales, *side.moves) if node is not None}
    spared: set[ir.Node] = set()
    for node in reversed(nodes):
        if node in chains and not any(value.is_graph_output() for value in node.outputs):
            users = [use.node for value in node.outputs for use in value.uses()]
            if all(user in found or user in spared for user in users):
                spared.add(node)
    return found, spared


def _side(value: Any) -> Side | None:
    moves: list[ir.Node] = []
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in MOVES:
        moves.append(producer)
        value = producer.inputs[0]
        producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != DEQUANTIZE:
        return None
    scale = producer.inputs[1]
    scales = scale.producer() if scale is not None else None
    return Side(
        producer, scales if scales is not None and scales.op_type == DEQUANTIZE else None, tuple(reversed(moves))
    )
