"""LeRobot's folders: what is read from them does to an observation what LeRobot itself did to it."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ki_edge.config import GemmaConfig, Pi05Config, VisionConfig
from ki_edge.errors import CheckpointError
from ki_edge.policy.contract import Camera, generic
from ki_edge.policy.normalize import NormStats, write_norm_stats
from ki_edge.policy.transforms import InputPipeline, OutputPipeline
from ki_export.policies import PolicyRequest, describe_policy
from ki_export.policies.lerobot_steps import relative_mask

from .complete import read_policy

FOLDERS = ("pi05_renamed", "pi05_relative", "pi05_identity", "pi05_old", "pi0")
GEMMA = GemmaConfig(width=16, depth=1, mlp_dim=16, num_heads=1, num_kv_heads=1, head_dim=16)
BEFORE, AFTER = "policy_preprocessor.json", "policy_postprocessor.json"


def model(variant="pi05"):
    vision = VisionConfig(width=16, depth=1, mlp_dim=16, num_heads=1, patch_size=14, image_size=224)
    return Pi05Config(vision, GEMMA, GEMMA, vocab_size=1024, action_dim=32, action_horizon=5, variant=variant)


@pytest.fixture(autouse=True)
def empty_caches(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "OPENPI_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))


@pytest.fixture
def tokenizer(tmp_path, tokenizer_model):
    (tmp_path / "words.model").write_bytes(tokenizer_model)
    return tmp_path / "words.model"


@pytest.fixture
def folder(data, tmp_path):
    """A folder of one's own to damage."""
    return shutil.copytree(data / "lerobot_policy" / "pi05_relative", tmp_path / "checkpoint")


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())


def describe(folder, **request):
    return describe_policy(folder, "lerobot", settings_of(folder), model(), PolicyRequest(**request))


def read(folder, variant="pi05", **request):
    return read_policy(folder, "lerobot", settings_of(folder), model(variant), PolicyRequest(**request))


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def step(content, name):
    return next(step for step in content["steps"] if step["registry_name"] == name)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_policy_is_lerobots(data, tokenizer, name):
    folder = data / "lerobot_policy" / name
    version = "0.4" if name == "pi05_old" else None
    files = read(folder, name.split("_")[0], tokenizer=tokenizer, lerobot_version=version)
    contract, golden = files.contract, np.load(folder / "vectors.npz")
    inputs, outputs = InputPipeline(contract, files.stats, files.tokenizer), OutputPipeline(contract, files.stats)
    images = {camera.key: np.zeros((48, 64, 3), np.uint8) for camera in contract.cameras if camera.key}
    for at, (state, task) in enumerate(zip(golden["state"], golden["tasks"], strict=True)):
        found = inputs({"images": images, "state": state, "prompt": str(task)})
        np.testing.assert_array_equal(found.state, golden["normalized_state"][at])
        text = str(golden["prompts"][at])
        np.testing.assert_array_equal(found.prompt_tokens[1:], files.tokenizer.encode_alone(text))
        assert found.prompt_tokens[0] == files.tokenizer.bos_id
        answer = np.pad(golden["model_actions"][at], ((0, 0), (0, 32 - contract.action_dim)))
        np.testing.assert_allclose(outputs(answer, found.raw_state), golden["actions"][at], rtol=0, atol=2e-6)


def test_fields_of_config_and_processors(data, tokenizer):
    contract = read(data / "lerobot_policy" / "pi05_renamed", tokenizer=tokenizer).contract
    assert contract.cameras == (
        Camera("base_0_rgb", "front", required=False),
        Camera("left_wrist_0_rgb", "image", required=False),
        Camera("empty_camera_0", None, required=False),
    )
    assert (contract.state_dim, contract.action_dim, contract.action_horizon, contract.execute) == (8, 7, 5, 3)
    assert (contract.num_steps, contract.max_token_len, contract.prompt_format) == (5, 120, "pi05")
    assert (contract.resize, contract.time_convention, contract.normalization_epsilon) == (
        "torch_pad", "lerobot", "lerobot",
    )  # fmt: skip
    assert (contract.normalization, contract.normalization_of("actions")) == ("quantile", "quantile")
    assert (contract.delta_mask, contract.pad_state_first, contract.action_names) == (None, False, None)


