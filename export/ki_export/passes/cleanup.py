"""What remains after the other passes: shared subexpressions, unused nodes, the tracer's notes."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

SMALL = 1024  # elements of a constant that is worth merging with an equal one


def clean_up(model: ir.Model) -> None:
    """Merge equal nodes, delete what nothing uses, and drop metadata (it holds paths of the exporting machine)."""
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass(size_limit=SMALL)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    common.NameFixPass()(model)
