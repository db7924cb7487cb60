"""What the training loop takes: steps of batches from any step on, samples that are held out, names for all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError
from ki_edge.train.step.batch import Batch
from ki_edge.train.step.training_data import Share

from .assembly import Assembler
from .loading import Pace, StepItems, load
from .recipe import Recipe
from .source import evaluated
from .token_report import TokenReport

KEPT_HELD = 512_000_000  # bytes of evaluated batches that stay in memory


class MixedData:
    """A `TrainingData` of datasets and text sets, made by `open_data`. `report`: how well its tokens fit."""

    def __init__(
        self, assembler: Assembler, tasks: Sequence[str], facts: Mapping[str, Any], workers: int, report: TokenReport
    ) -> None:
        self._assembler, self._facts, self.workers, self.report = assembler, facts, workers, report
        self.recipe: Recipe = assembler.recipe
        self.config: Pi05Config = assembler.recipe.config
        self.names: Sequence[str] = [*(one.name for one in assembler.actions), *(one.name for one in assembler.texts)]
        self.tasks: Sequence[str] = list(tasks)
        self._pace = Pace(workers)
        self._running: list[Iterator[Batch]] = []
        self._held: dict[Share, list[Batch]] = {}

    def steps(self, first: int, share: Share) -> Iterator[list[Batch]]:
        """The batches of this process for step `first` and those after, to the last one, each as `accumulate` batches.

        ArgumentError if a step's batch cannot be shared out evenly. Ending the iterator ends its workers.
        """
        settings = self._assembler.settings
        parts = share.world * share.accumulate
        size, left = divmod(settings.batch, parts)
        if left or not size:
            raise ArgumentError(
                f"batch {settings.batch} cannot be shared by {share.world} processes in {share.accumulate} parts each: "
                f"choose a multiple of {parts}"
            )
        offset = share.rank * share.accumulate * size
        items = StepItems(first, settings.steps, offset, size, share.accumulate)
        batches = load(self._assembler, items, self.workers, self._pace)
        self._running.append(batches)
        try:
            while len(step := list(islice(batches, share.accumulate))) == share.accumulate:
                yield step
        finally:
            self._stop(batches)

    def held_out(self, share: Share) -> Iterator[Batch]:
        """Samples of the episodes and texts that were held out, the same ones with the same draws each time.

        Of each dataset at most `source.MOST_HELD`, evenly over them. Each is in one process's share; where they cannot
        be shared out evenly the first processes have one more.
        """
        if share in self._held:
            yield from self._held[share]
            return
        settings, kept = self._assembler.settings, list[Batch]()
        size = max(1, settings.batch // (share.world * share.accumulate))
        own = self._held_samples()[share.rank :: share.world]
        items = [("held", tuple(own[at : at + size])) for at in range(0, len(own), size)]
        batches = load(self._assembler, items, min(self.workers, len(items)), Pace(1))
        self._running.append(batches)
        taken = 0
        try:
            for batch in batches:
                images = batch.observation.images
                taken += images.numel() * images.element_size() + batch.noise.numel() * 4
                kept.append(batch)
                yield batch
        finally:
            self._stop(batches)
        if taken <= KEPT_HELD:
            self._held[share] = kept

    def sizes(self) -> list[tuple[str, int, float]]:
        """Of each dataset: its name, samples that are trained on, and its share of every batch."""
        mixture = self._assembler.mixture
        return [
            (n, int(size), float(share))
            for n, size, share in zip(self.names, mixture.sizes, mixture.shares, strict=True)
        ]

    @property
    def loader_samples_per_s(self) -> float | None:
        """Samples that the workers make in a second when they do not wait; None before the first batch."""
        return self._pace.samples_per_s

    def action_names(self, source: int) -> Sequence[str]:
        """What the numbers of a dataset's actions are called."""
        return self._assembler.actions[source].action_names

    def decode_actions(self, source: int, ids: npt.ArrayLike) -> npt.NDArray[np.float64] | None:
        """Normalised actions f64 [H,a] of a FAST postfix, with or without "Action: "; None if its ids spell none."""
        dims = self._assembler.actions[source].action_dim
        return self.recipe.encoder.decode_actions(ids, self.config.action_horizon, dims)

    def unnormalize_actions(self, source: int, actions: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """f64 [..., a] in robot units; those that are relative to the state stay so."""
        return self.recipe.unnormalize_actions(source, actions)

    def where(self, source: int, row: int) -> str:
        """A sample's dataset, episode and frame, or its text set and line, for messages."""
        if source < len(self._assembler.actions):
            return self._assembler.actions[source].told(row)
        return self._assembler.texts[source - len(self._assembler.actions)].texts.where(row)

    def label(self, source: int, row: int) -> str:
        """The same with the dataset's name instead of its path, for pages."""
        if source < len(self._assembler.actions):
            return f"{self.names[source]}, {self._assembler.actions[source].place(row)}"
        return f"{self.names[source]}, {self._assembler.texts[source - len(self._assembler.actions)].texts.place(row)}"

    def save_assets(self, folder: Path) -> None:
        """Write contract.json and assets/ into a checkpoint folder that is being made."""
        self.recipe.save_assets(folder)

    def facts(self) -> Mapping[str, Any]:
        """What it is made of, as flat JSON values: a resumed run must be made of the same."""
        return dict(self._facts)

    def close(self) -> None:
        """End its workers."""
        for batches in list(self._running):
            self._stop(batches)
        for cache in self._assembler.caches:
            if cache is not None:
                cache.close()

    def _held_samples(self) -> list[tuple[int, int]]:
        """(source, number among its held out samples), dataset by dataset."""
        counts = [source.held_samples for source in self._assembler.actions]
        counts += [len(source.held) for source in self._assembler.texts]
        return [(number, one) for number, count in enumerate(counts) for one in evaluated(count)]

    def _stop(self, batches: Iterator[Batch]) -> None:
        if batches in self._running:
            self._running.remove(batches)
        close: Any = getattr(batches, "close", None)
        if close is not None:
            close()
