"""Where the episodes of a LeRobotDataset are: its metadata, of v3.0 (files of many episodes) and of v2.1 (one each)."""

from __future__ import annotations

import json
import stat
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ki_edge.errors import DatasetError
from ki_edge.files.reading import parse_json, read_file, read_object

from .lerobot_layout import CURE, FILMS, INFO, TABLES, VERSION, inside
from .parquet import read_portions

OLDER = "v2.1"
MOST_EPISODES = 1_000_000
MOST_BYTES = 256_000_000  # of a metadata file
LARGEST = 16_384  # pixels along a side of a picture
FIELDS = {"chunk_index", "file_index", "episode_chunk", "episode_index", "video_key"}


@dataclass(frozen=True)
class Located:
    """One episode: its frames are those of its number in `data`, its pictures in `videos` {feature: (file, start)}."""

    index: int
    length: int
    task: str | None
    data: Path
    videos: Mapping[str, tuple[Path, float]]


@dataclass(frozen=True)
class Index:
    """The features {name: {"dtype", "shape", ...}}, the rate and the episodes of a dataset."""

    folder: Path
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    episodes: tuple[Located, ...]

    @property
    def cameras(self) -> dict[str, tuple[int, int]]:
        """Features that hold colour pictures -> (height, width)."""
        found = {}
        for name, feature in self.features.items():
            info = feature.get("info")
            depth = isinstance(info, dict) and (info.get("is_depth_map") or info.get("video.is_depth_map"))
            if feature["dtype"] in ("video", "image") and not depth:
                height, width = _size(self.folder, name, feature)
                found[name] = (height, width)
        return found


def is_dataset(path: Path) -> bool:
    """Whether a folder says that it is a LeRobotDataset."""
    return (path / INFO).is_file()


def read_index(folder: Path) -> Index:
    """The index of a dataset. DatasetError if it is damaged, of another version, or what reads it is not installed."""
    info = read_object(folder / INFO, DatasetError)
    version, fps, features = info.get("codebase_version"), info.get("fps"), info.get("features")
    if version is None:
        raise DatasetError(f"{folder / INFO} has no codebase_version: it describes no LeRobotDataset")
    if version not in (VERSION, OLDER):
        raise DatasetError(f"{folder}: a LeRobotDataset of version {version!r:.40}; {VERSION} and {OLDER} are read")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= 10_000:
        raise DatasetError(f"{folder / INFO}: fps {fps!r:.40}: expected frames a second")
    if not isinstance(features, dict) or not all(isinstance(f, dict) and "dtype" in f for f in features.values()):
        raise DatasetError(f"{folder / INFO}: features: expected an object of objects with a dtype")
    videos = [name for name, feature in features.items() if feature["dtype"] == "video"]
    if missing := [name for name in (TABLES, *([FILMS] if videos else [])) if find_spec(name) is None]:
        raise DatasetError(f"{folder} is a LeRobotDataset; reading it needs {' and '.join(missing)}: {CURE}")
    episodes = (_episodes if version == VERSION else _older_episodes)(folder, info, videos)
    found = tuple(sorted(episodes, key=lambda episode: episode.index))
    if not found:
        raise DatasetError(f"{folder}: a LeRobotDataset without an episode")
    return Index(folder, float(fps), features, found)


