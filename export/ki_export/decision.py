"""Which products of a model are computed in 16 bits, decided from its range audit and from what the user keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import onnx_ir as ir

from ki_edge.errors import ArgumentError, ExportError

from .passes.lower import lower
from .passes.rescale import rescale
from .passes.sites import sites
from .ranges import LARGEST, MARGIN, Audit
from .weights import Form, Rows

TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
STORED = {"fp16": "F16", "bf16": "BF16"}  # as safetensors calls them
DOWN = ".down_proj"
UP = ".up_proj"
SHARE = 0.25  # of the products' weights that may stay float32 before float16 is pointless


@dataclass(frozen=True)
class Decision:
    """Sites that stay float32, each with the reason; and by `<layer>.mlp` the k of W_up / 2^k."""

    precision: str  # "fp16" or "bf16"
    kept: Mapping[str, str] = field(default_factory=dict)
    exponents: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"float32": dict(self.kept), "exponents": dict(self.exponents)}


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
    for site in audit.sites:
        if site in kept:
            continue
        found = audit.of(site)
        if site.endswith(DOWN):
            layer, up = site.removesuffix(DOWN), audit.of(site.removesuffix(DOWN) + UP)
            largest = max(found.input, found.output, up.output)
            exponents[layer] = max(0, math.ceil(math.log2(max(largest, 1e-30) * MARGIN / LARGEST)))
            found = type(found)(site, found.graph, weight=found.weight)
        elif site.endswith(UP) and _scalable(site.removesuffix(UP) + DOWN, audit, kept):
            found = type(found)(site, found.graph, input=found.input, weight=found.weight)  # its result is scaled
        if found.largest * MARGIN > LARGEST:
            kept[site] = f"reaches {found.largest:.3g}"
    decision = Decision(precision, kept, {layer: k for layer, k in exponents.items() if k})
    _check(decision, models)
    return decision


def _scalable(down: str, audit: Audit, kept: Mapping[str, str]) -> bool:
    """Whether an up_proj's result is made smaller together with the product that `down` reads."""
    return down in audit.sites and not kept.get(down, "").startswith("--keep")


def apply(decision: Decision, models: Mapping[str, ir.Model]) -> set[str]:
    """Rewrite all graphs; the names of the initializers that are 16-bit now."""
    low = set()
    for model in models.values():
        rescale(model, decision.exponents)
        low |= lower(model, TYPES[decision.precision], decision.kept.__contains__)
    return low


def forms(decision: Decision, low: set[str], origins: Mapping[str, Mapping[str, Rows]]) -> dict[str, Form]:
    """Checkpoint key -> how the weights file stores it, of the initializers that are 16-bit."""
    found = {}
    for rows_of in origins.values():
        for name, rows in rows_of.items():
            layer = name.removesuffix(f"{UP}.weight")
            exponent = decision.exponents.get(layer, 0) if name != layer else 0
            if name in low:
                found[rows.key] = Form(STORED[decision.precision], exponent)
            elif exponent:
                found[rows.key] = Form("F32", exponent)
    return found


def _chosen(patterns: Sequence[str], models: Mapping[str, ir.Model]) -> dict[str, str]:
    names = list(dict.fromkeys(site.name for model in models.values() for site in sites(model.graph)))
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
        for site in sites(model.graph):
            if site.weight is not None and site.weight.shape is not None:
                weights[str(site.weight.name)] = site.name, math.prod(site.weight.shape.numpy())
    total = sum(size for _, size in weights.values())
    own = {name for name, reason in decision.kept.items() if reason.startswith("reaches")}
    beyond = sum(size for name, size in weights.values() if name in own)
    if own and beyond > SHARE * total:
        named = ", ".join(f"{name} ({decision.kept[name]})" for name in sorted(own)[:4])
        more = f" and {len(own) - 4} more" if len(own) > 4 else ""
        raise ExportError(
            f"float16 does not fit this model: {100 * beyond / total:.0f} % of its products' weights belong to tensors "
            f"within {MARGIN:.0f}x of {LARGEST:.0f}: {named}{more}; use --precision bf16, which has float32's range"
        )
