"""Camera images: from what a robot sends to what the model was trained on.

    pil_pad        openpi: floats are truncated to bytes, PIL resizes with antialiasing, the margin is black; uint8,
                   equal to openpi bit for bit
    torch_pad      LeRobot: bilinear without antialiasing, as torch's `interpolate`; float32 in [-1, 1], margin -1
    torch_pad_04   LeRobot 0.4, which added the margin before it mapped 0..1 to [-1, 1]: there the margin is -3
    torch_pad_03   LeRobot before 0.4: as torch_pad, but the whole margin is at the left and the top

All keep the aspect ratio; all but the last centre the picture. What comes out is what the policy's prefix graph takes:
bytes, which the graph itself maps to [-1, 1], or numbers, as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import array_of
from ki_edge.config import Pictures
from ki_edge.errors import ArgumentError, ObservationError

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Resize = Literal["pil_pad", "torch_pad", "torch_pad_04", "torch_pad_03"]
MAX_SIDE, MAX_PIXELS = 16_384, 100_000_000  # of a picture that is accepted
LOWEST, HIGHEST = -3.0, 1.0  # of float pictures that a model sees
PLANS = 64  # sizes of pictures whose interpolation is kept


@dataclass(frozen=True)
class Method:
    """What a way of resizing gives: the pictures' type, the numbers of a margin and of an absent picture.

    `centred`: whether the picture is in the middle, or else in the corner at the bottom right.
    """

    pictures: Pictures
    margin: float
    absent: float
    centred: bool = True


METHODS: Mapping[Resize, Method] = {
    "pil_pad": Method("uint8", margin=0, absent=0),
    "torch_pad": Method("float32", margin=-1.0, absent=-1.0),
    "torch_pad_04": Method("float32", margin=-3.0, absent=-1.0),
    "torch_pad_03": Method("float32", margin=-1.0, absent=-1.0, centred=False),
}


def fit_image(
    image: npt.ArrayLike, height: int, width: int, resize: Resize, name: str = "image"
) -> npt.NDArray[np.uint8 | np.float32]:
    """Any accepted image as RGB [height, width, 3], by the method `resize`; errors as of `read_image`.

    uint8, or float32 in [-1, 1] with the method's margin.
    """
    method = METHODS[resize]
    if method.pictures == "uint8":
        return resize_with_pad(parse_image(image, name), height, width)
    return interpolate_with_pad(read_image(image, name), height, width, method)


def model_pictures(images: UInt8, pictures: Pictures) -> npt.NDArray[np.uint8 | np.float32]:
    """Pictures of the model's size, uint8 of any shape, as a policy's graphs take them: as they are, or as floats.

    Those are x / 255 * 2 - 1: to the bit what LeRobot makes of a picture that it need not resize.
    """
    return images if pictures == "uint8" else _to_unit(images) * np.float32(2) - np.float32(1)


def read_image(image: npt.ArrayLike, name: str = "image") -> npt.NDArray[Any]:
    """Any accepted image as [h, w, 3], in its own type.

    Accepted: uint8 0..255 or floating point 0..1, [h, w, 3] or [3, h, w]; a first axis of 3 means channels first; at
    most MAX_SIDE pixels a side and MAX_PIXELS in all. Raises ObservationError that names the camera for any other
    dtype, shape or size, and for floats that are not finite or leave the range of a byte, such as images in 0..255 or
    -1..1.
    """
    array = array_of(image, name, ObservationError)
    if array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]) or array.size == 0:
        raise ObservationError(f"{name}: expected an RGB image [h, w, 3] or [3, h, w], got shape {array.shape}")
    if max(array.shape) > MAX_SIDE or array.size > 3 * MAX_PIXELS:
        limit = f"at most {MAX_SIDE} pixels a side and {MAX_PIXELS // 1_000_000} million in all"
        raise ObservationError(f"{name}: an image of shape {array.shape} is too large: send {limit}")
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (255 * low > -1.0 and 255 * high < 256.0):  # NaN fails too
            raise ObservationError(
                f"{name}: a float image must lie in 0..1, got {low:.3g}..{high:.3g}; rescale it or send uint8"
            )
    elif array.dtype != np.uint8:
        raise ObservationError(f"{name}: expected dtype uint8 (or floats in 0..1), got {array.dtype}")
    return array.transpose(1, 2, 0) if array.shape[0] == 3 else array


def parse_image(image: npt.ArrayLike, name: str = "image") -> UInt8:
    """Any accepted image as RGB uint8 [h, w, 3]; floats are truncated to 255 x, as openpi does. See `read_image`."""
    array = read_image(image, name)
    return array if array.dtype == np.uint8 else (255 * array).astype(np.uint8)


def resize_with_pad(image: UInt8, height: int, width: int) -> UInt8:
    """Resize uint8 [h, w, 3] to [height, width, 3], keeping its aspect ratio, centred on black.

    Bilinear with PIL's antialiasing; sizes and offsets are truncated to whole pixels (openpi's `resize_with_pad`).
    An image that already has the size is returned as it is.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ArgumentError(f"expected uint8 [h, w, 3], got {image.dtype} {image.shape}")
    if image.shape[:2] == (height, width):
        return image
    from PIL import Image

    new_h, new_w = inner_size(image.shape[0], image.shape[1], height, width)
    resized = Image.fromarray(image).resize((new_w, new_h), resample=Image.Resampling.BILINEAR)
    if (new_h, new_w) == (height, width):
        return np.asarray(resized)
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    _inside(canvas, new_h, new_w)[:] = np.asarray(resized)
    return canvas


