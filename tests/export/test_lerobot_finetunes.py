"""LeRobot's policies whose config.json is not the robot's, or not what LeRobot itself goes by."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ki_edge.config import GemmaConfig, Pi05Config, VisionConfig
from ki_edge.errors import CheckpointError, ObservationError
from ki_edge.policy.transforms import InputPipeline
from ki_export.policies import PolicyRequest, describe_policy

from .complete import read_policy

GEMMA = GemmaConfig(width=16, depth=1, mlp_dim=16, num_heads=1, num_kv_heads=1, head_dim=16)
VISION = VisionConfig(width=16, depth=1, mlp_dim=16, num_heads=1, patch_size=14, image_size=224)
STEP = "pi05_prepare_state_tokenizer_processor_step"


@pytest.fixture
def request_04(tmp_path, tokenizer_model):
    (tmp_path / "words.model").write_bytes(tokenizer_model)
    return PolicyRequest(tokenizer=tmp_path / "words.model", lerobot_version="0.4")


@pytest.fixture
def folder(data, tmp_path):
    """A π0.5 of LeRobot 0.4: a camera, a state and actions of 6 numbers, its golden prompts padded to 32."""
    return shutil.copytree(data / "lerobot_policy" / "pi05_old", tmp_path / "checkpoint")


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def read(folder, request):
    settings = json.loads((folder / "config.json").read_text())
    model = Pi05Config(VISION, GEMMA, GEMMA, 1024, settings["max_action_dim"], 5, variant=settings["type"])
    return read_policy(folder, "lerobot", settings, model, request)


def of_a_base(content):
    """What stays in config.json after `lerobot-train --policy.path=lerobot/pi05_base`."""
    extra = {"observation.images.third": {"type": "VISUAL", "shape": [3, 224, 224]}}
    content["input_features"] = {**content["input_features"], **extra}
    content["input_features"]["observation.state"]["shape"] = [32]
    content["output_features"]["action"]["shape"] = [32]


def unnormalised(content):
    """The state goes into the prompt as it is."""
    for step in content["steps"]:
        if "norm_map" in step["config"]:
            step["config"]["norm_map"]["STATE"] = "IDENTITY"


def same_prompts(files, folder):
    """Whether the prompts are LeRobot's, whose robot sends the camera front alone."""
    golden = np.load(folder / "vectors.npz")
    inputs = InputPipeline(files.contract, files.stats, files.tokenizer)
    images = {"front": np.zeros((48, 64, 3), np.uint8)}
    answers = []
    for state, task, text in zip(golden["state"], golden["tasks"], golden["prompts"], strict=True):
        found = inputs({"images": images, "state": state, "prompt": str(task)}).prompt_tokens[1:]
        answers.append(np.array_equal(found, files.tokenizer.encode_alone(str(text))))
    return all(answers)


def test_the_dims_of_a_base_are_not_the_robots(folder, request_04):
    edit(folder / "config.json", of_a_base)
    files = read(folder, request_04)
    assert (files.contract.state_dim, files.contract.action_dim) == (6, 6)
    assert files.known["state_dim"].startswith("statistics in policy_preprocessor_step_2")
    assert files.known["action_dim"].endswith("config.json has 32")
    assert same_prompts(files, folder)


def test_statistics_that_nothing_reads_tell_the_dims_too(folder, request_04):
    edit(folder / "config.json", of_a_base)
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        edit(folder / name, unnormalised)
    assert read(folder, request_04).contract.state_dim == 6


def test_statistics_longer_than_the_policys_state_are_another_robots(folder, request_04):
    edit(folder / "config.json", lambda c: c["input_features"]["observation.state"].update(shape=[5]))
    with pytest.raises(CheckpointError, match="'state' has 6 numbers, the contract 5"):
        read(folder, request_04)


def test_statistics_of_two_lengths_tell_no_dims(folder, request_04):
    edit(folder / "config.json", of_a_base)
    path = next(folder.glob("*_normalizer_processor.safetensors"))
    save_file({**load_file(path), "observation.state.min": np.zeros(4, np.float32)}, path)
    with pytest.raises(CheckpointError, match="'state' has 6 numbers, the contract 32"):
        read(folder, request_04)


def test_a_camera_that_the_robot_lacks_is_masked(folder, request_04):
    edit(folder / "config.json", of_a_base)
    files = read(folder, request_04)
    inputs = InputPipeline(files.contract, files.stats, files.tokenizer)
    seen = {"images": {"front": np.zeros((48, 64, 3), np.uint8)}, "state": np.zeros(6), "prompt": "go"}
    found = inputs(seen)
    assert found.camera_mask.tolist() == [True, False]
    assert (found.images[1] == -1).all()  # as LeRobot fills it
    with pytest.raises(ObservationError, match="no camera is there: expected at least one of front, third"):
        inputs({**seen, "images": {}})


SIZES = [{"max_state_dim": 6}, {"max_action_dim": 8}, {"max_state_dim": 7, "max_action_dim": 6}]


@pytest.mark.parametrize("sizes", SIZES)
def test_04_pads_to_32_whatever_the_config_says(folder, request_04, sizes):
    edit(folder / "config.json", lambda c: c.update(sizes))
    files = read(folder, request_04)
    assert files.contract.pad_state_first
    assert files.contract.prompt_state_dim == (32 if "max_action_dim" in sizes else None)
    assert same_prompts(files, folder)


def test_a_width_that_the_saved_step_records(folder, request_04):
    edit(
        folder / "policy_preprocessor.json",
        lambda c: [s["config"].update(max_state_dim=9) for s in c["steps"] if s["registry_name"] == STEP],
    )
    files = read(folder, request_04)
    assert (files.contract.prompt_state_dim, files.known["prompt_state_dim"]) == (9, "--lerobot-version")
    assert not same_prompts(files, folder)


def test_before_043_times_were_added_up(folder, request_04, tmp_path):
    assert read(folder, request_04).contract.time_convention == "lerobot"
    edit(folder / "config.json", lambda c: [c.pop(name) for name in ("use_peft", "freeze_vision_encoder")])
    files = read(folder, request_04)
    assert files.contract.time_convention == "openpi" and "before 0.4.3" in files.known["time_convention"]
    newer = PolicyRequest(tokenizer=request_04.tokenizer, lerobot_version="0.5")  # converted from openpi
    assert read(folder, newer).contract.time_convention == "lerobot"
    settings = json.loads((folder / "config.json").read_text())
    facts = describe_policy(folder, "lerobot", settings, None, PolicyRequest(tokenizer=request_04.tokenizer))
    assert "config.json was saved by 0.4.0 to 0.4.2" in facts.missing[0]
    for convention in ("openpi", "lerobot"):  # a difference of 1e-5: a contract file may have either
        edited = {**files.contract.to_json(), "time_convention": convention}
        (tmp_path / "mine.json").write_text(json.dumps(edited))
        given = PolicyRequest(tokenizer=request_04.tokenizer, contract=str(tmp_path / "mine.json"))
        assert read(folder, given).contract.time_convention == convention
