"""Writes a LeRobotDataset v3.0, an episode at a time, so that it can be read whatever ends the program.

Each episode has files of its own: one of numbers, one of each camera, one of metadata. They are written under hidden
names and renamed when they are complete, meta/info.json last: until then a reader sees the episodes before. What a
killed process leaves of an unfinished one is never read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ki_edge.errors import RobotError
from ki_edge.files.writing import write_file, writing
from ki_edge.recordings import lerobot_layout as layout

from .episode import Episode
from .features import Features, Frame
from .statistics import Stats, together
from .tables import episode_table, task_table, write_table


def check_packages(stored: str = "video") -> None:
    """RobotError unless the packages that write a dataset are installed, whose pictures are `stored` so."""
    packages = (layout.TABLES, *([layout.FILMS] if stored == "video" else []))
    if missing := [name for name in packages if find_spec(name) is None]:
        raise RobotError(f"recording a dataset needs {' and '.join(missing)}: {layout.CURE}")


class DatasetWriter:
    """A dataset in `folder`, which has none yet. RobotError names the file that cannot be written.

    After `begin` come frames, then `finish` or `discard`. An episode without frames leaves nothing. Where several
    episodes are written at the same time each is `open`ed, told its frames by `append`, and `commit`ted.
    """

    def __init__(self, folder: Path, features: Features) -> None:
        check_packages(features.stored)
        self.folder, self.features = folder, features
        self.episodes = self.frames = 0
        self._tasks: dict[str, int] = {}
        self._stats: dict[str, Stats] | None = None  # of all episodes so far
        self._episode: Episode | None = None
        self._opened = 0

    def begin(self) -> None:
        """Start an episode; one that was not finished is discarded."""
        self.discard()
        self._episode = self.open()

    def add(self, frame: Frame) -> None:
        """Append a frame to the present episode."""
        assert self._episode is not None
        self.append(self._episode, frame)

    def finish(self, outcome: Mapping[str, Any]) -> None:
        """Commit the present episode. `outcome`: the values of `tables.OUTCOME`, None where one is not known."""
        episode, self._episode = self._episode, None
        if episode is not None:
            self.commit(episode, outcome)

    def discard(self) -> None:
        """Remove what there is of an unfinished episode."""
        episode, self._episode = self._episode, None
        if episode is not None:
            episode.discard()

    def open(self) -> Episode:
        """An episode beside others: its place in the dataset is that in the order of `commit`."""
        self._opened += 1
        return Episode(self.folder, self.features, self.episodes, self.frames, self._opened - 1)

    def append(self, episode: Episode, frame: Frame) -> None:
        """Append a frame to an episode that is open."""
        episode.add(frame, self._tasks.setdefault(frame.task, len(self._tasks)))

    def commit(self, episode: Episode, outcome: Mapping[str, Any]) -> None:
        """As `finish`. If it fails, nothing is left of the episode."""
        if not episode.count:
            episode.discard()
            return
        try:
            stats = episode.finish()
            episode.move(self.episodes, self.frames)
            self._publish(episode, stats, outcome)
        except BaseException:
            episode.discard()
            raise

    def _publish(self, episode: Episode, stats: dict[str, Stats], outcome: Mapping[str, Any]) -> None:
        tasks = [task for task, at in self._tasks.items() if at in episode.tasks]
        frames = (episode.first, episode.first + episode.count)
        table = episode_table(self.features, episode.index, frames, stats, outcome, tasks)
        known = stats if self._stats is None else together([self._stats, stats])
        with writing(self.folder, RobotError):
            episode.publish()
            write_table(self.folder / layout.TASKS, task_table(self._tasks))
            described = self.folder / layout.EPISODES.format(**layout.place(episode.index))
            write_table(described, table)
            episode.published += described.stat().st_size
        write_file(self.folder / layout.STATS, json.dumps(_plain(known), indent=1), RobotError)
        total = (self.episodes + 1, self.frames + episode.count, len(self._tasks))
        write_file(self.folder / layout.INFO, json.dumps(self.features.info(*total), indent=4), RobotError)
        self._stats, self.episodes, self.frames = known, total[0], total[1]


def _plain(stats: Mapping[str, Stats]) -> dict[str, Any]:
    return {feature: {name: value.tolist() for name, value in values.items()} for feature, values in stats.items()}
