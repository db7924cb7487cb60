"""What a plan of low products rests on: what each layer costs, and what more bits bought."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ki_export.passes.low_plan import LowPlan


@dataclass(frozen=True)
class LowCost:
    """A layer tried alone: the smallest cosine of the actions, their relative error, and its weights."""

    group: str
    kind: str
    cosine: float
    relative: float
    weights: int


@dataclass
class Findings:
    """What a plan rests on. `local`: site -> relative error of its result; `costs`: the costliest first.

    `kept`: (layer, its bits now, smallest cosine with it and all before it), in the order in which they were given more
    bits, the first entry with none; `steps`: smallest cosine after each denoising step, of the plan.
    """

    source: str
    observations: int
    budget: float
    local: dict[str, dict[str, float]] = field(default_factory=dict)
    costs: list[LowCost] = field(default_factory=list)
    kept: list[tuple[str, str, float]] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    holds: bool = True

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "observations": self.observations,
            "budget": self.budget,
            "holds": self.holds,
            "local": self.local,
            "costs": [vars(cost) for cost in self.costs],
            "more_bits": [{"layer": layer, "bits": bits, "cosine": cosine} for layer, bits, cosine in self.kept],
            "steps": self.steps,
        }


@dataclass(frozen=True, eq=False)
class Planned:
    """The plan and what it rests on."""

    plan: LowPlan
    findings: Findings

    def to_json(self) -> dict[str, Any]:
        return {**self.plan.to_json(), **self.findings.to_json()}
