"""Run a bundle and the PyTorch model on the same inputs: each graph by itself, then the runtime's whole pipeline.

A graph by itself gets the reference's own intermediate tensors, so that a failure names the graph that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ki_edge import graphs
from ki_edge.errors import BundleError
from ki_edge.flow import denoise_times, modulation_table, step_size
from ki_edge.model import Observation, PiModel
from ki_edge.model.sampling import prefix as run_prefix
from ki_edge.model.steering import steering_inputs
from ki_edge.overlap import Overlap, nothing_before
from ki_edge.progress import Progress
from ki_runtime.policy.denoise import runtime_weights
from ki_runtime.policy.trace import Trace

from .bars import FLOAT32, Bar, Measurement, bars_of, measure
from .cases import Case, continuing
from .pair import ParityPair

Array = npt.NDArray[Any]
DIRECTION = "actions_direction"  # the actions again, held to another metric
RUNTIME = "runtime"  # stands for the three graphs driven by the Sampler


@dataclass(frozen=True, eq=False)
class Answer:
    """What the reference answers to a case, kept for the witness.

    `actions` f32 [B,H,A], `ids` i64 [B,m]. Of each FAST step, over the tokens that it may emit: `margins` f32 [m], by
    which the best of the first row wins; `errors` and `sizes` f32 [m], the graph's largest error and the largest logit.
    """

    case: Case
    actions: Array
    ids: Array
    margins: Array
    errors: Array
    sizes: Array


@dataclass
class Comparison:
    """What was compared. `traces`: actions f32 [H,A] of the first case, the bundle's and the reference's.

    `answers`: the reference's results by case; `precision`: the bundle's; `method`: how the reference was held:
    "resident", "streamed", "recorded";
    `explanation`: one line about the first failure, None if there is none; `budget`: cosine that the bundle was asked
    to hold.
    """

    reference: str
    precision: str
    method: str
    cases: list[dict[str, Any]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    traces: tuple[Array, Array] | None = None
    explanation: str | None = None
    budget: float | None = None

    @property
    def bars(self) -> Mapping[str, Bar]:
        """What was allowed."""
        return bars_of(self.precision, self.budget)

    @property
    def failures(self) -> list[Measurement]:
        return [m for m in self.measurements if not m.passed]

    @property
    def worst(self) -> Measurement:
        """The measurement closest to its bar, or furthest beyond it."""
        return max(self.measurements, key=lambda m: m.severity)


@torch.no_grad()
def compare(pair: ParityPair, cases: Sequence[Case], progress: Progress) -> Comparison:
    """Every tensor of every case against the model."""
    manifest = pair.bundle.manifest
    result = Comparison("the PyTorch model", manifest.precision, pair.method, budget=manifest.budget)
    for case in cases:
        found, traces, answer = _compare_case(pair, case, progress)
        if case is cases[0] and pair.model.config.rtc != "none":
            found += _continue_chunk(pair, continuing(pair.model.config, case), progress)
        result.measurements += found
        result.answers.append(answer)
        result.traces = result.traces or traces
        result.cases.append({**case.describe(), **({} if pair.has_fast else {"fast_tokens": 0})})
        shown = next((m for m in found if not m.passed), next(m for m in found if m.tensor == "actions"))
        progress.say(f"compared {case.name}: {shown.tensor} {shown.figures}")
    return result


def _compare_case(
    pair: ParityPair, case: Case, progress: Progress
) -> tuple[list[Measurement], tuple[Array, Array], Answer]:
    observation, config = observe(case), pair.model.config
    steps, depth = case.num_steps, config.backbone.depth
    with progress.stage("PyTorch prefix", pair.steps(config.vision.depth + depth)):
        prefix = run_prefix(pair.model, observation)
    with progress.stage("prefix graph"):
        found = list(_prefix(pair, case, observation, prefix))
    states = [torch.from_numpy(case.noise)]
    with progress.stage("PyTorch and denoise graph", pair.steps(steps * config.expert.depth)):
        found += _denoise(pair, case, observation, prefix, states)
    fast = _Continued()
    if pair.has_fast:
        with progress.stage("PyTorch and FAST graph", pair.steps(case.max_tokens * depth)):
            fast = _fast(pair, case, observation, prefix)
            found += fast.found
    with progress.stage("the runtime's actions"):
        trace = pair.sampler.trace(*case.inputs, state=case.state, noise=case.noise, num_steps=steps)
        found += _runtime(pair, case, trace, prefix, states)
    if pair.has_fast and all(np.isfinite(m.error) for m in fast.found):  # else the runtime refuses to choose a token
        with progress.stage("the runtime's FAST tokens"):
            ids = pair.sampler.sample_fast_tokens(*case.inputs, **_decoding(pair, case))
        found.append(measure(case.name, RUNTIME, "greedy_ids", ids, fast.ids, bars=pair.bars))
    answer = Answer(case, states[-1].numpy(), fast.ids, *np.array(fast.decided, np.float32).reshape(-1, 3).T)
    return found, (trace.x[-1][0], states[-1][0].numpy()), answer


def _continue_chunk(pair: ParityPair, case: Case, progress: Progress) -> list[Measurement]:
    """A case whose chunk continues another one: the denoise graph step by step, then the runtime."""
    observation, states, steps = observe(case), [torch.from_numpy(case.noise)], case.num_steps
    with progress.stage("PyTorch and denoise graph, continuing a chunk", pair.steps(pair.model.config.backbone.depth)):
        prefix = run_prefix(pair.model, observation)
        found = list(_denoise(pair, case, observation, prefix, states))
        given = {"state": case.state, "noise": case.noise, "num_steps": steps, "overlap": case.overlap}
        actions = pair.sampler.trace(*case.inputs, **given).x[-1]  # type: ignore[arg-type]
    names = [name for name in ("actions", DIRECTION) if name in pair.bars]
    return found + [measure(case.name, RUNTIME, name, actions, states[-1].numpy(), bars=pair.bars) for name in names]


def observe(case: Case) -> Observation:
    """A case's inputs as tensors."""
    images, camera_mask, prompt_tokens, prompt_mask = (torch.from_numpy(array) for array in case.inputs)
    state = None if case.state is None else torch.from_numpy(case.state)
    return Observation(images, camera_mask, prompt_tokens, prompt_mask, state=state)


