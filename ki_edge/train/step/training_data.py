"""What a run needs of its data, whatever it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ki_edge.config import Pi05Config

from .batch import Batch


@dataclass(frozen=True)
class Share:
    """Which rows of each step's batch a process computes: `rank` of `world`, in `accumulate` parts."""

    rank: int = 0
    world: int = 1
    accumulate: int = 1


class TrainingData(Protocol):
    """A mixture of datasets, encoded for one model."""

    config: Pi05Config  # the model's geometry, with this data's vocabulary and horizon
    names: Sequence[str]  # of the datasets, by Batch.source
    tasks: Sequence[str]  # by Batch.task

    def steps(self, first: int, share: Share) -> Iterator[list[Batch]]:
        """This process's batches for step `first` and those after, to the last one, each as `accumulate` batches."""

    def held_out(self, share: Share) -> Iterator[Batch]:
        """A process's share of the samples that were held out, always the same draws, in batches; empty if none were.

        Every sample is in exactly one share, so shares may differ by one.
        """

    def where(self, source: int, row: int) -> str:
        """A sample's dataset, episode and frame, for messages."""

    def label(self, source: int, row: int) -> str:
        """The same with the dataset's name instead of its path, for pages."""

    def decode_actions(self, source: int, ids: npt.ArrayLike) -> npt.NDArray[np.float64] | None:
        """Normalised actions f64 [H,a] that a postfix's ids spell, with "Action: " or without; None: none."""

    def unnormalize_actions(self, source: int, actions: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Actions [...,a] of a dataset's robot in its own units, f64 [...,a]; relative ones stay relative."""

    def action_names(self, source: int) -> Sequence[str]:
        """What the numbers of an action of a dataset command, a of them."""

    def save_assets(self, folder: Path) -> None:
        """Write contract.json and assets/ into a checkpoint folder that is being made."""

    def facts(self) -> Mapping[str, Any]:
        """What it is made of, as flat JSON values: a resumed run must be made of the same."""

    def close(self) -> None:
        """End its workers."""