def test_relative_actions_leave_out_the_excluded_joints(data, tokenizer):
    contract = read(data / "lerobot_policy" / "pi05_relative", tokenizer=tokenizer).contract
    assert contract.delta_mask == (True, True, True, True, False, False)
    assert contract.action_names is not None and contract.action_names[-1] == "Gripper.pos"
    assert (contract.normalization, contract.action_normalization) == ("zscore", "quantile")
    assert [camera.key for camera in contract.cameras] == ["wrist", "front"]
    plain = read(data / "lerobot_policy" / "pi05_identity", tokenizer=tokenizer).contract
    assert plain.delta_mask == (True,) * 6  # without names LeRobot excludes nothing


def test_state_files_have_any_name(folder, tokenizer):
    (folder / "state").mkdir()
    edit(folder / AFTER, lambda c: step(c, "unnormalizer_processor").update(state_file="state/actions.safetensors"))
    next(folder.glob("*unnormalizer*.safetensors")).rename(folder / "state" / "actions.safetensors")
    files = read(folder, tokenizer=tokenizer)
    assert files.statistics is not None and "state/actions.safetensors" in files.statistics.source


def test_the_actions_statistics_are_those_of_the_postprocessor(folder, tokenizer):
    """LeRobot undoes the normalisation with the postprocessor's file, whatever the other one says."""
    before = read(folder, tokenizer=tokenizer).stats["actions"].q01
    path = next(folder.glob("*_normalizer_processor.safetensors"))
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    np.testing.assert_array_equal(read(folder, tokenizer=tokenizer).stats["actions"].q01, before)


def test_a_folder_without_processors_lists_what_it_lacks(data):
    facts = describe_policy(data / "lerobot_a", "lerobot", settings_of(data / "lerobot_a"), None, PolicyRequest())
    assert facts.contract is None
    assert facts.values["action_horizon"] == 10 and facts.known["action_horizon"] == "config.json"
    text = "; ".join(facts.missing)
    assert all(part in text for part in (BEFORE, AFTER, "--contract", "--norm-stats", "--tokenizer"))


def test_a_folder_without_processors_takes_a_contract_and_statistics(data, tmp_path, tokenizer):
    folder = data / "lerobot_a"
    slots = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    stats = NormStats(q01=[0.0] * 32, q99=[1.0] * 32)
    write_norm_stats(tmp_path / "norm_stats.json", {"state": stats, "actions": stats})
    sizes = {"state_dim": 32, "action_dim": 32, "action_horizon": 10, "max_token_len": 48}
    lerobot = {"resize": "torch_pad", "normalization_epsilon": "lerobot", "time_convention": "lerobot"}
    contract = generic(slots, **sizes, **lerobot)
    contract.save(tmp_path / "mine.json")
    request = PolicyRequest(
        contract=str(tmp_path / "mine.json"), assets=tmp_path / "norm_stats.json", tokenizer=tokenizer
    )
    facts = describe_policy(folder, "lerobot", settings_of(folder), None, request)
    assert facts.contract == contract and facts.missing == ()
    generic(slots, **{**sizes, "max_token_len": 50}, **lerobot).save(tmp_path / "mine.json")
    with pytest.raises(CheckpointError, match=r"mine\.json: max_token_len is 50, the checkpoint records 48"):
        describe_policy(folder, "lerobot", settings_of(folder), None, request)


def test_a_preset_names_robot_and_cameras_and_nothing_that_is_recorded(data, tokenizer):
    contract = read(data / "lerobot_policy" / "pi05_renamed", tokenizer=tokenizer, contract="libero").contract
    assert contract.robot == "libero"
    assert [camera.key for camera in contract.cameras] == ["observation/image", "observation/wrist_image", None]
    assert (contract.prompt_format, contract.resize, contract.action_horizon) == ("pi05", "torch_pad", 5)
    with pytest.raises(CheckpointError, match=r"3 camera slots .* which are wrist, front"):
        read(data / "lerobot_policy" / "pi05_relative", tokenizer=tokenizer, contract="libero")


