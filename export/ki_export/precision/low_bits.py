"""Eight and four bits: scales from observations, and which layers stay in more bits until the actions hold.

Everything is measured on what the robot gets: the actions after all denoising steps, of each observation. With all
layers low, if that holds the budget; else each layer is tried alone, and the costliest get more bits, no more of them
than the budget asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from ki_edge.bundle import DecodeVocabulary
from ki_edge.checkpoints import Checkpoint

from .low_findings import Findings, Planned
from .low_search import Search
from .low_study import NAMES, LowRequest, Study

__all__ = ["LowRequest", "Planned", "plan_low_bits"]


def plan_low_bits(
    checkpoint: Checkpoint,
    models: Mapping[str, ir.Model],
    vocabulary: DecodeVocabulary,
    request: LowRequest,
    say: Callable[[str], object],
) -> Planned:
    """Decide what becomes of every product of lowered graphs (16-bit products), which are not changed.

    The FAST graph is left out: it keeps 16 bits. ArgumentError for a pattern that fits nothing.
    """
    acting = {name: models[name] for name in NAMES}
    study = Study(checkpoint, acting, vocabulary, request)
    chosen = study.choose(say)
    findings = Findings(request.observed.source, len(request.observed.observations), request.least, study.local)
    search = Search(study, chosen, findings, say)
    plan = search.run()
    return Planned(plan, findings)
