"""Camera images: from what a robot sends to what the model was trained on.

    pil_pad     openpi: floats are truncated to bytes, PIL resizes with antialiasing; equal to openpi bit for bit
    torch_pad   LeRobot: bilinear without antialiasing on floats, as torch's `interpolate`; the result is rounded to
                bytes, which the model takes: at most half a grey level from what LeRobot feeds its model, and exact
                for a picture that has the model's size

Both keep the aspect ratio, centre the picture and pad with black.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import array_of
from ki_edge.errors import ArgumentError, ObservationError

MAX_PIXELS = 1 << 26  # of one picture; 8K video has half of it
UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Resize = Literal["pil_pad", "torch_pad"]


def fit_image(image: npt.ArrayLike, height: int, width: int, resize: Resize, name: str = "image") -> UInt8:
    """Any accepted image as RGB uint8 [height, width, 3], by the method `resize`; errors as of `parse_image`."""
    if resize == "torch_pad":
        return interpolate_with_pad(read_image(image, name), height, width)
    return resize_with_pad(parse_image(image, name), height, width)


def read_image(image: npt.ArrayLike, name: str = "image") -> npt.NDArray[Any]:
    """Any accepted image as [h, w, 3], in its own type.

    Accepted: uint8 0..255 or floating point 0..1, [h, w, 3] or [3, h, w]; a first axis of 3 means channels first.
    Raises ObservationError that names the camera for any other dtype or shape, and for floats that are not finite or
    leave the range of a byte, such as images in 0..255 or -1..1.
    """
    array = array_of(image, name, ObservationError)
    if array.size > 3 * MAX_PIXELS:
        raise ObservationError(f"{name}: {list(array.shape)} has more than {MAX_PIXELS} pixels: send a smaller picture")
    if array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]) or array.size == 0:
        raise ObservationError(f"{name}: expected an RGB image [h, w, 3] or [3, h, w], got shape {array.shape}")
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

    h, w = image.shape[:2]
    ratio = max(w / width, h / height)
    new_h, new_w = max(1, int(h / ratio)), max(1, int(w / ratio))
    resized = Image.fromarray(image).resize((new_w, new_h), resample=Image.Resampling.BILINEAR)
    top, left = (height - new_h) // 2, (width - new_w) // 2
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    canvas[top : top + new_h, left : left + new_w] = np.asarray(resized)
    return canvas


def interpolate_with_pad(image: npt.NDArray[Any], height: int, width: int) -> UInt8:
    """Resize uint8 0..255 or floats 0..1 [h, w, 3] to uint8 [height, width, 3]: the method `torch_pad`.

    Pixel centres, no antialiasing (torch's `interpolate`, bilinear, align_corners=False), values clamped to 0..1; of an
    odd margin the extra pixel is at the bottom or right (LeRobot's `resize_with_pad_torch`).
    """
    if image.ndim != 3 or image.shape[2] != 3:
        raise ArgumentError(f"expected an image [h, w, 3], got shape {image.shape}")
    if image.shape[:2] == (height, width):
        return _to_bytes(image)
    h, w = image.shape[:2]
    ratio = max(w / width, h / height)
    new_h, new_w = max(1, int(h / ratio)), max(1, int(w / ratio))
    pixels = image.astype(np.float32) / np.float32(255 if image.dtype == np.uint8 else 1)
    resized = _interpolate(_interpolate(pixels, new_w, axis=1), new_h, axis=0)
    top, left = (height - new_h) // 2, (width - new_w) // 2
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    canvas[top : top + new_h, left : left + new_w] = _to_bytes(resized)
    return canvas


def _interpolate(pixels: Float32, size: int, axis: int) -> Float32:
    """Linear interpolation of one axis at the centres of `size` pixels."""
    old = pixels.shape[axis]
    centres = np.maximum((np.arange(size, dtype=np.float32) + 0.5) * np.float32(old / size) - np.float32(0.5), 0)
    low = np.minimum(centres.astype(np.int64), old - 1)
    shape = [1, 1, 1]
    shape[axis] = size
    share = (centres - low).astype(np.float32).reshape(shape)
    below, above = np.take(pixels, low, axis), np.take(pixels, np.minimum(low + 1, old - 1), axis)
    return np.asarray(below * (1 - share) + above * share, np.float32)


def _to_bytes(image: npt.NDArray[Any]) -> UInt8:
    """Floats in 0..1 rounded to the nearest of 256 grey levels; bytes as they are."""
    levels: UInt8 = image if image.dtype == np.uint8 else np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return levels
