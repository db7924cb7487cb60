"""Pictures of any frame in any order: a worker keeps the files that it opened last open, and no more.

What is handed to a worker are paths and times; files are opened there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ki_edge.recordings.episode_file import RecordedEpisode
from ki_edge.recordings.lerobot import stored_pictures
from ki_edge.recordings.lerobot_index import Index
from ki_edge.recordings.lerobot_video import StoredPictures, VideoFile, check_whole

UInt8 = npt.NDArray[np.uint8]
OPEN_FILMS = 24  # decoders of a worker; one of 480 x 640 takes some 10 MB
KEPT_EPISODES = 2  # whose compressed pictures a worker has in memory, where they are not in films
Item = TypeVar("Item")


class Kept(Generic[Item]):
    """The items that were used last, at most so many; another process gets it empty."""

    def __init__(self, most: int) -> None:
        self._most, self._items = most, OrderedDict[Hashable, Item]()

    def get(self, key: Hashable, make: Callable[[], Item]) -> Item:
        """The item of a key, made if it is not kept; the one that was not used for longest makes room."""
        if key not in self._items:
            self._items[key] = make()
            while len(self._items) > self._most:
                _, old = self._items.popitem(last=False)
                if (close := getattr(old, "close", None)) is not None:
                    close()
        self._items.move_to_end(key)
        return self._items[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, (self._most,)


class Pictures(Protocol):
    """A dataset's pictures in one process."""

    def at(self, episode: int, step: int, time: float, camera: int) -> UInt8:
        """u8 [h,w,3] of the `episode`-th episode; `time` is the step's timestamp. DatasetError if there is none."""


class LeRobotPictures:
    """Of films that may hold several episodes, or of columns that hold a file for each picture.

    DatasetError for a film that is missing or cut off.
    """

    def __init__(self, index: Index, cameras: Sequence[str]) -> None:
        self._fps, self._folder = index.fps, index.folder
        self._names = list(cameras)
        self._sizes = [index.cameras[name] for name in cameras]
        self._stored = [index.features[name]["dtype"] == "image" for name in cameras]
        self._located = list(index.episodes) if any(self._stored) else []
        films: dict[Path, int] = {}
        shape = (len(index.episodes), len(self._names))
        self._film, self._start = np.zeros(shape, np.int32), np.zeros(shape)
        for row, episode in enumerate(index.episodes):
            for at, name in enumerate(self._names):
                if not self._stored[at]:
                    path, start = episode.videos[name]
                    self._film[row, at] = films.setdefault(path, len(films))
                    self._start[row, at] = start
        self._films = list(films)
        for film in self._films:
            check_whole(film)
        self._open: Kept[VideoFile] = Kept(OPEN_FILMS)
        self._read: Kept[StoredPictures] = Kept(KEPT_EPISODES * max(1, sum(self._stored)))

    def at(self, episode: int, step: int, time: float, camera: int) -> UInt8:
        if self._stored[camera]:
            return self._read.get((episode, camera), lambda: self._column(episode, camera))[step]
        film = int(self._film[episode, camera])
        file = self._open.get((film, camera), lambda: VideoFile(self._films[film], self._sizes[camera], self._fps, 1))
        return file.at(float(self._start[episode, camera]) + time)

    def _column(self, episode: int, camera: int) -> StoredPictures:
        return stored_pictures(self._folder, self._located[episode], self._names[camera], self._sizes[camera])


class NpzPictures:
    """Of .npz episodes, each of which is read whole."""

    def __init__(self, files: Sequence[Path], cameras: Sequence[str]) -> None:
        self._files, self._cameras = list(files), list(cameras)
        self._read: Kept[RecordedEpisode] = Kept(KEPT_EPISODES)

    def at(self, episode: int, step: int, time: float, camera: int) -> UInt8:
        read = self._read.get(episode, lambda: RecordedEpisode.open(self._files[episode]))
        picture = read.cameras[self._cameras[camera]][step]
        return picture if picture.shape[2] == 3 else picture.transpose(1, 2, 0)
