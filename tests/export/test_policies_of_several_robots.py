"""A checkpoint that was trained on several robots: the first one's policy, and that of each other by its name."""

import json
import shutil
from dataclasses import replace
from unicodedata import normalize

import pytest

from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import ArgumentError
from ki_edge.policy.contract import Camera, PolicyContract
from ki_edge.policy.normalize import read_norm_stats, write_norm_stats
from ki_export.policies import PolicyRequest, describe_policy
from ki_export.source.cli import main


@pytest.fixture
def several(fetch_checkpoint, tmp_path):
    """The shipped policy, and beside its robot another of three numbers."""
    folder = shutil.copytree(fetch_checkpoint, tmp_path / "several")
    place = folder / "robots" / "other-arm"
    place.mkdir(parents=True)
    own = PolicyContract.load(folder / "contract.json")
    cameras = tuple(Camera(camera.slot, f"seen_{camera.slot}") for camera in own.cameras)
    names = ("a", "b", "c")
    replace(own, cameras=cameras, state_dim=2, action_dim=3, action_names=names).save(place / "contract.json")
    stats = read_norm_stats(folder / "assets")
    few = {"state": 2, "actions": 3}
    write_norm_stats(
        place / "norm_stats.json",
        {
            name: replace(stats[name], **{f: getattr(stats[name], f)[:n] for f in ("mean", "std", "q01", "q99")})
            for name, n in few.items()
        },
    )
    return folder


def describe(folder, **request):
    opened = Checkpoint.open(folder)
    return describe_policy(opened.path, opened.format, opened.settings, opened.config, PolicyRequest(**request))


def test_the_first_robots_policy_is_the_checkpoints(several):
    found = describe(several)
    assert found.missing == () and found.contract.action_names == ("x", "y", "z", "gripper")


def test_another_robots_has_its_contract_and_statistics(several):
    found = describe(several, contract="other-arm")
    assert found.missing == () and found.contract.action_names == ("a", "b", "c")
    assert found.statistics.source == "robots/other-arm/norm_stats.json"
    assert found.statistics.features["actions"].dim == 3
    assert found.known["action_dim"] == "robots/other-arm/contract.json"
    assert found.files.codec is not None and found.tokenizer.source == "assets/tokenizer.model"


def test_a_name_may_be_spelt_with_letters_taken_apart(several):
    """As some file systems keep them, or some terminals send them."""
    robots = several / "robots"
    for kept, given in (("NFC", "NFD"), ("NFD", "NFC")):
        robots = next(robots.iterdir()).rename(robots / normalize(kept, "Würfel")).parent
        assert describe(several, contract=normalize(given, "Würfel")).contract.action_names == ("a", "b", "c")


def test_its_statistics_are_never_the_first_robots(several):
    (several / "robots" / "other-arm" / "norm_stats.json").unlink()
    found = describe(several, contract="other-arm")
    assert found.statistics is None and len(found.missing) == 1
    assert found.missing[0].startswith("no robots/other-arm/norm_stats.json: no norm_stats.json beside the robot's")
    assert describe(several, contract="other-arm", assets=several / "assets").missing == ()


@pytest.mark.parametrize("name", ["droid", "../other-arm", "other-arm/../../robots/other-arm", "robots/other-arm"])
def test_any_other_contract_is_refused_with_the_robots_there_are(several, name):
    with pytest.raises(ArgumentError, match=r"records its own in contract\.json; leave it away; .*: other-arm$"):
        describe(several, contract=name)


def test_the_command_takes_the_robots_name(several, capsys):
    assert main([str(several), "--contract", "other-arm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main([str(several), "--contract", "nobody"]) == 2
    assert "--contract takes the other robots that it was trained on: other-arm" in capsys.readouterr().err
