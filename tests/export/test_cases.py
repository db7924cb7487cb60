"""Checkpoints in the state in which users have them: ki-inspect and the export find the same, before any tracing."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ki_edge.errors import KiEdgeError
from ki_edge.policy.contract import droid, generic
from ki_export import cli, exporter
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.policies import PolicyRequest
from ki_export.source.inspection import inspect
from ki_export.source.opening import CheckpointRef

BEFORE = "policy_preprocessor.json"
RENAME = {"observation.images.front": "observation.images.base_0_rgb"}
NOWHERE = {"observation.images.wrist": "observation.images.wrist_0_rgb"}
BUFFERS = {
    f"{module}.{statistic}": np.full(6, value, np.float32)
    for module in ("normalize_inputs.buffer_observation_state", "unnormalize_outputs.buffer_action",
                   "normalize_targets.buffer_action")
    for statistic, value in (("mean", 1.0), ("std", 2.0))
}  # fmt: skip


class TracedError(Exception):
    """The export got as far as tracing."""


@pytest.fixture(autouse=True)
def no_tracing(monkeypatch, tmp_path):
    def stop(*_):
        raise TracedError

    monkeypatch.setattr(exporter, "trace_all", stop)
    for name in ("HF_HUB_CACHE", "OPENPI_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))


@pytest.fixture
def words(data):
    return data / "policies" / "droid_case" / "tokenizer.model"


def make(data, folder, kind, change=lambda folder: None):
    """A checkpoint of one's own: the weights of lerobot_a or openpi_a with the files of a case."""
    folder.mkdir()
    base = data / ("lerobot_a" if kind == "lerobot" else "openpi_a")
    shutil.copy(base / "model.safetensors", folder)
    case = data / "policies" / f"{kind}_case"
    if kind == "lerobot":
        shutil.copytree(case, folder, dirs_exist_ok=True)
    else:
        (folder / "assets" / "droid").mkdir(parents=True)
        shutil.copy(case / "config.json", folder)
        shutil.copy(case / "norm_stats.json", folder / "assets" / "droid")
    change(folder)
    return folder


def edit(name, change):
    """A change of one JSON file."""

    def apply(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def statistics(name):
    def apply(folder):
        source = next(p for p in folder.parents if (p / "stats").is_dir()) / "stats" / name
        shutil.copy(source, folder / "assets" / "droid" / "norm_stats.json")

    return apply


def old(buffers, mode, keep=()):
    """LeRobot before 0.4: no processors, buffers among the weights."""

    def apply(folder):
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, **buffers}, folder / "model.safetensors")
        for path in folder.glob("policy_*"):
            path.unlink()
        mapping = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
        edit("config.json", lambda c: c.update(normalization_mapping=mapping))(folder)

    return apply


def renamed(names):
    return edit(BEFORE, lambda c: c["steps"][0]["config"].update(rename_map=names))


def verdicts(folder, request, **where):
    """What ki-inspect and the export say: "" for one that can start, the error, or the list of what is missing."""
    try:
        inspected = "; ".join(inspect(CheckpointRef(str(folder), **where), request).missing)
    except KiEdgeError as error:
        inspected = str(error)
    try:
        export(CheckpointRef(str(folder), **where), folder.parent / "bundle", ExportOptions(policy=request))
    except TracedError:
        exported = ""
    except KiEdgeError as error:
        exported = str(error)
    assert not (folder.parent / "bundle").exists()
    return inspected, exported


