"""Camera images: from what a robot sends to what the model was trained on, equal to openpi's PIL path bit for bit."""

import numpy as np
import numpy.typing as npt

from ki_edge.errors import ArgumentError, ObservationError

UInt8 = npt.NDArray[np.uint8]


def parse_image(image: npt.ArrayLike, name: str = "image") -> UInt8:
    """Any accepted image as RGB uint8 [h, w, 3].

    Accepted: uint8 0..255 or floating point 0..1 (truncated to 255 x, as openpi does), [h, w, 3] or [3, h, w]; a first
    axis of 3 means channels first. Raises ObservationError that names the camera for any other dtype or shape, and for
    floats that are not finite or leave the range of a byte, such as images in 0..255 or -1..1.
    """
    array = np.asarray(image)
    if array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]) or array.size == 0:
        raise ObservationError(f"{name}: expected an RGB image [h, w, 3] or [3, h, w], got shape {array.shape}")
    if np.issubdtype(array.dtype, np.floating):
        scaled = 255 * array
        low, high = float(scaled.min()), float(scaled.max())
        if not (low > -1.0 and high < 256.0):  # NaN fails too
            found = f"{low / 255:.3g}..{high / 255:.3g}"
            raise ObservationError(f"{name}: a float image must lie in 0..1, got {found}; rescale it or send uint8")
        array = scaled.astype(np.uint8)
    if array.dtype != np.uint8:
        raise ObservationError(f"{name}: expected dtype uint8 (or floats in 0..1), got {array.dtype}")
    return array.transpose(1, 2, 0) if array.shape[0] == 3 else array


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
