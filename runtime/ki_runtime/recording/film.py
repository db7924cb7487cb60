"""Frames to a film: mp4 where imageio-ffmpeg is installed, else an animated GIF.

A film is written by a thread of its own: Python handles signals in the main thread, so none can cut a frame in two or
keep a film from being finished. ffmpeg gets a session of its own, so Ctrl-C in the terminal does not reach it either.
"""

from __future__ import annotations

import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from ki_edge.errors import ArgumentError, RobotError

UInt8 = npt.NDArray[np.uint8]
GIF_MAX_FPS = 50  # viewers slow down anything faster


class Film(Protocol):
    """A film being written. `path` is where it will be."""

    path: Path

    def add(self, frame: UInt8) -> None:
        """Append an RGB frame u8 [h, w, 3], of the same size as the first."""

    def close(self) -> None:
        """Finish the file; without frames there is none. RobotError if it could not be written."""


def open_film(stem: Path, fps: float) -> Film:
    """A film at `stem` with the suffix of what can be written here."""
    if find_spec("imageio_ffmpeg") is not None:
        return FilmThread(Mp4Film(stem.with_suffix(".mp4"), fps))
    return FilmThread(GifFilm(stem.with_suffix(".gif"), fps))


class FilmThread:
    """A film whose calls run in a thread; each waits for it, and what was begun is done even if the wait is cut off."""

    def __init__(self, film: Film) -> None:
        self.path = film.path
        self._film = film
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="film")

    def add(self, frame: UInt8) -> None:
        self._thread.submit(self._film.add, frame).result()

    def close(self) -> None:
        closed = self._thread.submit(self._film.close)
        self._thread.shutdown(wait=False)  # its thread is joined when the program ends
        closed.result()


class Mp4Film:
    """H.264 through ffmpeg, frame by frame. Odd sizes lose their last row or column (yuv420p needs even ones)."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path = path
        self._fps = Fraction(fps).limit_denominator(1000)
        self._ffmpeg: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._size = (0, 0)

    def add(self, frame: UInt8) -> None:
        frame = frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]
        if self._ffmpeg is None:
            self._size = (frame.shape[1], frame.shape[0])
            self._start()
        _check_size(frame, self._size)
        assert self._ffmpeg is not None and self._ffmpeg.stdin is not None
        try:
            self._ffmpeg.stdin.write(np.ascontiguousarray(frame, np.uint8).data)
        except OSError:  # it ended before its film did
            raise self._failure() from None

    def close(self) -> None:
        if self._ffmpeg is None:
            return
        ffmpeg, errors = self._ffmpeg, self._errors
        assert ffmpeg.stdin is not None and errors is not None
        with suppress(OSError):  # its status tells
            ffmpeg.stdin.close()
        status = ffmpeg.wait()
        self._ffmpeg = None
        with errors:
            if status != 0:
                raise self._failure()

    def _start(self) -> None:
        width, height = self._size
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the film
        given = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(self._fps), "-i", "-")
        made = ("-an", "-pix_fmt", "yuv420p", "-f", "mp4", f"file:{self.path}")
        program: Any = import_module("imageio_ffmpeg").get_ffmpeg_exe()
        self._ffmpeg = subprocess.Popen(
            [program, "-y", "-v", "error", *given, *made],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
        )

    def _failure(self) -> RobotError:
        assert self._errors is not None
        self._errors.seek(0)
        lines = self._errors.read(10_000).decode("utf-8", "replace").strip().splitlines()
        return RobotError(f"the film {self.path} could not be finished: ffmpeg: {lines[-1] if lines else 'it ended'}")


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
