"""Recorded episodes by the path that a user gives: an .npz file, a folder of them, or a LeRobotDataset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from ki_edge.errors import DatasetError

from .episode_file import RecordedEpisode
from .lerobot import LeRobotRecordings
from .lerobot_index import is_dataset

EXPECTED = "expected an episode (.npz), a folder of them, or a LeRobotDataset (a folder with meta/info.json)"


class Recordings(Protocol):
    """Episodes, read when they are asked for."""

    def __len__(self) -> int:
        """How many there are, at least one."""

    def episode(self, number: int) -> RecordedEpisode:
        """One of them, from 0. DatasetError if it is unfit."""


class EpisodeFiles:
    """Episodes in .npz files."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def episode(self, number: int) -> RecordedEpisode:
        return RecordedEpisode.open(self.paths[number])


def open_recordings(path: str | os.PathLike[str]) -> Recordings:
    """The episodes at a path. DatasetError names what is there instead; an .npz file is read when it is asked for."""
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise DatasetError(f"{path}: no such file or folder; {EXPECTED}")
        return EpisodeFiles([path])
    if is_dataset(path):
        return LeRobotRecordings(path)
    if not (files := episode_files(path)):
        raise DatasetError(f"{path}: neither meta/info.json nor an .npz file in this folder; {EXPECTED}")
    return EpisodeFiles(files)


def episode_files(folder: Path) -> list[Path]:
    """The .npz files of a folder, by name."""
    return sorted(folder.glob("*.npz"))
