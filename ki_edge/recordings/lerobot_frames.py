"""The numbers of all frames of a LeRobotDataset at once, file by file: what a training draws its samples from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import DatasetError
from ki_edge.files.reading import parse_json, read_file

from .episode_file import MAX_BYTES, MAX_PROMPT
from .lerobot import vectors
from .lerobot_index import MOST_BYTES, Index, Located, regular
from .lerobot_layout import TASKS
from .parquet import read_portions

OLDER_TASKS = "meta/tasks.jsonl"
MOST_FRAMES = 1_000_000_000
MOST_TASKS = 1_000_000
LATE = 0.25  # of a period: how far a timestamp may be from its frame's number
Float32 = npt.NDArray[np.float32]
NUMBERS = ("episode_index", "frame_index", "timestamp")


@dataclass(frozen=True, eq=False)
class Numbers:
    """Columns of all frames F in the order of episodes and steps.

    starts     i64 [E+1], the first frame of each episode
    columns    {feature: f32 [F,n]}
    timestamp  f32 [F], seconds from the episode's start
    task       i32 [F], into `tasks`; -1 where the dataset says none
    """

    starts: npt.NDArray[np.int64]
    columns: Mapping[str, Float32]
    timestamp: Float32
    task: npt.NDArray[np.int32]
    tasks: tuple[str, ...]


def read_numbers(index: Index, features: Sequence[str]) -> Numbers:
    """These features of all frames. DatasetError names the file and row, or the episode and frame, of what is unfit:
    a damaged file, lists of other lengths, NaN, frames that are missing or twice, timestamps that are not the frames'.
    """
    lengths = np.array([episode.length for episode in index.episodes], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    if starts[-1] > MOST_FRAMES:
        raise DatasetError(f"{index.folder}: {starts[-1]} frames, at most {MOST_FRAMES} are read")
    reader = _Reader(index, features, starts)
    by_file: dict[Path, list[Located]] = {}
    for episode in index.episodes:
        by_file.setdefault(episode.data, []).append(episode)
    for path, episodes in by_file.items():
        reader.read(path, episodes)
    reader.check()
    tasks, task = _tasks(index, reader.arrays["task_index"][:, 0].astype(np.int64), lengths)
    columns = {name: reader.arrays[name] for name in features}
    return Numbers(starts, columns, reader.arrays["timestamp"][:, 0], task, tasks)


class _Reader:
    """Puts the rows of files where they belong."""

    def __init__(self, index: Index, features: Sequence[str], starts: npt.NDArray[np.int64]) -> None:
        self.index, self.features, self.starts = index, tuple(features), starts
        self.numbers = np.array([episode.index for episode in index.episodes], np.int64)
        self.seen = np.zeros(starts[-1], np.bool_)
        self.arrays: dict[str, npt.NDArray[Any]] = {}

    def read(self, path: Path, episodes: Iterable[Located]) -> None:
        import pyarrow as pa

        own = np.array([episode.index for episode in episodes], np.int64)
        row = 0
        try:
            for batch in read_portions(regular(path), [*NUMBERS, "task_index", *self.features], MAX_BYTES):
                self._place(path, row, batch, own)
                row += batch.num_rows
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(
                f"{path} cannot be read from row {row} on: {' '.join(str(error).split())[:300]}"
            ) from None

    def _place(self, path: Path, row: int, batch: Any, own: npt.NDArray[np.int64]) -> None:
        names = batch.schema.names
        where = f"{path}, rows {row} to {row + batch.num_rows - 1}"
        if missing := [name for name in (*NUMBERS, *self.features) if name not in names]:
            raise DatasetError(f"{path}: no column {', '.join(missing)}; it has {', '.join(names)[:300]}")
        episode, step = (_integers(where, name, batch.column(names.index(name))) for name in NUMBERS[:2])
        kept = np.isin(episode, own)  # a file may hold episodes that the metadata does not know
        at = np.searchsorted(self.numbers, episode[kept])
        step = step[kept]
        wrong = np.flatnonzero((step < 0) | (step >= self.starts[at + 1] - self.starts[at]))
        if wrong.size:
            first = np.flatnonzero(kept)[wrong[0]]
            raise DatasetError(
                f"{path}, row {row + first}: frame {step[wrong[0]]} of episode {episode[first]}, which has "
                f"{self.starts[at[wrong[0]] + 1] - self.starts[at[wrong[0]]]} frames"
            )
        place = self.starts[at] + step
        if self.seen[place].any() or len(np.unique(place)) < len(place):
            raise DatasetError(f"{where}: a frame of episode {episode[kept][0]} is there twice")
        self.seen[place] = True
        for name in ("timestamp", "task_index", *self.features):
            values = vectors(where, name, batch.column(names.index(name))) if name in names else _none(batch)
            values = values[kept]
            if name not in self.arrays:
                self.arrays[name] = np.zeros((self.starts[-1], values.shape[1]), np.float32)
            if values.shape[1] != self.arrays[name].shape[1]:
                raise DatasetError(
                    f"{where}: {values.shape[1]} numbers in {name}, elsewhere {self.arrays[name].shape[1]}"
                )
            self._check_finite(name, values, place)
            self.arrays[name][place] = values

    def _check_finite(self, name: str, values: Float32, place: npt.NDArray[np.int64]) -> None:
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            value = values[tuple(bad[0])]
            raise DatasetError(
                f"{self.where(int(place[bad[0][0]]))}: {name}[{bad[0][1]}] is {value}: expected a finite number; "
                "remove or mend that episode"
            )

    def where(self, frame: int) -> str:
        """A frame's folder, episode and number."""
        at = int(np.searchsorted(self.starts, frame, "right")) - 1
        return f"{self.index.folder}: episode {self.numbers[at]}, frame {frame - self.starts[at]}"

    def check(self) -> None:
        """DatasetError if a frame is missing, or its timestamp is another's."""
        missing = np.flatnonzero(~self.seen)
        if missing.size:
            at = int(np.searchsorted(self.starts, missing[0], "right")) - 1
            raise DatasetError(f"{self.where(int(missing[0]))} is missing in {self.index.episodes[at].data}")
        times, period = self.arrays["timestamp"][:, 0].astype(np.float64), 1 / self.index.fps
        step = np.arange(len(times)) - np.repeat(self.starts[:-1], np.diff(self.starts))
        late = np.flatnonzero(np.abs(times - step * period) > LATE * period)
        if late.size:
            first = int(late[0])
            raise DatasetError(
                f"{self.where(first)}: timestamp {times[first]:.6g} s, at {self.index.fps:g} frames a second it is "
                f"{step[first] * period:.6g} s: the timestamps do not match the fps of meta/info.json"
            )


