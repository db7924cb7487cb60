"""A camera's pictures to an mp4 file in this process, through PyAV, or each to a PNG: the pictures of datasets."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# A frame is found by decoding from the last key frame: ten at most. No frame waits for a later one.
OPTIONS = {"crf": "20", "preset": "superfast", "g": "10", "bf": "0"}


class Video:
    """H.264 at a fixed rate; frame i is shown at i / fps. Sizes are even: see `even`. OSError where it cannot write."""

    def __init__(self, path: Path, fps: float, height: int, width: int) -> None:
        import av

        self._frame = av.VideoFrame.from_ndarray
        self._container: Any = av.open(str(path), "w", format="mp4")
        self._stream = self._container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1000), options=OPTIONS
        )
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        self._stream.thread_count = 1  # the other cores are the policy's

    def add(self, picture: npt.NDArray[np.uint8]) -> None:
        """Append an RGB picture u8 [h, w, 3]."""
        frame = self._frame(np.ascontiguousarray(picture), format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the file."""
        try:
            self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()


def png(picture: npt.NDArray[np.uint8]) -> bytes:
    """A picture u8 [h, w, 3] as a PNG file, quickly rather than small."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG", compress_level=1)
    return out.getvalue()


def even(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A picture without the last row or column of an odd size, which yuv420p cannot have; at least 2 x 2 pixels."""
    height, width = picture.shape[:2]
    if min(height, width) < 2:
        picture = picture.repeat(2 if height < 2 else 1, axis=0).repeat(2 if width < 2 else 1, axis=1)
        height, width = picture.shape[:2]
    return picture[: height // 2 * 2, : width // 2 * 2]
