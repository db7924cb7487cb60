"""`ki-serve --record`: requests and answers as datasets that replay, and what is left when a disk is full."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ki_edge.errors import RobotError
from ki_edge.recordings.collection import open_recordings
from ki_edge.recordings.episodes import EpisodeView
from ki_runtime.monitoring import request_recorder
from ki_runtime.monitoring.request_recorder import RequestRecorder
from ki_runtime.recording import dataset
from ki_runtime.robots import open_robot

from .monitored import CONTRACT, HORIZON, POLICY, ROBOT, answer, answered, level, refused, seen

pq = pytest.importorskip("pyarrow.parquet", reason="pip install 'ki-edge[record]'")
pytest.importorskip("av", reason="pip install 'ki-edge[record]'")

OTHER = "[::1]:40002"


def recorder(folder, **options):
    made = RequestRecorder(folder, **{"reserve": 0, "say": [].append, **options})
    made.loaded(CONTRACT, POLICY)
    return made


def datasets(folder):
    return sorted(path for path in folder.iterdir() if path.is_dir())


def check(folder, numbers, at=0):
    """One episode of these requests, read by our own reader."""
    view = EpisodeView(open_recordings(folder).episode(at), CONTRACT)
    assert len(view) == len(numbers)
    for step, number in enumerate(numbers):
        observation = view.observation(step)
        assert observation["state"].tolist() == [number, 0.5, -1.0] and observation["prompt"] == "count"
        assert observation["images"]["front"].shape == (48, 64, 3)
        assert observation["images"]["wrist/left"].shape == (32, 40, 3)
        for picture in observation["images"].values():
            assert abs(picture.mean() - level(number)) < 3
        np.testing.assert_array_equal(view.episode.actions[step], [number, -number])


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


def test_it_stops_at_its_limit_and_keeps_what_it_has(tmp_path):
    (tmp_path / "older").write_bytes(b"x" * 50_000)
    said = []
    made = recorder(tmp_path, limit=1_000_000, say=said.append)
    for number in range(2000):
        made.handled(answered(number, begins=number % 20 == 0))
        if number % 100 == 0:
            drained(made)
    made.close()
    (folder,) = datasets(tmp_path)
    assert len(said) == 1 and "recording stopped, the server goes on" in said[0] and "the limit is 0.001 GB" in said[0]
    recordings = open_recordings(folder)
    assert len(recordings) == made.episodes > 2 and made.frames < 2000
    for at in range(len(recordings)):
        assert len(EpisodeView(recordings.episode(at), CONTRACT).pictures(0)) == 2
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 600_000 < size <= 1_000_000 and not list(tmp_path.rglob("*.partial"))
    again = []
    recorder(tmp_path, limit=100_000, say=again.append).close()
    assert len(again) == 1 and "the limit is" in again[0]  # of all that is there, also from before


def test_space_is_left_to_others(tmp_path):
    said = []
    made = recorder(tmp_path, reserve=1 << 60, say=said.append)
    made.handled(answered(0))
    made.close()
    assert len(said) == 1 and "are left to others" in said[0] and datasets(tmp_path) == []


def drained(made):
    """Wait until nothing waits to be recorded."""
    done = threading.Event()
    while made._work._items:
        done.wait(0.005)


def test_a_full_disk_stops_the_recording_and_not_the_server(tmp_path, largest_file):
    said = []
    made = recorder(tmp_path, say=said.append)
    for number in range(5):
        made.handled(answered(number))
    made.left(ROBOT, "closed")
    while made.episodes < 1:
        time.sleep(0.005)
    with largest_file(300):
        for number in range(300):
            made.handled(answered(number))
            made.handled(answered(number, OTHER))
        made.left(ROBOT, "closed")
        while not said:  # the last that it does
            time.sleep(0.005)
    made.handled(answered(1))
    made.close()
    (folder,) = datasets(tmp_path)
    assert len(said) == 1 and "File too large" in said[0] and "cannot write" in said[0]
    assert len(open_recordings(folder)) == 1 and made.episodes == 1
    check(folder, range(5))
    assert not list(tmp_path.rglob("*.partial"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 kB."""
    mount = tmp_path / "mount"
    mount.mkdir()
    options = ["-t", "tmpfs", "-o", "size=600k", "none", str(mount)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small file system takes root and mount")
    done = subprocess.run(["mount", *options], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system takes root and mount: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_real_full_disk(small_disk):
    said = []
    made = recorder(small_disk / "run", say=said.append)
    rng = np.random.default_rng(0)
    for number in range(3000):
        noise = {name: rng.integers(0, 256, (64, 64, 3), np.uint8) for name in ("front", "wrist/left")}
        made.handled(answered(number, observation={**seen(number), "images": noise}, begins=number in (5, 10)))
        if number % 50 == 0:
            drained(made)
        if made.stopped:
            break
    made.close()
    assert len(said) == 1 and "No space left on device" in said[0]
    recordings = open_recordings(datasets(small_disk / "run")[0])
    assert len(recordings) in (made.episodes, made.episodes + 1) and made.episodes >= 2
    assert not list(small_disk.rglob("*.partial"))
    for at in range(len(recordings)):
        assert EpisodeView(recordings.episode(at), CONTRACT).observation(0)["prompt"] == "count"


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


KILLED = """
import sys, time
from pathlib import Path
from tests.runtime.monitored import answered
from tests.runtime.test_request_recording import recorder
made = recorder(Path(sys.argv[1]))
number = 0
while True:
    for client in range(3):
        made.handled(answered(number % 8, f"10.0.0.{client}:1", begins=number % 8 == 0))
    number += 1
    print(made.episodes, flush=True)
    time.sleep(0.002)
"""


def test_killed_at_any_moment_finished_episodes_are_readable(tmp_path):
    root = Path(__file__).parents[2]
    for number, most in enumerate((3, 5, 8)):
        folder = tmp_path / str(number)
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, folder], cwd=root, stdout=subprocess.PIPE, text=True
        ) as run:
            assert run.stdout is not None
            finished = 0
            while finished < most:
                finished = int(run.stdout.readline())
            run.send_signal(signal.SIGKILL)
        recordings = open_recordings(datasets(folder)[0])
        assert len(recordings) >= finished
        for at in range(len(recordings)):
            check(datasets(folder)[0], range(len(recordings.episode(at))), at)


