"""How good a model is on the episodes that were held out: losses, tokens, and the actions that it would send.

Every process computes its share; what they found is summed, so one process finds the same as many. All call the model
equally often, as sharded weights need it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ki_edge.model import Pi05
from ki_edge.model.loss import postfix_cross_entropy
from ki_edge.train.step.batch import ACTIONS, Batch
from ki_edge.train.step.training_data import Share, TrainingData

# Each is a mean. Errors are absolute, over recorded actions: in robot units, and in those of the model. `text` and
# `text_accuracy`: of the samples of text sets; `not_spelled`: share of recorded chunks that FAST has no tokens for.
METRICS = (
    "flow", "fast", "fast_accuracy", "text", "text_accuracy", "action_error", "action_error_normalised",
    "fast_action_error", "fast_action_error_normalised", "fast_undecodable", "not_spelled",
)  # fmt: skip
BY_DATASET = ("flow", "fast", "text", "action_error", "action_error_normalised", "fast_action_error", "not_spelled")
IN_UNITS = ("action_error", "fast_action_error")  # no mean over robots, whose units differ
PREFIX = "held_out_"
Float64 = npt.NDArray[np.float64]


class Engine(Protocol):
    """What evaluation needs of the engine that trains."""

    world: int
    device: torch.device
    main: bool

    def share(self) -> Share:
        """Which samples this process has."""

    def averaged(self) -> AbstractContextManager[Pi05]:
        """The model with the moving average's weights."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """A chunk of a held-out sample in robot units, f64 [h,a], h of it recorded; `fast` None: the tokens spell none, or
    `spelled` is false: FAST has none for the recorded chunk, so nothing was asked for."""

    where: str
    task: str
    names: tuple[str, ...]
    recorded: Float64
    flow: Float64
    fast: Float64 | None
    spelled: bool = True


@dataclass(frozen=True, eq=False)
class Evaluation:
    """`values`: held_out_flow and so on, of what there was; of a mixture also held_out_flow/NAME, and of robots whose
    units differ held_out_action_error/NAME alone. `predictions`: of samples of the main process, none elsewhere."""

    values: dict[str, float]
    predictions: tuple[Prediction, ...] = ()


def evaluate(engine: Engine, data: TrainingData, *, num_steps: int = 10, shown: int = 4) -> Evaluation:
    """All held-out samples, under the moving average; no values if nothing was held out.

    `num_steps` of denoising; `shown`: predictions that are kept to be looked at, evenly over the samples.
    """
    sums = torch.zeros(len(data.names), len(METRICS), 2, dtype=torch.float64)
    found: list[Prediction] = []
    with engine.averaged() as model, torch.no_grad():
        for batch, counts in _in_step(engine, data):
            sample = _predict(model, batch, num_steps)
            if counts:
                scores = _Scores(sums, data, batch, sample)
                scores.add_losses()
                scores.add_actions()
                if engine.main:
                    found += scores.predictions()
    if engine.world > 1:
        shared = sums.to(engine.device)
        torch.distributed.all_reduce(shared)
        sums = shared.cpu()
    kept = sorted({int((at + 0.5) * len(found) / shown) for at in range(shown)}) if found else []
    return Evaluation(_means(sums.numpy(), data.names), tuple(found[at] for at in kept))


@dataclass(frozen=True, eq=False)
class _Predicted:
    """Of a batch, on the CPU. `flow` f64 [B], NaN of text; `tokens` f64 [B]: cross-entropy, NaN without a postfix;
    `said` i64 [B,F]: the likeliest token at each place; `sampled` f64 [B,H,A], normalised."""

    flow: Float64
    tokens: Float64 | None
    said: npt.NDArray[np.int64] | None
    sampled: Float64


def _in_step(engine: Engine, data: TrainingData) -> Iterator[tuple[Batch, bool]]:
    """This process's batches; where others have more, one of its own again, which does not count."""
    batches, spare = iter(data.held_out(engine.share())), None
    while True:
        batch = next(batches, None)
        there = torch.tensor([batch is not None], dtype=torch.int64, device=engine.device)
        if engine.world > 1:
            torch.distributed.all_reduce(there)
        if not int(there):
            return
        counts, spare = batch is not None, batch or spare or next(iter(data.held_out(Share())))
        yield spare.to(engine.device), counts


def _predict(model: Pi05, batch: Batch, num_steps: int) -> _Predicted:
    bare = replace(batch.observation, fast_tokens=None, fast_mask=None)
    draws = len(batch.noise) // len(batch)
    losses = model.compute_loss(
        bare, batch.actions if batch.given is None else batch.given,
        noise=batch.noise, time=batch.time, delay=batch.delay, real=batch.real,
    )  # fmt: skip
    squares = losses.flow.unflatten(0, (draws, len(batch))) * batch.dims[None, :, None, :]  # type: ignore[no-untyped-call]
    free = batch.free.unflatten(0, (draws, len(batch))).sum(dim=(0, 2)) * batch.dims.sum(dim=1)  # type: ignore[no-untyped-call]
    flow = squares.double().sum(dim=(0, 2, 3)) / torch.where(free > 0, free, torch.nan)
    tokens, said = None, None
    if batch.observation.fast_tokens is not None:
        logits = model.fast_logits(batch.observation)
        tokens, said = postfix_cross_entropy(logits, batch.observation), logits.argmax(dim=-1)
    sampled = model.sample_actions(bare, noise=batch.noise[: len(batch)], num_steps=num_steps)
    return _Predicted(
        _numpy(flow), None if tokens is None else _numpy(tokens), None if said is None else said.cpu().numpy(),
        _numpy(sampled),
    )  # fmt: skip


