"""The files of one episode of a dataset while it runs: a table of numbers and a video of each camera."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ki_edge.errors import RobotError
from ki_edge.files.writing import writing
from ki_edge.recordings import lerobot_layout as layout

from .features import Features, Frame
from .statistics import PictureStats, Stats, column_stats
from .tables import hidden, schema, sync
from .video import Video, png

ROWS, ROWS_BYTES = 1000, 1 << 20  # that are kept in memory, whichever is reached first


class Episode:
    """Written under hidden names until `publish`. RobotError names the file that cannot be written.

    `serial` tells the hidden files of episodes that are open at once apart. `index`, of the episode, and `first`, of
    its first frame in the dataset, are what they will be unless another one is finished before: see `move`.
    """

    def __init__(self, folder: Path, features: Features, index: int, first: int, serial: int) -> None:
        self.index, self.first, self.count = index, first, 0
        self.published = 0  # bytes of its files, once they have their names, and of its row in meta/episodes
        self.tasks: set[int] = set()
        self._folder, self._features = folder, features
        data, films = self._paths(serial)
        self._data, self._films = hidden(data), {name: hidden(path) for name, path in films.items()}
        self._row_bytes = 0
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None
        self._videos: dict[str, Video] = {}
        self._pictures = {name: PictureStats() for name in features.cameras}

    def add(self, frame: Frame, task: int) -> None:
        self.tasks.add(task)
        counted = {
            "timestamp": self.count / self._features.fps,
            "frame_index": self.count,
            "episode_index": self.index,
            "index": self.first + self.count,
            "task_index": task,
        }
        with writing(self._data, RobotError):
            if not self.count:
                self._open()
            for name, video in self._videos.items():
                video.add(frame.pictures[name])
            for name, pictures in self._pictures.items():
                pictures.add(frame.pictures[name])
            values = self._features.values(frame)
            images = {key: self._image(frame, key) for key in self._features.image_keys}
            self._rows.append(values | counted | images)
            self.count += 1
            self._row_bytes = sum(np.asarray(value).nbytes for value in values.values()) + 64  # 64: of those counted
            self._row_bytes += sum(len(image["bytes"]) for image in images.values())
            if len(self._rows) >= ROWS or len(self._rows) * self._row_bytes >= ROWS_BYTES:
                self._flush()

    def size(self) -> int:
        """Bytes on the disk, and of the rows that are still to be written."""
        size = len(self._rows) * self._row_bytes
        for path in (*self._films.values(), self._data):
            with suppress(OSError):
                size += path.stat().st_size
        return size

    def move(self, index: int, first: int) -> None:
        """Give a finished episode, not yet published, another place in the dataset."""
        if (index, first) == (self.index, self.first):
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        with writing(self._data, RobotError):
            table = pq.read_table(self._data)
            for name, values in (
                ("episode_index", np.full(self.count, index)),
                ("index", np.arange(first, first + self.count)),
            ):
                table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.int64()))
            pq.write_table(table, self._data)
        self.index, self.first = index, first

    def finish(self) -> dict[str, Stats]:
        """Complete the files under their hidden names; the statistics of all columns and cameras."""
        import pyarrow.parquet as pq

        with writing(self._data, RobotError):
            self._flush()
            self._close()
            stats = {}
            for name, (_, shape, _) in self._features.columns().items():  # a column at a time: hours have many rows
                column = pq.read_table(self._data, columns=[name])[name].combine_chunks()
                flat = column.flatten() if shape != (1,) else column
                stats[name] = column_stats(flat.to_numpy(zero_copy_only=False).reshape(self.count, -1))
        keys = zip(self._pictures.values(), self._features.camera_keys, strict=True)
        return stats | {key: pictures.stats() for pictures, key in keys}

    def publish(self) -> None:
        """Give the files their names, that of the numbers last."""
        data, films = self._paths(self.index)
        for written, path in (*((self._films[name], films[name]) for name in films), (self._data, data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            sync(written)
            written.replace(path)
            self.published += path.stat().st_size

    def discard(self) -> None:
        with suppress(OSError, ValueError):
            self._close()
        for path in (*self._films.values(), self._data):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _paths(self, number: int) -> tuple[Path, dict[str, Path]]:
        """Of the numbers, and of each camera's film, of the `number`-th episode."""
        place = layout.place(number)
        keys = dict(zip(self._features.cameras, self._features.video_keys, strict=False)).items()  # none of images
        films = {name: self._folder / layout.VIDEO.format(video_key=key, **place) for name, key in keys}
        return self._folder / layout.DATA.format(**place), films

    def _image(self, frame: Frame, key: str) -> dict[str, Any]:
        """A camera's picture as LeRobot keeps one in a table."""
        name = key.removeprefix(layout.CAMERAS)
        return {"bytes": png(frame.pictures[name]), "path": f"frame-{self.count:06d}.png"}

    def _open(self) -> None:
        import pyarrow.parquet as pq

        for path in (self._data, *self._films.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self._data, schema(self._features))
        for name, path in self._films.items():
            self._videos[name] = Video(path, self._features.fps, *self._features.cameras[name])

    def _flush(self) -> None:
        import pyarrow as pa

        rows, self._rows = self._rows, []
        if rows:
            columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
            for name, (_, shape, _) in self._features.columns().items():
                if shape == (1,):  # a number, also where it is that of a vector
                    columns[name] = np.asarray(columns[name]).reshape(-1)
            self._writer.write_table(pa.table(columns, schema=schema(self._features)))

    def _close(self) -> None:
        """All of them, also where one fails: a file that stays open keeps its room on a full disk."""
        writer, self._writer = self._writer, None
        videos, self._videos = self._videos, {}
        with ExitStack() as files:
            if writer is not None:
                files.callback(writer.close)
            for video in videos.values():
                files.callback(video.close)
