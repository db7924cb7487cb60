"""Episodes of LeRobotDatasets, as LeRobot itself wrote them (tests/data/lerobot_dataset), and those that are none."""

import json
import os
import shutil

import numpy as np
import pytest

from ki_edge.errors import DatasetError, RobotError
from ki_edge.policy.contract import generic
from ki_edge.recordings import lerobot_index
from ki_edge.recordings.collection import open_recordings
from ki_edge.recordings.episodes import EpisodeView
from ki_runtime.recording.video import Video
from ki_runtime.robots import open_robot

pq = pytest.importorskip("pyarrow.parquet", reason="pip install 'ki-edge[record]'")
pytest.importorskip("av", reason="pip install 'ki-edge[record]'")
LENGTHS = (7, 5)
CONTRACT = generic(["front", "wrist"], state_dim=3, action_dim=2, action_horizon=4)


def levels(episode):
    """Grey level of each frame, see make.py of the data."""
    return 20 * np.arange(LENGTHS[episode]) + 100 * episode


@pytest.fixture
def dataset(data, tmp_path):
    """A copy of LeRobot's, to be damaged."""
    return shutil.copytree(data / "lerobot_dataset" / "v3", tmp_path / "dataset")


def change(path, **values):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))


def change_table(path, **columns):
    """Give columns of a parquet file other values."""
    import pyarrow as pa

    table = pq.read_table(path)
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, pa.array(values, table.schema.field(name).type))
    pq.write_table(table, path)


def check(recordings):
    assert len(recordings) == 2
    for number, length in enumerate(LENGTHS):
        episode = recordings.episode(number)
        view = EpisodeView(episode, CONTRACT)
        t = np.arange(length)
        np.testing.assert_array_equal(episode.state, np.stack([t, np.full(length, number), np.full(length, 0.5)], 1))
        np.testing.assert_array_equal(episode.actions, np.stack([10 * t + number, -t], 1))
        for step in (*range(length), length - 1, 0, 3, 1, 2):  # also backwards, and twice the same
            observation = view.observation(step)
            front, wrist = observation["images"]["front"], observation["images"]["wrist"]
            assert front.shape == (48, 64, 3) and abs(front.mean() - levels(number)[step]) < 3  # a lossy film
            assert wrist.shape == (16, 24, 3) and (wrist == levels(number)[step] + 5).all()
            assert observation["prompt"] == f"task {number}"


def test_what_lerobot_wrote(data):
    check(open_recordings(data / "lerobot_dataset" / "v3"))