def regular(path: Path) -> Path:
    """A path, if a regular file is there; DatasetError otherwise."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from None
    raise DatasetError(f"{path} is not a regular file")


def _episodes(folder: Path, info: Mapping[str, Any], videos: list[str]) -> Iterator[Located]:
    """v3.0: every row of meta/episodes/; what info.json counts is not trusted."""
    import pyarrow as pa

    wanted = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
    for key in videos:
        wanted += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    count = 0
    for path in sorted((folder / "meta" / "episodes").glob("*/*.parquet")):
        try:
            for batch in read_portions(regular(path), wanted, MOST_BYTES):
                count += batch.num_rows
                if count > MOST_EPISODES:
                    raise DatasetError(f"{folder}: more than {MOST_EPISODES} episodes")
                for row in batch.to_pylist():
                    yield _located(folder, info, row, {key: _numbers(row, f"videos/{key}/") for key in videos})
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{path} does not describe episodes: {' '.join(str(error).split())[:200]}") from None


def _older_episodes(folder: Path, info: Mapping[str, Any], videos: list[str]) -> Iterator[Located]:
    """v2.1: a line of meta/episodes.jsonl each."""
    path = folder / "meta" / "episodes.jsonl"
    size = info.get("chunks_size", 1000)
    for line in read_file(path, MOST_BYTES, DatasetError).splitlines():
        if not line.strip():
            continue
        row = parse_json(line, f"a line of {path}", DatasetError)
        try:
            index = int(row["episode_index"])
            place = {"episode_index": index, "episode_chunk": index // int(size)}
            start = {"from_timestamp": 0.0, **place}
            yield _located(folder, info, {**row, **place}, dict.fromkeys(videos, start))
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{path} does not describe episodes: {json.dumps(row)[:100]}") from None


def _located(
    folder: Path, info: Mapping[str, Any], row: Mapping[str, Any], videos: Mapping[str, Mapping[str, Any]]
) -> Located:
    index, length, tasks = row["episode_index"], row["length"], row.get("tasks") or [None]
    if type(index) is not int or type(length) is not int or index < 0 or length < 1:
        raise DatasetError(f"{folder}: an episode number {index!r:.40} of {length!r:.40} frames")
    task = tasks[0]
    if task is not None and not isinstance(task, str):
        raise DatasetError(f"{folder}: episode {index}: the task is {task!r:.40}, expected text")
    data = _path(folder, info, "data_path", {**_numbers(row, "data/"), **_numbers(row, "")})
    films = {
        key: (_path(folder, info, "video_path", {**place, "video_key": key}), float(place["from_timestamp"]))
        for key, place in videos.items()
    }
    return Located(index, length, task, data, films)


def _numbers(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    names = ("chunk_index", "file_index", "from_timestamp", "episode_chunk", "episode_index")
    return {name: row[prefix + name] for name in names if prefix + name in row}


def _path(folder: Path, info: Mapping[str, Any], name: str, values: Mapping[str, Any]) -> Path:
    """A path of info.json with its numbers put in; nothing else can be put in, and it stays in the folder."""
    template = info.get(name)
    if not isinstance(template, str) or len(template) > 300:
        raise DatasetError(f"{folder / INFO}: {name} {template!r:.60}: expected the pattern of a path")
    parts = []
    try:
        for text, field, spec, conversion in string.Formatter().parse(template):
            parts.append(text)
            if field is None:
                continue
            value = values[field]
            if field not in FIELDS or conversion or (spec and not (spec[:-1].isdigit() and spec[-1] == "d")):
                raise ValueError(field)
            parts.append(value if isinstance(value, str) else format(int(value), (spec or "d")[:4]))
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DatasetError(f"{folder / INFO}: {name} {template!r:.80} cannot be filled in: {error}") from None
    return folder / inside("".join(parts), f"{folder / INFO}: {name}", DatasetError)


def _size(folder: Path, name: str, feature: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of a feature's pictures, whose axes may be named in either order."""
    shape, names = feature.get("shape"), feature.get("names")
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and 1 <= n <= LARGEST for n in shape):
        raise DatasetError(f"{folder / INFO}: {name}: shape {shape!r:.60}, expected [height, width, 3]")
    first = isinstance(names, list) and names[:1] in (["channels"], ["channel"], ["c"])
    height, width, channels = (*shape[1:], shape[0]) if first or shape[2] != 3 else shape
    if channels != 3:
        raise DatasetError(f"{folder / INFO}: {name}: {channels} channels, expected 3")
    return height, width
