"""Run a bundle and the PyTorch model on the same inputs: each graph by itself, then the runtime's whole pipeline.

A graph by itself gets the reference's own intermediate tensors, so that a failure names the graph that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.flow import denoise_times, modulation_table, step_size
from ki_edge.graphs import GraphSpec
from ki_edge.model import Observation, Pi05
from ki_edge.model.sampling import prefix as run_prefix
from ki_runtime.backends import SessionOptions, choose_backend, open_session
from ki_runtime.denoise import runtime_weights
from ki_runtime.sampler import Sampler, Trace
from ki_runtime.session import Session

from .bars import Measurement, measure
from .cases import Case

Array = npt.NDArray[Any]
RUNTIME = "runtime"  # stands for the three graphs driven by the Sampler


@dataclass
class Comparison:
    """What was compared. `traces`: actions f32 [H,A] of the first case, the bundle's and the reference's.

    `explanation`: one line about the first failure, None if there is none.
    """

    reference: str
    cases: list[dict[str, Any]] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    traces: tuple[Array, Array] | None = None
    explanation: str | None = None

    @property
    def failures(self) -> list[Measurement]:
        return [m for m in self.measurements if not m.passed]

    @property
    def worst(self) -> Measurement:
        """The measurement closest to its bar, or furthest beyond it."""
        return max(self.measurements, key=lambda m: m.severity)


class Sides:
    """The bundle's graphs under ONNX Runtime on one side, the model on the other."""

    def __init__(self, bundle: Bundle, model: Pi05) -> None:
        self.bundle, self.model = bundle, model
        backend = choose_backend("ort")
        self._sessions = {s.name: open_session(bundle, s, backend, SessionOptions()) for s in graphs.GRAPHS}
        self.sampler = Sampler(bundle, lambda spec: self._sessions[spec.name])

    def session(self, spec: GraphSpec) -> Session:
        return self._sessions[spec.name]

    def run(self, spec: GraphSpec, *tensors: Tensor) -> dict[str, Array]:
        """One graph on the reference's tensors, given in the contract's order."""
        feeds = {
            wanted.name: np.array(tensor.numpy(), wanted.dtype, order="C")
            for wanted, tensor in zip(spec.inputs, tensors, strict=True)
        }
        return self.session(spec).run(feeds)


@torch.no_grad()
def compare(bundle: Bundle, model: Pi05, cases: Sequence[Case], say: Callable[[str], object]) -> Comparison:
    """Every tensor of every case against the model."""
    sides = Sides(bundle, model)
    result = Comparison("the PyTorch model")
    for case in cases:
        found, traces = _compare_case(sides, case)
        result.measurements += found
        result.traces = result.traces or traces
        result.cases.append(case.describe())
        worst = max(found, key=lambda m: m.severity)
        say(f"compared {case.name}: worst {worst.error:.1e} of {worst.limit:.1e} ({worst.where})")
    return result


def _compare_case(sides: Sides, case: Case) -> tuple[list[Measurement], tuple[Array, Array]]:
    observation = Observation(*(torch.from_numpy(array) for array in case.inputs))
    k, v, mask = run_prefix(sides.model, observation)
    found = list(_prefix(sides, case, observation, (k, v, mask)))
    states = [torch.from_numpy(case.noise)]
    found += _denoise(sides, case, (k, v, mask), states)
    found += _fast(sides, case, observation)
    trace = sides.sampler.trace(*case.inputs, noise=case.noise, num_steps=case.num_steps)
    found += _runtime(case, trace, (k, v, mask), states)
    return found, (trace.x[-1][0], states[-1][0].numpy())


def _prefix(sides: Sides, case: Case, observation: Observation, reference: tuple[Tensor, ...]) -> Iterator[Measurement]:
    given = sides.run(
        graphs.PREFIX,
        observation.images,
        observation.camera_mask,
        observation.prompt_tokens,
        observation.prompt_mask,
    )
    mask = reference[2].numpy()
    yield measure(case.name, "prefix", "prefix_mask", given["prefix_mask"], mask)
    for name, expected in zip(("prefix_k", "prefix_v"), reference, strict=False):
        yield from by_layer(case.name, "prefix", name, given[name], expected.numpy(), mask)


