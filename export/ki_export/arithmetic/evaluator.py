"""A graph computed node by node in PyTorch, for several observations side by side.

All observations pass a node before the next one starts, so a weight is read once for all of them, and a model of any
size needs the memory of one weight and of what is alive between two nodes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ki_edge.errors import ExportError

from .fusion import Fused, Side, fused_products
from .low_bits import LOW_TYPES, LowOperand, low_product, operand
from .operators import CUSTOM, OPERATORS, TYPES

Replacement = Callable[[Tensor, Tensor], Tensor]
Watch = Callable[[ir.Node, Sequence[Tensor | None], Sequence[Tensor]], object]
BUDGET = 700_000_000  # bytes of weights that stay in memory: π0.5's action expert in 16 bits

PREPARED = 80_000_000  # bytes of low weights that stay in memory as float32 too: a small model's, so that it runs fast
PART = 140_000_000  # bytes of a single weight that are used at a time: any of a π0.5's layers, in float32 too


class WeightReader(Protocol):
    """Where the values of initializers come from, each in its declared type."""

    def part(self, value: ir.Value, start: int, stop: int) -> Tensor:
        """Rows start..stop of an initializer."""

    def rows(self, value: ir.Value, rows: Tensor) -> Tensor:
        """Some rows of it, [*rows.shape, ...]: a table of embeddings is never read whole."""


class Shelf:
    """Weights that were used last, up to `budget` bytes."""

    def __init__(self, reader: WeightReader, budget: int = BUDGET) -> None:
        self._reader, self._budget, self._bytes = reader, budget, 0
        self._held: OrderedDict[str, Tensor] = OrderedDict()

    def part(self, value: ir.Value, start: int, stop: int) -> Tensor:
        if start > 0 or stop < _rows(value):
            return self._reader.part(value, start, stop)
        name = str(value.name)
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        size = _size(value)
        while self._held and self._bytes + size > self._budget:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        tensor = self._reader.part(value, start, stop)
        if tensor.nbytes <= self._budget:
            self._held[name] = tensor
            self._bytes += tensor.nbytes
        return tensor

    def rows(self, value: ir.Value, rows: Tensor) -> Tensor:
        return self._reader.rows(value, rows)


def _rows(value: ir.Value) -> int:
    """Length of the first axis; 1 of a scalar."""
    assert value.shape is not None
    return int(value.shape[0]) if len(value.shape) else 1  # type: ignore[arg-type]


def _size(value: ir.Value) -> int:
    assert value.shape is not None and value.dtype is not None
    count = 1
    for dim in value.shape:
        count *= int(dim)  # type: ignore[arg-type]
    return int(count * value.dtype.itemsize)


@dataclass(frozen=True, eq=False)
class _Step:
    node: ir.Node
    attributes: Mapping[str, Any]
    done: tuple[ir.Value, ...]  # values that no later node reads
    fused: Fused | None = None  # of a product that is computed on low values


class Evaluator:
    """One graph. `weights` gives initializers without a value of their own; `replaced`: what some products are instead.

    Products of two dequantised operands are computed as one kernel (`low_bits.low_product`); with `fuse` False, node by
    node, which rounds the dequantised operands to the type that the graph gives them.
    ExportError names the node if an operator is not one of ours, operands differ in type, or a result is not of the
    declared type.
    """

    def __init__(
        self,
        graph: ir.Graph,
        weights: WeightReader,
        *,
        fuse: bool = True,
        replaced: Mapping[ir.Node, Replacement] | None = None,
    ) -> None:
        self._graph, self._weights, self._replaced = graph, weights, replaced or {}
        self._prepared: dict[ir.Node, LowOperand] = {}
        self._prepared_bytes = 0
        self._constants: dict[ir.Value, Tensor] = {}
        for value in graph.initializers.values():
            if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor):
                self._constants[value] = _constant(value.const_value)
        self._steps = list(_schedule(graph, fuse=fuse))

    @torch.no_grad()
    def run(self, feeds: Sequence[Mapping[str, Tensor]], watch: Watch | None = None) -> list[dict[str, Tensor]]:
        """The graph's outputs for each of `feeds` (all inputs by name). `watch` sees every node that ran."""
        scopes: list[dict[ir.Value, Tensor]] = [
            {value: feed[str(value.name)] for value in self._graph.inputs} for feed in feeds
        ]
        wanted = {value: str(value.name) for value in self._graph.outputs}
        results: list[dict[str, Tensor]] = [{} for _ in feeds]
        for step in self._steps:
            if step.fused is not None:
                self._multiply_low(step, step.fused, scopes, watch)
            elif _is_large(step.node):
                self._multiply(step, scopes, watch)
            else:
                shared = self._read(step.node)
                for scope in scopes:
                    self._compute(step, scope, shared, watch)
            for scope, result in zip(scopes, results, strict=True):
                for value in step.node.outputs:
                    if value in wanted:
                        result[wanted[value]] = scope[value]
                for value in step.done:
                    scope.pop(value, None)
        for scope, result in zip(scopes, results, strict=True):  # an input that is an output
            result.update({name: scope[value] for value, name in wanted.items() if name not in result})
        return results

    def _read(self, node: ir.Node) -> dict[int, Tensor]:
        """The weights of one node, by their place among its inputs."""
        found = {}
        for at, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or _takes_rows(node, at):
                continue
            constant = self._constants.get(value)
            found[at] = self._weights.part(value, 0, _rows(value)) if constant is None else constant
        return found

    def _multiply(self, step: _Step, scopes: Sequence[dict[ir.Value, Tensor]], watch: Watch | None) -> None:
        """A product with a weight too large to hold, such as the whole unembedding: some of its rows at a time."""
        x, weight = step.node.inputs
        assert x is not None and weight is not None
        rows = _rows(weight)
        found: list[list[Tensor]] = [[] for _ in scopes]
        share = max(1, rows * PART // _size(weight))
        for start in range(0, rows, share):
            part = self._weights.part(weight, start, min(start + share, rows))
            for scope, parts in zip(scopes, found, strict=True):
                inputs = (scope[x], part)
                parts.extend(self._apply(step, inputs))
                if watch is not None:
                    watch(step.node, inputs, parts[-1:])
        for scope, parts in zip(scopes, found, strict=True):
            scope[step.node.outputs[0]] = torch.cat(parts, -1)

    def _multiply_low(
        self, step: _Step, fused: Fused, scopes: Sequence[dict[ir.Value, Tensor]], watch: Watch | None
    ) -> None:
        """A product of low values. `watch` sees no operands."""
        node, output = step.node, step.node.outputs[0]
        right = self._prepare(fused.right) if _is_weight(fused.right) else None
        dtype = TYPES[int(output.dtype)] if output.dtype is not None else self._declared(node)
        for scope in scopes:
            a, b = self._operand(fused.left, scope), right or self._operand(fused.right, scope)
            if node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int():
                b = LowOperand(b.unscaled.mT, b.factor, b.whole)
            scope[output] = low_product(a, b, dtype)
            if watch is not None:
                watch(node, (None, None), (scope[output],))

    def _declared(self, node: ir.Node) -> torch.dtype:
        """The type of a product's left operand, which is that of its result."""
        value = node.inputs[0]
        if value is None or value.dtype is None:
            raise ExportError(f"graph {self._graph.name}: '{node.outputs[0].name}' has no declared type")
        return TYPES[int(value.dtype)]

    def _prepare(self, side: Side) -> LowOperand:
        """A weight as a product takes it; small ones are remembered."""
        if side.node in self._prepared:
            return self._prepared[side.node]
        found = self._operand(side, {})
        if self._prepared_bytes + found.unscaled.nbytes <= PREPARED:
            self._prepared[side.node] = found
            self._prepared_bytes += found.unscaled.nbytes
        return found

    def _operand(self, side: Side, scope: Mapping[ir.Value, Tensor]) -> LowOperand:
        values, *scales = (self._any(value, scope) for value in side.low)
        attributes = {name: _plain(attribute) for name, attribute in side.node.attributes.items()}
        found = operand(values, scales[0], attributes, scales[1] if side.scales is not None else None)
        moved = found.unscaled
        for move in side.moves:
            if move.op_type != "Cast":
                inputs = [moved, *(None if v is None else self._any(v, scope) for v in move.inputs[1:])]
                moved = OPERATORS[move.op_type](inputs, {n: _plain(a) for n, a in move.attributes.items()})[0]
        return LowOperand(moved, found.factor, found.whole)

    def _any(self, value: ir.Value, scope: Mapping[ir.Value, Tensor]) -> Tensor:
        """A value of a scope, a constant or a weight."""
        if value in scope or not value.is_initializer() or value in self._constants:
            return self._value(value, scope)
        return self._weights.part(value, 0, _rows(value))

    def _compute(
        self, step: _Step, scope: dict[ir.Value, Tensor], shared: Mapping[int, Tensor], watch: Watch | None
    ) -> None:
        node, table = step.node, step.node.inputs[0] if step.node.inputs else None
        if table is not None and table.is_initializer() and _takes_rows(node, 0) and table not in self._constants:
            places = scope[node.inputs[1]]  # type: ignore[index]
            inputs: list[Tensor | None] = [None, places]
            outputs: tuple[Tensor, ...] = (self._weights.rows(table, places),)
        else:
            inputs = [
                None if value is None else (shared[at] if at in shared else self._value(value, scope))
                for at, value in enumerate(node.inputs)
            ]
            outputs = self._apply(step, inputs)
        for value, tensor in zip(node.outputs, outputs, strict=True):
            if value.dtype is not None and TYPES[int(value.dtype)] != tensor.dtype:
                raise ExportError(f"'{value.name}' of {node.op_type} is {tensor.dtype}, declared {value.dtype}")
            scope[value] = tensor
        if watch is not None:
            watch(node, inputs, outputs)

    def _value(self, value: ir.Value, scope: Mapping[ir.Value, Tensor]) -> Tensor:
        return self._constants[value] if value in self._constants else scope[value]

    def _apply(self, step: _Step, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        node = step.node
        known = OPERATORS if node.domain in ("", "ai.onnx") else CUSTOM.get(node.domain, {})
        if node.op_type not in known:
            raise ExportError(f"graph {self._graph.name}: operator {node.op_type} is not one of ours")
        if node in self._replaced:
            left, right = inputs[:2]
            assert left is not None and right is not None
            return (self._replaced[node](left, right),)
        try:
            return known[node.op_type](inputs, step.attributes)
        except (RuntimeError, ValueError, IndexError, TypeError, ExportError) as error:
            first = str(error).split("\n", 1)[0]
            raise ExportError(f"graph {self._graph.name}: {node.op_type} '{node.outputs[0].name}': {first}") from error


def _is_large(node: ir.Node) -> bool:
    """Whether a node is a product x W^T with a weight that is taken in parts."""
    if node.op_type != "Gemm" or len(node.inputs) != 2 or "transB" not in node.attributes:
        return False
    weight = node.inputs[1]
    return weight is not None and weight.is_initializer() and _size(weight) > PART


def _is_weight(side: Side) -> bool:
    """Whether an operand is the same in every run."""
    return all(value.is_initializer() for value in side.read)


def _takes_rows(node: ir.Node, at: int) -> bool:
    """Whether a node only takes rows of its input at this place."""
    axis = node.attributes.get("axis")
    return node.op_type == "Gather" and at == 0 and (axis is None or axis.as_int() == 0)


def _constant(tensor: Any) -> Tensor:
    """A value in the graph itself; bfloat16 and low types have no numpy type of their own."""
    if int(tensor.dtype) in LOW_TYPES:
        values = torch.from_numpy(np.asarray(tensor.numpy()).astype(np.float32))
        return values.to(LOW_TYPES[int(tensor.dtype)])
    if tensor.dtype == ir.DataType.BFLOAT16:
        return torch.frombuffer(bytearray(tensor.tobytes()), dtype=torch.bfloat16).reshape(tuple(tensor.shape))
    return torch.tensor(tensor.numpy())


def _schedule(graph: ir.Graph, *, fuse: bool) -> Iterator[_Step]:
    every = list(graph)
    fused, spared = fused_products(every) if fuse else ({}, set())
    nodes = [node for node in every if node not in spared]
    kept = set(graph.outputs)
    last: dict[ir.Value, int] = {}
    for at, node in enumerate(nodes):
        read = fused[node].read if node in fused else node.inputs
        for value in (*read, *node.outputs):
            if value is not None and value not in kept:
                last[value] = at
    ends: dict[int, list[ir.Value]] = {}
    for value, at in last.items():
        ends.setdefault(at, []).append(value)
    for at, node in enumerate(nodes):
        attributes = {name: _plain(attribute) for name, attribute in node.attributes.items()}
        yield _Step(node, attributes, tuple(ends.get(at, ())), fused.get(node))


def _plain(attribute: Any) -> Any:
    value = attribute.value
    return value.numpy() if isinstance(value, ir.TensorProtocol) else value
