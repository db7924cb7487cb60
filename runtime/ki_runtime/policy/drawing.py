"""The next token of a text: the most likely one, or one drawn by its probability."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import seed_of
from ki_edge.errors import ArgumentError

from .decode import Choices, Int64

HOTTEST = 100.0


@dataclass(eq=False)
class Drawing:
    """Choices drawn at a temperature: p ~ exp(logit / temperature). With 0 the most likely is taken."""

    choices: Choices
    temperature: float
    rng: np.random.Generator = field(default_factory=np.random.default_rng)

    @property
    def eos_id(self) -> int:
        return self.choices.eos_id

    def best(self, logits: npt.NDArray[np.float32]) -> Int64:
        """A token for each row, i64 [B], of logits f32 [B, F]."""
        if not self.temperature:
            return self.choices.best(logits)
        # the largest of logits with Gumbel noise is drawn by their probabilities
        scores = self.choices.scores(logits).astype(np.float64) / self.temperature
        return np.asarray(self.choices.ids[np.argmax(scores + self.rng.gumbel(size=scores.shape), axis=1)])


def drawing(choices: Choices, temperature: Any, seed: Any) -> Drawing:
    """ArgumentError for a temperature that is none, or a seed without one, which would have no effect."""
    number = isinstance(temperature, int | float | np.number) and not isinstance(temperature, bool)
    if not number or not 0.0 <= temperature <= HOTTEST:
        raise ArgumentError(f"temperature {temperature!r:.40}: expected a number from 0 (greedy) to {HOTTEST:g}")
    if seed is not None and not temperature:
        raise ArgumentError("seed: with temperature 0 nothing is drawn; leave it out, or give a temperature")
    return Drawing(choices, float(temperature), np.random.default_rng(seed_of(seed)))
