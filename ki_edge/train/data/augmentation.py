"""Pictures changed at random as openpi trains: crop and rotation where a camera stands still, colour everywhere.

    a standing camera   a window of 95 % of each side, its place uniform, scaled back to the picture's size;
                        then turned by -5 to 5 degrees about the middle, black where nothing is
    every camera        brightness times 0.7 to 1.3; contrast 0.6 to 1.4 about the picture's mean; saturation 0.5 to 1.5
                        about each pixel's mean; cut to 0..255 at the end

All uniform, drawn for each picture. A camera at a hand is not moved: it sees the gripper where it always is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ki_edge.errors import ArgumentError

UInt8 = npt.NDArray[np.uint8]
WINDOW = 0.95  # of each side
DEGREES = 5.0
BRIGHTNESS, CONTRAST, SATURATION = (0.7, 1.3), (0.6, 1.4), (0.5, 1.5)


@dataclass(frozen=True)
class Change:
    """What is done to one picture. `top`, `left`: of the window, shares of the room it has; `angle`: degrees."""

    top: float
    left: float
    angle: float
    brightness: float
    contrast: float
    saturation: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Change:
        """Always as many numbers, so that one camera's changes do not depend on another's kind."""
        top, left, angle = rng.random(), rng.random(), rng.uniform(-DEGREES, DEGREES)
        colour = [float(rng.uniform(*bounds)) for bounds in (BRIGHTNESS, CONTRAST, SATURATION)]
        return cls(top, left, float(angle), *colour)


def augment(images: UInt8, wrist: Sequence[bool], rng: np.random.Generator) -> UInt8:
    """Pictures u8 [N,h,w,3] changed, each in its own way; `wrist`: those of which only the colour is.

    The same generator's state gives the same bytes. ArgumentError for another type or shape.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != len(wrist):
        raise ArgumentError(
            f"augment: {images.dtype} {list(images.shape)} for {len(wrist)} cameras: expected uint8 [N,h,w,3] of as "
            "many"
        )
    changes = [Change.draw(rng) for _ in images]
    changed = [
        coloured(picture if fixed else moved(picture, change), change)
        for picture, fixed, change in zip(images, wrist, changes, strict=True)
    ]
    return np.stack(changed) if changed else images.copy()


def moved(picture: UInt8, change: Change) -> UInt8:
    """The window scaled to the whole picture and turned, in one bilinear interpolation; u8 [h,w,3]."""
    from PIL import Image

    height, width = picture.shape[:2]
    rows, columns = max(1, int(height * WINDOW)), max(1, int(width * WINDOW))
    top = min(int(change.top * (height - rows + 1)), height - rows)  # uniform over whole pixels
    left = min(int(change.left * (width - columns + 1)), width - columns)
    window = Image.fromarray(np.ascontiguousarray(picture[top : top + rows, left : left + columns]))
    turn, side = math.cos(math.radians(change.angle)), math.sin(math.radians(change.angle))
    # from a place (x, y) of the result to one of the window: about the middles, turned, then scaled
    across, down = columns / width, rows / height
    terms = (across * turn, -across * side, down * side, down * turn)
    matrix = (
        terms[0], terms[1], columns / 2 - terms[0] * width / 2 - terms[1] * height / 2,
        terms[2], terms[3], rows / 2 - terms[2] * width / 2 - terms[3] * height / 2,
    )  # fmt: skip
    return np.asarray(window.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))


def coloured(picture: UInt8, change: Change) -> UInt8:
    """Brightness, contrast and saturation, u8 [h,w,3]: one matrix for all pixels, cut to a byte only at the end."""
    from PIL import Image

    scale, grey = change.brightness * change.contrast, (1.0 - change.saturation) / 3
    mean = float(picture.mean()) * change.brightness
    offset = mean * (1.0 - change.contrast)
    rows = [
        (*(scale * (grey + change.saturation * (channel == other)) for other in range(3)), offset)
        for channel in range(3)
    ]
    matrix = tuple(number for row in rows for number in row)
    return np.asarray(Image.fromarray(picture).convert("RGB", matrix))
