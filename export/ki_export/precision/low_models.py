"""The low part of an export: graphs that are in 16 bits already are rewritten to a plan's eight and four bits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import onnx_ir as ir

from ki_edge import graphs
from ki_edge.bundle import DecodeVocabulary
from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.keys import checkpoint_key
from ki_edge.dtypes import PRECISIONS
from ki_edge.errors import ExportError
from ki_export.graphs.tracing import quiet
from ki_export.passes.low_plan import LowPlan
from ki_export.passes.static import quantize_static
from ki_export.weights.low_bits import LowForm

from .low_bits import LowRequest, plan_low_bits
from .sixteen_bits import Lowered


def lower_further(
    checkpoint: Checkpoint,
    models: Mapping[str, ir.Model],
    vocabulary: DecodeVocabulary,
    lowered: Lowered,
    request: LowRequest,
    say: Callable[[str], object],
) -> Lowered:
    """Bring graphs in 16 bits to a plan's low products; the same with the plan and the weights' forms."""
    decision = lowered.decision
    request = replace(request, exponents=decision.exponents, kept=decision.kept)
    planned = plan_low_bits(checkpoint, models, vocabulary, request, say)
    plan = planned.plan
    with quiet():
        low = quantize_models(models, plan, lowered.decision.exponents)
    for kind, count in Counter(product.kind for product in plan.products.values()).items():
        say(f"{count} products in {kind}, {len(plan.kept)} kept in 16 bits")
    if own := _own_weights(models, low):
        size = f"{own / 1e9:.2f} GB of the bundle"
        say(f"fast_decode keeps 16-bit weights of its own, {size}; --no-fast-head leaves it out")
    return replace(lowered, plan=plan, low=low, findings=planned.findings.to_json())


def _own_weights(models: Mapping[str, ir.Model], low: Mapping[str, LowForm]) -> int:
    """Bytes of the 16-bit weights in fast_decode that other graphs take in fewer bits."""
    model = models.get(graphs.FAST_DECODE.name)
    weights = {} if model is None else model.graph.initializers
    shapes = [value.shape.numpy() for name, value in weights.items() if checkpoint_key(name) in low and value.shape]
    return 2 * sum(math.prod(shape) for shape in shapes)


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
