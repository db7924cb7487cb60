"""Frames of datasets that LeRobot itself wrote, beside what its own reader gave (tests/data/lerobot_dataset)."""

import pickle

import numpy as np
import pytest

from ki_edge.errors import DatasetError
from ki_edge.train.data.frames import open_frames
from ki_edge.train.data.pictures import Kept
from ki_runtime.robots.replay import record_episode

KINDS = ("many_av1", "many_h264", "many_v21")

LENGTHS = (6, 4, 9, 1, 5)
FEATURES = ("observation.joints", "observation.gripper", "action")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def samples(data, kind):
    with np.load(data / "lerobot_dataset" / f"{kind}.npz") as file:
        return dict(file)


def places(starts):
    """(row, episode, step) of every frame, in an order that jumps between episodes and files."""
    for row in np.random.default_rng(0).permutation(int(starts[-1])):
        episode = int(np.searchsorted(starts, row, "right")) - 1
        yield int(row), episode, int(row - starts[episode])


def test_numbers_tasks_and_timestamps(data, kind, samples):
    frames = open_frames(data / "lerobot_dataset" / kind)
    numbers = frames.read(FEATURES)
    assert np.diff(numbers.starts).tolist() == list(LENGTHS) and list(frames.episodes) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(numbers.columns["observation.joints"], samples["joints"])
    np.testing.assert_array_equal(numbers.columns["observation.gripper"], samples["gripper"].reshape(-1, 1))
    np.testing.assert_array_equal(numbers.columns["action"], samples["action"][:, 0])
    np.testing.assert_array_equal(numbers.timestamp, samples["timestamp"])
    assert [numbers.tasks[at] for at in numbers.task] == samples["task"].tolist()
    assert len(set(samples["task"][:6])) == 2  # a task that changes within an episode
    np.testing.assert_array_equal(np.repeat(frames.episodes, LENGTHS), samples["episode"])
    assert frames.fps == 10 and frames.vectors["action"].names == ("a", "b", "c", "grip")


def test_every_picture_in_any_order_in_another_process(data, kind, samples):
    frames = open_frames(data / "lerobot_dataset" / kind)
    numbers = frames.read(["action"])
    films = sorted((data / "lerobot_dataset" / kind).rglob("*.mp4"))
    assert (len(films) < 10) == (kind != "many_v21") and len(films) > 2  # several films, of several episodes in v3.0
    pictures = pickle.loads(pickle.dumps(frames.pictures(list(frames.cameras), numbers)))
    for row, episode, step in places(numbers.starts):
        for camera, name in enumerate(("top", "left_wrist")):
            found = pictures.at(episode, step, float(numbers.timestamp[row]), camera)
            wanted = samples[name][row].transpose(1, 2, 0)
            assert (
                found.shape == wanted.shape and np.abs(found.astype(int) - wanted).max() <= 1
            )  # another build of FFmpeg


def test_pictures_in_columns(data):
    with np.load(data / "lerobot_dataset" / "samples.npz") as file:
        samples = dict(file)
    frames = open_frames(data / "lerobot_dataset" / "v3")
    numbers = frames.read(["observation.state"])
    np.testing.assert_array_equal(numbers.columns["observation.state"], samples["state"])
    pictures = pickle.loads(pickle.dumps(frames.pictures(["observation.images.wrist"], numbers)))
    for row, episode, step in places(numbers.starts):
        found = pictures.at(episode, step, float(numbers.timestamp[row]), 0)
        np.testing.assert_array_equal(found, samples["wrist"][row].transpose(1, 2, 0))


def test_npz_episodes(tmp_path):
    random = np.random.default_rng(0)
    given = []
    for number, length in enumerate((3, 5)):
        arrays = {"state": random.normal(size=(length, 3)), "actions": random.normal(size=(length, 2))}
        arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
        images = {"front": random.integers(0, 256, (length, 10, 12, 3), np.uint8)}
        record_episode(tmp_path / f"{number}.npz", images=images, prompt=f"fold {number}", **arrays)
        given.append((arrays, images))
    frames = open_frames(tmp_path)
    numbers = frames.read(["observation.state", "action"])
    assert numbers.starts.tolist() == [0, 3, 8] and numbers.tasks == ("fold 0", "fold 1") and frames.fps is None
    np.testing.assert_array_equal(numbers.columns["action"], np.concatenate([one["actions"] for one, _ in given]))
    assert frames.cameras == {"front": (10, 12)}
    pictures = pickle.loads(pickle.dumps(frames.pictures(["front"], numbers)))
    for _, episode, step in places(numbers.starts):
        np.testing.assert_array_equal(pictures.at(episode, step, 0.0, 0), given[episode][1]["front"][step])
    before = frames.digest()
    record_episode(tmp_path / "2.npz", images={"side": np.zeros((2, 4, 4, 3), np.uint8)}, prompt="p", **{
        "state": np.zeros((2, 3), np.float32), "actions": np.zeros((2, 2), np.float32)})  # fmt: skip
    with pytest.raises(DatasetError, match=r"2\.npz: cameras: \['side'\], and .*0\.npz has \['front'\]"):
        open_frames(tmp_path)
    (tmp_path / "2.npz").unlink()
    assert open_frames(tmp_path).digest() == before


def test_a_digest_tells_other_data(copy):
    folder = copy()
    before = open_frames(folder).digest()
    film = next(folder.rglob("*.mp4"))
    content = film.read_bytes()
    film.write_bytes(content[:-3] + b"abc")
    assert open_frames(folder).digest() != before
    film.write_bytes(content)
    assert open_frames(folder).digest() == before
    tasks = folder / "meta/stats.json"
    tasks.write_text("{}")  # not read
    assert open_frames(folder).digest() == before
    (folder / "meta/info.json").write_text((folder / "meta/info.json").read_text() + "\n")
    assert open_frames(folder).digest() != before


def test_as_many_files_stay_open_as_are_allowed():
    closed = []

    class Item:
        def __init__(self, name):
            self.name = name

        def close(self):
            closed.append(self.name)

    kept = Kept(2)
    first = kept.get("a", lambda: Item("a"))
    kept.get("b", lambda: Item("b"))
    assert kept.get("a", lambda: Item("again")) is first
    kept.get("c", lambda: Item("c"))
    assert closed == ["b"]  # the one that was not used for longest
    assert pickle.loads(pickle.dumps(kept)).get("a", lambda: "new") == "new"
