"""The matrix products of a graph under names that people can say: `backbone.layers.3.mlp.down_proj`.

A product with a weight is called after it, that of the logits after the embedding table, whose rows it takes; the two
of an attention are `<layer>.self_attn.scores` (queries with keys) and `<layer>.self_attn.values` (probabilities with
values). Graphs that share a layer share its names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

LINEAR = re.compile(
    r"(vision\.encoder\.layers\.\d+|backbone\.layers\.\d+|expert\.layers\.\d+)\.(self_attn|mlp)\.\w+|projector"
)
ATTENTION = re.compile(r"(.*\.self_attn)\.q_proj")
EMBEDDING = "backbone.embed_tokens"  # the table, and the product with its rows that gives the logits
UNEMBEDDING = "unembedding."
SCORES, VALUES = "scores", "values"


@dataclass(frozen=True, eq=False)
class MatrixProduct:
    """One product. `weight`: its initializer [out, in], None for the products of an attention."""

    name: str
    node: ir.Node
    weight: ir.Value | None = None


def matrix_products(graph: ir.Graph) -> list[MatrixProduct]:
    """The products that are worth a low precision, in their order.

    Left out, and so always float32, is what is small or ends in the actions: the patch embedding, the projections of
    actions, state and time. ValueError for a product that belongs to no known layer.
    """
    found: list[MatrixProduct] = []
    for node in graph:
        if node.op_type == "Gemm":
            found += _linear(node)
        elif node.op_type == "MatMul":
            found.append(MatrixProduct(_attention(node), node))
    return found


def _linear(node: ir.Node) -> Iterator[MatrixProduct]:
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer():
        return
    name = str(weight.name)
    if name.startswith((UNEMBEDDING, EMBEDDING)):
        yield MatrixProduct(EMBEDDING, node, weight)
    elif LINEAR.fullmatch(name.removesuffix(".weight")):
        yield MatrixProduct(name.removesuffix(".weight"), node, weight)


def _attention(node: ir.Node) -> str:
    softmax = _ancestor(node.inputs[0], "Softmax", through=("Cast",))
    if softmax is None:
        return f"{_layer(node)}.{SCORES}"
    scores = _ancestor(softmax.inputs[0], "MatMul", through=("Add", "Reshape", "Cast"))
    if scores is None:
        raise ValueError(f"MatMul {node.name}: the softmax before it follows no product")
    return f"{_layer(scores)}.{VALUES}"


def _layer(scores: ir.Node) -> str:
    """`<layer>.self_attn` of the queries that meet the keys."""
    value = scores.inputs[0]
    while value is not None:
        producer = value.producer()
        weight = producer.inputs[1] if producer is not None and producer.op_type == "Gemm" else None
        if weight is not None and (match := ATTENTION.match(str(weight.name))):
            return match[1]
        value = producer.inputs[0] if producer is not None and producer.inputs else None
    raise ValueError(f"MatMul {scores.name} has no q_proj before it: unknown layer")


def _ancestor(value: ir.Value | None, op_type: str, through: tuple[str, ...]) -> ir.Node | None:
    """The `op_type` node that made `value`, looking through first inputs of `through`."""
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in through:
        value = producer.inputs[0]
        producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == op_type else None
