"""Recorded demonstrations: what is read, and how bad folders are refused."""

import json

import numpy as np
import pytest

from ki_edge.errors import DatasetError
from ki_edge.train.demonstrations import Demonstrations


@pytest.fixture
def folder(record, tmp_path):
    """Demonstrations that the test may damage."""
    return record(tmp_path / "demonstrations")


def refused(folder, message):
    with pytest.raises(DatasetError, match=message) as caught:
        Demonstrations.open(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def edit_meta(folder, **changes):
    path = folder / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_opens(demonstrations):
    data = Demonstrations.open(str(demonstrations))
    assert len(data) == 12
    assert data.image_size == (8, 8)
    assert data.meta["prompts"] == ["Reach the red target", "go home"]
    for name in ("images", "state", "actions", "prompt", "points"):
        np.testing.assert_array_equal(getattr(data, name), np.load(demonstrations / f"{name}.npy"))
    assert isinstance(data.images, np.memmap)


def test_points_are_optional(folder):
    (folder / "points.npy").unlink()
    assert Demonstrations.open(folder).points is None


@pytest.mark.parametrize("name", ["meta.json", "images.npy", "state.npy", "actions.npy", "prompt.npy"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder, name)


def test_no_folder(tmp_path):
    refused(tmp_path / "none", "expected a folder of recorded demonstrations")


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x93NUMPY\x01\x00\x10"])
@pytest.mark.parametrize("name", ["images.npy", "state.npy", "points.npy"])
def test_file_that_is_no_array(folder, name, content):
    (folder / name).write_bytes(content)
    refused(folder, f"{name} cannot be read")


def test_truncated_array(folder):
    content = (folder / "images.npy").read_bytes()
    (folder / "images.npy").write_bytes(content[:-1])
    refused(folder, r"images\.npy cannot be read")


def test_archives_and_objects_are_no_arrays(folder):
    with (folder / "state.npy").open("wb") as file:
        np.savez(file, state=np.zeros((12, 3), np.float32))
    refused(folder, r"state\.npy cannot be read")
    np.save(folder / "state.npy", np.array([{"a": 1}], object), allow_pickle=True)
    refused(folder, r"state\.npy cannot be read")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("images", np.zeros((12, 2, 8, 8, 3), np.float32), "float32 .*, expected uint8 12 x 2 x \\* x \\* x 3"),
        ("images", np.zeros((12, 1, 8, 8, 3), np.uint8), "expected uint8 12 x 2"),
        ("images", np.zeros((12, 2, 8, 8), np.uint8), "expected uint8 12 x 2"),
        ("state", np.zeros((12, 3)), "float64 .*, expected float32 12 x 3"),
        ("state", np.zeros((11, 3), np.float32), r"float32 \(11, 3\), expected float32 12 x 3"),
        ("actions", np.zeros((12, 5, 3), np.float32), "expected float32 12 x 4 x 3"),
        ("prompt", np.zeros(12, np.int64), "expected int32 12"),
        ("points", np.zeros((12, 2, 3), np.float32), "expected float32 12 x 2 x 2"),
        ("prompt", np.full(12, 2, np.int32), "indices outside the 2 prompts"),
        ("prompt", np.full(12, -1, np.int32), "indices outside the 2 prompts"),
        ("state", np.full((12, 3), np.nan, np.float32), r"state\.npy holds NaN or infinite values"),
        ("actions", np.full((12, 4, 3), np.inf, np.float32), r"actions\.npy holds NaN or infinite values"),
    ],
)
def test_wrong_array(folder, name, array, message):
    np.save(folder / f"{name}.npy", array)
    refused(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2, this version reads 1"),
        ({"version": "1"}, "'version' must be a non-empty int, not '1'"),
        ({"frames": 0}, "'frames' must be a non-empty int, not 0"),
        ({"frames": -12}, "'frames' must be at least 1"),
        ({"cameras": []}, r"'cameras' must be a non-empty list, not \[\]"),
        ({"cameras": [1, 2]}, r"'cameras' must be a list of strings, not \[1, 2\]"),
        ({"prompts": [None, "a"]}, "'prompts' must be a list of strings"),
        ({"action_names": ["dx", 2, "dz"]}, "'action_names' must be a list of strings"),
        ({"prompts": "go"}, "'prompts' must be a non-empty list, not 'go'"),
        ({"horizon": None}, "'horizon' must be a non-empty int"),
        ({"control_hz": 0}, "'control_hz' must be a positive number, not 0"),
        ({"control_hz": "25"}, "'control_hz' must be a positive number, not '25'"),
        ({"control_hz": True}, "'control_hz' must be a positive number"),
    ],
)
def test_wrong_meta(folder, changes, message):
    edit_meta(folder, **changes)
    refused(folder, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b"{}", "'version' must be"),
        (b" " * 4_000_001, "more than 4000000 bytes"),
    ],
)
def test_broken_meta(folder, content, message):
    (folder / "meta.json").write_bytes(content)
    refused(folder, message)
