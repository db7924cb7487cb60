"""A dataset whose pictures are stored one by one: nothing of them is lost, and nothing else is different."""

import json
import sys

import numpy as np
import pytest

from ki_edge.errors import DatasetError, RobotError
from ki_edge.recordings import lerobot_index
from ki_edge.recordings.collection import open_recordings
from ki_runtime.recording import dataset
from ki_runtime.recording.dataset import DatasetWriter
from ki_runtime.recording.features import Features, Frame

pq = pytest.importorskip("pyarrow.parquet", reason="pip install 'ki-edge[record]'")
pytest.importorskip("av", reason="pip install 'ki-edge[record]'")
LENGTHS, SIZES = (3, 5), {"front": (24, 32), "hand": (16, 16)}


def pictures(episode, step):
    random = np.random.default_rng([episode, step])
    return {name: random.integers(0, 256, (*size, 3), np.uint8) for name, size in SIZES.items()}


def write(folder, stored):
    features = Features(10.0, "toy", 2, ("x", "y"), SIZES, ("position",), stored)
    writer = DatasetWriter(folder, features)
    for number, length in enumerate(LENGTHS):
        writer.begin()
        for step in range(length):
            vector = np.array([number, step], np.float32)
            seen = pictures(number, step)
            writer.add(Frame(step, step / 10, vector, vector, vector, seen, 0.0, 0, step, 0.1, False, (), "go"))
        writer.finish({"ki.stopped": False})
    return folder


def test_pictures_come_back_as_they_were(tmp_path):
    recordings = open_recordings(write(tmp_path / "images", "image"))
    for number, length in enumerate(LENGTHS):
        episode = recordings.episode(number)
        assert len(episode) == length
        for step in range(length):
            for name, picture in pictures(number, step).items():
                np.testing.assert_array_equal(episode.cameras[name][step], picture)


def test_what_reads_films_is_not_needed(tmp_path, monkeypatch):
    films = write(tmp_path / "films", "video")
    for module in (lerobot_index, dataset):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name == "av" else name)
    monkeypatch.setitem(sys.modules, "av", None)  # importing it fails
    images = write(tmp_path / "images", "image")
    with pytest.raises(RobotError, match="recording a dataset needs av"):
        write(tmp_path / "more", "video")
    assert open_recordings(images).episode(0).cameras["hand"][0].shape == (*SIZES["hand"], 3)
    with pytest.raises(DatasetError, match=r"films is a LeRobotDataset; reading it needs av: pip install"):
        open_recordings(films)


def test_the_rest_is_that_of_films(tmp_path):
    images, films = write(tmp_path / "images", "image"), write(tmp_path / "films", "video")
    assert not (images / "videos").exists()
    described, filmed = (json.loads((folder / "meta/info.json").read_text()) for folder in (images, films))
    assert described["video_path"] is None
    for name in SIZES:
        feature = described["features"].pop(f"observation.images.{name}")
        assert feature == {"dtype": "image", "shape": [*SIZES[name], 3], "names": ["height", "width", "channels"]}
        del filmed["features"][f"observation.images.{name}"]
    assert described["features"] == filmed["features"]
    assert json.loads((images / "meta/stats.json").read_text()) == json.loads((films / "meta/stats.json").read_text())
    for path in sorted((films / "data").rglob("*.parquet")):
        one, other = pq.read_table(path), pq.read_table(images / path.relative_to(films))
        assert other.select(one.column_names).equals(one)
        assert set(other.column_names) - set(one.column_names) == {f"observation.images.{name}" for name in SIZES}


def test_an_episode_that_moves_keeps_its_pictures(tmp_path):
    """Of two episodes that are open at once, the one that ends first comes first."""
    writer = DatasetWriter(tmp_path / "two", Features(10.0, "toy", 2, ("x", "y"), SIZES, ("position",), "image"))
    first, second = writer.open(), writer.open()
    for step in range(2):
        for number, episode in ((0, first), (1, second)):
            vector = np.array([number, step], np.float32)
            seen = pictures(number, step)
            writer.append(episode, Frame(step, 0.0, vector, vector, vector, seen, 0.0, 0, 0, 0.0, False, (), "go"))
    writer.commit(second, {})
    writer.commit(first, {})
    recordings = open_recordings(tmp_path / "two")
    for number, written in enumerate((1, 0)):
        np.testing.assert_array_equal(recordings.episode(number).cameras["front"][1], pictures(written, 1)["front"])
