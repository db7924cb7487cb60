"""Which LeRobot trained a policy: told by its folder, or asked for where it matters, never assumed."""

import json
import shutil

import pytest

from ki_edge.config import GemmaConfig, Pi05Config, VisionConfig
from ki_edge.errors import ArgumentError, CheckpointError
from ki_export.policies import PolicyRequest, describe_policy

GEMMA = GemmaConfig(width=16, depth=1, mlp_dim=16, num_heads=1, num_kv_heads=1, head_dim=16)
VISION = VisionConfig(width=16, depth=1, mlp_dim=16, num_heads=1, patch_size=14, image_size=224)


@pytest.fixture(autouse=True)
def empty_caches(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "OPENPI_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))


@pytest.fixture
def tokenizer(tmp_path, tokenizer_model):
    (tmp_path / "words.model").write_bytes(tokenizer_model)
    return tmp_path / "words.model"


@pytest.fixture
def old(data, tmp_path):
    """A folder of 0.4, which says nothing: π0.5, one camera of 48x64, a state of 6 numbers."""
    return shutil.copytree(data / "lerobot_policy" / "pi05_old", tmp_path / "checkpoint")


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def describe(folder, tokenizer, **request):
    settings = json.loads((folder / "config.json").read_text())
    model = Pi05Config(VISION, GEMMA, GEMMA, 1024, 32, 5, variant=settings["type"])
    return describe_policy(folder, "lerobot", settings, model, PolicyRequest(tokenizer=tokenizer, **request))


def unpadded(folder):
    """A state that no version pads: the saved step says that it has its length already."""
    step = "pi05_prepare_state_tokenizer_processor_step"
    edit(
        folder / "policy_preprocessor.json",
        lambda c: [s["config"].update(max_state_dim=6) for s in c["steps"] if s["registry_name"] == step],
    )


def square(content):
    content["input_features"]["observation.images.front"]["shape"] = [3, 96, 96]


def test_it_is_asked_for_once(old, tokenizer):
    facts = describe(old, tokenizer)
    assert facts.contract is None and "resize" not in facts.known
    (question,) = facts.missing
    assert "'observation.images.front' of 48x64" in question and "6 state numbers to 32" in question
    assert "give --lerobot-version: 0.4; or 0.5" in question


@pytest.mark.parametrize(("version", "resize", "padded"), [("0.4", "torch_pad_04", True), ("0.5", "torch_pad", False)])
def test_the_answer_decides_margin_and_state(old, tokenizer, version, resize, padded):
    facts = describe(old, tokenizer, lerobot_version=version)
    assert not facts.missing
    assert (facts.contract.resize, facts.contract.pad_state_first) == (resize, padded)
    assert facts.known["resize"] == facts.known["pad_state_first"] == "--lerobot-version"


def test_each_difference_is_enough_to_ask(old, tokenizer):
    edit(old / "config.json", square)
    (question,) = describe(old, tokenizer).missing
    assert "6 state numbers" in question and "margin" not in question
    unpadded(old)
    assert describe(old, tokenizer).missing == ()
    wide = {"observation.images.wrist": {"type": "VISUAL", "shape": [3, 48, 64]}}
    edit(old / "config.json", lambda c: c["input_features"].update(wide))
    (question,) = describe(old, tokenizer).missing
    assert "'observation.images.wrist' of 48x64" in question and "state" not in question


def test_what_makes_no_difference_is_not_asked(old, tokenizer):
    edit(old / "config.json", square)
    unpadded(old)
    facts = describe(old, tokenizer)
    assert (facts.contract.resize, facts.contract.pad_state_first) == ("torch_pad", False)
    assert "the same in every version" in facts.known["resize"]
    empty = {"observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 48, 64]}}  # never has a picture
    edit(old / "config.json", lambda c: c["input_features"].update(empty))
    assert describe(old, tokenizer).missing == ()


def test_a_camera_without_a_size_may_have_a_margin(old, tokenizer):
    edit(old / "config.json", square)
    unpadded(old)
    edit(old / "config.json", lambda c: c["input_features"]["observation.images.front"].update(shape=[96]))
    assert "its size is not recorded" in describe(old, tokenizer).missing[0]


SIGNS = [
    ("config.json", {"use_relative_actions": False}, "torch_pad", "config.json"),
    ("train_config.json", {"peft": None, "cudnn_deterministic": False}, "torch_pad", "train_config.json"),
    ("train_config.json", {"batch_size": 8}, "torch_pad_04", "train_config.json"),
]


@pytest.mark.parametrize(("file", "fields", "resize", "source"), SIGNS)
def test_what_the_folder_tells_is_not_asked(old, tokenizer, file, fields, resize, source):
    path = old / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **fields}))
    facts = describe(old, tokenizer)
    assert not facts.missing
    assert (facts.contract.resize, facts.contract.pad_state_first) == (resize, resize == "torch_pad_04")
    assert facts.known["resize"] == facts.known["pad_state_first"] == source
    right, wrong = ("0.4", "0.5") if resize == "torch_pad_04" else ("0.5", "0.4")
    assert describe(old, tokenizer, lerobot_version=right).contract == facts.contract
    with pytest.raises(CheckpointError, match=rf"--lerobot-version {wrong}: .* is of LeRobot {right}.*{source}") as no:
        describe(old, tokenizer, lerobot_version=wrong)
    assert "\n" not in str(no.value)


