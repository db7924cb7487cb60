"""Which products of a model are computed in 16 bits, decided from its range audit and from what the user keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import onnx_ir as ir

from ki_edge.dtypes import PRECISIONS
from ki_edge.errors import ArgumentError, ExportError
from ki_export.passes.lower import lower
from ki_export.passes.products import EMBEDDING, matrix_products
from ki_export.passes.rescale import rescale
from ki_export.weights.weights import StorageFormat, TensorSlice

from .ranges import LARGEST, MARGIN, SMALL, Audit, Range

DOWN = ".down_proj"
UP = ".up_proj"
SHARE = 0.25  # of the products' weights that may stay float32 before float16 is pointless


@dataclass(frozen=True)
class Decision:
    """Sites that stay float32, each with the reason; and what is scaled by powers of two.

    `exponents`: site -> k of its weight stored as W / 2^k. `factors`: site -> k of the 2^k that its result is
    multiplied by in float32: the same k, but where an MLP's product is to be smaller.
    """

    precision: str  # "fp16" or "bf16"
    kept: Mapping[str, str] = field(default_factory=dict)
    exponents: Mapping[str, int] = field(default_factory=dict)
    factors: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"float32": dict(self.kept), "exponents": dict(self.exponents), "factors": dict(self.factors)}


def decide(
    precision: str, audit: Audit | None, models: Mapping[str, ir.Model], patterns: Sequence[str] = ()
) -> Decision:
    """What to lower. `audit`: None for bfloat16, which has float32's range; `patterns`: sites to keep, shell-style.

    ArgumentError for a pattern that fits no site; ExportError if so much would stay float32 that float16 is pointless.
    """
    kept = _chosen(patterns, models)
    if audit is None:
        return Decision(precision, kept)
    exponents: dict[str, int] = {}
    factors: dict[str, int] = {}
    for site in audit.sites:
        if site in kept:
            continue
        found = audit.of(site)
        if not found.input.count:
            raise ExportError(f"no observation reached {site}: give observations that use the whole model")
        smaller = _product(site.removesuffix(DOWN), audit) if site.endswith(DOWN) else 0
        exponent = 0 if site == EMBEDDING else _weight_exponent(found, smaller)
        if reason := _misfit(found, exponent, smaller):
            kept[site] = reason
            exponent = 0
        exponents[site], factors[site] = exponent, exponent + smaller
    for site in [site for site in audit.sites if site.endswith(DOWN)]:
        layer = site.removesuffix(DOWN)
        smaller = _product(layer, audit) if site in factors else 0
        if smaller and layer + UP in exponents and _folds(audit.of(layer + UP), exponents[layer + UP] + smaller):
            exponents[layer + UP] += smaller
        elif smaller:
            factors[layer + UP] = factors.get(layer + UP, 0) - smaller
    decision = Decision(precision, kept, _nonzero(exponents), _nonzero(factors))
    _check(decision, models)
    return decision


def _product(layer: str, audit: Audit) -> int:
    """k by which an MLP's product is computed 2^k times smaller."""
    product = audit.of(layer + DOWN).input
    return shift(product.largest, product.typical)


def _weight_exponent(found: Range, smaller: int) -> int:
    """k of W / 2^k such that weight and result, whose operand is 2^smaller times smaller, both fit."""
    if not found.weight.count:
        return 0
    exponent = shift(found.weight.largest, found.weight.typical)
    scale = 2.0 ** -(exponent + smaller)
    return exponent + shift(found.output.largest * scale, found.output.typical * scale)


def _folds(up: Range, exponent: int) -> bool:
    """Whether W_up / 2^exponent and its result still fit, so that the weight alone makes the product smaller."""
    extents, scale = (up.weight, up.output), 2.0**-exponent
    return all(shift(extent.largest * scale, extent.typical * scale) == 0 for extent in extents)