CASES = {
    "lerobot": ("lerobot", lambda folder: None, {}, ""),
    "droid": ("droid", lambda folder: None, {"contract": "droid"}, ""),
    "res": ("lerobot", edit("config.json", lambda c: c.update(image_resolution=[256, 256])), {},
            r"image_size is \(256, 256\), the model's is \(224, 224\)"),
    "wide": ("lerobot", edit("config.json", lambda c: c.update(max_action_dim=16)), {}, "model_action_dim is 16"),
    "chunk": ("lerobot", edit("config.json", lambda c: c.update(n_action_steps=11)), {}, "execute must be at most 10"),
    "norm_noq": ("droid", statistics("norm_noq.json"), {"contract": "droid"}, "'state' has no q01, q99"),
    "norm_nan": ("droid", statistics("norm_nan.json"), {"contract": "droid"}, "norm_stats.json: actions"),
    "no_stats": ("droid", lambda f: shutil.rmtree(f / "assets"), {"contract": "droid"}, "no norm_stats.json"),
    "no_contract": ("droid", lambda folder: None, {}, "does not record robot, cameras"),
    "pi0": ("droid", lambda folder: None, {"contract": "pi0_droid"}, "is for a π0, and .* give a contract for that"),
    "fast": ("droid", lambda folder: None, {"contract": "droid", "fast": "fast"}, "FAST head has ids up to 257023"),
    "rename": ("lerobot", renamed(RENAME), {}, ""),
    "rename_nowhere": ("lerobot", renamed({**RENAME, **NOWHERE}), {}, "which no camera or state of the policy has"),
    "rename_action": ("lerobot", renamed({"observation.a": "action"}), {}, "which no camera or state"),
    "rename_away": ("lerobot", renamed({"observation.images.base_0_rgb": "observation.images.left_wrist_0_rgb"}), {},
                    "from a feature of the policy and gives it to none"),
    "rename_swap": ("lerobot", renamed({"observation.images.base_0_rgb": "observation.images.left_wrist_0_rgb",
                    "observation.images.left_wrist_0_rgb": "observation.images.base_0_rgb"}), {}, ""),
    "rename_collides": ("lerobot", renamed({"observation.left_wrist_0_rgb": "observation.images.base_0_rgb"}), {},
                        "two cameras of the policy have the short name 'left_wrist_0_rgb'"),
    "old_norm": ("lerobot", old(BUFFERS, "QUANTILES"), {}, "LeRobot before 0.4 .* has mean, std, not q01 and q99"),
    "old_norm_unset": ("lerobot", old({**BUFFERS, "unnormalize_outputs.buffer_action.mean": np.full(6, np.inf, "f4")},
                       "MEAN_STD"), {}, "was never set: its mean is infinite"),
    "old_norm_mode": ("lerobot", old(BUFFERS, "ROBUST"), {}, "STATE is 'ROBUST', expected one of"),
    "no_chunk": ("lerobot", edit("config.json", lambda c: c.pop("chunk_size")), {}, "action horizon is not recorded"),
}  # fmt: skip


@pytest.fixture
def stats(data, tmp_path):
    return shutil.copytree(data / "policies" / "droid_case", tmp_path / "stats")


@pytest.mark.parametrize("name", CASES)
def test_inspect_and_export_never_disagree(data, tmp_path, words, stats, name):
    kind, change, request, message = CASES[name]
    folder = make(data, tmp_path / "checkpoint", kind, change)
    if "fast" in request:
        request = {**request, "fast": data / "fast"}
    inspected, exported = verdicts(folder, PolicyRequest(tokenizer=words, **request))
    assert bool(inspected) == bool(exported) == bool(message), (inspected, exported)
    assert inspected in exported
    for text in (inspected, exported):
        assert re.search(message, text), text
        assert "\n" not in text


