"""Graph passes, in the order in which they run. Each changes one thing, exactly, and never reads a weight.

Imports: nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from .cleanup import clean_up
from .constants import fold_constants
from .identities import remove_identities
from .linear import use_stored_weights
from .modulation import split_modulation
from .names import name_layers
from .norms import divide_by_root
from .positions import count_by_sums
from .reshapes import simplify_reshapes
from .rotary import fuse_rotations
from .transposes import simplify_transposes

PASSES: tuple[Callable[[ir.Model], None], ...] = (
    fold_constants,
    remove_identities,
    use_stored_weights,
    simplify_transposes,
    simplify_reshapes,
    divide_by_root,
    count_by_sums,
    clean_up,
    name_layers,
)

# for whole graphs that ONNX Runtime's CPU provider is to run, before their layers become 8-bit products
CPU_PASSES: tuple[Callable[[ir.Model], None], ...] = (split_modulation, fuse_rotations)

__all__ = ["CPU_PASSES", "PASSES"]
