"""From failed measurements to one sentence: graph, tensor, layer, and the usual cause."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ki_edge import graphs
from ki_edge.bundle import Bundle, sha256
from ki_edge.checkpoints import Checkpoint
from ki_edge.flow import denoise_times, step_size
from ki_edge.graphs import GraphSpec
from ki_edge.model import PiModel
from ki_edge.model.sampling import prefix as run_prefix
from ki_edge.overlap import nothing_before
from ki_export.weights.differences import differing_weights

from .bars import Measurement
from .cases import CONTINUING, Case
from .comparison import RUNTIME, Comparison, observe, watched
from .localize import first_wrong_layer
from .pair import feeds_of

ORDER = [*(spec.name for spec in graphs.GRAPHS), RUNTIME]
GRAPH_CAUSE = (
    "its weights are the checkpoint's, so the graph computes it differently: usually a model method or a graph pass "
    "was changed, or this opset's operator rounds differently"
)
ROUNDING_CAUSE = "no single layer is wrong: usually activations so large that float32 rounding adds up"
RUNTIME_CAUSE = "every graph is right by itself: usually the time convention, the modulation table or the trimming"
CONTINUING_CAUSE = "chunks that continue no other are right: usually what the denoise graph is told of the one before"
NOT_FINITE_CAUSE = "values are not finite: usually an overflow, or a weight that is NaN"


@torch.no_grad()
def explain(
    comparison: Comparison, bundle: Bundle, checkpoint: Checkpoint, model: PiModel, cases: Sequence[Case]
) -> str:
    """One line about the first failure in the order of graphs and layers."""
    failure = min(comparison.failures, key=_order)
    line = f"{summary(failure)}; {len(comparison.failures)} of {len(comparison.measurements)} comparisons failed"
    changed = differing_weights(bundle, checkpoint)
    layer = None
    if failure.graph != RUNTIME:
        case = next(case for case in cases if case.name == failure.case.removesuffix(CONTINUING))
        layer = _wrong_layer(failure.graph, bundle, model, case)
    parts = [line] + ([f"first wrong layer {layer}"] if layer else [])
    if changed and _of_another(bundle, checkpoint):
        name = f"{bundle.manifest.provenance.get('checkpoint')!s:.60}"
        parts.append(f"cause: this bundle was exported from another checkpoint ({name})")
    elif changed:
        more = f" and {len(changed) - 1} more differ" if len(changed) > 1 else " differs"
        parts.append(f"cause: weight '{changed[0]}'{more} from the checkpoint's: the bundle is damaged or was changed")
    elif not np.isfinite(failure.error):
        parts.append(f"cause: {NOT_FINITE_CAUSE}")
    elif failure.case.endswith(CONTINUING) and layer is None:
        parts.append(f"cause: {CONTINUING_CAUSE}")
    elif failure.graph == RUNTIME:
        parts.append(f"cause: {RUNTIME_CAUSE}")
    else:
        parts.append(f"cause: {GRAPH_CAUSE if layer else ROUNDING_CAUSE}")
    return "; ".join(parts)


def _of_another(bundle: Bundle, checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint's files are not those that the bundle records."""
    recorded = bundle.manifest.provenance.get("sha256")
    return isinstance(recorded, dict) and sorted(map(str, recorded.values())) != sorted(
        sha256(path) for path in checkpoint.source.files
    )


def _order(failure: Measurement) -> tuple[int, float, float]:
    """Graphs in the order in which they run, then layers and steps, then the worst."""
    place = np.inf if failure.place is None else failure.place
    return ORDER.index(failure.graph), place, -failure.severity


def summary(failure: Measurement) -> str:
    """Which tensor failed, by how much, and where."""
    return f"{failure.where}: {failure.figures} ({failure.case})"


def _wrong_layer(graph: str, bundle: Bundle, model: PiModel, case: Case) -> str | None:
    spec, tensors = _inputs(graph, bundle, model, case)
    feeds = feeds_of(bundle, spec, tensors)
    methods = {"prefix": model.prefix_forward, "denoise": model.denoise_step, "fast_decode": model.fast_decode_step}
    return first_wrong_layer(bundle, graph, feeds, model, lambda: methods[graph](*tensors))  # type: ignore[operator]


def _inputs(graph: str, bundle: Bundle, model: PiModel, case: Case) -> tuple[GraphSpec, tuple[Tensor, ...]]:
    """What the model itself feeds to a graph first."""
    observation = observe(case)
    if graph == "prefix":
        return graphs.specs(bundle.manifest.config)[0], tuple(torch.from_numpy(array) for array in case.inputs)
    if graph == "denoise":
        times = denoise_times(case.num_steps, bundle.manifest.sampling["time_convention"])
        row = model.modulation(torch.from_numpy(times[:1]))[0]
        dt = torch.tensor(step_size(case.num_steps))
        state = () if observation.state is None else (observation.state,)
        spec = graphs.specs(model.config)[1]
        alone = map(torch.from_numpy, nothing_before(model.config, len(case.images)).values())
        return spec, (torch.from_numpy(case.noise), row, dt, *run_prefix(model, observation), *state, *alone)
    seen: list[tuple[Tensor, ...]] = []
    with watched(model, bundle.manifest.vocabulary.ids, lambda inputs, outputs: seen.append(inputs)):
        model.sample_fast_tokens(observation, max_tokens=1, forced=case.forced, constrained=bool(model.decode_ids))
    return graphs.fast_decode(bundle.manifest.config), seen[0]
