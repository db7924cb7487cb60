"""LeRobot's resizing in float: against recordings of LeRobot, and against torch's own `interpolate`."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from ki_edge.errors import ArgumentError, ObservationError
from ki_edge.policy.images import MAX_SIDE, METHODS, fit_image, interpolate_with_pad, model_pictures, read_image

FLOAT_METHODS = [name for name, method in METHODS.items() if method.pictures == "float32"]
ROUNDING = 5e-7  # of numbers up to 1 in float32, a few operations each
# torch's kernels for processors without fused multiply-adds round coordinates once more
TORCHS = ROUNDING if torch.backends.cpu.get_cpu_capability() != "DEFAULT" else 3e-4
SIZES = [(480, 640), (640, 480), (720, 1280), (1080, 1920), (9, 10), (37, 223), (448, 448), (225, 224), (4, 600)]


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_torch(image, method):
    """LeRobot's steps with torch's kernels: [0, 1], resize, then the version's margin and * 2 - 1."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    ratio = max(image.shape[1] / 224, image.shape[0] / 224)
    inner = interpolate(pixels, [int(n / ratio) for n in image.shape[:2]], mode="bilinear", align_corners=False)
    (down, right) = (224 - n for n in inner.shape[2:])
    places = {
        "torch_pad": (0.0, (right // 2, right - right // 2, down // 2, down - down // 2)),
        "torch_pad_04": (-1.0, (right // 2, right - right // 2, down // 2, down - down // 2)),
        "torch_pad_03": (0.0, (right, 0, down, 0)),
    }
    margin, sides = places[method]
    return (torch.nn.functional.pad(inner, sides, value=margin) * 2 - 1)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("method", FLOAT_METHODS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_torchs_to_float32s_rounding(size, method):
    image = picture(*size)
    expected = by_torch(image, method)
    forms = (image, image.transpose(2, 0, 1), np.asfortranarray(image), image.astype(np.float32) / 255, image / 255)
    for form in forms:
        found = fit_image(form, 224, 224, method)
        assert found.dtype == np.float32 and found.shape == (224, 224, 3)
        np.testing.assert_allclose(found, expected, rtol=0, atol=TORCHS)


@pytest.mark.parametrize("size", ["48x64", "120x250", "260x90", "10x9"])
def test_it_is_lerobots(data, size):
    golden = np.load(data / "lerobot_policy" / "images.npz")
    found = (fit_image(golden[f"{size}/in"], 224, 224, "torch_pad") + 1) / 2
    for part, expected in ((found[::5, ::5], "fifths"), (found[112], "row"), (found[:, 112], "column")):
        np.testing.assert_allclose(part, golden[f"{size}/{expected}"], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("method", FLOAT_METHODS)
def test_a_picture_of_the_models_size_is_exact(method):
    image = picture(8, 12)
    expected = (torch.from_numpy(image).float() / 255 * 2.0 - 1.0).numpy()
    np.testing.assert_array_equal(fit_image(image, 8, 12, method), expected)
    np.testing.assert_array_equal(fit_image(image.astype(np.float32) / np.float32(255), 8, 12, method), expected)
    np.testing.assert_array_equal(model_pictures(image, "float32"), expected)
    assert model_pictures(image, "uint8") is image


def test_margins():
    white = np.full((10, 20, 3), 255, np.uint8)
    for method, margin in (("torch_pad", -1), ("torch_pad_04", -3)):
        out = fit_image(white, 41, 40, method)
        assert (out[:10] == margin).all() and (out[30:] == margin).all()  # the odd row is at the bottom
        assert out[10:30] == pytest.approx(1)
    old = fit_image(white, 41, 40, "torch_pad_03")
    assert (old[:21] == -1).all() and old[21:] == pytest.approx(1)


def test_floats_that_leave_the_range_by_less_than_a_grey_level_are_clipped():
    for size in (8, 16):
        out = fit_image(np.full((size, size, 3), 1.003, np.float32), 8, 8, "torch_pad")
        assert out.max() == 1
        assert fit_image(np.full((size, size, 3), -0.003, np.float32), 8, 8, "torch_pad").min() == -1


def test_the_pictures_of_others_are_not_changed():
    image = picture(480, 640).astype(np.float32) / 255
    before = image.copy()
    for size in ((224, 224), (480, 640)):
        fit_image(image, *size, "torch_pad")[:] = 7
        np.testing.assert_array_equal(image, before)


def test_threads_share_the_plans():
    images = [picture(60 + n % 3, 80, n) for n in range(24)]
    alone = [fit_image(image, 32, 32, "torch_pad") for image in images]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda image: fit_image(image, 32, 32, "torch_pad"), images))
    np.testing.assert_array_equal(together, alone)


def test_a_shape_that_is_no_picture():
    with pytest.raises(ArgumentError, match=r"\[h, w, 3\]"):
        interpolate_with_pad(picture(8, 12)[0], 8, 12, METHODS["torch_pad"])


@pytest.mark.parametrize("shape", [(1, MAX_SIDE + 1, 3), (3, MAX_SIDE + 1, 1), (11_000, 11_000, 3), (3, 1 << 40, 1)])
def test_absurd_sizes_are_refused_before_they_are_read(shape):
    image = np.broadcast_to(np.uint8(0), shape)  # takes no memory
    with pytest.raises(ObservationError, match=r"front: an image of shape .* too large: send at most 16384 pixels"):
        read_image(image, "front")
    assert read_image(np.broadcast_to(np.uint8(0), (MAX_SIDE, 3, 3))).shape == (MAX_SIDE, 3, 3)
