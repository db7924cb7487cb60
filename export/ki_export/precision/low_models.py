"""The low part of an export: graphs that are in 16 bits already are rewritten to a plan's eight and four bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from ki_edge import graphs
from ki_edge.bundle import DecodeVocabulary
from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.keys import checkpoint_key
from ki_edge.dtypes import PRECISIONS
from ki_edge.errors import ExportError
from ki_export.graphs.tracing import quiet
from ki_export.passes.low_plan import Kind, LowPlan
from ki_export.passes.static import quantize_static
from ki_export.weights.low_bits import LowForm

from .calibration import Calibration
from .simple_plan import simple_plan
from .sixteen_bits import Lowered


@dataclass(frozen=True)
class LowRequest:
    """`kind`: the low precision that was asked for; `observed`: what scales are measured on; `keep`: patterns of sites
    that stay in 16 bits; `budget_cosine`: of the actions, None for the kind's own.
    """

    kind: Kind
    observed: Calibration
    keep: tuple[str, ...] = ()
    budget_cosine: float | None = None


def lower_further(
    checkpoint: Checkpoint,
    models: Mapping[str, ir.Model],
    vocabulary: DecodeVocabulary,
    lowered: Lowered,
    request: LowRequest,
    say: Callable[[str], object],
) -> Lowered:
    """Bring graphs in 16 bits to a plan's low products; the same with the plan and the weights' forms."""
    assert lowered.audit is not None
    plan = simple_plan(request.kind, lowered.audit, lowered.decision, models, request.keep)
    with quiet():
        low = quantize_models(models, plan, lowered.decision.exponents)
    for kind, count in Counter(product.kind for product in plan.products.values()).items():
        say(f"{count} products in {kind}, {len(plan.kept)} kept in 16 bits")
    return replace(lowered, plan=plan, low=low)


def quantize_models(models: Mapping[str, ir.Model], plan: LowPlan, exponents: Mapping[str, int]) -> dict[str, LowForm]:
    """Rewrite the graphs; checkpoint key -> low form of every weight that was replaced.

    `exponents`: site -> k of the weights that the graphs take divided by 2^k. fast_decode keeps 16-bit weights of its
    own unless the plan says otherwise. ExportError for a plan that does not fit the graphs.
    """
    base, forms = PRECISIONS[plan.base].stored, {}
    for name, model in models.items():
        if name == graphs.FAST_DECODE.name and not plan.fast:
            continue
        try:
            replaced = quantize_static(model, plan)
        except ValueError as error:
            raise ExportError(f"graph {name} cannot be quantised: {error}") from error
        for parts in replaced:
            exponent = exponents.get(parts.weight.removesuffix(".weight"), 0)
            forms[checkpoint_key(parts.weight)] = LowForm(parts.kind, base, exponent, parts.balance)
    return forms
