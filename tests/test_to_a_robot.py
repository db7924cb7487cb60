"""From recordings to a moving robot: the commands of docs/training.md, with fewer steps."""

import importlib
import json
import shutil

import pytest

from .documents import ROOT, Command, blocks
from .test_documentation import SCRIPTS

for package in ("pyarrow", "av"):
    pytest.importorskip(package, reason="pip install 'ki-edge[record]'")
SHORT = [
    "--steps",
    "2",
    "--eval-every",
    "2",
    "--held-out",
    "0.3",
    "--batch",
    "4",
    "--flow-draws",
    "1",
    "--workers",
    "0",
]
PAGE = ROOT / "docs" / "training.md"


def words_of(number):
    """The words of a command of the page's first block."""
    block = next(iter(blocks(PAGE)))
    return Command(block.page, block.lines[number], True).words


def call(words):
    module, _, function = SCRIPTS[words[0]].partition(":")
    return getattr(importlib.import_module(module), function)(words[1:])


def runs(out):
    """What a recorded run says of its episodes."""
    info = json.loads((out / "meta" / "info.json").read_text())
    return info["total_episodes"], info["total_frames"]


def test_the_page_leads_from_recordings_to_a_moving_robot(fetch_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(fetch_bundle, "my_bundle")
    record, train, export, run = (words_of(number) for number in range(4))
    assert [words[0] for words in (record, train, export, run)] == ["ki-run", "ki-train", "ki-export", "ki-run"]
    assert call(record) == 0
    assert runs(tmp_path / "build/my_run")[0] == 3
    assert call([*train, *SHORT]) == 0
    assert call(export) == 0
    assert call([*run, "--record", "again"]) == 0
    episodes, frames = runs(tmp_path / "again")
    assert episodes == 3 and frames > 30  # it moved, as far as two steps have taught it


def test_a_dataset_of_the_older_version_leads_there_too(data, tmp_path):
    out, map_file = str(tmp_path / "policy"), tmp_path / "map.json"
    map_file.write_text('{"state": ["observation.joints", "observation.gripper"]}')
    dataset = str(data / "lerobot_dataset" / "many_v21")
    assert call(["ki-train", dataset, "-o", out, "--map", str(map_file), "--horizon", "4", *SHORT]) == 0
    assert call(["ki-export", f"{out}/last", "-o", f"{out}/bundle", "--target", "ort", "--no-verify"]) == 0
    assert (tmp_path / "policy" / "bundle" / "manifest.json").is_file()
