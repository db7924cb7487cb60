"""The model of a geometry."""

from __future__ import annotations

from ki_edge.config import Pi05Config

from .pi import PiModel
from .pi0 import Pi0
from .pi05 import Pi05


def build(config: Pi05Config) -> PiModel:
    """A fresh Pi05 or Pi0, as the geometry's `variant` says."""
    models: tuple[type[Pi05] | type[Pi0], ...] = (Pi05, Pi0)
    return next(model for model in models if model.variant == config.variant)(config)
