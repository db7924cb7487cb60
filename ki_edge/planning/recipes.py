"""Training recipes by name: what others train such policies with, and where it is written. Without PyTorch.

A recipe gives some of `TrainSettings`; the rest keep their defaults, and what is given explicitly wins. Batch size and
number of steps are no part of one: they depend on the data and the machine. Times are drawn from
Beta(1.5, 1) * 0.999 + 0.001 in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ki_edge.errors import ArgumentError

from .settings import TrainSettings


@dataclass(frozen=True)
class TrainingRecipe:
    """`values`: fields of TrainSettings; `source`: where they are from; `about`: what it is for."""

    about: str
    source: str
    values: Mapping[str, Any]


def _recipe(about: str, source: str, **values: Any) -> TrainingRecipe:
    return TrainingRecipe(about, source, MappingProxyType(values))


RECIPES: Mapping[str, TrainingRecipe] = MappingProxyType(
    {
        "ki": _recipe(
            "knowledge insulation as the paper has it: the losses alone, the optimiser is yours",
            "arXiv 2505.23705: stop-gradient on the backbone's K and V in every layer; it keeps the two losses apart, "
            "so both have weight 1",
            knowledge_insulation=True, fast_loss=True, flow_weight=1.0, fast_weight=1.0, text_weight=1.0,
        ),
        "pi05": _recipe(
            "π0.5's joint training: FAST and flow together, the flow's gradient reaches the backbone",
            "arXiv 2504.16054: cross-entropy plus alpha times the flow loss, alpha = 10",
            knowledge_insulation=False, fast_loss=True, flow_weight=10.0, fast_weight=1.0, text_weight=1.0,
        ),
        "opentau": _recipe(
            "OpenTau's defaults for π0.5",
            "TensorAuto/OpenTau, policies/pi05/configuration_pi05.py, optim/optimizers.py and configs/train.py",
            knowledge_insulation=True, fast_loss=True, flow_weight=1.0, fast_weight=1.0, text_weight=1.0, flow_draws=1,
            learning_rate=2.5e-5, warmup=1_000, decay_steps=30_000, final_rate=0.1, optimizer="adamw", beta1=0.9,
            beta2=0.95, weight_decay=1e-10, clip=10.0, ema=0.0, freeze=("vision",),
        ),
        "pi052": _recipe(
            "LeRobot's PI052: text, FAST and flow, insulated",
            "huggingface/lerobot, policies/pi052/configuration_pi052.py (pull request 4184) and pi05's, whose "
            "optimiser it has",
            knowledge_insulation=True, fast_loss=True, flow_weight=10.0, fast_weight=1.0, text_weight=1.0, flow_draws=5,
            learning_rate=2.5e-5, warmup=1_000, decay_steps=30_000, final_rate=0.1, optimizer="adamw", beta1=0.9,
            beta2=0.95, weight_decay=0.01, clip=1.0, ema=0.0,
        ),
        "openpi": _recipe(
            "openpi's fine-tuning of π0.5 (pi05_libero): flow alone, a constant rate after the warm-up",
            "Physical-Intelligence/openpi 15a9616, training/config.py (pi05_libero) and training/optimizer.py",
            knowledge_insulation=False, fast_loss=False, flow_weight=1.0, flow_draws=1,
            learning_rate=5e-5, warmup=10_000, decay_steps=1_000_000, final_rate=1.0, optimizer="adamw", beta1=0.9,
            beta2=0.95, weight_decay=1e-10, clip=1.0, ema=0.999,
        ),
        "tiny": _recipe(
            "a small model from nothing, as examples/fetch; these are the defaults",
            "measured here (examples/fetch)",
            knowledge_insulation=True, fast_loss=True, flow_weight=1.0, fast_weight=1.0, text_weight=1.0, flow_draws=4,
            learning_rate=1e-3, warmup=300, decay_steps=0, final_rate=0.02, optimizer="adamw", beta1=0.9, beta2=0.98,
            weight_decay=0.01, clip=1.0, ema=0.998,
        ),
    }
)  # fmt: skip


def find_recipe(name: str) -> TrainingRecipe:
    """The recipe of a name. ArgumentError for one that there is not."""
    if name not in RECIPES:
        raise ArgumentError(f"recipe {name!r:.60}: expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


def with_recipe(name: str | None, given: Mapping[str, Any], base: TrainSettings | None = None) -> TrainSettings:
    """`base` (the defaults without it), changed by the recipe, then by what was given explicitly.

    ArgumentError for an unknown recipe, and for values that no run can have.
    """
    values = {} if name is None else find_recipe(name).values
    return replace(base or TrainSettings(), **{**values, **given})


def table() -> Iterator[str]:
    """The recipes as a Markdown table: a row for each setting, a column for each recipe."""
    names = list(RECIPES)
    fields = [name for name in TrainSettings.__dataclass_fields__ if any(name in r.values for r in RECIPES.values())]
    yield f"| setting | {' | '.join(f'`{name}`' for name in names)} |"
    yield "|---|" + "---|" * len(names)
    for field in fields:
        yield f"| {field} | {' | '.join(_cell(RECIPES[name].values.get(field)) for name in names)} |"


def _cell(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
