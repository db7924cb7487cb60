"""`ki-serve --record`: requests and answers as datasets that replay."""

import json
import time

import numpy as np
import pytest

from ki_edge.errors import RobotError
from ki_edge.recordings.collection import open_recordings
from ki_edge.recordings.episodes import EpisodeView
from ki_runtime.monitoring import request_recorder
from ki_runtime.monitoring.request_recorder import RequestRecorder
from ki_runtime.recording import dataset
from ki_runtime.robots import open_robot

from .monitored import CONTRACT, HORIZON, POLICY, ROBOT, answer, answered, refused, seen
from .recorded_requests import OTHER, check, datasets, recorder

pq = pytest.importorskip("pyarrow.parquet", reason="pip install 'ki-edge[record]'")
pytest.importorskip("av", reason="pip install 'ki-edge[record]'")


def columns(folder, episode=0):
    table = pq.read_table(folder / f"data/chunk-000/file-{episode:03d}.parquet")
    return {name: np.array(values) for name, values in table.to_pydict().items()}


def outcome(folder, episode=0):
    return pq.read_table(folder / f"meta/episodes/chunk-000/file-{episode:03d}.parquet").to_pylist()[0]


def test_an_episode_for_each_client_though_they_take_turns(tmp_path):
    made = recorder(tmp_path)
    for number in range(6):
        made.handled(answered(number, reported={"guards.velocity": 1.0} if number == 3 else {}))
        made.handled(answered(number + 50, OTHER))
        made.handled(refused())
    made.left(OTHER, "closed")
    made.handled(answered(6))
    made.close()
    (folder,) = datasets(tmp_path)
    assert len(open_recordings(folder)) == 2 and (made.episodes, made.frames, made.dropped) == (2, 13, 0)
    check(folder, range(50, 56), 0)  # over first
    check(folder, range(7), 1)
    found = columns(folder, 1)
    np.testing.assert_array_equal(found["index"], 6 + np.arange(7))  # moved: it began as the first
    np.testing.assert_array_equal(found["episode_index"], 1)
    np.testing.assert_allclose(found["ki.time"], np.arange(7) / 10, atol=1e-5)
    np.testing.assert_allclose(found["ki.observation_age"], (42 + np.arange(7)) / 1e3, atol=1e-6)
    chunks = np.stack([answer(number)["actions"] for number in range(7)])
    np.testing.assert_array_equal(found["ki.answer"].reshape(7, HORIZON, 2), chunks)
    assert found["ki.guards"].any(axis=1).tolist() == [number == 3 for number in range(7)]
    info = json.loads((folder / "meta/info.json").read_text())
    assert info["fps"] == 10 and info["total_frames"] == 13 and info["robot_type"] == "fetch"
    said = outcome(folder, 1)
    assert said["ki.inferences"] == 7 and said["ki.dropped"] == 0 and said["ki.success"] is None
    assert not list(tmp_path.rglob("*.partial"))


def test_a_reset_begins_an_episode_and_so_does_a_reconnection(tmp_path):
    made = recorder(tmp_path)
    for number in range(6):
        made.handled(answered(number, begins=number in (0, 2)))
    made.left(ROBOT, "closed")
    made.left(ROBOT, "closed")
    made.handled(answered(6))
    made.close()
    (folder,) = datasets(tmp_path)
    for at, numbers in enumerate(([0, 1], [2, 3, 4, 5], [6])):
        check(folder, numbers, at)


def test_it_replays(tmp_path):
    made = recorder(tmp_path)
    for number in range(4):
        made.handled(answered(number))
    made.close()
    robot = open_robot(f"replay:{datasets(tmp_path)[0]}")
    robot.fit(CONTRACT)
    for number in range(4):
        assert robot.observe()["state"].tolist() == [number, 0.5, -1.0]
        robot.act(robot.recorded[number])
    assert robot.status().done


def test_long_episodes_are_cut_and_idle_ones_end(tmp_path, monkeypatch):
    monkeypatch.setattr(request_recorder, "MOST_FRAMES", 3)
    made = recorder(tmp_path)
    for number in range(7):
        made.handled(answered(number))
    monkeypatch.setattr(request_recorder, "IDLE", 0.0)
    while made.episodes < 3:  # without a word more
        time.sleep(0.01)
    (folder,) = datasets(tmp_path)
    for at, numbers in enumerate(([0, 1, 2], [3, 4, 5], [6])):
        check(folder, numbers, at)
    made.close()


def test_cameras_of_other_sizes_and_other_policies_have_datasets_of_their_own(tmp_path):
    made = recorder(tmp_path)
    made.handled(answered(0))
    made.handled(answered(1, observation=seen(1, {"front": (64, 64), "wrist/left": (33, 40)})))
    made.handled(answered(2))
    made.handled(answered(3, observation=seen(3, {"front": (48, 64)})))  # a camera less: black
    made.loaded(CONTRACT, {**POLICY, "name": "newer"})
    made.handled(answered(4))
    made.close()
    first, second, third = datasets(tmp_path)
    assert [len(open_recordings(folder)) for folder in (first, second, third)] == [2, 1, 1]
    pictures = EpisodeView(open_recordings(first).episode(1), CONTRACT).observation(1)["images"]
    assert pictures["wrist/left"].max() < 3 < pictures["front"].mean()
    assert json.loads((third / "meta/info.json").read_text())["robot_type"] == "newer"


def test_clients_beyond_what_is_open_at_once_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(request_recorder, "MOST_OPEN", 2)
    made = recorder(tmp_path)
    for number in range(3):
        for client in range(4):
            made.handled(answered(number, f"10.0.0.{client}:1"))
    made.close()
    assert made.episodes == 2 and made.frames == 6 and made.dropped == 6
    assert "6 requests were not recorded" in made.describe()


@pytest.mark.parametrize(
    "changes",
    [
        {"answer": {"text": "yes"}},
        {"answer": {"actions": np.full((HORIZON, 2), np.nan)}},
        {"answer": {"actions": np.zeros((HORIZON, 3))}},
        {"answer": {"actions": "no"}},
        {"observation": {"state": np.zeros(3)}},
        {"observation": {"images": {}, "state": np.zeros(9), "prompt": "x"}},
    ],
)
def test_what_does_not_fit_is_left_out(tmp_path, changes):
    made = recorder(tmp_path)
    made.handled(answered(0))
    made.handled(answered(1, **changes))
    made.handled(answered(2))
    made.close()
    check(datasets(tmp_path)[0], [0, 2])
    assert made.dropped == 1 and not made.stopped


def test_an_unexpected_fault_stops_it_with_one_line(tmp_path, monkeypatch):
    said = []
    made = recorder(tmp_path, say=said.append)

    def broken(*_):
        raise ZeroDivisionError("of the encoder")

    monkeypatch.setattr(dataset.DatasetWriter, "append", broken)
    for number in range(3):
        made.handled(answered(number))
    made.close()
    assert said == ["recording stopped, the server goes on: of the encoder"]


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RobotError, match=f"cannot write {folder}"):
            RequestRecorder(folder)


def test_without_the_packages_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "find_spec", lambda name: None)
    with pytest.raises(RobotError, match=r"needs pyarrow and av: pip install 'ki-edge\[record\]'$"):
        RequestRecorder(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_servers_record_into_one_folder(tmp_path):
    one, two = recorder(tmp_path), recorder(tmp_path)
    one._started = two._started
    for number in range(3):
        one.handled(answered(number))
        two.handled(answered(number + 9))
    one.close()
    two.close()
    assert sorted(columns(folder)["observation.state"][0][0] for folder in datasets(tmp_path)) == [0, 9]
