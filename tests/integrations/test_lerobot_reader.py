"""The real LeRobot reads what a run recorded, in the environment of its own that `conftest.py` finds or makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ki_edge.recordings.collection import open_recordings
from ki_edge.recordings.episodes import EpisodeView
from ki_runtime.monitoring.request_recorder import RequestRecorder
from ki_runtime.recording.dataset import DatasetWriter
from ki_runtime.recording.features import Features, Frame

from ..runtime.monitored import CONTRACT, POLICY, answer, answered, level
from ..runtime.recorded_runs import STEPS, Cut, Plan, record

pytestmark = pytest.mark.integration
READ = """
import json, sys
import numpy as np, torch
from lerobot.datasets.compute_stats import aggregate_stats
from lerobot.datasets.lerobot_dataset import LeRobotDataset
import lerobot
found = {}
for folder in sys.argv[1:]:
    data = LeRobotDataset("local/run", root=folder, video_backend="pyav")
    rows = [data[i] for i in range(len(data))]
    plain = lambda value: value.tolist() if isinstance(value, torch.Tensor) else value
    cameras = data.meta.camera_keys
    ahead = {"action": [k / data.fps for k in range(3)]}
    only = {"episodes": [data.num_episodes - 1], "delta_timestamps": ahead}
    last = LeRobotDataset("local/run", root=folder, video_backend="pyav", **only)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    found[folder] = {
        "version": lerobot.__version__, "episodes": data.num_episodes, "fps": data.fps, "batches": len(list(loader)),
        "rows": [{k: plain(v) for k, v in row.items() if k not in cameras} for row in rows],
        "levels": [{k: row[k].mean().item() * 255 for k in cameras} for row in rows],
        "sizes": {k: list(rows[0][k].shape) for k in cameras},
        "last": [plain(last[i]["action"]) for i in range(len(last))],
        "success": [data.meta.episodes[i]["ki.success"] for i in range(data.num_episodes)],
        "stats": {k: {n: np.asarray(v).tolist() for n, v in s.items()} for k, s in data.meta.stats.items()},
    }
print(json.dumps(found))
"""
AGGREGATE = """
import json, sys
import numpy as np
from lerobot.datasets.compute_stats import aggregate_stats, get_feature_stats
episodes = [{k: np.array(v) for k, v in one.items()} for one in json.load(sys.stdin)]
of = lambda x: get_feature_stats(x, axis=0, keepdims=x.ndim == 1)
total = aggregate_stats([{k: of(v) for k, v in one.items()} for one in episodes])
print(json.dumps({k: {n: np.asarray(v).tolist() for n, v in s.items()} for k, s in total.items()}))
"""


@pytest.fixture(scope="module")
def lerobot(lerobot_python, tmp_path_factory):
    """lerobot(script, *arguments, input=None) -> the JSON that a script prints in LeRobot's interpreter."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def call(script, *arguments, input=None):
        command = [str(lerobot_python), "-c", script, *map(str, arguments)]
        environment = {**kept, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("hub"))}
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=550, check=False, env=environment, input=input
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return call


