"""Image parsing and resizing against openpi's golden results."""

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, ObservationError
from ki_edge.policy.images import parse_image, resize_with_pad

SIZES = ["480x640", "640x480", "100x100", "225x224", "37x223"]


@pytest.mark.parametrize("size", SIZES)
def test_golden_resize(data, size):
    golden = np.load(data / "transforms" / "vectors.npz")
    image = golden[f"resize/{size}/in"]
    np.testing.assert_array_equal(resize_with_pad(image, 224, 224), golden[f"resize/{size}/out"])
    transposed = np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)  # not contiguous
    np.testing.assert_array_equal(resize_with_pad(transposed, 224, 224), golden[f"resize/{size}/out"])


def test_resize_to_another_size_pads_with_black():
    image = np.full((10, 20, 3), 200, dtype=np.uint8)
    out = resize_with_pad(image, 42, 42)
    assert out.shape == (42, 42, 3)
    assert (out[:10] == 0).all()
    assert (out[10:31] == 200).all()
    assert (out[31:] == 0).all()
    assert resize_with_pad(image, 10, 20) is image


def test_resize_of_a_thin_image():
    assert resize_with_pad(np.full((1, 900, 3), 9, dtype=np.uint8), 224, 224).max() == 9


@pytest.mark.parametrize("bad", [np.zeros((4, 4, 3)), np.zeros((4, 4), dtype=np.uint8)])
def test_resize_refuses(bad):
    with pytest.raises(ArgumentError, match="expected uint8"):
        resize_with_pad(bad, 224, 224)


def test_parse():
    image = np.random.default_rng(0).integers(0, 256, size=(4, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(parse_image(image), image)
    np.testing.assert_array_equal(parse_image(image.transpose(2, 0, 1)), image)
    for dtype in (np.float32, np.float64):
        floating = (image / 255.0).astype(dtype)
        np.testing.assert_array_equal(parse_image(floating), (255 * floating).astype(np.uint8))
    assert parse_image(np.full((2, 2, 3), 0.999)).max() == 254  # truncated, not rounded


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), dtype=np.uint8), r"cam: expected an RGB image .* got shape \(4, 4\)"),
        (np.zeros((4, 4, 4), dtype=np.uint8), "RGB"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "RGB"),
        (np.zeros((1, 4, 4, 3), dtype=np.uint8), "RGB"),
        (np.zeros((4, 4, 3), dtype=np.int64), "expected dtype uint8 .* got int64"),
        (np.zeros((4, 4, 3), dtype=bool), "expected dtype uint8"),
        (np.full((4, 4, 3), 200.0), r"must lie in 0..1, got 200..200"),
        (np.full((4, 4, 3), -0.5), "must lie in 0..1"),
        (np.full((4, 4, 3), np.nan), "must lie in 0..1"),
    ],
)
def test_parse_refuses(image, message):
    with pytest.raises(ObservationError, match=message):
        parse_image(image, "cam")
