"""The pictures of one camera of a LeRobotDataset: from an mp4 file that may hold several episodes, or from a column.

A picture is decoded when it is asked for; one after the other costs a decoded frame each.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import DatasetError

from .lerobot_index import regular

UInt8 = npt.NDArray[np.uint8]
FIRST = (b"ftyp", b"styp", b"moov", b"mdat", b"free", b"skip", b"wide")  # parts that a film can begin with
BACK = (
    -0.25,
    0.5,
    60.0,
)  # periods before a time at which its frame is sought; at first just behind, for the frame itself
AHEAD = 0.25  # seconds: what lies further ahead is sought, what is nearer is decoded up to


def check_whole(path: Path) -> None:
    """DatasetError for a film that is missing, or of which the end is: by what its boxes say of their sizes."""
    try:
        with regular(path).open("rb") as file:
            size, at = path.stat().st_size, 0
            while at < size:
                file.seek(at)
                head = file.read(16)
                length, kind = int.from_bytes(head[:4], "big"), head[4:8]
                if length == 1:  # it stands behind
                    length = int.from_bytes(head[8:16], "big")
                elif length == 0:  # to the end
                    return
                if length < 8 or len(head) < 8 or (at == 0 and kind not in FIRST):
                    raise DatasetError(f"{path} is no mp4 video: at byte {at} it has {bytes(head[:8])!r}")
                if at + length > size:
                    name = kind.decode("latin-1").strip()
                    raise DatasetError(
                        f"{path} is cut off: its part {name!r} ends at byte {at + length}, the file at {size}: "
                        "fetch or copy it again"
                    )
                at += length
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from None


class VideoFile:
    """The frames u8 [h, w, 3] of an mp4 file by their time in it, in any order. `size`: (h, w); `threads`: a decoder's,
    0 for as many as it likes.

    DatasetError where the file is no mp4 video of that size, or has no frame within half a period of a time.
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: float, threads: int = 0) -> None:
        self._path, self._size, self._fps, self._threads = path, size, fps, threads
        self._file: IO[bytes] | None = None
        self._container: Any = None
        self._frames: Any = None
        self._frame: Any = None  # the one that was decoded last

    def at(self, time: float) -> UInt8:
        """The frame of a time in seconds."""
        import av

        try:
            self._open()
            frame = self._find(time)
        except (av.FFmpegError, OSError, ValueError, StopIteration) as error:
            self.close()
            what = "it has no frame there" if isinstance(error, StopIteration) else " ".join(str(error).split())
            raise DatasetError(f"{self._path} cannot be read at {time:.3f} s: {what}") from None
        if (frame.height, frame.width) != self._size:
            raise DatasetError(
                f"{self._path}: pictures of {frame.height} x {frame.width}, meta/info.json says "
                f"{self._size[0]} x {self._size[1]}"
            )
        picture: UInt8 = frame.to_ndarray(format="rgb24")
        return picture

    def close(self) -> None:
        """Close the file; the next picture opens it again."""
        container, file = self._container, self._file
        self._container = self._frames = self._frame = self._file = None
        if container is not None:
            container.close()
        if file is not None:
            file.close()

    def __del__(self) -> None:
        self.close()

    def _open(self) -> None:
        import av

        if self._container is None:
            # from a file that is open, as mp4: nothing in it can make the library open another file or a network
            self._file = regular(self._path).open("rb")
            self._container = av.open(self._file, format="mp4")
            if not self._container.streams.video:
                raise ValueError("it holds no video")
            self._container.streams.video[0].codec_context.thread_count = self._threads

    def _find(self, time: float) -> Any:
        """The frame within half a period of a time. StopIteration if there is none."""
        half = 0.5 / self._fps
        now = None if self._frame is None else self._frame.time
        if now is not None and now - half <= time <= now + AHEAD and (frame := self._forward(time)).time <= time + half:
            return frame
        for back in BACK:  # a film whose order of decoding is not that of showing may begin behind what is sought
            stream = self._container.streams.video[0]
            self._container.seek(max(0, int((time - back / self._fps) / stream.time_base)), stream=stream)
            self._frames, self._frame = self._container.decode(stream), None
            if (frame := self._forward(time)).time <= time + half:
                return frame
        raise StopIteration

    def _forward(self, time: float) -> Any:
        """The first frame from the present one on that is not before a time, to half a period."""
        while self._frame is None or self._frame.time < time - 0.5 / self._fps:
            self._frame = next(self._frames)
        return self._frame


class VideoPictures:
    """Pictures u8 [h, w, 3] by step. `times`: where each step's is in the file, seconds; `shape` [T, h, w, 3].

    DatasetError as of VideoFile.
    """

    def __init__(self, path: Path, times: npt.NDArray[np.float64], size: tuple[int, int], fps: float) -> None:
        self.shape = (len(times), *size, 3)
        self._times, self._film = times, VideoFile(path, size, fps)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, step: int) -> UInt8:
        return self._film.at(float(self._times[step]))

    def close(self) -> None:
        """Close the file; the next picture opens it again."""
        self._film.close()


class StoredPictures:
    """Pictures that stand in a column as PNG or JPEG files; `stored` are their bytes, decoded when asked for."""

    def __init__(self, where: str, stored: Sequence[Any], size: tuple[int, int]) -> None:
        self.shape = (len(stored), *size, 3)
        self._where, self._stored = where, stored

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, step: int) -> UInt8:
        from PIL import Image

        content = self._stored[step]
        if not isinstance(content, bytes):  # a path instead, which is never followed
            raise DatasetError(f"{self._where}: step {step} has no picture in the file")
        try:
            with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
                if (image.height, image.width) != self.shape[1:3]:  # before it is decoded
                    raise ValueError(f"{image.height} x {image.width}, expected {self.shape[1]} x {self.shape[2]}")
                return np.asarray(image.convert("RGB"))
        except Exception as error:  # each decoder fails in its own way
            reason = " ".join(str(error).split())
            raise DatasetError(f"{self._where}: the picture of step {step} cannot be read: {reason}") from None