def test_a_training_configuration_of_043_and_044_tells_nothing(old, tokenizer):
    (old / "train_config.json").write_text(json.dumps({"peft": None}))
    assert len(describe(old, tokenizer).missing) == 1
    (old / "train_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"train_config\.json is not valid JSON"):
        describe(old, tokenizer)


def test_of_a_pi0_only_the_margin_matters(data, tmp_path, tokenizer):
    folder = shutil.copytree(data / "lerobot_policy" / "pi0", tmp_path / "pi0")
    assert describe(folder, tokenizer).contract.resize == "torch_pad"  # it has relative actions
    relative = ("relative_actions_processor", "absolute_actions_processor")
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        edit(folder / name, lambda c: c.update(steps=[s for s in c["steps"] if s["registry_name"] not in relative]))
    edit(folder / "config.json", lambda c: [c.pop(n) for n in list(c) if n.startswith(("use_relative", "relative_"))])
    (question,) = describe(folder, tokenizer).missing
    assert "margin" in question and "state" not in question
    contract = describe(folder, tokenizer, lerobot_version="0.4").contract
    assert (contract.resize, contract.pad_state_first) == ("torch_pad_04", False)


def test_before_04_the_margin_was_elsewhere(old, tokenizer):
    edit(old / "config.json", lambda c: c.update(resize_imgs_with_padding=c.pop("image_resolution")))
    facts = describe(old, tokenizer)
    assert (facts.contract.resize, facts.known["resize"]) == ("torch_pad_03", "config.json")
    with pytest.raises(CheckpointError, match=r"is of LeRobot before 0\.4, since its config\.json has 'resize_imgs"):
        describe(old, tokenizer, lerobot_version="0.4")


def test_a_contract_file_answers_and_a_preset_does_not(old, tokenizer, tmp_path):
    contract = describe(old, tokenizer, lerobot_version="0.4").contract
    contract.save(tmp_path / "mine.json")
    given = describe(old, tokenizer, contract=str(tmp_path / "mine.json"))
    assert given.contract == contract and not given.missing
    with pytest.raises(CheckpointError, match=r"mine\.json: pad_state_first is True"):
        describe(old, tokenizer, contract=str(tmp_path / "mine.json"), lerobot_version="0.5")
    edit(tmp_path / "mine.json", lambda c: c.update(resize="pil_pad"))
    with pytest.raises(CheckpointError, match=r"mine\.json: resize is pil_pad; LeRobot's is torch_pad"):
        describe(old, tokenizer, contract=str(tmp_path / "mine.json"))
    wrist = {"observation.images.wrist": {"type": "VISUAL", "shape": [3, 48, 64]}}
    edit(old / "config.json", lambda c: c.update(input_features={**c["input_features"], **wrist}, empty_cameras=1))
    assert len(describe(old, tokenizer, contract="libero").missing) == 1
    facts = describe(old, tokenizer, contract="libero", lerobot_version="0.4")
    assert (facts.contract.robot, facts.contract.resize, facts.contract.pad_state_first) == (
        "libero", "torch_pad_04", True,
    )  # fmt: skip


def test_it_is_for_lerobot_only(old):
    with pytest.raises(ArgumentError, match=r"--lerobot-version is for LeRobot's checkpoints; .* is openpi"):
        describe_policy(old, "openpi", {}, None, PolicyRequest(lerobot_version="0.4"))


def test_another_version(old, tokenizer):
    with pytest.raises(ArgumentError, match=r"--lerobot-version 0.6: expected one of 0.4, 0.5"):
        describe(old, tokenizer, lerobot_version="0.6")
