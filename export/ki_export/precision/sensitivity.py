"""What each layer costs in 16 bits: the error of the actions if it alone is lowered, and what keeping it would cost.

An island of float32 pays where a layer's error is large and its weights are few.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from tqdm import tqdm

from ki_edge import graphs
from ki_edge.bundle import DecodeVocabulary
from ki_edge.checkpoints import Checkpoint
from ki_export.graphs.tracing import pack, quiet, unpack
from ki_export.passes.products import matrix_products
from ki_export.weights.weights import TensorSlice, sources

from .calibration import Observed
from .decision import Decision, apply
from .ranges import BUDGET
from .rehearsal import Rehearsal

GROUP = re.compile(r"(.*layers\.\d+\.(?:self_attn|mlp)|projector)\b")
OBSERVATIONS = 2
WIDENED = 2  # bytes a weight that float32 needs more than 16 bits


@dataclass(frozen=True)
class Cost:
    """One layer's attention or MLP. `error`: largest difference of the actions, if it alone is in 16 bits.

    `relative`: L2 of that difference over that of the actions; `megabytes`: more weight memory if it is kept.
    """

    group: str
    error: float
    relative: float
    megabytes: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sensitivity(
    checkpoint: Checkpoint,
    models: Mapping[str, ir.Model],
    vocabulary: DecodeVocabulary,
    decision: Decision,
    observations: tuple[Observed, ...],
    say: Callable[[str], object],
) -> list[Cost]:
    """The cost of every group that `decision` lowers and that the actions depend on, the largest error first.

    `models`: traced float32 graphs; they are not changed. One run of prefix and denoising for each group.
    """
    acting = {name: pack(model) for name, model in models.items() if name != graphs.FAST_DECODE.name}
    weights = _groups({name: models[name] for name in acting}, decision)
    observations = observations[:OBSERVATIONS]
    exact = _actions(checkpoint, acting, vocabulary, None, (), observations)
    costs = []
    for group in tqdm(weights, desc="sensitivity", unit="layer", disable=None, leave=False):
        found = _actions(checkpoint, acting, vocabulary, decision, (group,), observations)
        difference = torch.cat(found) - torch.cat(exact)
        relative = float(difference.norm() / torch.cat(exact).norm())
        megabytes = WIDENED * weights[group] / 1e6
        costs.append(Cost(group, float(difference.abs().max()), relative, megabytes))
    costs.sort(key=lambda cost: -cost.error)
    for cost in costs[:3]:
        say(f"most sensitive: {cost.group}: {cost.error:.1e} of the actions, {cost.megabytes:.1f} MB more in float32")
    return costs


def group_of(site: str) -> str:
    """The attention or MLP of a layer that a product belongs to; itself for all others."""
    found = GROUP.match(site)
    return found[1] if found else site


def _groups(models: Mapping[str, ir.Model], decision: Decision) -> dict[str, int]:
    """Weights of each group."""
    found: dict[str, dict[str, int]] = {}
    for model in models.values():
        for site in matrix_products(model.graph):
            if site.name in decision.kept:
                continue
            shape = site.weight.shape if site.weight is not None else None
            found.setdefault(group_of(site.name), {})[site.name] = 0 if shape is None else math.prod(shape.numpy())
    return {group: sum(sizes.values()) for group, sizes in found.items()}


def _actions(
    checkpoint: Checkpoint,
    packed: Mapping[str, bytes],
    vocabulary: DecodeVocabulary,
    decision: Decision | None,
    lowered: tuple[str, ...],
    observations: tuple[Observed, ...],
) -> list[Tensor]:
    """Actions with only the groups `lowered` in 16 bits; all in float32 without a decision."""
    models = {name: unpack(data) for name, data in packed.items()}
    origins: dict[str, Mapping[str, TensorSlice]] = {name: sources(model, vocabulary) for name, model in models.items()}
    exponents: Mapping[str, int] = {}
    if decision is not None:
        alone = _only(decision, models, lowered)
        exponents = alone.exponents
        with quiet():
            apply(alone, models)
    rehearsal = Rehearsal(checkpoint, models, origins, BUDGET, exponents)
    return rehearsal.actions(observations, rehearsal.prefix(observations))


def _only(decision: Decision, models: Mapping[str, ir.Model], lowered: tuple[str, ...]) -> Decision:
    names = {site.name for model in models.values() for site in matrix_products(model.graph)}
    kept = {name: "not looked at" for name in names if group_of(name) not in lowered}

    def of(exponents: Mapping[str, int]) -> dict[str, int]:
        return {site: exponent for site, exponent in exponents.items() if group_of(site) in lowered}

    everything = {**kept, "backbone.embed_tokens": "not looked at", **decision.kept}
    return Decision(decision.precision, everything, of(decision.exponents), of(decision.factors))