BAD = [
    (BEFORE, lambda c: c["steps"].append({"registry_name": "crop", "config": {}}), "step 7 'crop' is not known"),
    (BEFORE, lambda c: c["steps"].append(c["steps"][3]), "comes twice"),
    (BEFORE, lambda c: c["steps"].insert(6, c["steps"].pop(3)), "steps in the order"),
    (BEFORE, lambda c: c["steps"].pop(4), "found the prompt steps none"),
    (BEFORE, lambda c: c["steps"].pop(3), "no step 'normalizer_processor'"),
    (BEFORE, lambda c: c.update(steps=3), "expected a list 'steps'"),
    (BEFORE, lambda c: c["steps"].append([]), "has no 'registry_name'"),
    (BEFORE, lambda c: c["steps"][3]["config"].update(eps=1e-6), "eps is 1e-06"),
    (BEFORE, lambda c: c["steps"][3]["config"]["norm_map"].update(STATE="ROBUST"), "STATE is normalised by ROBUST"),
    (BEFORE, lambda c: c["steps"][3]["config"]["norm_map"].update(VISUAL="MEAN_STD"), "pictures are normalised by"),
    (BEFORE, lambda c: c["steps"][3].update(state_file="../other.safetensors"), "outside its folder"),
    (BEFORE, lambda c: c["steps"][3].update(state_file="/etc/passwd"), "outside its folder"),
    (BEFORE, lambda c: c["steps"][3].update(state_file="gone.safetensors"), "names gone.safetensors, which is missing"),
    (BEFORE, lambda c: c["steps"][3].update(state_file=None), "no statistics of 'observation.state' for MEAN_STD"),
    (BEFORE, lambda c: c["steps"][2]["config"].update(action_names="all"), "action_names must be a list"),
    (BEFORE, lambda c: c["steps"][0]["config"].update(rename_map={"a": "c", "b": "c"}), "two features one name"),
    (AFTER, lambda c: c["steps"][1]["config"].update(enabled=False), "relative actions are on in one"),
    ("config.json", lambda c: c.update(type="smolvla"), "policy 'smolvla': expected pi05 or pi0"),
    ("config.json", lambda c: c.update(n_obs_steps=2), "n_obs_steps is 2; only 1"),
    ("config.json", lambda c: c.update(use_visual_memory=True), "use_visual_memory is True"),
    ("config.json", lambda c: c.update(min_period=0.1), "min_period is 0.1"),
    ("config.json", lambda c: c.update(chunk_size="5"), "chunk_size is '5'"),
    ("config.json", lambda c: c.update(chunk_size=6), "action_horizon is 6, the model's is 5"),
    ("config.json", lambda c: c.update(image_resolution=[96, 96]), r"image_size is \(96, 96\)"),
    ("config.json", lambda c: c.update(empty_cameras=-1), "empty_cameras is -1"),
    ("config.json", lambda c: c["output_features"]["action"].update(shape=[5]), "whose length does not fit"),
    ("config.json", lambda c: c["input_features"]["observation.state"].update(shape=[5]), "of 6 numbers need as many"),
    ("config.json", lambda c: c["output_features"].clear(), "no feature 'action', so action_dim is not recorded"),
    ("config.json", lambda c: c.update(input_features={}), "no camera among its input_features"),
    ("config.json", lambda c: c.update(input_features=[3]), "input_features must be an object"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "change", "message"), BAD)
def test_what_cannot_be_reproduced_is_refused(folder, tokenizer, file, change, message):
    edit(folder / file, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(folder, tokenizer=tokenizer)
    assert "\n" not in str(caught.value)


def test_a_pi05_prompt_for_a_pi0_model(folder, tokenizer):
    with pytest.raises(CheckpointError, match="holds the state, which this π0 model takes"):
        read(folder, "pi0", tokenizer=tokenizer)


def test_the_tokenizer_that_the_processor_names(folder, tokenizer_model, tmp_path):
    edit(folder / BEFORE, lambda c: c["steps"][5]["config"].update(tokenizer_name="someone/words"))
    with pytest.raises(CheckpointError, match=r"no assets/tokenizer\.model \(give --tokenizer, .* of someone/words"):
        read(folder)
    snapshot = tmp_path / "cache" / "models--someone--words" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.model").write_bytes(tokenizer_model)
    assert read(folder).tokenizer_file.source == "Hugging Face cache, someone/words at abc"


def test_excluded_joints_whatever_their_case():
    assert relative_mask(4, ("a", "Left_Gripper.pos", "b"), ["GRIPPER", ""]) == (True, False, True, True)
    assert relative_mask(2, None, ["gripper"]) == relative_mask(2, ("x", "y"), []) == (True, True)
