"""Which action of which chunk is due: chunks are handed over at the right index.

The schedule counts steps, which are planned actions that were taken, not ticks: while a robot holds still no time of a
chunk passes. Row i of a chunk belongs to step `first + i`, where `first` is the step before which its observation was
made. So a chunk that arrives d steps later starts at row d: its first d rows have passed and are dropped, none is
skipped and none comes twice (arXiv 2506.07339, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Way = Literal["plain", "guided", "trained"]  # how a chunk was joined to the one before it


@dataclass(frozen=True, eq=False)
class Chunk:
    """Actions f32 [H, a], robot units. `number` counts the chunks of an episode; `observed`: when, loop's clock."""

    number: int
    actions: F32
    first: int
    observed: float
    way: Way = "plain"


@dataclass(frozen=True, eq=False)
class Planned:
    """An action f32 [a] that is due, and where it comes from: row `index` of chunk `chunk`, observed at `observed`."""

    action: F32
    chunk: int
    index: int
    observed: float


class Schedule:
    """The chunk that is played, and the one before while they are blended.

    `limit`: rows of a chunk that are played at most; `crossfade`: actions over which a new chunk is blended in.
    """

    def __init__(self, limit: int, crossfade: int = 0) -> None:
        self._limit, self._crossfade = limit, crossfade
        self.reset()

    def reset(self) -> None:
        """A new episode: nothing is planned."""
        self.step = 0  # the next one
        self.drop()
        self._since = 0  # steps of the present chunk that were taken

    def drop(self) -> None:
        """Nothing of the present chunk is played any more."""
        self._chunk: Chunk | None = None
        self._before: Chunk | None = None

    @property
    def observed(self) -> float | None:
        """When the observation of the present chunk was made."""
        return None if self._chunk is None else self._chunk.observed

    @property
    def index(self) -> int:
        """The row of the present chunk that is due next."""
        return 0 if self._chunk is None else self.step - self._chunk.first

    @property
    def left(self) -> int:
        """Actions that can still be taken."""
        return 0 if self._chunk is None else max(0, min(self._limit, len(self._chunk.actions)) - self.index)

    def rest(self) -> F32:
        """The actions to come f32 [n, a] of the whole present chunk, n may be 0."""
        return np.zeros((0, 0), np.float32) if self._chunk is None else self._chunk.actions[self.index :]

    def hand_over(self, chunk: Chunk) -> bool:
        """Play `chunk` from the row that is due. False if all its rows have passed: then nothing changes."""
        if self.step - chunk.first >= len(chunk.actions):
            return False
        self._before = self._chunk if self._crossfade else None
        self._chunk, self._since = chunk, 0
        return True

    def take(self) -> Planned | None:
        """The action of this step; None where there is none, and then no step passes."""
        chunk = self._chunk
        if chunk is None or not self.left:
            return None
        planned = Planned(self._blended(chunk), chunk.number, self.index, chunk.observed)
        self.step += 1
        self._since += 1
        return planned

    def _blended(self, chunk: Chunk) -> F32:
        action: F32 = chunk.actions[self.index]
        old = None if self._before is None else self._before.actions[self.step - self._before.first :]
        if old is None or self._since >= self._crossfade or not len(old):
            self._before = None
            return action
        share = np.float32((self._since + 1) / (self._crossfade + 1))
        return np.asarray(old[0] + share * (action - old[0]), np.float32)
