"""A plan from the range audit alone: every product low, scales from the largest magnitude that was seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import onnx_ir as ir
import torch

from ki_edge import graphs
from ki_export.passes.low_plan import Kind, LowPlan, LowProduct
from ki_export.passes.products import EMBEDDING, matrix_products
from ki_export.weights.rounding import scale_of, second_scale

from .decision import Decision
from .ranges import Audit


def simple_plan(
    kind: Kind, audit: Audit, decision: Decision, models: Mapping[str, ir.Model], keep: Sequence[str] = ()
) -> LowPlan:
    """Of lowered graphs. `keep`: patterns of sites that stay in 16 bits."""
    products: dict[str, LowProduct] = {}
    kept: dict[str, str] = {}
    for name in (graphs.PREFIX.name, graphs.DENOISE.name):
        for site in matrix_products(models[name].graph):
            if site.name in decision.kept or site.name == EMBEDDING:
                continue
            if pattern := next((p for p in keep if fnmatchcase(site.name, p)), ""):
                kept[site.name] = f"--keep {pattern}"
            elif site.weight is not None:
                products[site.name] = _linear(kind, site.name, audit, decision)
            elif kind == "int8":
                kept[site.name] = "engines have no kernel for it"
            else:
                found = audit.of(site.name)
                products[site.name] = LowProduct("fp8", _scale(found.input.largest), _scale(found.other.largest))
    return LowPlan(kind, products, base="fp16", kept=kept)


def _linear(kind: Kind, site: str, audit: Audit, decision: Decision) -> LowProduct:
    smaller = 0
    if site.endswith(".down_proj"):
        smaller = decision.factors.get(site, 0) - decision.exponents.get(site, 0)
    largest = torch.tensor(audit.of(site).input.largest * 2.0**-smaller)
    return LowProduct(kind, float(second_scale(largest) if kind == "nvfp4" else scale_of(largest, kind)))


def _scale(largest: float) -> float:
    return float(scale_of(torch.tensor(largest), "fp8"))
