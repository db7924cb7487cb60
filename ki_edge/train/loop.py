"""The steps of a run: take a batch, learn from it, log, evaluate, save; and stop where somebody asks for it.

All randomness of step n comes from (seed, n), so a resumed run takes the steps that an uninterrupted one would have
taken. Every process of a run goes through the same calls; the main one writes and tells.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ki_edge.errors import DivergedError
from ki_edge.planning.settings import TrainSettings

from .parallel.checkpoints import STATE, RunFolder
from .parallel.engine import Engine
from .parallel.results import StepResult
from .step.batch import ACTIONS, Batch
from .step.training_data import TrainingData
from .watching.log import RunLog, by_group

Row = dict[str, Any]
NAMED = 4  # samples of a bad batch that a message names


class Watcher(Protocol):
    """Is told how a run goes; in the main process only."""

    def logged(self, row: Mapping[str, Any]) -> None:
        """A row of the log."""

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """What an evaluation found."""

    def saved(self, step: int, folder: Path) -> None:
        """A checkpoint is complete."""


class Judge(Protocol):
    """What is measured every `eval_every` steps."""

    def evaluate(self, engine: Engine, data: TrainingData) -> Row:
        """Values by name; all processes call it at the same step."""

    def try_out(self, checkpoint: Path, step: int) -> Row | None:
        """Values of a complete checkpoint at work; None if it was asked to stop. In the main process only."""

    def stop(self) -> None:
        """Ask for an early end of what is being tried out."""

    def score(self, row: Mapping[str, Any]) -> float | None:
        """How good a checkpoint with these values is, more is better; None if nothing was measured."""


class Trainer:
    """One run. `watchers` are those of the main process."""

    def __init__(
        self,
        engine: Engine,
        data: TrainingData,
        settings: TrainSettings,
        folder: RunFolder,
        log: RunLog | None,
        *,
        judge: Judge | None = None,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        self.engine, self.data, self.settings, self.folder, self.log = engine, data, settings, folder, log
        self.judge, self.watchers = judge, list(watchers)
        self._stopping = False
        self.owes = False  # an evaluation that was due when the run was stopped; it is made up when it goes on
        self._clock = _Clock()

    @property
    def step(self) -> int:
        """Steps that were taken."""
        return self.engine.step

    def stop(self, *_: object) -> None:
        """Ask for an end: the run is saved after the step that is being taken. Fit to be a signal's handler."""
        self._stopping = True
        if self.judge is not None:
            self.judge.stop()

    def run(self) -> Iterator[Row]:
        """Train to the last step, or to where a process was asked to stop; yields rows of the log and of evaluations.

        A run that is finished already has its checkpoint written again, if that is missing. An evaluation that was due
        when an earlier process ended is made up first.
        """
        if self.step >= self.settings.steps and not self._is_saved():
            self._save()
        if self.engine.any(self._is_unjudged()):
            yield from self._evaluated()
        if self.step >= self.settings.steps:
            return
        steps = iter(self.data.steps(self.step, self.engine.share()))
        try:
            while self.step < self.settings.steps and not self.engine.any(self._stopping):
                yield from self._take(steps)
        finally:
            if (close := getattr(steps, "close", None)) is not None:
                close()
        if not self._is_saved():  # it was stopped
            self._save()

    def close(self) -> None:
        """End workers and trackers, leave the group of processes, let go of the folder."""
        self.data.close()
        for watcher in self.watchers:
            if (close := getattr(watcher, "close", None)) is not None:
                close()
        self.engine.close()
        self.folder.close()

    def _take(self, steps: Iterator[list[Batch]]) -> Iterator[Row]:
        """One step, and what is due after it."""
        with self._clock.waiting():
            batches = next(steps)
        result = self._learn(batches)
        self._clock.samples += self.settings.batch
        step, settings = self.step, self.settings
        last = step == settings.steps
        if step % settings.log_every == 0 or last:
            yield self._told(self._row(result))
        judged = self._is_judged()
        if judged or last or step % settings.save_every == 0:
            with self._clock.stopped():
                self._save()  # first: a kill while it is judged loses nothing that was learnt
                if judged:
                    yield from self._evaluated()

    def _learn(self, batches: list[Batch]) -> StepResult:
        try:
            return self.engine.train_step(batches, self.settings.rate(self.step))
        except DivergedError as error:
            own = [(int(s), int(r)) for batch in batches for s, r in zip(batch.source, batch.row, strict=True)]
            bad = error.samples or own
            named = "; ".join(self.data.where(*sample) for sample in bad[:NAMED])
            more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
            raise DivergedError(
                f"{error}. Its samples: {named}{more}. Nothing was learnt from them; the last checkpoint is "
                f"{self.folder.latest() or 'none'}",
                error.step,
                error.samples,
            ) from None

    # ------------------------------------------------------------------ rows

    def _row(self, result: StepResult) -> Row:
        """Values of this step; speeds are those since the row before."""
        row: Row = {"step": self.step, **result.terms, "grad_norm": result.grad_norm}
        row["rate"] = self.settings.rate(self.step - 1)
        row |= {f"rate/{name}": factor * row["rate"] for name, factor in self.settings.rates}
        row |= by_group(
            result.flow.numpy(), result.tokens.numpy(), result.source.numpy(), result.task.numpy(),
            (result.kind == ACTIONS).numpy(),
            names=self.data.names, tasks=self.data.tasks,
        )  # fmt: skip
        seconds, waited, samples = self._clock.restart()
        row |= {"samples_per_s": round(samples / seconds, 2), "waited": round(waited / seconds, 4)}
        row["memory"] = self.engine.peak_memory()
        if (speed := getattr(self.data, "loader_samples_per_s", None)) is not None:
            row["loader_samples_per_s"] = round(speed, 1)
        return row

    def _told(self, row: Row) -> Row:
        if self.log is not None:
            self.log.append(row)
        for watcher in self.watchers:
            watcher.logged(row)
        return row

    # ------------------------------------------------------------------ checkpoints

    def _is_saved(self) -> bool:
        return self.engine.any(self.folder.folder(self.step).is_dir())

    def _save(self) -> Path:
        """A complete checkpoint of this step."""
        folder = self.folder.publish(self.step, self._fill)
        for watcher in self.watchers:
            watcher.saved(self.step, folder)
        return folder

    def _fill(self, folder: Path) -> None:
        self.engine.save_state(folder / STATE)
        self.engine.save_checkpoint(folder)
        if self.engine.main:
            self.data.save_assets(folder)

    # ------------------------------------------------------------------ evaluations

    def _is_judged(self) -> bool:
        """Whether an evaluation is due after this step."""
        every, step = self.settings.eval_every, self.step
        return bool(every) and self.judge is not None and (step % every == 0 or step >= self.settings.steps)

    def _is_unjudged(self) -> bool:
        """Whether the checkpoint of this step waits for an evaluation; known to the main process."""
        if self.log is None or not self.step or not self._is_judged() or not self.folder.folder(self.step).is_dir():
            return False
        return all(row["step"] != self.step for row in self.log.evaluations())

    def _evaluated(self) -> Iterator[Row]:
        """Judge the checkpoint of this step, and keep what was found with it; nothing where the run is to stop."""
        assert self.judge is not None
        if self.engine.any(self._stopping):
            self.owes = True
            return
        values: Row | None = {"step": self.step, **self.judge.evaluate(self.engine, self.data)}
        worth: float | None = None
        if self.engine.main and values is not None:
            found = self.judge.try_out(self.folder.folder(self.step), self.step)
            values = None if found is None else values | found
            worth = None if values is None else self.judge.score(values)
        self.engine.wait_for_main(self.step)
        self.folder.score(self.step, math.nan if worth is None else worth)
        if values is None:
            self.owes = True
            return
        if self.engine.main:
            if self.log is not None:
                self.log.append_evaluation(values)
            for watcher in self.watchers:
                watcher.evaluated(values)
        yield values


class _Clock:
    """Seconds since the last row: of all, and of waiting for data; what is no training does not count."""

    def __init__(self) -> None:
        self._since, self._waited, self.samples = time.perf_counter(), 0.0, 0

    def restart(self) -> tuple[float, float, int]:
        """(seconds, of which waiting, samples) since the last time."""
        now = time.perf_counter()
        found = max(1e-9, now - self._since), self._waited, self.samples
        self._since, self._waited, self.samples = now, 0.0, 0
        return found

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that waits for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """A block that is no training."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started
