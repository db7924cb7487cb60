"""Frames to a film: mp4 where imageio-ffmpeg is installed, else an animated GIF."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ki_edge.errors import ArgumentError

UInt8 = npt.NDArray[np.uint8]
GIF_MAX_FPS = 50  # viewers slow down anything faster


class Film(Protocol):
    """A film being written. `path` is where it will be."""

    path: Path

    def add(self, frame: UInt8) -> None:
        """Append an RGB frame u8 [h, w, 3], of the same size as the first."""

    def close(self) -> None:
        """Finish the file; without frames there is none."""


def open_film(stem: Path, fps: float) -> Film:
    """A film at `stem` with the suffix of what can be written here."""
    if find_spec("imageio_ffmpeg") is not None:
        return Mp4Film(stem.with_suffix(".mp4"), fps)
    return GifFilm(stem.with_suffix(".gif"), fps)


class Mp4Film:
    """H.264 through ffmpeg, frame by frame. Odd sizes lose their last row or column (yuv420p needs even ones)."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path = path
        self._fps = fps
        self._pipe: Any = None
        self._size = (0, 0)

    def add(self, frame: UInt8) -> None:
        frame = frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]
        height, width = frame.shape[:2]
        if self._pipe is None:
            writer = import_module("imageio_ffmpeg").write_frames
            self._size = (width, height)
            self._pipe = writer(str(self.path), self._size, fps=self._fps, macro_block_size=2)
            self._pipe.send(None)
        _check_size(frame, self._size)
        self._pipe.send(np.ascontiguousarray(frame))

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


class GifFilm:
    """An animated GIF through Pillow; frames are kept, reduced to 256 colours, until it is closed."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path = path
        self._milliseconds = round(1000 / min(fps, GIF_MAX_FPS))
        self._frames: list[Any] = []

    def add(self, frame: UInt8) -> None:
        from PIL import Image

        if self._frames:
            _check_size(frame, self._frames[0].size)
        self._frames.append(Image.fromarray(np.ascontiguousarray(frame)).quantize(256))

    def close(self) -> None:
        if self._frames:
            first, *rest = self._frames
            first.save(self.path, save_all=True, append_images=rest, duration=self._milliseconds, loop=0)
            self._frames = []


def _check_size(frame: UInt8, size: tuple[int, int]) -> None:
    if (frame.shape[1], frame.shape[0]) != size:
        raise ArgumentError(f"a film frame of {frame.shape[1]}x{frame.shape[0]} in a film of {size[0]}x{size[1]}")
