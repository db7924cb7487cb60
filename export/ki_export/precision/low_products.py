"""Low products in the place of a graph's 16-bit ones, before any graph is rewritten: what they will compute."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ki_export.arithmetic.evaluator import Replacement
from ki_export.arithmetic.low_bits import LowOperand, low_product
from ki_export.passes.low_plan import LowPlan, LowProduct
from ki_export.passes.products import matrix_products
from ki_export.weights.rounding import Kind, round_blocks, round_values, round_weight, times_blocks

HELD = 400_000_000  # bytes of rounded weights that stay in memory over the steps


class RoundedWeights:
    """Rounded weights by node, as products take them: those used last, up to HELD bytes."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[str, Kind], LowOperand] = OrderedDict()
        self._bytes = 0

    def of(self, site: str, weight: Tensor, kind: Kind, balance: Tensor | None) -> LowOperand:
        """A weight [out, in], as the right side [in, out] of a product."""
        key = (site, kind)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        scaled = weight.float() if balance is None else weight.float() * balance
        low = round_weight(scaled, kind)
        found = LowOperand(low.unscaled.mT, low.factor, whole=kind == "int8")
        size = found.unscaled.nbytes
        while self._held and self._bytes + size > HELD:
            self._bytes -= self._held.popitem(last=False)[1].unscaled.nbytes
        if size <= HELD:
            self._held[key] = found
            self._bytes += size
        return found


def replacements(plan: LowPlan, models: Mapping[str, ir.Model], weights: RoundedWeights) -> dict[ir.Node, Replacement]:
    """What the plan's products compute, by node of the 16-bit graphs."""
    found: dict[ir.Node, Replacement] = {}
    for model in models.values():
        for site in matrix_products(model.graph):
            product = plan.products.get(site.name)
            if product is not None:
                balance = plan.balances.get(product.balance)
                given = None if balance is None else torch.from_numpy(balance)
                found[site.node] = _Product(site.name, product, given, weights)
    return found


class _Product:
    def __init__(self, site: str, product: LowProduct, balance: Tensor | None, weights: RoundedWeights) -> None:
        self._site, self._product, self._balance, self._weights = site, product, balance, weights

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        product = self._product
        x = left.float() if self._balance is None else left.float() / self._balance
        a = low_operand(x, product.operand, product.kind)
        if product.other is None:
            b = self._weights.of(self._site, right, product.kind, self._balance)
        else:
            b = low_operand(right.float(), product.other, product.kind)
        return low_product(a, b, left.dtype)


def low_operand(x: Tensor, scale: float, kind: Kind) -> LowOperand:
    """An operand that comes at run time, with its static scale; of nvfp4 without one (0) as it is."""
    if kind == "nvfp4" and scale == 0:
        return LowOperand(x, torch.ones(()), whole=False)
    factor = torch.tensor(np.float32(scale))
    if kind == "nvfp4":
        values, scales = round_blocks(x, factor)
        return LowOperand(times_blocks(values, scales), factor, whole=False)
    return LowOperand(round_values(x / factor, kind), factor, whole=kind == "int8")
