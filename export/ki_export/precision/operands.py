"""What the operands of every product are like, over all observations and all denoising steps, before they are rounded.

Of each product in 16 bits: the largest magnitude of every channel, and rows to choose a scale by. Rows are drawn evenly
from all calls of the product, and the one with the largest value of each call is always among them: a scale that
saturates it must pay for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor

from ki_edge import graphs
from ki_export.passes.products import MatrixProduct, matrix_products

from .calibration import Observed
from .rehearsal import STEPS, Prefixes, Rehearsal

ROWS = 192  # of an operand that are kept, at least; and those with the largest value of each call
SINGLE = 64  # values that stand for a row


@dataclass
class Operand:
    """One side of a product. `largest` f32 [channels]: of each channel; `rows` f32 [n, channels]."""

    largest: Tensor = field(default_factory=lambda: torch.zeros(()))
    drawn: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> Tensor:
        return torch.cat(self.drawn)

    def see(self, values: Tensor, count: int, generator: torch.Generator) -> None:
        """Take the largest and draw `count` rows of [..., channels]."""
        rows = values.reshape(-1, values.shape[-1])
        sizes = rows.abs()
        largest = sizes.amax(0).float()
        self.largest = torch.maximum(self.largest, largest)
        drawn = torch.randint(len(rows), (count,), generator=generator)
        top = sizes.amax(1).argmax()[None]
        self.drawn.append(rows[torch.cat([top, drawn])].float())


@dataclass(frozen=True, eq=False)
class Operands:
    """A product and what its two sides are like; the right one is empty where it is a weight."""

    product: MatrixProduct
    graph: str
    left: Operand = field(default_factory=Operand)
    right: Operand = field(default_factory=Operand)


def observe_operands(
    rehearsal: Rehearsal, models: Mapping[str, ir.Model], observations: Sequence[Observed]
) -> tuple[dict[str, Operands], Prefixes, list[list[Tensor]]]:
    """Operands of every product by site, and what was computed: prefixes, and the actions after each step.

    One run of prefix and denoising. Rows of absent cameras and padding are not there to be seen.
    """
    found: dict[str, Operands] = {}
    names = (graphs.PREFIX.name, graphs.DENOISE.name)
    watches = {name: _Watch(name, models[name].graph, found, len(observations)) for name in names}
    prefixes = rehearsal.prefix(observations, watches[names[0]])
    states = rehearsal.states(observations, prefixes, watches[names[1]])
    return found, prefixes, states


class _Watch:
    def __init__(self, name: str, graph: ir.Graph, found: dict[str, Operands], observations: int) -> None:
        self._sites = {}
        for product in matrix_products(graph):
            self._sites[product.node] = found.setdefault(product.name, Operands(product, name))
        calls = observations * (STEPS if name == graphs.DENOISE.name else 1)
        self._count = -(-ROWS // calls)
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, node: ir.Node, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> None:
        seen = self._sites.get(node)
        if seen is None:
            return
        left, right = inputs[:2]
        assert left is not None and right is not None
        if seen.product.weight is not None:
            seen.left.see(left, self._count, self._generator)
        else:  # one scale for all of it, and as many columns as there are keys: single values
            seen.left.see(left.reshape(-1, 1), SINGLE * self._count, self._generator)
            seen.right.see(right.reshape(-1, 1), SINGLE * self._count, self._generator)
