"""One dataset: what features it has, the numbers of all its frames, and how to get at their pictures.

A LeRobotDataset (v3.0, v2.1), an .npz episode or a folder of these, as `ki_edge.recordings` reads them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ki_edge.errors import DatasetError
from ki_edge.files.reading import read_file
from ki_edge.recordings.collection import EpisodeFiles, open_recordings
from ki_edge.recordings.episode_file import RecordedEpisode
from ki_edge.recordings.lerobot import names_of
from ki_edge.recordings.lerobot_frames import Numbers, read_numbers
from ki_edge.recordings.lerobot_index import MOST_BYTES, is_dataset, read_index, regular
from ki_edge.recordings.lerobot_layout import ACTION, CAMERAS, STATE

from .pictures import LeRobotPictures, NpzPictures, Pictures

OWN = ("episode_index", "frame_index", "timestamp", "index", "task_index")  # columns that are no features
EDGE = 1 << 16  # bytes of a file's beginning and of its end that go into a digest
MOST_EDGES = 20_000  # files; of more only the sizes count


@dataclass(frozen=True)
class Vector:
    """A feature of numbers: how many, and what they are called where the dataset says so."""

    size: int
    names: tuple[str, ...] | None = None


class Frames(Protocol):
    """A dataset that was opened; none of its frames has been read yet."""

    @property
    def path(self) -> Path: ...

    @property
    def fps(self) -> float | None: ...

    @property
    def vectors(self) -> Mapping[str, Vector]:
        """Features of numbers."""

    @property
    def cameras(self) -> Mapping[str, tuple[int, int]]:
        """Features that hold pictures -> their height and width."""

    @property
    def episodes(self) -> Sequence[int]:
        """Their numbers in the dataset."""

    def read(self, features: Sequence[str]) -> Numbers:
        """These features of all frames. DatasetError if they are unfit."""

    def pictures(self, cameras: Sequence[str], numbers: Numbers) -> Pictures:
        """What finds the pictures of these cameras; it can be given to another process."""

    def digest(self) -> str:
        """Another one for other metadata, files of another size, or another beginning or end."""


def open_frames(path: Path) -> Frames:
    """The dataset at a path. DatasetError names what is there instead, or what is wrong with it."""
    if is_dataset(path):
        return LeRobotFrames(path)
    recordings = open_recordings(path)
    assert isinstance(recordings, EpisodeFiles)
    return NpzFrames(path, recordings)


def short(feature: str) -> str:
    """A feature's name without what all of its kind begin with."""
    return feature.removeprefix(CAMERAS).removeprefix("observation.")


class LeRobotFrames:
    """Of a LeRobotDataset. DatasetError as of `read_index`, and if no feature holds pictures."""

    def __init__(self, path: Path) -> None:
        self.path, self.index = path, read_index(path)
        self.fps: float | None = self.index.fps
        self.episodes = [episode.index for episode in self.index.episodes]
        self.cameras = self.index.cameras
        self.vectors: dict[str, Vector] = {}
        for name, feature in self.index.features.items():
            shape = feature.get("shape")
            if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or shape[0] < 1:
                continue
            if str(feature["dtype"]).startswith(("float", "int", "uint")) and name not in OWN:
                names = names_of(feature.get("names")) or ()
                self.vectors[name] = Vector(shape[0], tuple(names) if len(names) == shape[0] else None)
        if not self.cameras:
            found = ", ".join(sorted(self.index.features))[:500]
            raise DatasetError(f"{path}: no feature holds pictures, it has {found}")

    def read(self, features: Sequence[str]) -> Numbers:
        return read_numbers(self.index, features)

    def pictures(self, cameras: Sequence[str], numbers: Numbers) -> Pictures:
        return LeRobotPictures(self.index, cameras)

    def digest(self) -> str:
        """Of all of meta/ but for the statistics, which are not read, and of the files that hold frames."""
        found = hashlib.sha256()
        for path in sorted((self.path / "meta").rglob("*")):
            if path.is_file() and path.suffix in (".json", ".jsonl", ".parquet") and "stats" not in path.name:
                found.update(path.relative_to(self.path).as_posix().encode())
                found.update(hashlib.sha256(read_file(path, MOST_BYTES, DatasetError)).digest())
        files = {episode.data for episode in self.index.episodes}
        files |= {film for episode in self.index.episodes for film, _ in episode.videos.values()}
        _add_files(found, self.path, files)
        return found.hexdigest()


class NpzFrames:
    """Of episodes in .npz files: all with the same cameras and sizes."""

    def __init__(self, path: Path, files: EpisodeFiles) -> None:
        self.path, self.fps = path, None
        self._files = [Path(file) for file in files.paths]
        self.episodes = list(range(len(files)))
        self._states, self._actions, self._lengths, self._prompts = [], [], [], []
        first: RecordedEpisode | None = None
        for number in self.episodes:
            episode = files.episode(number)
            first = first or episode
            _check_like(episode, first)
            self._states.append(episode.state)
            self._actions.append(episode.actions)
            self._lengths.append(len(episode))
            self._prompts.append(episode.prompt or "")
            if number == 0:
                self.cameras = {name: _size(pictures.shape) for name, pictures in sorted(episode.cameras.items())}
        self.vectors = {STATE: Vector(self._states[0].shape[1]), ACTION: Vector(self._actions[0].shape[1])}

    def read(self, features: Sequence[str]) -> Numbers:
        tasks = tuple(dict.fromkeys(prompt for prompt in self._prompts if prompt))
        each = [tasks.index(prompt) if prompt else -1 for prompt in self._prompts]
        columns = {STATE: np.concatenate(self._states), ACTION: np.concatenate(self._actions)}
        starts = np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64)
        task = np.repeat(np.array(each, np.int32), self._lengths)
        return Numbers(starts, {name: columns[name] for name in features}, np.zeros(len(task), np.float32), task, tasks)

    def pictures(self, cameras: Sequence[str], numbers: Numbers) -> Pictures:
        return NpzPictures(self._files, cameras)

    def digest(self) -> str:
        found = hashlib.sha256()
        _add_files(found, self.path if self.path.is_dir() else self.path.parent, set(self._files))
        return found.hexdigest()


def _check_like(episode: RecordedEpisode, first: RecordedEpisode) -> None:
    for what, own, other in (
        ("cameras", sorted(episode.cameras), sorted(first.cameras)),
        ("numbers in a state", episode.state.shape[1], first.state.shape[1]),
        ("numbers in an action", episode.actions.shape[1], first.actions.shape[1]),
    ):
        if own != other:
            raise DatasetError(f"{episode.where}: {what}: {own}, and {first.where} has {other}")


def _size(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[1], shape[2]) if shape[3] == 3 else (shape[2], shape[3])


def _add_files(found: hashlib._Hash, folder: Path, files: Iterable[Path]) -> None:
    ordered = sorted(files)
    for path in ordered:
        size = regular(path).stat().st_size
        found.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        if len(ordered) > MOST_EDGES:
            continue
        try:
            with path.open("rb") as file:
                found.update(file.read(EDGE))
                file.seek(max(0, size - EDGE))
                found.update(file.read(EDGE))
        except OSError as error:
            raise DatasetError(f"{path} cannot be read: {error.strerror}") from None
