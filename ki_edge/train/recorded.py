"""Recorded episodes as demonstrations: a LeRobotDataset (v3.0 or v2.1), an .npz episode, or a folder of them.

Every frame is an example: its pictures and state, and the chunk of the actions that came next. A chunk that reaches
past its episode's end goes on with the last action, as openpi's and LeRobot's do, and nothing is learnt from those.
Pictures are decoded once, to the model's size, into one array on disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import DatasetError
from ki_edge.files.writing import writing
from ki_edge.policy.images import Resize, fit_image
from ki_edge.recordings.collection import Recordings, open_recordings
from ki_edge.recordings.episode_file import Float32, RecordedEpisode

from .demonstrations import Demonstrations

MOST_BYTES = 64 << 30  # of decoded pictures
SPARE = 1 << 30  # bytes that stay free on the disk
Progress = Callable[[int, int], object]  # (frames that are decoded, of how many)


def decode_recordings(
    path: str | Path,
    pictures: Path,
    *,
    horizon: int,
    size: tuple[int, int],
    resize: Resize = "pil_pad",
    most_bytes: int = MOST_BYTES,
    progress: Progress = lambda done, of: None,
) -> Demonstrations:
    """The episodes at `path` with chunks of `horizon` actions; their pictures u8 go into the file `pictures` (.npy).

    DatasetError for episodes that are damaged, have other cameras, other numbers or no prompt, for more than
    `most_bytes` of pictures, and where the disk has no room for them.
    """
    recordings = open_recordings(path)
    episodes = [recordings.episode(number) for number in range(len(recordings))]
    first = episodes[0]
    for episode in episodes:
        _check_like(episode, first)
    names, prompts = sorted(first.cameras), list(dict.fromkeys(episode.prompt or "" for episode in episodes))
    lengths = [len(episode) for episode in episodes]
    chunks, real = zip(*(chunks_of(episode.actions, horizon) for episode in episodes), strict=True)
    shape = (sum(lengths), len(names), *size, 3)
    _check_room(pictures, int(np.prod(shape)), most_bytes)
    meta = {
        "cameras": names,
        "state_names": _names(recordings, "state_names", first.state.shape[1], "state"),
        "action_names": _names(recordings, "action_names", first.actions.shape[1], "action"),
        "horizon": horizon,
        "frames": shape[0],
        "episodes": len(episodes),
        "prompts": prompts,
        "control_hz": getattr(recordings, "fps", None),
    }
    _decode(episodes, names, pictures, shape, resize, progress)
    images: npt.NDArray[np.uint8] = np.load(pictures, mmap_mode="r")
    return Demonstrations(
        Path(path),
        meta,
        images,
        np.concatenate([episode.state for episode in episodes]),
        np.concatenate(chunks),
        np.repeat([prompts.index(episode.prompt or "") for episode in episodes], lengths).astype(np.int32),
        None,
        np.concatenate(real),
    )


def chunks_of(actions: Float32, horizon: int) -> tuple[Float32, npt.NDArray[np.bool_]]:
    """The chunk from each frame on, f32 [T,H,a], held at the episode's end; which of it was recorded, bool [T,H]."""
    at = np.arange(len(actions))[:, None] + np.arange(horizon)
    return actions[np.minimum(at, len(actions) - 1)], at < len(actions)


def _decode(
    episodes: Sequence[RecordedEpisode],
    names: Sequence[str],
    path: Path,
    shape: tuple[int, ...],
    resize: Resize,
    progress: Progress,
) -> None:
    """All pictures, in the order of frames; the file appears when it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path, DatasetError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            array: Any = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)  # type: ignore[no-untyped-call]
            for row, picture in enumerate(_fitted(episodes, names, shape[2:4], resize)):
                array[row] = picture
                progress(row + 1, shape[0])
            array.flush()
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _fitted(
    episodes: Sequence[RecordedEpisode], names: Sequence[str], size: tuple[int, ...], resize: Resize
) -> Iterator[npt.NDArray[np.uint8]]:
    """Each frame's pictures u8 [N,h,w,3]."""
    for episode in episodes:
        for step in range(len(episode)):
            given = {name: episode.cameras[name][step] for name in names}
            yield np.stack([fit_image(given[name], size[0], size[1], resize, name).astype(np.uint8) for name in names])
        for film in episode.cameras.values():
            if (close := getattr(film, "close", None)) is not None:
                close()


def _check_like(episode: RecordedEpisode, first: RecordedEpisode) -> None:
    if not episode.prompt:
        raise DatasetError(f"{episode.where}: no task (prompt) says what is done in it: a policy is told")
    for what, own, other in (
        ("cameras", sorted(episode.cameras), sorted(first.cameras)),
        ("numbers in a state", episode.state.shape[1], first.state.shape[1]),
        ("numbers in an action", episode.actions.shape[1], first.actions.shape[1]),
    ):
        if own != other:
            raise DatasetError(f"{episode.where}: {what}: {own}, and {first.where} has {other}")


def _check_room(pictures: Path, size: int, most_bytes: int) -> None:
    if size > most_bytes:
        raise DatasetError(
            f"the pictures take {size / 1e9:.1f} GB at the model's size, at most {most_bytes / 1e9:.1f} GB are "
            "decoded: train on fewer episodes"
        )
    parent = next(folder for folder in pictures.absolute().parents if folder.is_dir())
    if size + SPARE > (free := shutil.disk_usage(parent).free):
        raise DatasetError(
            f"{parent} has {free / 1e9:.1f} GB free; the pictures take {size / 1e9:.1f} GB at the model's size, and "
            f"{SPARE / 1e9:.0f} GB should stay free"
        )


def _names(recordings: Recordings, which: str, count: int, kind: str) -> list[str]:
    """Names of the numbers, where a recording has as many."""
    found = getattr(recordings, which, None)
    return list(found) if found is not None and len(found) == count else [f"{kind} {i}" for i in range(count)]
