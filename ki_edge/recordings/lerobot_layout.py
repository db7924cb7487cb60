"""Where a LeRobotDataset v3.0 keeps what, and how its columns are called: for who writes and who reads one."""

from __future__ import annotations

from pathlib import PurePosixPath

from ki_edge.errors import KiEdgeError

VERSION = "v3.0"
INFO, STATS, TASKS = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
FILES = 1000  # of one folder
STATE, ACTION, TASK, CAMERAS = "observation.state", "action", "task", "observation.images."
CURE = "pip install 'ki-edge[record]'"
TABLES, FILMS = "pyarrow", "av"  # the packages that read and write them


def place(number: int) -> dict[str, int]:
    """Folder and file of the `number`-th file of a kind."""
    chunk, file = divmod(number, FILES)
    return {"chunk_index": chunk, "file_index": file}


def inside(name: str, what: str, error: type[KiEdgeError]) -> str:
    """A path that a file names, if it stays within the file's folder; else `error`, which calls it `what`."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or not pure.parts:
        raise error(f"{what} is {name!r:.100}, which is no path within the dataset")
    return name