def _prefix(
    pair: ParityPair, case: Case, observation: Observation, reference: tuple[Tensor, ...]
) -> Iterator[Measurement]:
    graph, _ = graphs.specs(pair.bundle.manifest.config)
    given = pair.run(
        graph, observation.images, observation.camera_mask, observation.prompt_tokens, observation.prompt_mask
    )
    mask = reference[2].numpy()
    yield measure(case.name, "prefix", "prefix_mask", given["prefix_mask"], mask, bars=pair.bars)
    for name, expected in zip(("prefix_k", "prefix_v"), reference, strict=False):
        yield from by_layer(case.name, "prefix", name, given[name], expected.numpy(), mask, pair.bars)


def by_layer(
    case: str,
    graph: str,
    name: str,
    given: Array,
    expected: Array,
    mask: npt.NDArray[np.bool_],
    bars: Mapping[str, Bar] = FLOAT32,
) -> Iterator[Measurement]:
    """K or V [L,B,K,S,D] layer by layer, where the prefix mask bool [B,S] is set: nothing else is ever read."""
    for layer, (ours, theirs) in enumerate(zip(given, expected, strict=True)):
        yield measure(case, graph, name, ours.swapaxes(1, 2)[mask], theirs.swapaxes(1, 2)[mask], layer, bars)


def _denoise(
    pair: ParityPair, case: Case, observation: Observation, prefix: tuple[Tensor, ...], states: list[Tensor]
) -> Iterator[Measurement]:
    """Each step from the reference's x; appends the reference's states to `states`.

    A step that continues no chunk is the model's own plain step: what the graph takes for one is zeros then.
    """
    manifest = pair.bundle.manifest
    times = denoise_times(case.num_steps, manifest.sampling["time_convention"])
    rows = pair.model.modulation(torch.from_numpy(times))
    table = modulation_table(runtime_weights(pair.bundle), times, manifest.config)
    dt = torch.tensor(step_size(case.num_steps))
    _, graph = graphs.specs(manifest.config)
    fixed = prefix if observation.state is None else (*prefix, observation.state)
    steering = list(_steering(pair.model, case, times))
    for step, row in enumerate(rows):
        more = fixed if case.overlap is None else (*fixed, *steering[step])
        yield measure(case.name, RUNTIME, "modulation", table[step], row.numpy(), step, pair.bars)
        expected = pair.model.denoise_step(states[-1], row, dt, *more)
        given = pair.run(graph, states[-1], row, dt, *fixed, *steering[step])
        yield measure(case.name, "denoise", "x_next", given["x_next"], expected.numpy(), step, pair.bars)
        velocity, wanted = (((x - states[-1].numpy()) / dt.numpy()) for x in (given["x_next"], expected.numpy()))
        yield measure(case.name, "denoise", "velocity", velocity, wanted, step, pair.bars)
        states.append(expected)


