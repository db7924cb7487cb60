"""ki-inspect: what a checkpoint is, without loading it; and the least time on known devices."""

import json
import shutil

import pytest

from ki_edge.checkpoints import SafetensorsSource
from ki_edge.config import PI05
from ki_export import cli
from ki_export.policies import PolicyRequest
from ki_export.source import cli as inspect_cli
from ki_export.source import inspection
from ki_export.source.devices import DEVICES, floor_ms, stages
from ki_export.source.inspection import inspect
from ki_export.source.opening import CheckpointRef

# milliseconds by hand from the same formula, with rounded counts of weights: cameras, prompt -> device -> (16, 8 bit)
BY_HAND = {
    (2, 10): {
        "Orin": (88.1, 44.3),
        "Thor": (39.9, 20.1),
        "4090": (21.0, 10.6),
        "5090": (15.1, 7.6),
        "H200": (3.8, 1.9),
    },
    (3, 200): {"Orin": (135.1, 68.0), "4090": (33.1, 16.6), "5090": (24.6, 12.4), "H200": (5.8, 2.9)},
}


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch, tmp_path):
    """A tensor that is read fails the test, and no tokenizer of this machine is found."""

    def refuse(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(SafetensorsSource, "rows", refuse)
    for name in ("HF_HUB_CACHE", "OPENPI_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "no cache"))


@pytest.mark.parametrize("case", BY_HAND)
def test_floors(case):
    for name, expected in BY_HAND[case].items():
        device = next(device for device in DEVICES if name in device.name)
        found = stages(PI05, cameras=case[0], prompt=case[1], steps=10)
        given = [sum(floor_ms(stage, device, width) for stage in found) for width in (2, 1)]
        assert given == pytest.approx(expected, rel=0.02, abs=0.05)


def test_a_bare_model(data, capsys):
    assert inspect_cli.main([str(data / "openpi_a")]) == 0
    text = capsys.readouterr().out
    assert "format      openpi, a π0.5 of" in text
    assert "--contract" in text and "--norm-stats" in text and "--tokenizer" in text
    assert "backbone    3 layers of width 64, 1024 tokens" in text


def test_json(data, capsys):
    assert inspect_cli.main(["--json", str(data / "lerobot_a")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["variant"]) == ("lerobot", "pi05")
    assert found["geometry"]["action_horizon"] == 10
    assert found["bytes"] == (data / "lerobot_a" / "model.safetensors").stat().st_size
    assert set(found["floor_ms"]) == {device.name for device in DEVICES}


def test_a_complete_policy(fetch_checkpoint, capsys):
    assert inspect_cli.main([str(fetch_checkpoint)]) == 0
    text = capsys.readouterr().out
    assert "nothing is missing: ki-export can export the policy" in text
    cameras = text[text.index("  cameras") : text.index("  state_dim")].splitlines()
    assert [line.split() for line in cameras] == [["cameras", "front_left", "contract.json"], ["front_right"]]
    assert "too small a model for a least time" in text
    assert inspect(CheckpointRef(str(fetch_checkpoint)), PolicyRequest()).missing == []


def test_what_given_options_change(data):
    found = inspect(CheckpointRef(str(data / "openpi_a")), PolicyRequest(contract="libero"))
    assert all("--contract" not in sentence for sentence in found.missing)
    assert any("--tokenizer" in sentence for sentence in found.missing)


def test_a_step_of_training_does_not_record_its_horizon(data, tmp_path):
    shutil.copy(data / "openpi_a" / "model.safetensors", tmp_path)
    config = json.loads((data / "openpi_a" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"tiny": config["tiny"]}))
    assert "--horizon" in inspect(CheckpointRef(str(tmp_path)), PolicyRequest()).missing[0]
    for where in (CheckpointRef(str(tmp_path), horizon=10), CheckpointRef(str(tmp_path))):
        request = PolicyRequest(contract=None if where.horizon else "pi05_droid")
        assert not any("--horizon" in sentence for sentence in inspect(where, request).missing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "expected a folder, or a Hub id"),
        (["CHECKPOINT", "--revision", "main"], "is a local folder: --revision main is for Hub ids only"),
        (["CHECKPOINT", "--horizon", "3"], "records an action horizon of 10, but 3 was asked for"),
        (["CHECKPOINT", "--contract", "spot"], "neither a file nor one of droid"),
    ],
)
def test_bad_arguments_are_one_line(data, capsys, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inspect_cli.main([str(data / "openpi_a") if word == "CHECKPOINT" else word for word in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_export_without_an_output(data, capsys):
    assert cli.main([str(data / "openpi_a")]) == 2
    assert "no output: give -o BUNDLE; ki-inspect " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("contract", "heads"),
    [
        (None, ["2 cameras, 30 tokens", "3 cameras, 200 tokens"]),
        ("libero", ["2 cameras, 30 tokens", "2 cameras, 48 tokens"]),
    ],
)
def test_times_are_told_for_the_cameras_of_the_policy(data, monkeypatch, contract, heads):
    monkeypatch.setattr(inspection, "SMALLEST", 0.0)
    lines = inspect(CheckpointRef(str(data / "openpi_a")), PolicyRequest(contract=contract)).lines()
    head = next(line for line in lines if line.endswith("tokens") and " cameras, " in line)
    assert [part.strip() for part in head.split("  ") if part.strip()] == heads


def test_a_horizon_that_nobody_knows_is_not_printed(data, tmp_path):
    shutil.copy(data / "openpi_a" / "model.safetensors", tmp_path)
    config = json.loads((data / "openpi_a" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"tiny": config["tiny"]}))
    for contract in (None, "droid"):
        lines = inspect(CheckpointRef(str(tmp_path)), PolicyRequest(contract=contract)).lines()
        assert not any(line.startswith(("  action_horizon", "  execute")) for line in lines)
        assert any("an unknown number of actions" in line for line in lines)
