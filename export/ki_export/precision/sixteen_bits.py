"""The 16-bit part of an export: audit the ranges, decide, rewrite the graphs, say how weights are stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ki_edge import flow
from ki_edge.bundle import DecodeVocabulary
from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import ExportError
from ki_edge.files.writing import write_file
from ki_export.graphs.tracing import quiet
from ki_export.passes.low_plan import LowPlan
from ki_export.policies import PolicyFiles
from ki_export.weights.low_bits import LowForm
from ki_export.weights.weights import StorageFormat, sources

from .calibration import SYNTHETIC, Calibration, calibration
from .decision import Decision, apply, decide, forms
from .ranges import RANGES, Audit, audit, scaling
from .sensitivity import Cost, sensitivity

LARGE = 1_000_000_000  # parameters of a model for which fewer synthetic observations do
FEW = 3
MANY, SOME = 24, 6  # for static scales, which saturate what they have not seen


@dataclass(frozen=True)
class Request:
    """`precision`: "fp16" or "bf16"; `observed`: for the ranges; `keep`: patterns of sites to keep float32.

    `sensitivity`: measure what each layer costs.
    """

    precision: str
    observed: Calibration
    keep: tuple[str, ...] = ()
    sensitivity: bool = False


@dataclass(frozen=True, eq=False)
class Lowered:
    """What was done. `audit` is None for bfloat16; `forms`: checkpoint key -> how the weights file stores it.

    `costs`: of every layer, if they were asked for. `plan`: what is in eight or four bits, None if nothing is, and
    `low`: checkpoint key -> the form of the weights that are, `findings`: what the plan rests on.
    """

    decision: Decision
    audit: Audit | None
    forms: Mapping[str, StorageFormat]
    costs: tuple[Cost, ...] = ()
    plan: LowPlan | None = None
    low: Mapping[str, LowForm] = field(default_factory=dict)
    findings: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ranges.json: the decision and what it rests on."""
        found = {**self.decision.to_json(), **({} if self.audit is None else self.audit.to_json())}
        if self.costs:
            found["sensitivity"] = [cost.to_json() for cost in self.costs]
        if self.plan is not None:
            found["low_bits"] = self.plan.to_json()
            found["low_findings"] = dict(self.findings)
        write_file(folder / RANGES, json.dumps(found, indent=1) + "\n", ExportError)


def lower_models(
    checkpoint: Checkpoint,
    models: Mapping[str, ir.Model],
    vocabulary: DecodeVocabulary,
    request: Request,
    say: Callable[[str], object],
) -> Lowered:
    """Rewrite traced float32 graphs to 16-bit products.

    ArgumentError or ExportError if patterns or ranges do not allow it.
    """
    decide(request.precision, None, models, request.keep)  # a wrong pattern is told before minutes of measuring
    origins = {name: sources(model, vocabulary) for name, model in models.items()}
    observed = request.observed
    found = None
    if request.precision == "fp16":
        found = audit(checkpoint, models, origins, vocabulary, observed, say)
    decision = decide(request.precision, found, models, request.keep)
    _tell(decision, say)
    costs: list[Cost] = []
    if request.sensitivity:
        costs = sensitivity(checkpoint, models, vocabulary, decision, observed.observations, say)
    with quiet():
        low = apply(decision, models)
    stored = forms(decision, low, {name: sources(model, vocabulary) for name, model in models.items()})
    read = {rows.key for origin in origins.values() for rows in origin.values()}
    tensors = checkpoint.source.tensors
    for key in flow.modulation_weights(checkpoint.config):  # of the runtime alone, which widens them
        if key not in read:
            stored[key] = StorageFormat(tensors[key].dtype)
    return Lowered(decision, found, stored, tuple(costs))


def observations(
    checkpoint: Checkpoint, files: PolicyFiles | None, recorded: Path | None, *, scales: bool = False
) -> Calibration:
    """What ranges, and static `scales`, are measured on. DatasetError if a recording does not fit the checkpoint."""
    size = sum(tensor.elements for tensor in checkpoint.source.tensors.values())
    few, many = (SOME, MANY) if scales else (FEW, SYNTHETIC)
    count = few if size > LARGE else many
    return calibration(checkpoint.config, files, recorded, synthetic=count)


def _tell(decision: Decision, say: Callable[[str], object]) -> None:
    for site in dict.fromkeys((*decision.exponents, *decision.factors)):
        say(f"{site}: {scaling(decision.exponents.get(site, 0), decision.factors.get(site, 0))}")
    for site, reason in decision.kept.items():
        say(f"{site} stays float32: {reason}")