def test_lerobot_reads_the_requests_that_a_server_recorded(lerobot, tmp_path):
    """Of clients that took turns: the episode that began first is the second of the dataset."""
    made = RequestRecorder(tmp_path, reserve=0)
    made.loaded(CONTRACT, POLICY)
    for number in range(5):
        made.handled(answered(number))
        made.handled(answered(number + 50, "[::1]:2"))
    made.left("[::1]:2", "closed")
    made.close()
    (folder,) = tmp_path.iterdir()
    found = lerobot(READ, folder)[str(folder)]
    assert found["episodes"] == 2 and found["fps"] == 10 and found["sizes"]["observation.images.front"] == [3, 48, 64]
    numbers = [*range(50, 55), *range(5)]
    for at, (number, row, levels) in enumerate(zip(numbers, found["rows"], found["levels"], strict=True)):
        assert (row["index"], row["episode_index"], row["frame_index"]) == (at, at // 5, at % 5)
        assert row["observation.state"] == [number, 0.5, -1.0] and row["action"] == [number, -number]
        assert row["ki.answer"] == answer(number)["actions"].ravel().tolist() and row["task"] == "count"
        assert all(abs(value - level(number)) < 3 for value in levels.values())


def test_lerobot_reads_what_a_run_recorded(lerobot, tmp_path):
    record(tmp_path / "whole", episodes=3, seed=4, every_tick=True)
    record(tmp_path / "asked", episodes=2)
    with pytest.raises(Exception, match="broken"):
        record(tmp_path / "cut", policy=Cut(), episodes=5)
    record(tmp_path / "slow", rate=12.5, policy=Slow(), robot=SlowRobot(), every_tick=True)
    folders = [tmp_path / name for name in ("whole", "asked", "cut", "slow")]
    found = lerobot(READ, *folders)
    for folder in folders:
        check(found[str(folder)], folder)
    assert found[str(folders[0])]["success"] == [True, False, True]
    assert found[str(folders[2])]["success"] == [True, False, None]
    assert found[str(folders[0])]["fps"] == 20 and found[str(folders[3])]["fps"] == 12.5
    sys.stdout.write(f"LeRobot {found[str(folders[0])]['version']}\n")


def check(found, folder):
    """Row by row what our own reader gives, and pictures to a grey level."""
    recordings = open_recordings(folder)
    assert found["episodes"] == len(recordings)
    at = 0
    for number in range(len(recordings)):
        episode = recordings.episode(number)
        view = EpisodeView(episode, Plan.contract)
        for step in range(len(view)):
            row, levels = found["rows"][at], found["levels"][at]
            observation = view.observation(step)
            assert row["observation.state"] == episode.state[step].tolist()
            assert row["action"] == episode.actions[step].tolist() and row["task"] == "count"
            assert (row["episode_index"], row["frame_index"], row["index"]) == (number, step, at)
            for key, name in (("front", "front"), ("wrist.left", "wrist/left")):
                assert abs(levels[f"observation.images.{key}"] - observation["images"][name].mean()) < 0.1
            at += 1
        if number == len(recordings) - 1:
            chunks = np.array(found["last"])
            rows = np.minimum(np.arange(len(view))[:, None] + np.arange(3), len(view) - 1)
            np.testing.assert_array_equal(chunks, episode.actions[rows])
    assert at == len(found["rows"]) and found["batches"] == -(-at // 4)
    assert found["sizes"] == {"observation.images.front": [3, 32, 48], "observation.images.wrist.left": [3, 16, 32]}


def test_lerobot_reads_pictures_that_are_stored_one_by_one(lerobot, tmp_path):
    features = Features(10.0, "toy", 2, ("x", "y"), {"front": (24, 32)}, ("position",), "image")
    writer, grey = DatasetWriter(tmp_path / "set", features), []
    for length in (3, 4):
        writer.begin()
        for step in range(length):
            grey.append(20 * len(grey))
            vector = np.full(2, step, np.float32)
            seen = {"front": np.full((24, 32, 3), grey[-1], np.uint8)}
            writer.add(Frame(step, 0.1 * step, vector, vector, vector, seen, 0.0, 0, step, 0.1, False, (), "go"))
        writer.finish({"ki.stopped": False})
    found = lerobot(READ, tmp_path / "set")[str(tmp_path / "set")]
    assert found["episodes"] == 2 and found["sizes"] == {"observation.images.front": [3, 24, 32]}
    np.testing.assert_allclose([row["observation.images.front"] for row in found["levels"]], grey, atol=1e-3)
    assert found["last"][-1] == [[3.0, 3.0]] * 3


def test_statistics_are_lerobots(lerobot, tmp_path):
    """Its quantiles of one episode come from histograms of 5000 bins; ours are exact."""
    record(tmp_path, episodes=3, every_tick=True)
    recordings = open_recordings(tmp_path)
    episodes = [recordings.episode(number) for number in range(3)]
    given = [{"observation.state": one.state.tolist(), "action": one.actions.tolist()} for one in episodes]
    theirs = lerobot(AGGREGATE, input=json.dumps(given))
    ours = json.loads((tmp_path / "meta/stats.json").read_text())
    for feature, values in theirs.items():
        assert ours[feature].keys() == values.keys()
        for name, value in values.items():
            spread = 1.0 if name.startswith("q") else 1e-6  # of nine numbers: they interpolate otherwise
            np.testing.assert_allclose(ours[feature][name], value, atol=spread, err_msg=f"{feature} {name}")
    assert np.shape(ours["observation.images.front"]["mean"]) == (3, 1, 1)
    assert ours["observation.images.front"]["count"] == [6] and len(episodes[0]) == STEPS


def test_cut_off_at_any_moment_lerobot_reads_the_finished_episodes(lerobot, tmp_path, monkeypatch):
    """Copies of the folder at every moment at which a file gets its name."""
    import shutil

    replace, moments = Path.replace, []

    def watched(self, target):
        done = replace(self, target)
        info = tmp_path / "run" / "meta/info.json"
        if info.exists():
            moments.append(json.loads(info.read_text())["total_episodes"])
            shutil.copytree(tmp_path / "run", tmp_path / f"left{len(moments)}")
        return done

    monkeypatch.setattr(Path, "replace", watched)
    record(tmp_path / "run", episodes=2, every_tick=True)
    monkeypatch.undo()
    folders = [tmp_path / f"left{number + 1}" for number in range(len(moments))]
    found = lerobot(READ, *folders)
    assert {1, 2} <= set(moments) and len(moments) >= 6
    for folder, done in zip(folders, moments, strict=True):
        assert found[str(folder)]["episodes"] == done and len(found[str(folder)]["rows"]) == done * STEPS
        assert found[str(folder)]["rows"][-1]["episode_index"] == done - 1


class Slow(Plan):
    """A rate that is no whole number."""

    contract = Plan.contract.from_json(Plan.contract.to_json() | {"control_hz": 12.5})


class SlowRobot:
    """`Filmed` at that rate."""

    control_hz = 12.5

    def __init__(self):
        from ..runtime.recorded_runs import Filmed

        self._robot = Filmed()

    def __getattr__(self, name):
        return getattr(self._robot, name)