def by_layer(
    case: str, graph: str, name: str, given: Array, expected: Array, mask: npt.NDArray[np.bool_]
) -> Iterator[Measurement]:
    """K or V [L,B,K,S,D] layer by layer, where the prefix mask bool [B,S] is set: nothing else is ever read."""
    for layer, (ours, theirs) in enumerate(zip(given, expected, strict=True)):
        yield measure(case, graph, name, ours.swapaxes(1, 2)[mask], theirs.swapaxes(1, 2)[mask], layer)


def _denoise(sides: Sides, case: Case, prefix: tuple[Tensor, ...], states: list[Tensor]) -> Iterator[Measurement]:
    """Each step from the reference's x; appends the reference's states to `states`."""
    manifest = sides.bundle.manifest
    times = denoise_times(case.num_steps, manifest.sampling["time_convention"])
    rows = sides.model.modulation(torch.from_numpy(times))
    table = modulation_table(runtime_weights(sides.bundle), times, manifest.config.expert.depth)
    dt = torch.tensor(step_size(case.num_steps))
    for step, row in enumerate(rows):
        yield measure(case.name, RUNTIME, "modulation", table[step], row.numpy(), step)
        expected = sides.model.denoise_step(states[-1], row, dt, *prefix)
        given = sides.run(graphs.DENOISE, states[-1], row, dt, *prefix)
        yield measure(case.name, "denoise", "x_next", given["x_next"], expected.numpy(), step)
        states.append(expected)


def _fast(sides: Sides, case: Case, observation: Observation) -> Iterator[Measurement]:
    """Every decoding step of the reference replayed through the graph, then the runtime's own greedy ids."""
    found: list[Measurement] = []

    def replay(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        given = sides.run(graphs.FAST_DECODE, *inputs)
        logits, *new = (tensor.numpy() for tensor in outputs)
        found.append(measure(case.name, "fast_decode", "logits", given["logits"], logits, None))
        for name, expected in zip(("new_k", "new_v"), new, strict=True):
            pairs = zip(given[name], expected, strict=True)
            found.extend(measure(case.name, "fast_decode", name, a, b, layer) for layer, (a, b) in enumerate(pairs))

    constrained = bool(sides.model.decode_ids)
    options = {"max_tokens": case.max_tokens, "forced": case.forced, "constrained": constrained}
    with watched(sides.model, sides.bundle.manifest.vocabulary.ids, replay):
        expected = sides.model.sample_fast_tokens(observation, **options)  # type: ignore[arg-type]
    yield from found
    given = sides.sampler.sample_fast_tokens(*case.inputs, **options)  # type: ignore[arg-type]
    yield measure(case.name, RUNTIME, "greedy_ids", given, expected.numpy())


@contextmanager
def watched(
    model: Pi05, columns: Sequence[int], see: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], None]
) -> Iterator[None]:
    """Show `see` every fast_decode_step of the model: its inputs and outputs, logits of the bundle's columns."""
    step: Callable[..., tuple[Tensor, ...]] = model.fast_decode_step
    rows = model.backbone.embed_tokens.weight[torch.tensor(columns)]

    def shown(*inputs: Tensor) -> tuple[Tensor, ...]:
        see(inputs[:5], step(*inputs[:5], rows))
        return step(*inputs)

    model.fast_decode_step = shown  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del model.fast_decode_step


def _runtime(case: Case, trace: Trace, prefix: tuple[Tensor, ...], states: Sequence[Tensor]) -> Iterator[Measurement]:
    """The whole pipeline, which leaves out absent cameras and padding."""
    k, v, mask = (tensor.numpy() for tensor in prefix)
    mask = mask[:, trace.columns]
    yield measure(case.name, RUNTIME, "prefix_mask", trace.prefix_mask, mask)
    for name, given, expected in (("prefix_k", trace.prefix_k, k), ("prefix_v", trace.prefix_v, v)):
        yield from by_layer(case.name, RUNTIME, name, given, expected[:, :, :, trace.columns], mask)
    for step, (ours, theirs) in enumerate(zip(trace.x[1:], states[1:], strict=True)):
        yield measure(case.name, RUNTIME, "x", ours, theirs.numpy(), step)
    yield measure(case.name, RUNTIME, "actions", trace.x[-1], states[-1].numpy())
