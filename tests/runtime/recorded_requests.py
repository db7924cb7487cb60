"""A recorder of requests, and what it recorded, read by our own reader."""

import numpy as np

from ki_edge.recordings.collection import open_recordings
from ki_edge.recordings.episodes import EpisodeView
from ki_runtime.monitoring.request_recorder import RequestRecorder

from .monitored import CONTRACT, POLICY, level

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
