"""Episodes of a LeRobotDataset v3.0 or v2.1, as our own `ki-run --record` or LeRobot writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import DatasetError

from .episode_file import MAX_BYTES, MAX_PROMPT, Pictures, RecordedEpisode, value_fault
from .lerobot_index import Index, Located, read_index, regular
from .lerobot_layout import ACTION, CAMERAS, STATE
from .lerobot_video import StoredPictures, VideoPictures
from .parquet import read_portions

MOST_STEPS = 10_000_000


class LeRobotRecordings:
    """The episodes of a dataset, in order. DatasetError as of `read_index`, and without state, actions or pictures."""

    def __init__(self, folder: Path) -> None:
        self._index: Index = read_index(folder)
        features = self._index.features
        if missing := [name for name in (STATE, ACTION) if name not in features]:
            raise DatasetError(f"{folder}: {', '.join(missing)} is missing, it has {', '.join(sorted(features))[:500]}")
        self._cameras = self._index.cameras
        if not self._cameras:
            raise DatasetError(f"{folder}: no feature holds pictures, it has {', '.join(sorted(features))[:500]}")

    def __len__(self) -> int:
        return len(self._index.episodes)

    @property
    def fps(self) -> float:
        """Frames a second."""
        return self._index.fps

    @property
    def state_names(self) -> list[str] | None:
        """What the numbers of a state are, where the dataset says it."""
        return names_of(self._index.features[STATE].get("names"))

    @property
    def action_names(self) -> list[str] | None:
        """What the numbers of an action are, where the dataset says it."""
        return names_of(self._index.features[ACTION].get("names"))

    def episode(self, number: int) -> RecordedEpisode:
        """The `number`-th episode, from 0. DatasetError if its files are missing, damaged or too large."""
        index, located = self._index, self._index.episodes[number]
        where = f"{index.folder}, episode {located.index}"
        stored = [name for name in self._cameras if index.features[name]["dtype"] == "image"]
        columns = _columns(where, located, [STATE, ACTION, "timestamp", "frame_index", *stored])
        numbers = {name: vectors(where, name, columns[name]) for name in (STATE, ACTION)}
        if fault := value_fault(numbers):
            raise DatasetError(f"{where}: {fault}")
        if located.task is not None and len(located.task) > MAX_PROMPT:
            raise DatasetError(f"{where}: the task has {len(located.task)} characters, at most {MAX_PROMPT}")
        times = np.asarray(columns["timestamp"], np.float64)
        cameras: dict[str, Pictures] = {}
        for name, size in self._cameras.items():
            short = name.removeprefix(CAMERAS).removeprefix("observation.")
            if name in stored:
                cameras[short] = _stored(f"{where}, {name}", columns[name], size)
            else:
                path, start = located.videos[name]
                cameras[short] = VideoPictures(regular(path), start + times, size, index.fps)
        sizes = [f"{name} {list(pictures.shape)}" for name, pictures in cameras.items()]
        contents = ", ".join([*sizes, *(f"{name} float32{list(array.shape)}" for name, array in numbers.items())])
        return RecordedEpisode(where, cameras, numbers[STATE], numbers[ACTION], located.task, contents)


def stored_pictures(folder: Path, located: Located, name: str, size: tuple[int, int]) -> StoredPictures:
    """An episode's pictures in the column `name`. DatasetError if its file is missing or damaged."""
    where = f"{folder}, episode {located.index}"
    return _stored(f"{where}, {name}", _columns(where, located, [name, "frame_index"])[name], size)


def _stored(where: str, column: Any, size: tuple[int, int]) -> StoredPictures:
    files = [row.get("bytes") if isinstance(row, dict) else None for row in column.to_pylist()]
    return StoredPictures(where, files, size)


def names_of(given: Any) -> list[str] | None:
    """A list of texts, which LeRobot's older writers put into an object with one entry."""
    if isinstance(given, dict) and len(given) == 1:
        given = next(iter(given.values()))
    if not isinstance(given, list) or not given or not all(isinstance(name, str) and name for name in given):
        return None
    return given if len(set(given)) == len(given) else None


def _columns(where: str, located: Located, wanted: list[str]) -> dict[str, Any]:
    """Columns of an episode, frame_index among them, as arrow arrays, in the order of its frames."""
    import pyarrow as pa

    path = regular(located.data)
    if located.length > MOST_STEPS:
        raise DatasetError(f"{where}: {located.length} frames, at most {MOST_STEPS} are read")
    try:
        portions = read_portions(path, ["episode_index", *wanted], MAX_BYTES, only=located.index)
        own = [pa.Table.from_batches([batch]).filter(_of(located.index)) for batch in portions]
        if not own:
            raise DatasetError(f"{path}: no frame of episode {located.index}")
        table = pa.concat_tables(own)
        if table.num_rows != located.length:
            raise DatasetError(f"{path}: {table.num_rows} frames of episode {located.index}, expected {located.length}")
        table = table.sort_by("frame_index").combine_chunks()
        return {name: table[name].combine_chunks() for name in wanted}
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from None


def _of(episode: int) -> Any:
    import pyarrow.compute as pc

    return pc.field("episode_index") == episode


def vectors(where: str, name: str, column: Any) -> npt.NDArray[np.float32]:
    """A column of numbers or of lists of equally many, f32 [T, n]."""
    import pyarrow as pa

    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    flat = column.flatten() if lists else column
    if not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)) or column.null_count or flat.null_count:
        raise DatasetError(f"{where}: {name} is a column of {kind}, expected lists of numbers")
    if len(flat) % len(column):
        raise DatasetError(f"{where}: {name} has lists of different lengths")
    with np.errstate(over="ignore"):
        return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(len(column), -1).astype(np.float32)
