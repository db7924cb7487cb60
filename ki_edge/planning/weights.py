"""How many parameters learn, rest, are gathered together: the counts behind every estimate of a training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from ki_edge.checkpoints.layout.keys import BACKBONE, EMBEDDING, PROJECTOR, VISION, parameter_shapes
from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError

GROUPS = ("vision", "projector", "backbone", "embeddings", "expert")
LAYER = re.compile(r".*\.layers\.\d+\.(?!.*layernorm\.dense)")
DENSE = re.compile(r".*norm\.dense\.")  # the modulations, which are gathered together


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters. `learning`, `resting`: that have gradients, or not; `adapters`: of `learning`, LoRA's.

    `matrices`: that products multiply by, and their biases, of groups that are not frozen. `outside`: in no layer,
    gathered for a whole step; of those `outside_learning` learn. `inside`: of layers and modulations; `largest`: of the
    largest of these.
    """

    learning: int
    resting: int
    adapters: int
    matrices: int
    outside: int
    outside_learning: int
    inside: int
    largest: int

    @property
    def total(self) -> int:
        return self.learning + self.resting


def group_of(key: str) -> str:
    """The group of a tensor, by its name in a checkpoint."""
    if key == EMBEDDING:
        return "embeddings"
    for prefix, group in ((VISION, "vision"), (PROJECTOR, "projector"), (BACKBONE, "backbone")):
        if key.startswith(prefix):
            return group
    return "expert"


def count(config: Pi05Config, freeze: tuple[str, ...] = (), lora: Mapping[str, int] | None = None) -> Weights:
    """Of a geometry with frozen groups, and with groups whose matrices rest beside adapters of a rank.

    ArgumentError for an unknown group.
    """
    lora = lora or {}
    for group in (*freeze, *lora):
        if group not in GROUPS:
            raise ArgumentError(f"group {group!r:.40}: expected one of {', '.join(GROUPS)}")
    units: dict[str, int] = {}
    learning = resting = adapters = matrices = outside_learning = 0
    for key, shape in parameter_shapes(config).items():
        size, group = prod(shape), group_of(key)
        rests = group in freeze or group in lora
        learning, resting = learning + (0 if rests else size), resting + (size if rests else 0)
        if group in lora and len(shape) == 2:
            adapters += lora[group] * sum(shape)
        matrices += size if group not in freeze and (len(shape) > 1 or key.endswith(".bias")) else 0
        found = LAYER.match(key)
        unit = "modulations" if DENSE.match(key) else found[0] if found else ""
        units[unit] = units.get(unit, 0) + size
        outside_learning += 0 if unit or rests else size
    inside = {unit: size for unit, size in units.items() if unit}
    return Weights(
        learning + adapters, resting, adapters, matrices, units.get("", 0), outside_learning,
        sum(inside.values()), max(inside.values(), default=0),
    )  # fmt: skip