def test_every_moment_of_a_commit(tmp_path, monkeypatch):
    """A copy before and after each file that gets its name: what SIGKILL would leave."""
    moments, replace = [], Path.replace

    def watched(self, target):
        for call in (lambda: None, lambda: replace(self, target)):
            call()
            for folder in datasets(tmp_path / "run"):
                if (folder / "meta/info.json").exists():
                    shutil.copytree(folder, tmp_path / "left" / str(len(moments)))
                    moments.append(json.loads((folder / "meta/info.json").read_text())["total_episodes"])

    monkeypatch.setattr(Path, "replace", watched)
    made = recorder(tmp_path / "run")
    for number in range(3):
        for client in (ROBOT, OTHER):
            made.handled(answered(number, client, begins=True))
    made.close()
    assert made.episodes == 6 and len(moments) > 50
    for at, done in enumerate(moments):
        recordings = open_recordings(tmp_path / "left" / str(at))
        assert done <= len(recordings) <= done + 1
        recordings.episode(len(recordings) - 1)


def test_memory_and_threads_are_bounded(tmp_path, monkeypatch):
    """A disk that hangs: the server's thread goes on, what waits is bounded, the rest is counted."""
    hang = threading.Event()
    monkeypatch.setattr(RequestRecorder, "_record", lambda self, request: hang.wait(60))
    made = recorder(tmp_path)
    for number in range(3000):
        made.handled(answered(number))
    assert made.dropped >= 3000 - request_recorder.WAITING - 1 and len(made._work._items) <= request_recorder.WAITING
    assert made._missed[ROBOT] == made.dropped
    for number in range(3):
        made.handled(answered(number, received=request_recorder.WAITING_BYTES + 1))
    hang.set()
    made.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