def test_the_horizon_of_a_preset_with_several_is_asked_for(data, tmp_path, words):
    folder = make(data, tmp_path / "checkpoint", "droid", edit("config.json", lambda c: c.pop("action_horizon")))
    request = PolicyRequest(tokenizer=words, contract="droid")
    inspected, exported = verdicts(folder, request)
    assert inspected in exported and "--horizon" in inspected
    assert "15 (pi05_droid), 16 (pi05_droid_finetune)" in inspected
    found = inspect(CheckpointRef(str(folder)), request)
    assert found.to_json()["geometry"]["action_horizon"] is None and found.to_json()["contract"] is None
    assert not any("action_horizon" in line for line in found.lines())
    for where, contract, horizon, source in (
        ({"horizon": 16}, "droid", 16, "--horizon"),
        ({}, "pi05_droid_finetune", 16, "--contract pi05_droid_finetune"),
        ({"horizon": 12}, "pi05_droid", 12, "--horizon"),
    ):
        request = PolicyRequest(tokenizer=words, contract=contract)
        assert verdicts(folder, request, **where) == ("", "")
        policy = inspect(CheckpointRef(str(folder), **where), request).found.policy
        assert policy.contract.action_horizon == horizon and policy.known["action_horizon"] == source
        assert policy.files.contract == policy.contract and set(policy.known) == set(policy.contract.to_json())


def test_a_horizon_that_contradicts_a_contract_file(data, tmp_path, words):
    folder = make(data, tmp_path / "checkpoint", "droid", edit("config.json", lambda c: c.pop("action_horizon")))
    droid().save(tmp_path / "mine.json")
    request = PolicyRequest(tokenizer=words, contract=str(tmp_path / "mine.json"))
    for text in verdicts(folder, request, horizon=3):
        assert "mine.json: action_horizon is 15, --horizon says 3" in text
    assert verdicts(folder, request) == ("", "")


def test_all_that_is_missing_at_once_and_the_command(data, tmp_path, capsys):
    folder = make(data, tmp_path / "checkpoint", "droid", edit("config.json", lambda c: c.pop("action_horizon")))
    shutil.rmtree(folder / "assets")
    assert cli.main([str(folder), "-o", str(tmp_path / "bundle"), "--prompt", "tidy up"]) == 2
    error = capsys.readouterr().err
    assert error.count("ki-export:   - ") == 4
    for part in ("--horizon", "--contract", "--norm-stats", "--tokenizer", "hf download", "4.3 MB"):
        assert part in error
    asked = "--horizon ACTIONS --contract NAME --norm-stats NORM_STATS_JSON --tokenizer TOKENIZER_MODEL"
    command = f"ki-export:   ki-export {folder} -o BUNDLE --prompt 'tidy up' {asked}"
    assert error.rstrip().endswith(command)


def test_buffers_of_old_lerobot_are_its_statistics(data, tmp_path, words):
    folder = make(data, tmp_path / "checkpoint", "lerobot", old(BUFFERS, "MEAN_STD"))
    slots = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    lerobot = {"resize": "torch_pad", "normalization_epsilon": "lerobot", "time_convention": "lerobot"}
    sizes = {"state_dim": 6, "action_dim": 6, "action_horizon": 10}
    contract = generic(slots, **sizes, **lerobot, normalization="zscore", action_normalization="zscore")
    contract.save(tmp_path / "mine.json")
    request = PolicyRequest(tokenizer=words, contract=str(tmp_path / "mine.json"))
    assert verdicts(folder, request) == ("", "")
    files = inspect(CheckpointRef(str(folder)), request).found.policy.files
    np.testing.assert_array_equal(files.stats["state"].mean, [1.0] * 6)
    np.testing.assert_array_equal(files.stats["actions"].std, [2.0] * 6)
    generic(slots, **sizes, **lerobot).save(tmp_path / "mine.json")
    for text in verdicts(folder, request):
        assert "action_normalization is quantile, the checkpoint records zscore" in text


def test_the_model_alone_ignores_the_policy(data, tmp_path):
    folder = make(data, tmp_path / "checkpoint", "lerobot", old(BUFFERS, "QUANTILES"))
    assert inspect(CheckpointRef(str(folder)), PolicyRequest(), model_only=True).missing == []
    with pytest.raises(TracedError):
        export(folder, tmp_path / "bundle", ExportOptions(model_only=True))
