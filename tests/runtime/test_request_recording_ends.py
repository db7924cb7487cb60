"""`ki-serve --record` where a disk is full, a limit is reached, or the process is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ki_edge.recordings.collection import open_recordings
from ki_edge.recordings.episodes import EpisodeView
from ki_runtime.monitoring import request_recorder
from ki_runtime.monitoring.request_recorder import RequestRecorder

from .monitored import CONTRACT, ROBOT, answered, seen
from .recorded_requests import OTHER, check, datasets, recorder

pytest.importorskip("pyarrow", reason="pip install 'ki-edge[record]'")
pytest.importorskip("av", reason="pip install 'ki-edge[record]'")


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


KILLED = """
import sys, time
from pathlib import Path
from tests.runtime.monitored import answered
from tests.runtime.recorded_requests import recorder
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
