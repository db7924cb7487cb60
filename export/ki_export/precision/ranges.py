"""The range audit: how large the operands and results of every matrix product become, in float32, on observations.

float16 ends at 65504. What comes within a factor MARGIN of it on the observations at hand may pass it on others, so it
is not trusted to float16. At the other end its steps are 6e-8 apart, so a tensor whose typical (root mean square) value
is below SMALL loses digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ki_edge import graphs
from ki_edge.bundle import DecodeVocabulary
from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.keys import EMBEDDING as EMBEDDING_KEY
from ki_edge.errors import ExportError
from ki_export.passes.products import EMBEDDING, matrix_products
from ki_export.weights.weights import TensorSlice

from .calibration import Calibration
from .rehearsal import Rehearsal

RANGES = "ranges.json"  # in a bundle
LARGEST = 65504.0  # of float16
MARGIN = 8.0
SMALL = 2.0**-12
BUDGET = 1_300_000_000  # bytes of weights in memory: π0.5's action expert in float32
KINDS = ("input", "other", "output", "weight")


@dataclass
class Extent:
    """Magnitudes of one tensor over all observations: the largest and, from sums, the typical one."""

    largest: float = 0.0
    squares: float = 0.0
    count: int = 0

    @property
    def typical(self) -> float:
        """Root mean square."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def see(self, tensor: Tensor, what: str) -> None:
        """ExportError if a value is not finite."""
        largest = float(torch.maximum(tensor.amax(), -tensor.amin()))
        if not math.isfinite(largest):
            raise ExportError(
                f"the {what} is not finite in float32: this checkpoint is broken, no precision can run it"
            )
        self.largest = max(self.largest, largest)
        self.squares += float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
        self.count += tensor.numel()

    def add(self, other: Extent) -> None:
        self.largest = max(self.largest, other.largest)
        self.squares, self.count = self.squares + other.squares, self.count + other.count


@dataclass
class Range:
    """One product: its operand, the other operand of an attention's product, its result before the bias (added in
    float32), its weight if any.
    """

    site: str
    graph: str
    input: Extent = field(default_factory=Extent)
    other: Extent = field(default_factory=Extent)
    output: Extent = field(default_factory=Extent)
    weight: Extent = field(default_factory=Extent)

    @property
    def largest(self) -> float:
        return max(extent.largest for extent in (self.input, self.other, self.output, self.weight))

    @property
    def headroom(self) -> float:
        """How many times larger everything could become within float16."""
        return LARGEST / self.largest if self.largest else math.inf

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"site": self.site, "graph": self.graph, "headroom": min(self.headroom, 1e9)}
        for kind in KINDS:
            extent = getattr(self, kind)
            if extent.count:
                found[kind] = {"largest": extent.largest, "typical": extent.typical}
        return found


@dataclass
class Audit:
    """All ranges of a model, by graph and site, in the order in which they run. `source`: what was observed."""

    source: str
    observations: int
    ranges: dict[tuple[str, str], Range] = field(default_factory=dict)

    def of(self, site: str) -> Range:
        """The largest of all graphs that share a site. KeyError if none has it."""
        found = [r for r in self.ranges.values() if r.site == site]
        if not found:
            raise KeyError(site)
        merged = Range(site, found[0].graph)
        for one in found:
            for kind in KINDS:
                getattr(merged, kind).add(getattr(one, kind))
        return merged

    @property
    def sites(self) -> list[str]:
        return list(dict.fromkeys(r.site for r in self.ranges.values()))

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "observations": self.observations,
            "largest_float16": LARGEST,
            "margin": MARGIN,
            "ranges": [found.to_json() for found in self.ranges.values()],
        }


def audit(
    checkpoint: Checkpoint,
    models: Mapping[str, ir.Model],
    origins: Mapping[str, Mapping[str, TensorSlice]],
    vocabulary: DecodeVocabulary,
    observed: Calibration,
    say: Callable[[str], object] = lambda _: None,
) -> Audit:
    """Run the traced float32 graphs over the observations and take every product's range.

    Weights are read from the checkpoint as they are used. ExportError if float32 itself overflows.
    """
    result = Audit(observed.source, len(observed.observations))
    rehearsal = Rehearsal(checkpoint, models, origins, BUDGET)
    observations = observed.observations

    def watch(name: str) -> _Watch:
        return _Watch(models[name].graph, result)

    prefixes = rehearsal.prefix(observations, watch(graphs.PREFIX.name))
    rehearsal.actions(observations, prefixes, watch(graphs.DENOISE.name))
    if vocabulary.ids:
        rehearsal.decode(observations, prefixes, np.array(vocabulary.ids), watch(graphs.FAST_DECODE.name))
    table = result.ranges.get((graphs.FAST_DECODE.name, EMBEDDING))
    if table is not None:  # of which the observations used a few rows
        table.weight = Extent()
        for piece in checkpoint.source.pieces(EMBEDDING_KEY):
            table.weight.see(torch.from_numpy(np.require(piece, requirements="W")), f"weight of {EMBEDDING}")
    for name in models:
        largest = max((r for r in result.ranges.values() if r.graph == name), key=lambda r: r.largest)
        say(f"audited {name}: largest {largest.largest:.3g} in {largest.site} (float16 ends at {LARGEST:.0f})")
    return result


class _Watch:
    """Takes the ranges of a graph's products as they run."""

    def __init__(self, graph: ir.Graph, result: Audit) -> None:
        self._ranges: dict[ir.Node, Range] = {}
        self._unseen: dict[ir.Node, int] = {}  # elements of their weights that have not passed yet
        self._weight: Tensor | None = None  # the last one, or part of one, which all observations share
        for site in matrix_products(graph):
            key = (str(graph.name), site.name)
            self._ranges[site.node] = result.ranges.setdefault(key, Range(site.name, str(graph.name)))
            shape = site.weight.shape if site.weight is not None else None
            self._unseen[site.node] = 0 if shape is None else math.prod(shape.numpy())

    def __call__(self, node: ir.Node, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> None:
        found = self._ranges.get(node)
        if found is None:
            return
        left, right, *bias = inputs
        assert left is not None and right is not None
        result = outputs[0] if not bias or bias[0] is None else outputs[0] - bias[0]
        seen = {"input": left, "output": result}
        if node.op_type != "Gemm":
            seen["other"] = right
        elif right is not self._weight and self._unseen[node] > 0:
            seen["weight"] = right
            self._unseen[node] -= right.numel()
        self._weight = right
        for kind, tensor in seen.items():
            getattr(found, kind).see(tensor, f"{kind} of {found.site}")


def scaling(exponent: int, factor: int) -> str:
    """What is done to a product whose weight is stored / 2^exponent and whose result is multiplied by 2^factor."""
    powers = {"weight {}": -exponent, "result {} in float32": factor}
    return ", ".join(what.format(f"{'*' if k > 0 else '/'} 2^{abs(k)}") for what, k in powers.items() if k)
