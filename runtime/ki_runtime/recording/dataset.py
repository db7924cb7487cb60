"""Writes a LeRobotDataset v3.0, an episode at a time, so that it can be read whatever ends the program.

Each episode has files of its own: one of numbers, one of each camera, one of metadata. They are written under hidden
names and renamed when they are complete, meta/info.json last: until then a reader sees the episodes before. What a
killed process leaves of an unfinished one is never read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ki_edge.errors import RobotError
from ki_edge.files.writing import write_file, writing
from ki_edge.recordings import lerobot_layout as layout

from .features import Features, Frame
from .statistics import PictureStats, Stats, column_stats, together
from .video import Video

ROWS = 1000  # that are kept in memory
OUTCOME = {
    "ki.seed": "int64", "ki.success": "bool", "ki.success_any": "bool", "ki.reached": "int64", "ki.inferences": "int64",
    "ki.seconds": "float64", "ki.stopped": "bool", "ki.dropped": "int64",
}  # fmt: skip


def check_packages() -> None:
    """RobotError unless the packages that write a dataset are installed."""
    if missing := [name for name in layout.PACKAGES if find_spec(name) is None]:
        raise RobotError(f"recording a dataset needs {' and '.join(missing)}: {layout.CURE}")


class DatasetWriter:
    """A dataset in `folder`, which has none yet. RobotError names the file that cannot be written.

    After `begin` come frames, then `finish` or `discard`. An episode without frames leaves nothing.
    """

    def __init__(self, folder: Path, features: Features) -> None:
        check_packages()
        self.folder, self.features = folder, features
        self.episodes = self.frames = 0
        self._tasks: dict[str, int] = {}
        self._stats: dict[str, Stats] | None = None  # of all episodes so far
        self._episode: _Episode | None = None

    def begin(self) -> None:
        """Start an episode; one that was not finished is discarded."""
        self.discard()
        self._episode = _Episode(self.folder, self.features, self.episodes, self.frames)

    def add(self, frame: Frame) -> None:
        """Append a frame to the present episode."""
        assert self._episode is not None
        task = self._tasks.setdefault(frame.task, len(self._tasks))
        self._episode.add(frame, task)

    def finish(self, outcome: Mapping[str, Any]) -> None:
        """Commit the present episode. `outcome`: the values of OUTCOME, None where one is not known."""
        episode, self._episode = self._episode, None
        if episode is None or not episode.count:
            if episode is not None:
                episode.discard()
            return
        try:
            stats = episode.finish()
            self._publish(episode, stats, outcome)
        except BaseException:
            episode.discard()
            raise

    def discard(self) -> None:
        """Remove what there is of an unfinished episode."""
        episode, self._episode = self._episode, None
        if episode is not None:
            episode.discard()

    def _publish(self, episode: _Episode, stats: dict[str, Stats], outcome: Mapping[str, Any]) -> None:
        import pyarrow as pa

        count = episode.count
        row = _episode_row(
            self.features, episode, stats, outcome, [t for t, at in self._tasks.items() if at in episode.tasks]
        )
        known = stats if self._stats is None else together([self._stats, stats])
        with writing(self.folder / layout.TASKS, RobotError):
            episode.publish()
            _write_table(self.folder / layout.TASKS, _task_table(self._tasks))
            _write_table(self.folder / layout.EPISODES.format(**layout.place(episode.index)), pa.table(row))
        write_file(self.folder / layout.STATS, json.dumps(_plain(known), indent=1), RobotError)
        total = (self.episodes + 1, self.frames + count, len(self._tasks))
        write_file(self.folder / layout.INFO, json.dumps(self.features.info(*total), indent=4), RobotError)
        self._stats, self.episodes, self.frames = known, total[0], total[1]


class _Episode:
    """The files of one episode while it runs."""

    def __init__(self, folder: Path, features: Features, index: int, first: int) -> None:
        self.index, self.first, self.count = index, first, 0
        self.tasks: set[int] = set()
        self._features = features
        place = layout.place(index)
        self._data = folder / layout.DATA.format(**place)
        self._films = {
            name: folder / layout.VIDEO.format(video_key=key, **place)
            for name, key in zip(features.cameras, features.video_keys, strict=True)
        }
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
                self._pictures[name].add(frame.pictures[name])
            self._rows.append(self._features.values(frame) | counted)
            self.count += 1
            if len(self._rows) >= ROWS:
                self._flush()

    def finish(self) -> dict[str, Stats]:
        """Complete the files under their hidden names; the statistics of all columns and cameras."""
        import pyarrow.parquet as pq

        with writing(self._data, RobotError):
            self._flush()
            self._close()
            stats = {}
            for name, (_, shape, _) in self._features.columns().items():  # a column at a time: hours have many rows
                column = pq.read_table(_hidden(self._data), columns=[name])[name].combine_chunks()
                flat = column.flatten() if shape != (1,) else column
                stats[name] = column_stats(flat.to_numpy(zero_copy_only=False).reshape(self.count, -1))
        keys = zip(self._pictures.values(), self._features.video_keys, strict=True)
        return stats | {key: pictures.stats() for pictures, key in keys}

    def publish(self) -> None:
        """Give the files their names, that of the numbers last."""
        for path in (*self._films.values(), self._data):
            _sync(_hidden(path))
            _hidden(path).replace(path)

    def discard(self) -> None:
        with suppress(OSError, ValueError):
            self._close()
        for path in (*self._films.values(), self._data):
            with suppress(OSError):
                _hidden(path).unlink(missing_ok=True)

    def _open(self) -> None:
        import pyarrow.parquet as pq

        for path in (self._data, *self._films.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(_hidden(self._data), _schema(self._features))
        for name, path in self._films.items():
            self._videos[name] = Video(_hidden(path), self._features.fps, *self._features.cameras[name])

    def _flush(self) -> None:
        import pyarrow as pa

        rows, self._rows = self._rows, []
        if rows:
            columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
            for name, (_, shape, _) in self._features.columns().items():
                if shape == (1,):  # a number, also where it is that of a vector
                    columns[name] = np.asarray(columns[name]).reshape(-1)
            self._writer.write_table(pa.table(columns, schema=_schema(self._features)))

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        videos, self._videos = self._videos, {}
        try:
            for video in videos.values():
                video.close()
        finally:
            if writer is not None:
                writer.close()


def _schema(features: Features) -> Any:
    import pyarrow as pa

    types = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_()}
    return pa.schema([
        (name, types[dtype] if shape == (1,) else pa.list_(types[dtype], shape[0]))
        for name, (dtype, shape, _) in features.columns().items()
    ])  # fmt: skip


def _task_table(tasks: Mapping[str, int]) -> Any:
    """The instructions, as pandas writes a frame whose index they are: that is how LeRobot reads them."""
    import pyarrow as pa

    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
            for name, (kind, numpy) in kinds.items()
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    table = pa.table({"task_index": pa.array(list(tasks.values()), pa.int64()), "task": pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _episode_row(
    features: Features, episode: _Episode, stats: Mapping[str, Stats], outcome: Mapping[str, Any], tasks: list[str]
) -> dict[str, Any]:
    """A table of one row: where the episode's frames are, how it went, its statistics."""
    import pyarrow as pa

    place, count = layout.place(episode.index), episode.count
    numbers: dict[str, Any] = {"episode_index": episode.index, "length": count}
    numbers |= {f"data/{name}": value for name, value in place.items()}
    numbers |= {"dataset_from_index": episode.first, "dataset_to_index": episode.first + count}
    for key in features.video_keys:
        numbers |= {f"videos/{key}/{name}": value for name, value in place.items()}
        numbers |= {f"videos/{key}/from_timestamp": 0.0, f"videos/{key}/to_timestamp": count / features.fps}
    numbers |= {f"meta/episodes/{name}": value for name, value in place.items()}
    row = {
        name: pa.array([value], pa.float64() if isinstance(value, float) else pa.int64())
        for name, value in numbers.items()
    }
    kinds = {"int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}
    row |= {name: pa.array([outcome.get(name)], kinds[kind]) for name, kind in OUTCOME.items()}
    row["tasks"] = pa.array([tasks], pa.list_(pa.string()))
    for feature, values in stats.items():
        for name, value in values.items():
            row[f"stats/{feature}/{name}"] = pa.array([value.tolist()])
    return row


def _plain(stats: Mapping[str, Stats]) -> dict[str, Any]:
    return {feature: {name: value.tolist() for name, value in values.items()} for feature, values in stats.items()}


def _write_table(path: Path, table: Any) -> None:
    """A parquet file, whole or not at all."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _hidden(path)
    try:
        pq.write_table(table, partial)
        _sync(partial)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _hidden(path: Path) -> Path:
    """The name of a file that is not complete; no reader looks for such names."""
    return path.with_name(f".{path.name}.partial")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