def _misfit(found: Range, exponent: int, smaller: int) -> str:
    """Why a product cannot be computed in float16 in spite of its scaling; "" if it can."""
    scaled = {
        "operand": max(found.input.largest * 2.0**-smaller, found.other.largest),
        "result": found.output.largest * 2.0 ** -(exponent + smaller),
        "weight": found.weight.largest * 2.0**-exponent,
    }
    kind, largest = max(scaled.items(), key=lambda item: item[1])
    if largest * MARGIN > LARGEST:
        return f"its {kind} reaches {largest:.3g}"
    small = {
        "operand": found.input.typical * 2.0**-smaller,
        "other operand": found.other.typical,
        "weight": found.weight.typical * 2.0**-exponent,
    }
    for kind, typical in small.items():
        if 0 < typical < SMALL / 8:
            return f"its {kind}, typically {typical:.1e}, would be rounded away"
    return ""


def shift(largest: float, typical: float) -> int:
    """k such that values / 2^k fit float16: 0 if they do, above 0 if they are too large, below if too small."""
    limit = LARGEST / MARGIN
    if largest > limit:
        return math.ceil(math.log2(largest / limit))
    if 0 < typical < SMALL:
        return -min(math.ceil(math.log2(SMALL / typical)), math.floor(math.log2(limit / largest)))
    return 0


def _nonzero(exponents: Mapping[str, int]) -> dict[str, int]:
    return {site: exponent for site, exponent in exponents.items() if exponent}


def apply(decision: Decision, models: Mapping[str, ir.Model]) -> set[str]:
    """Rewrite all graphs; the names of the initializers that are 16-bit now."""
    low = set()
    for model in models.values():
        rescale(model, decision.factors)
        low |= lower(model, ir.DataType(PRECISIONS[decision.precision].onnx), decision.kept.__contains__)
    return low


def forms(
    decision: Decision, low: set[str], origins: Mapping[str, Mapping[str, TensorSlice]]
) -> dict[str, StorageFormat]:
    """Checkpoint key -> how the weights file stores it, of the initializers that are 16-bit or divided."""
    found = {}
    for rows_of in origins.values():
        for name, rows in rows_of.items():
            exponent = decision.exponents.get(name.removesuffix(".weight"), 0)
            if name in low:
                found[rows.key] = StorageFormat(PRECISIONS[decision.precision].stored, exponent)
            elif exponent:
                found[rows.key] = StorageFormat("F32", exponent)
    return found


def _chosen(patterns: Sequence[str], models: Mapping[str, ir.Model]) -> dict[str, str]:
    names = list(dict.fromkeys(site.name for model in models.values() for site in matrix_products(model.graph)))
    kept: dict[str, str] = {}
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise ArgumentError(
                f"--keep-fp32 {pattern!r} fits no matrix product: there are such as {', '.join(names[:3])}, "
                f"{names[-1]}; try 'backbone.layers.0.*' or '*.down_proj'"
            )
        kept.update(dict.fromkeys(found, f"--keep-fp32 {pattern}"))
    return kept


def _check(decision: Decision, models: Mapping[str, ir.Model]) -> None:
    weights = {}
    for model in models.values():
        for site in matrix_products(model.graph):
            if site.weight is not None and site.weight.shape is not None:
                weights[str(site.weight.name)] = site.name, math.prod(site.weight.shape.numpy())
    total = sum(size for _, size in weights.values())
    own = {name for name, reason in decision.kept.items() if not reason.startswith("--keep")}
    beyond = sum(size for name, size in weights.values() if name in own)
    if own and beyond > SHARE * total:
        named = ", ".join(f"{name} ({decision.kept[name]})" for name in sorted(own)[:4])
        more = f" and {len(own) - 4} more" if len(own) > 4 else ""
        raise ExportError(
            f"float16 does not fit this model: {100 * beyond / total:.0f} % of its products' weights do not fit within "
            f"{LARGEST:.0f} / {MARGIN:.0f}: {named}{more}; use --precision bf16, which has float32's range"
        )