def _integers(where: str, name: str, column: Any) -> npt.NDArray[np.int64]:
    import pyarrow as pa

    if not pa.types.is_integer(column.type) or column.null_count:
        raise DatasetError(f"{where}: {name} is a column of {column.type}, expected whole numbers")
    return np.asarray(column.to_numpy(zero_copy_only=False), np.int64)


def _none(batch: Any) -> Float32:
    """What stands where there is no column task_index."""
    return np.full((batch.num_rows, 1), -1, np.float32)


def _tasks(
    index: Index, given: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> tuple[tuple[str, ...], npt.NDArray[np.int32]]:
    """The texts, and each frame's: by its task_index, or where there is no table of tasks by its episode."""
    table = _task_table(index.folder)
    if table is None:
        texts = [episode.task or "" for episode in index.episodes]
        known = tuple(dict.fromkeys(text for text in texts if text))
        each = np.array([known.index(text) if text else -1 for text in texts], np.int32)
        return known, np.repeat(each, lengths)
    names = tuple(dict.fromkeys(table.values()))
    number = {text: at for at, text in enumerate(names)}
    used, inverse = np.unique(given, return_inverse=True)
    if unknown := [int(one) for one in used if one >= 0 and int(one) not in table]:
        raise DatasetError(f"{index.folder}: frames of task {unknown[0]}, which the table of tasks does not have")
    lookup = np.array([number[table[int(one)]] if one >= 0 else -1 for one in used], np.int32)
    return names, lookup[inverse].astype(np.int32)


def _task_table(folder: Path) -> dict[int, str] | None:
    """The text of each task_index; None without a table."""
    found: dict[int, str] = {}
    if (folder / TASKS).is_file():
        rows = _rows_of_parquet(folder / TASKS)
    elif (folder / OLDER_TASKS).is_file():
        path = folder / OLDER_TASKS
        lines = read_file(path, MOST_BYTES, DatasetError).splitlines()
        rows = [parse_json(line, f"a line of {path}", DatasetError) for line in lines if line.strip()]
    else:
        return None
    for row in rows:
        index = row.get("task_index") if isinstance(row, dict) else None
        text = (row.get("task", row.get("__index_level_0__"))) if isinstance(row, dict) else None
        if type(index) is not int or not isinstance(text, str) or len(text) > MAX_PROMPT:
            raise DatasetError(f"{folder}: the table of tasks has {json.dumps(row, default=str)[:100]}")
        found[index] = text
        if len(found) > MOST_TASKS:
            raise DatasetError(f"{folder}: more than {MOST_TASKS} tasks")
    return found


def _rows_of_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(regular(path)).names
        text = next((name for name in ("task", "__index_level_0__") if name in names), "task")
        return [row for batch in read_portions(path, ["task_index", text], MOST_BYTES) for row in batch.to_pylist()]
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path} does not name tasks: {' '.join(str(error).split())[:200]}") from None