def _steering(model: PiModel, case: Case, times: npt.NDArray[np.float32]) -> Iterator[tuple[Tensor, ...]]:
    """The graph's inputs for the chunk before, of each step."""
    overlap: Overlap | None = case.overlap
    if overlap is None:
        alone = tuple(map(torch.from_numpy, nothing_before(model.config, len(case.images)).values()))
        yield from (alone for _ in times)
    else:
        yield from steering_inputs(overlap, times, model.modulation, trained=model.config.rtc == "trained")


@dataclass
class _Continued:
    """FAST decoding: its comparisons, the reference's greedy ids, and each step's margin, error and size (`Answer`)."""

    found: list[Measurement] = field(default_factory=list)
    ids: Array = field(default_factory=lambda: np.zeros((1, 0), np.int64))
    decided: list[tuple[float, float, float]] = field(default_factory=list)


def _fast(pair: ParityPair, case: Case, observation: Observation, prefix: tuple[Tensor, ...]) -> _Continued:
    """Every decoding step of the reference replayed through the graph."""
    result = _Continued()
    found, decided = result.found, result.decided
    columns = pair.bundle.manifest.vocabulary.ids
    allowed = np.isin(columns, pair.model.decode_ids or columns)

    def replay(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        given = pair.run(graphs.fast_decode(pair.bundle.manifest.config), *inputs)
        logits, *new = (tensor.numpy() for tensor in outputs)
        second, best = np.partition(logits[0, allowed], -2)[-2:]
        error = np.abs(given["logits"][0, allowed] - logits[0, allowed]).max()
        decided.append((float(best - second), float(error), float(np.abs(logits[0, allowed]).max())))
        found.append(measure(case.name, "fast_decode", "logits", given["logits"], logits, None, pair.bars))
        for name, expected in zip(("new_k", "new_v"), new, strict=True):
            for layer, (ours, theirs) in enumerate(zip(given[name], expected, strict=True)):
                found.append(measure(case.name, "fast_decode", name, ours, theirs, layer, pair.bars))

    with watched(pair.model, columns, replay), known_prefix(pair.model, prefix):
        result.ids = pair.model.sample_fast_tokens(observation, **_decoding(pair, case)).numpy()
    return result


def _decoding(pair: ParityPair, case: Case) -> dict[str, Any]:
    return {"max_tokens": case.max_tokens, "forced": case.forced, "constrained": bool(pair.model.decode_ids)}


@contextmanager
def watched(
    model: PiModel, columns: Sequence[int], see: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], None]
) -> Iterator[None]:
    """Show `see` every fast_decode_step of the model: its inputs and outputs, logits of the bundle's columns.

    The sampler gets those of the ids that it may emit. BundleError if one of them is no column.
    """
    step: Callable[..., tuple[Tensor, ...]] = model.fast_decode_step
    wanted = model.decode_ids or range(model.config.vocab_size)
    places = {token: at for at, token in enumerate(columns)}
    missing = [token for token in wanted if token not in places]
    if missing:
        raise BundleError(f"the decode vocabulary lacks {len(missing)} tokens, such as {missing[0]}: export again")
    chosen = torch.tensor([places[token] for token in wanted])
    rows = model.backbone.embed_tokens.weight[torch.tensor(columns)]

    def shown(*inputs: Tensor) -> tuple[Tensor, ...]:
        logits, *new = step(*inputs[:5], rows)
        see(inputs[:5], (logits, *new))
        return logits[:, chosen], *new

    model.fast_decode_step = shown  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del model.fast_decode_step


@contextmanager
def known_prefix(model: PiModel, prefix: tuple[Tensor, ...]) -> Iterator[None]:
    """Give a sampler of the model the prefix that was computed before."""
    model.prefix_forward = lambda *_: prefix  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del model.prefix_forward


def _runtime(
    pair: ParityPair, case: Case, trace: Trace, prefix: tuple[Tensor, ...], states: Sequence[Tensor]
) -> Iterator[Measurement]:
    """The whole pipeline, which leaves out absent cameras and padding."""
    k, v, mask = (tensor.numpy() for tensor in prefix)
    mask, bars = mask[:, trace.columns], pair.bars
    yield measure(case.name, RUNTIME, "prefix_mask", trace.prefix_mask, mask, bars=bars)
    for name, given, expected in (("prefix_k", trace.prefix_k, k), ("prefix_v", trace.prefix_v, v)):
        yield from by_layer(case.name, RUNTIME, name, given, expected[:, :, :, trace.columns], mask, bars)
    for step, (ours, theirs) in enumerate(zip(trace.x[1:], states[1:], strict=True)):
        yield measure(case.name, RUNTIME, "x", ours, theirs.numpy(), step, bars)
    for name in ("actions", DIRECTION):
        if name in bars:
            yield measure(case.name, RUNTIME, name, trace.x[-1], states[-1].numpy(), bars=bars)
