"""Datasets that LeRobot's own writers made, and `open_data` on them."""

import json
import shutil

import pytest

from ki_edge.planning.settings import TrainSettings
from ki_edge.train.data.opening import open_data
from ki_edge.train.data.start import Start

PARTS = {"state": ["observation.joints", "observation.gripper"]}


@pytest.fixture
def copy(data, tmp_path):
    """copy(kind) -> a dataset of make_many.py, to be damaged."""

    def made(kind="many_av1"):
        return shutil.copytree(data / "lerobot_dataset" / kind, tmp_path / kind)

    return made


@pytest.fixture
def opened(tmp_path, small_config):
    """opened(*datasets, told={...}, settings={...}, **options) -> MixedData, which is closed at the end."""
    made = []

    def open_(*datasets, told=None, settings=None, start=None, **options):
        names = [str(one) for one in datasets]
        path = tmp_path / f"map-{len(made)}.json"
        if told is None:
            told = {"datasets": {name.rsplit("/")[-1].split(":")[0]: PARTS for name in names if "many" in name}}
        path.write_text(json.dumps(told))
        values = {"steps": 5, "batch": 6, "flow_draws": 2, **(settings or {})}
        options = {"workers": 0, "horizon": 4, "map_file": path, **options}
        found = open_data(names, start or Start.from_nothing(small_config), TrainSettings(**values), **options)
        made.append(found)
        return found

    yield open_
    for one in made:
        one.close()
