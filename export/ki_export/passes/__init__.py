"""Graph passes, in the order in which they run. Each changes one thing, exactly, and never reads a weight."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from .cleanup import clean_up
from .constants import fold_constants
from .identities import remove_identities
from .linear import use_stored_weights
from .names import name_layers
from .reshapes import simplify_reshapes

PASSES: tuple[Callable[[ir.Model], None], ...] = (
    fold_constants,
    remove_identities,
    use_stored_weights,
    simplify_reshapes,
    clean_up,
    name_layers,
)

__all__ = ["PASSES"]