def test_version_2_1(dataset):
    """The same frames, in a file for each episode."""
    table = pq.read_table(dataset / "data/chunk-000/file-000.parquet")
    lines = []
    for episode, length in enumerate(LENGTHS):
        rows = table.filter(np.array(table["episode_index"]) == episode)
        pq.write_table(rows, dataset / f"data/chunk-000/episode_{episode:06d}.parquet")
        path = dataset / f"videos/chunk-000/observation.images.front/episode_{episode:06d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        film = Video(path, 10, 48, 64)
        for level in levels(episode):
            film.add(np.full((48, 64, 3), level, np.uint8))
        film.close()
        lines.append(json.dumps({"episode_index": episode, "tasks": [f"task {episode}"], "length": length}))
    (dataset / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n")
    shutil.rmtree(dataset / "meta/episodes")
    paths = {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    change(dataset / "meta/info.json", codebase_version="v2.1", **paths)
    check(open_recordings(dataset))


def test_replay_shows_one_episode_after_the_other(data):
    robot = open_robot(f"replay:{data / 'lerobot_dataset' / 'v3'}")
    robot.fit(CONTRACT)
    for seed, episode in ((0, 0), (1, 1), (2, 0), (None, 0), (1001, 1)):
        robot.reset(seed)
        assert len(robot.recorded) == len(robot.predicted) == LENGTHS[episode]
        assert robot.observe()["prompt"] == f"task {episode}" and robot.frame() is not None
        robot.act(np.zeros(2, np.float32))
        assert robot.observe()["state"].tolist() == [1, episode, 0.5]


def test_a_folder_of_files(tmp_path):
    from ki_runtime.robots.replay import record_episode

    for number in range(2):
        arrays = {"state": np.full((3, 3), number, np.float32), "actions": np.zeros((3, 2), np.float32)}
        images = {"front": np.zeros((3, 4, 4, 3), np.uint8)}
        record_episode(tmp_path / f"{number}.npz", images=images, prompt="p", **arrays)
    robot = open_robot(f"replay:{tmp_path}")
    robot.reset(3)
    assert robot.observe()["state"].tolist() == [1, 1, 1]


def broken_table(name):
    def write(folder):
        (folder / name).write_bytes(b"PAR1" + bytes(100))

    return write


def long_picture(folder):
    path = folder / "data/chunk-000/file-000.parquet"
    pictures = pq.read_table(path)["observation.images.wrist"].to_pylist()
    change_table(path, **{"observation.images.wrist": [{"bytes": None, "path": "/etc/hostname"}] * len(pictures)})


def info(**values):
    return lambda folder: change(folder / "meta/info.json", **values)


def features(name, **values):
    def write(folder):
        path = folder / "meta/info.json"
        known = json.loads(path.read_text())["features"]
        change(path, features={**known, name: {**known.get(name, {}), **values}})

    return write


def episodes(**columns):
    return lambda folder: change_table(folder / "meta/episodes/chunk-000/file-000.parquet", **columns)


def frames(**columns):
    return lambda folder: change_table(folder / "data/chunk-000/file-000.parquet", **columns)


def fifo(folder):
    (folder / "data/chunk-000/file-000.parquet").unlink()
    os.mkfifo(folder / "data/chunk-000/file-000.parquet")


VIDEO = "videos/observation.images.front/chunk-000/file-000.mp4"
BAD = {
    "version": (info(codebase_version="v9"), "a LeRobotDataset of version 'v9'; v3.0 and v2.1 are read"),
    "fps": (info(fps=0), r"info\.json: fps 0: expected frames a second"),
    "fps text": (info(fps="10"), "fps '10'"),
    "features": (info(features=[]), "features: expected an object"),
    "no JSON": (lambda folder: (folder / "meta/info.json").write_text("{"), "is not valid JSON"),
    "outside": (info(data_path="../{chunk_index}.parquet"), r"'\.\./0\.parquet', which is no path within the dataset"),
    "absolute": (info(data_path="/etc/passwd"), "no path within the dataset"),
    "format": (info(data_path="{chunk_index.__class__}"), "cannot be filled in"),
    "width": (info(data_path="{chunk_index:0999999999d}"), "cannot be read"),
    "shape": (features("observation.images.front", shape=[48, 64, 10**9]), "expected \\[height, width, 3\\]"),
    "another size": (features("observation.images.front", shape=[32, 64, 3]), "48 x 64, meta/info.json says 32"),
    "another size stored": (features("observation.images.wrist", shape=[8, 8, 3]), "16 x 24, expected 8 x 8"),
    "no episodes": (lambda folder: shutil.rmtree(folder / "meta/episodes"), "without an episode"),
    "broken episodes": (broken_table("meta/episodes/chunk-000/file-000.parquet"), "does not describe episodes"),
    "broken data": (broken_table("data/chunk-000/file-000.parquet"), "cannot be read"),
    "missing data": (lambda folder: shutil.rmtree(folder / "data"), "cannot be read: No such file"),
    "a pipe": (fifo, "is not a regular file"),
    "lengths": (episodes(length=[9, 5]), "7 frames of episode 0, expected 9"),
    "huge": (episodes(length=[10**12, 5]), "at most 10000000 are read"),
    "none": (episodes(length=[0, 5]), "of 0 frames"),
    "NaN": (frames(action=[[np.nan, 0]] * 12), r"action\[0\]\[0\] is nan"),
    "null": (frames(action=[None] * 12), "expected lists of numbers"),
    "no video": (broken_table(VIDEO), r"file-000\.mp4 cannot be read at 0\.000 s"),
    "missing video": (lambda folder: (folder / VIDEO).unlink(), "cannot be read: No such file"),
    "a playlist": (lambda folder: (folder / VIDEO).write_text("ffconcat version 1.0\nfile x\n"), "cannot be read at"),
    "late": (episodes(**{"videos/observation.images.front/from_timestamp": [100.0, 0.0]}), "it has no frame there"),
    "a path as picture": (long_picture, "step 0 has no picture in the file"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD)
def test_what_is_no_dataset(dataset, damage, message):
    damage(dataset)
    with pytest.raises(DatasetError, match=message) as caught:
        view = EpisodeView(open_recordings(dataset).episode(0), CONTRACT)
        view.observation(0)
    assert "\n" not in str(caught.value)


def test_state_and_action_must_be_there(dataset):
    content = json.loads((dataset / "meta/info.json").read_text())
    kept = {name: feature for name, feature in content["features"].items() if name != "observation.state"}
    change(dataset / "meta/info.json", features=kept)
    with pytest.raises(DatasetError, match=r"observation\.state is missing, it has action"):
        open_recordings(dataset)


def test_what_is_there_instead(tmp_path):
    with pytest.raises(RobotError, match=r"no such file or folder; expected an episode \(\.npz\), a folder of them"):
        open_robot(f"replay:{tmp_path / 'none'}")
    with pytest.raises(RobotError, match=r"neither meta/info\.json nor an \.npz file in this folder"):
        open_robot(f"replay:{tmp_path}")


def test_without_the_packages_one_line_says_what_to_install(data, monkeypatch):
    monkeypatch.setattr(lerobot_index, "find_spec", lambda name: None)
    with pytest.raises(RobotError, match=r"needs pyarrow and av: pip install 'ki-edge\[record\]'$"):
        open_robot(f"replay:{data / 'lerobot_dataset' / 'v3'}")