class _Scores:
    """Adds a batch to the sums f64 [sources, METRICS, (sum, count)]."""

    def __init__(self, sums: Tensor, data: TrainingData, batch: Batch, predicted: _Predicted) -> None:
        self._sums, self._data, self._predicted = sums.numpy(), data, predicted
        self._batch = batch = batch.to("cpu")
        self._source = batch.source.numpy()
        self._said: dict[int, Float64 | None] = {}
        self._acts = np.flatnonzero((batch.kind == ACTIONS).numpy() & batch.real.any(dim=1).numpy())

    def add_losses(self) -> None:
        """Flow, cross-entropy and accuracy of the tokens."""
        batch, predicted = self._batch, self._predicted
        acts = (batch.kind == ACTIONS).numpy()
        for row in np.flatnonzero(np.isfinite(predicted.flow)):
            self._add(row, "flow", predicted.flow[row])
        if predicted.tokens is None or predicted.said is None:
            return
        assert batch.observation.fast_mask is not None and batch.observation.fast_tokens is not None
        mask = batch.observation.fast_mask.numpy()
        right = (predicted.said == batch.observation.fast_tokens.numpy()) & mask
        for row in np.flatnonzero(mask.any(axis=1)):
            name = "fast" if acts[row] else "text"
            self._add(row, name, predicted.tokens[row])
            self._add(row, f"{name}_accuracy", right[row].sum(), mask[row].sum())

    def add_actions(self) -> None:
        """Sampled and decoded actions against the recorded ones."""
        for row in self._acts:
            recorded, real, dims = self._recorded(row)
            self._add_error(row, "action_error", self._predicted.sampled[row][real][:, dims], recorded)
            spelled = self._spelled(row)
            if self._predicted.said is not None:
                self._add(row, "not_spelled", float(spelled is None))
            if spelled is None:
                continue
            self._add(row, "fast_undecodable", float(len(spelled) == 0))
            if len(spelled):
                self._add_error(row, "fast_action_error", spelled[real], recorded)

    def predictions(self) -> Iterator[Prediction]:
        """The samples' chunks, in robot units."""
        for row in self._acts:
            source = int(self._source[row])
            recorded, real, dims = self._recorded(row)
            spelled = self._spelled(row)
            yield Prediction(
                self._data.label(source, int(self._batch.row[row])),
                self._data.tasks[int(self._batch.task[row])],
                tuple(self._data.action_names(source)),
                self._robot(row, recorded),
                self._robot(row, self._predicted.sampled[row][real][:, dims]),
                None if spelled is None or not len(spelled) else self._robot(row, spelled[real]),
                spelled is not None or self._predicted.said is None,
            )

    def _recorded(self, row: int) -> tuple[Float64, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Recorded actions f64 [h,a], which of the chunk they are [H], which numbers [A]."""
        real, dims = self._batch.real[row].numpy(), self._batch.dims[row].numpy()
        return self._batch.actions[row].numpy().astype(np.float64)[real][:, dims], real, dims

    def _spelled(self, row: int) -> Float64 | None:
        """Normalised actions f64 [H,a] of the likeliest tokens, empty if they spell none; None without a postfix."""
        if row not in self._said:
            self._said[row] = self._decoded(row)
        return self._said[row]

    def _decoded(self, row: int) -> Float64 | None:
        mask = self._batch.observation.fast_mask
        if self._predicted.said is None or mask is None or not bool(mask[row].any()):
            return None
        ids = self._predicted.said[row][mask[row].numpy()]
        found = self._data.decode_actions(int(self._source[row]), ids)
        return np.zeros((0, 0)) if found is None else found

    def _robot(self, row: int, actions: Float64) -> Float64:
        return self._data.unnormalize_actions(int(self._source[row]), actions)

    def _add_error(self, row: int, name: str, actions: Float64, recorded: Float64) -> None:
        apart = np.abs(self._robot(row, actions) - self._robot(row, recorded))
        self._add(row, name, apart.sum(), apart.size)
        self._add(row, f"{name}_normalised", np.abs(actions - recorded).sum(), apart.size)

    def _add(self, row: int, name: str, value: float, count: float = 1.0) -> None:
        self._sums[self._source[row], METRICS.index(name)] += (value, count)


def _means(sums: Float64, names: Sequence[str]) -> dict[str, float]:
    """Of all datasets, and of some by dataset."""
    robots = int((sums[:, METRICS.index("action_error"), 1] > 0).sum())
    found = _divided(sums.sum(axis=0), [name for name in METRICS if robots < 2 or name not in IN_UNITS], "")
    if len(names) > 1:
        for index, name in enumerate(names):
            found |= _divided(sums[index], BY_DATASET, f"/{name}")
    return found


def _divided(sums: Float64, metrics: Sequence[str], suffix: str) -> dict[str, float]:
    pairs = {name: sums[METRICS.index(name)] for name in metrics}
    return {f"{PREFIX}{name}{suffix}": float(total / count) for name, (total, count) in pairs.items() if count}


def _numpy(tensor: Tensor) -> Float64:
    return tensor.double().cpu().numpy()