def interpolate_with_pad(image: npt.NDArray[Any], height: int, width: int, method: Method) -> Float32:
    """Resize uint8 0..255 or floats 0..1 [h, w, 3] to float32 [height, width, 3] in [-1, 1], with the method's margin.

    Pixel centres, no antialiasing (torch's `interpolate`, bilinear, align_corners=False, which this equals to float32's
    rounding); of an odd margin the extra pixel is at the bottom or right (LeRobot's `resize_with_pad_torch`).
    """
    if image.ndim != 3 or image.shape[2] != 3:
        raise ArgumentError(f"expected an image [h, w, 3], got shape {image.shape}")
    if image.shape[:2] == (height, width):
        return _clipped(_to_unit(image) * np.float32(2) - np.float32(1), image.dtype)
    new_h, new_w = inner_size(image.shape[0], image.shape[1], height, width)
    canvas = np.full((height, width, 3), method.margin, np.float32)
    inside = _inside(canvas, new_h, new_w) if method.centred else canvas[height - new_h :, width - new_w :]
    inside[:] = _clipped(_interpolate(image, new_h, new_w), image.dtype)
    return canvas


def inner_size(h: int, w: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) of a picture [h, w] inside the model's, at least one pixel each; the rest is margin."""
    ratio = max(w / width, h / height)
    return max(1, int(h / ratio)), max(1, int(w / ratio))


def _inside(canvas: npt.NDArray[Any], new_h: int, new_w: int) -> npt.NDArray[Any]:
    """The middle of a canvas."""
    top, left = (canvas.shape[0] - new_h) // 2, (canvas.shape[1] - new_w) // 2
    return canvas[top : top + new_h, left : left + new_w]


def _interpolate(image: npt.NDArray[Any], new_h: int, new_w: int) -> Float32:
    """[h, w, 3] to float32 [new_h, new_w, 3], mapped to [-1, 1]. Only pixels that are used become floats."""
    h, w = image.shape[:2]
    rows, columns = _axis(h, new_h, 1), _axis(w, new_w, 3)
    if image.dtype not in (np.uint8, np.float32):
        image = image.astype(np.float32)
    # indices are valid; "clip" spares numpy a buffer
    above, below = (np.take(image.reshape(h, 3 * w), at, 0, mode="clip") for at in np.split(rows.places, 2))
    few = 2 * new_w < w  # of the columns are used: then they are chosen first, while they are bytes
    if few:
        above, below = (np.take(part, columns.places, 1, mode="clip") for part in (above, below))
    mixed = _between(above, below, rows.share[:, None])
    if few:
        left, right = np.split(mixed, 2, axis=1)
    else:
        left, right = (np.take(mixed, at, 1, mode="clip") for at in np.split(columns.places, 2))
    out = _between(left, right, columns.share)  # [new_h, 3 new_w]
    out *= np.float32(2 / 255 if image.dtype == np.uint8 else 2)
    out -= np.float32(1)
    return out.reshape(new_h, new_w, 3)


@dataclass(frozen=True, eq=False)
class _Axis:
    """Where the numbers of a resized axis are: `share` of the way between the first half of `places` and the second."""

    places: Int64
    share: Float32


@lru_cache(PLANS)
def _axis(old: int, new: int, channels: int) -> _Axis:
    """The plan of one axis of `old` pixels with `channels` numbers each.

    torch's kernels multiply and subtract in float32 with one rounding (a fused multiply-add).
    """
    scale = float(np.float32(old) / np.float32(new))
    centres = np.maximum((np.arange(new) + 0.5) * scale - 0.5, 0).astype(np.float32)
    first = np.minimum(centres.astype(np.int64), old - 1)
    pixels = np.concatenate([first, np.minimum(first + 1, old - 1)])
    places = (channels * pixels[:, None] + np.arange(channels)).ravel()
    share = np.repeat((centres - first).astype(np.float32), channels)
    places.flags.writeable = share.flags.writeable = False  # threads share them
    return _Axis(places, share)


def _between(first: npt.NDArray[Any], second: npt.NDArray[Any], share: Float32) -> Float32:
    """first + share * (second - first) in float32, in memory of its own."""
    out: Float32 = second.astype(np.float32)
    start = first.astype(np.float32, copy=False)
    out -= start
    out *= share
    out += start
    return out


def _to_unit(image: npt.NDArray[Any]) -> Float32:
    """Bytes or floats in 0..1 as float32 0..1."""
    unit: Float32 = image.astype(np.float32, copy=False)
    return unit / np.float32(255) if image.dtype == np.uint8 else unit


def _clipped(pixels: Float32, of: np.dtype[Any]) -> Float32:
    """Within [-1, 1]: floats of a robot may leave 0..1 by less than a grey level, bytes cannot."""
    return pixels if of == np.uint8 else np.clip(pixels, np.float32(-1), np.float32(1))
