"""Pictures changed at random, as openpi's training does: what may change, by how much, and what never does."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from ki_edge.errors import ArgumentError
from ki_edge.planning.settings import TrainSettings
from ki_edge.train.data import assembly
from ki_edge.train.data.augmentation import Change, augment, coloured, moved
from ki_edge.train.data.opening import open_data
from ki_edge.train.data.start import Start
from ki_edge.train.data.texts import TextSet
from ki_edge.train.step.batch import ACTIONS, TEXT
from ki_edge.train.step.training_data import Share

STILL = Change(top=0.5, left=0.5, angle=0.0, brightness=1.0, contrast=1.0, saturation=1.0)


@pytest.fixture(scope="module")
def picture():
    """Smooth, so that interpolation hardly matters: f(x, y) in each channel its own, 96 pixels."""
    y, x = np.mgrid[:96, :96] / 95.0
    smooth = np.stack([0.5 + 0.4 * np.sin(4 * x + y), 0.2 + 0.6 * x * y, 0.8 - 0.5 * y], axis=-1)
    return (255 * smooth).astype(np.uint8)


def openpi_colour(image, brightness, contrast, saturation):
    """preprocess_observation_pytorch's formulas, on floats [h,w,3] in 0..1."""
    image = image * brightness
    mean = image.mean()
    image = (image - mean) * contrast + mean
    grey = image.mean(axis=-1, keepdims=True)
    return np.clip(grey + (image - grey) * saturation, 0, 1)


def openpi_motion(image, top, left, angle):
    """Its crop, its resizing by torch and its rotation by grid_sample, on floats [h,w,3], from whole pixels."""
    h, w = image.shape[:2]
    rows, columns = int(h * 0.95), int(w * 0.95)
    tensor = torch.from_numpy(image[top : top + rows, left : left + columns]).permute(2, 0, 1)[None]
    tensor = torch.nn.functional.interpolate(tensor, size=(h, w), mode="bilinear", align_corners=False)
    turn = np.deg2rad(angle)
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    grid = torch.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], dim=-1)
    turned = torch.nn.functional.grid_sample(
        tensor, grid[None].float(), mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return turned[0].permute(1, 2, 0).numpy()


def test_nothing_is_changed_by_nothing(picture):
    np.testing.assert_array_equal(coloured(picture, STILL), picture)


def test_colour_is_openpis(picture):
    for seed in range(30):
        change = Change.draw(np.random.default_rng(seed))
        wanted = openpi_colour(picture / 255.0, change.brightness, change.contrast, change.saturation)
        assert np.abs(coloured(picture, change) - 255 * wanted).max() <= 0.51


@pytest.mark.parametrize("angle", [-5.0, 0.0, 3.0])
@pytest.mark.parametrize(("top", "left"), [(0.0, 0.0), (0.999, 0.3), (0.5, 0.999)])
def test_motion_is_openpis(picture, angle, top, left):
    """Inside, to a few grey levels: it interpolates twice, and its grid is half a pixel wider at the border."""
    found = moved(picture, replace(STILL, top=top, left=left, angle=angle))
    wanted = 255 * openpi_motion((picture / 255.0).astype(np.float32), int(top * 6), int(left * 6), angle)
    inside = np.s_[8:-8, 8:-8]
    assert np.abs(found[inside] - wanted[inside]).max() <= 4
    assert np.abs(found[inside] - wanted[inside]).mean() <= 1.2


def test_a_turned_picture_is_black_where_nothing_is():
    white = np.full((64, 64, 3), 255, np.uint8)
    turned = moved(white, replace(STILL, angle=5.0))
    assert turned[:2, :2].max() == 0 or turned[-2:, :2].max() == 0
    assert (turned[16:48, 16:48] == 255).all()
    assert (moved(white, STILL) == 255).all(), "a window is scaled to the whole picture"


def test_a_window_has_95_percent(picture):
    """The first and the last columns of the result are those of the window's ends."""
    ramp = np.repeat(np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 200, axis=0), 3, axis=2)
    for left, first in ((0.0, 0), (0.999, 10)):
        found = moved(ramp, replace(STILL, left=left))[100, :, 0].astype(int)
        assert abs(found[0] - first) <= 1 and abs(found[-1] - (first + 189)) <= 1


def test_draws_have_openpis_ranges():
    random = np.random.default_rng(0)
    drawn = [Change.draw(random) for _ in range(4000)]
    bounds = {
        "top": (0, 1),
        "left": (0, 1),
        "angle": (-5, 5),
        "brightness": (0.7, 1.3),
        "contrast": (0.6, 1.4),
        "saturation": (0.5, 1.5),
    }
    for name, (low, high) in bounds.items():
        values = np.array([getattr(change, name) for change in drawn])
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)  # a uniform's, to 4 standard errors
        assert abs(values.std() - (high - low) / 12**0.5) < 0.02 * (high - low)


def test_windows_are_uniform_over_whole_pixels():
    """Of a picture of 100 pixels, 6 places each way, equally often."""
    picture = np.zeros((100, 100, 3), np.uint8)
    picture[:, :, 0] = np.arange(100)[None, :] * 2
    random, seen = np.random.default_rng(1), []
    for _ in range(600):
        seen.append(int(moved(picture, replace(STILL, left=random.random()))[50, 0, 0]) // 2)
    counts = np.bincount(seen, minlength=6)
    assert len(counts) == 6 and counts.min() > 60


def test_hands_are_not_moved_and_cameras_do_not_depend_on_each_other(picture):
    dots = picture.copy()
    dots[::7, ::5] = 255
    both = np.stack([dots, dots])
    found = augment(both, [False, True], np.random.default_rng(3))
    random = np.random.default_rng(3)
    first, second = Change.draw(random), Change.draw(random)
    np.testing.assert_array_equal(found[0], coloured(moved(dots, first), first))
    np.testing.assert_array_equal(found[1], coloured(dots, second))
    np.testing.assert_array_equal(augment(both, [True, True], np.random.default_rng(3))[1], found[1])


def test_the_same_generator_gives_the_same_bytes(picture):
    images = np.stack([picture] * 3)
    once = augment(images, [False, False, True], np.random.default_rng([7, 2, 5]))
    np.testing.assert_array_equal(once, augment(images, [False, False, True], np.random.default_rng([7, 2, 5])))
    assert not np.array_equal(once, augment(images, [False, False, True], np.random.default_rng([7, 2, 6])))
    assert once.dtype == np.uint8 and once.flags.writeable and (images == picture).all()


def test_a_constant_picture_stays_one_by_colour():
    grey = np.full((1, 32, 32, 3), 100, np.uint8)
    for seed in range(20):
        found = augment(grey, [True], np.random.default_rng(seed))
        change = Change.draw(np.random.default_rng(seed))
        assert len(np.unique(found)) == 1 and abs(int(found.flat[0]) - 100 * change.brightness) <= 1


@pytest.mark.parametrize(
    ("images", "wrist"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), [False]),
        (np.zeros((8, 8, 3), np.uint8), [False]),
        (np.zeros((2, 8, 8, 3), np.uint8), [False]),
        (np.zeros((1, 8, 8, 4), np.uint8), [False]),
    ],
)
def test_what_is_no_picture_is_refused(images, wrist):
    with pytest.raises(ArgumentError, match=r"expected uint8 \[N,h,w,3\] of as many"):
        augment(images, wrist, np.random.default_rng(0))


def test_none_are_none():
    assert augment(np.zeros((0, 8, 8, 3), np.uint8), [], np.random.default_rng(0)).shape == (0, 8, 8, 3)


def test_it_is_quick(picture):
    """A frame of three cameras at 224 pixels takes some 6 ms on a slow core; a hundred would make it the bottleneck."""
    images = np.zeros((3, 224, 224, 3), np.uint8)
    times = []
    for seed in range(5):
        begun = time.process_time()
        augment(images, [False, True, True], np.random.default_rng(seed))
        times.append(time.process_time() - begun)
    assert min(times) < 0.1


def test_which_cameras_of_a_sample_are_moved(small_dataset, small_texts, small_config, monkeypatch):
    """Those that stand still; none where the answer names a place in the pictures."""
    told = []

    def watched(images, wrist, rng):
        told.append((tuple(wrist), rng.integers(1 << 30)))
        return images

    monkeypatch.setattr(assembly, "augment", watched)
    settings = TrainSettings(batch=20, steps=3, augment=True)
    names = [str(small_dataset), str(small_texts)]
    data = open_data(names, Start.from_nothing(small_config), settings, horizon=4, workers=0)
    (batch,) = next(data.steps(0, Share()))
    cameras = [camera.slot for camera in data.recipe.contracts[0].cameras]
    answers = [answer for _, answer in TextSet.open(small_texts).texts()]
    for kind, row, (wrist, _) in zip(batch.kind.tolist(), batch.row.tolist(), told, strict=True):
        places = kind == TEXT and "<loc" in answers[row]
        assert wrist == tuple(places or name == "hand" for name in cameras)
    assert TEXT in batch.kind and ACTIONS in batch.kind and cameras == ["top", "hand"]
    first, _ = list(told), told.clear()
    list(data.steps(0, Share(rank=1, world=2)))
    assert told[:10] == first[10:], "what is drawn does not depend on the processes"
    data.close()


def test_nothing_is_changed_without_being_asked(small_dataset, small_config, monkeypatch):
    monkeypatch.setattr(assembly, "augment", lambda *_: pytest.fail("pictures were changed"))
    settings = TrainSettings(batch=4, steps=1)
    data = open_data([str(small_dataset)], Start.from_nothing(small_config), settings, horizon=4, workers=0)
    next(data.steps(0, Share()))
    data.close()
