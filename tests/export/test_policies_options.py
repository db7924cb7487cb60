"""Every option of LeRobot's processors is honoured or refused by name; no wrong JSON type gives a traceback."""

import copy
import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from ki_edge.config import GemmaConfig, Pi05Config, VisionConfig
from ki_edge.errors import CheckpointError, KiEdgeError
from ki_export.policies import PolicyRequest, describe_policy

from .complete import read_policy

BEFORE, AFTER, CONFIG = "policy_preprocessor.json", "policy_postprocessor.json", "config.json"
GEMMA = GemmaConfig(width=16, depth=1, mlp_dim=16, num_heads=1, num_kv_heads=1, head_dim=16)
VISION = VisionConfig(width=16, depth=1, mlp_dim=16, num_heads=1, patch_size=14, image_size=224)
PROMPT = "pi05_prepare_state_tokenizer_processor_step"


def model(variant="pi05"):
    return Pi05Config(VISION, GEMMA, GEMMA, vocab_size=1024, action_dim=32, action_horizon=5, variant=variant)


@pytest.fixture
def folder(data, tmp_path):
    return shutil.copytree(data / "lerobot_policy" / "pi05_relative", tmp_path / "checkpoint")


@pytest.fixture
def read(data, folder):
    words = data / "policies" / "tokenizer" / "tokenizer.model"

    def go():
        settings = json.loads((folder / CONFIG).read_text())
        return read_policy(folder, "lerobot", settings, model(), PolicyRequest(tokenizer=words))

    return go


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def options(content, name):
    return next(step for step in content["steps"] if step["registry_name"] == name).setdefault("config", {})


NORMALIZER, UNNORMALIZER = "normalizer_processor", "unnormalizer_processor"
REFUSED = [
    (BEFORE, PROMPT, {"include_state_in_prompt": False}, r"include_state_in_prompt is False .* expected True"),
    (BEFORE, PROMPT, {"task_key": "subtask"}, "task_key is 'subtask'"),
    (BEFORE, PROMPT, {"max_state_dim": "32"}, "max_state_dim must be a positive integer, not '32'"),
    (BEFORE, PROMPT, {"bins": 512}, r"the option bins of the step .* \(512\) is not known"),
    (BEFORE, "device_processor", {"float_dtype": "bfloat16"}, "float_dtype is 'bfloat16' .* expected None, 'float32'"),
    (BEFORE, "device_processor", {"float_dtype": "float16"}, "float_dtype is 'float16'"),
    (BEFORE, "device_processor", {"device": 0}, "device must be a name or null, not 0"),
    (AFTER, "device_processor", {"float_dtype": "half"}, "float_dtype is 'half'"),
    (BEFORE, "to_batch_processor", {"size": 2}, r"the option size .* known are none"),
    (BEFORE, "tokenizer_processor", {"padding_side": "left"}, "padding_side is 'left' .* expected 'right'"),
    (BEFORE, "tokenizer_processor", {"task_key": "prompt"}, "task_key is 'prompt'"),
    (BEFORE, "tokenizer_processor", {"truncation": 1}, "truncation is 1"),
    (BEFORE, "tokenizer_processor", {"padding": "pad"}, "padding is 'pad'"),
    (BEFORE, "tokenizer_processor", {"max_length": True}, "max_length must be a positive integer, not True"),
    (BEFORE, "tokenizer_processor", {"max_length": None}, "max_length must be a positive integer, not None"),
    (BEFORE, "tokenizer_processor", {"add_bos": False}, "the option add_bos"),
    (BEFORE, "relative_actions_processor", {"enabled": "no"}, "enabled must be true or false, not 'no'"),
    (BEFORE, "relative_actions_processor", {"exclude_joints": "gripper"}, "exclude_joints must be a list of names"),
    (BEFORE, "relative_actions_processor", {"reference": "last"}, "the option reference"),
    (AFTER, "absolute_actions_processor", {"enabled": 1}, "enabled must be true or false, not 1"),
    (BEFORE, NORMALIZER, {"eps": 1e-6}, "eps is 1e-06"),
    (BEFORE, NORMALIZER, {"clip": 5.0}, r"the option clip .* \(5.0\) is not known"),
    (BEFORE, NORMALIZER, {"norm_map": None}, "norm_map must be an object that maps names to names, not None"),
    (BEFORE, NORMALIZER, {"norm_map": {}}, "norm_map .* has no STATE, so how 'observation.state' is normalised"),
    (AFTER, UNNORMALIZER, {"norm_map": {"STATE": "QUANTILES"}}, "norm_map .* has no ACTION, so how 'action'"),
    (BEFORE, NORMALIZER, {"features": {}}, "features .* have no 'observation.state'"),
    (AFTER, UNNORMALIZER, {"features": {}}, "features .* have no 'action'"),
    (BEFORE, NORMALIZER, {"features": {"observation.state": {"type": "STATE"}}}, "features must be an object"),
    (BEFORE, NORMALIZER, {"normalize_observation_keys": "state"}, "normalize_observation_keys must be a list of names"),
    (BEFORE, "rename_observations_processor", {"rename_map": [1]}, "rename_map must be an object that maps names"),
    (BEFORE, "rename_observations_processor", {"rename_map": None}, "rename_map must be an object that maps names"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "step", "given", "message"), REFUSED)
def test_refused_by_name(folder, read, file, step, given, message):
    edit(folder / file, lambda c: options(c, step).update(given))
    with pytest.raises(CheckpointError, match=message) as caught:
        read()
    assert file in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["features", "norm_map"])
@pytest.mark.parametrize(("file", "step"), [(BEFORE, NORMALIZER), (AFTER, UNNORMALIZER)])
def test_what_is_missing_is_never_no_normalisation(folder, read, file, step, name):
    edit(folder / file, lambda c: options(c, step).pop(name))
    with pytest.raises(CheckpointError, match=f"the step '{step}' records no {name}"):
        read()


HARMLESS = [
    (PROMPT, {"max_state_dim": 32, "task_key": "task", "include_state_in_prompt": True}),
    ("device_processor", {"device": "cuda:1", "float_dtype": "float32"}),
    ("tokenizer_processor", {"padding": "longest", "truncation": False}),
    (NORMALIZER, {"normalize_observation_keys": ["observation.state"]}),
    ("relative_actions_processor", {"exclude_joints": None}),
]


@pytest.mark.parametrize(("step", "given"), HARMLESS)
def test_harmless_values_are_taken(folder, read, step, given):
    edit(folder / BEFORE, lambda c: options(c, step).update(given))
    assert read().contract.normalization == "zscore"


def test_honoured_values(folder, read):
    edit(folder / BEFORE, lambda c: options(c, NORMALIZER).update(normalize_observation_keys=[]))
    assert read().contract.normalization == "none"  # said so, not left out
    edit(folder / BEFORE, lambda c: options(c, "tokenizer_processor").update(max_length=77))
    assert read().contract.max_token_len == 77


def test_other_keys_of_a_step_and_of_the_file(folder, read):
    edit(folder / BEFORE, lambda c: c["steps"][0].update(enabled=False))
    with pytest.raises(CheckpointError, match="step 0 'rename_observations_processor' has the key 'enabled'"):
        read()
    edit(folder / BEFORE, lambda c: (c["steps"][0].pop("enabled"), c.update(hooks=[])))
    with pytest.raises(CheckpointError, match="the key 'hooks' is not known"):
        read()


def test_a_bad_number_in_a_state_file_names_the_file(folder, read):
    path = next(folder.glob("*_normalizer_processor.safetensors"))
    stats = load_file(path)
    stats["observation.state.mean"][2] = float("nan")
    save_file(stats, path)
    with pytest.raises(KiEdgeError, match=rf"{path.name}.*observation\.state"):
        read()


WRONG = (None, True, 0, -1, 1.5, 1e300, "", "x\x00", "../x", [], [[]], [None], {}, {"": None}, {"type": 3}, "α" * 200)


def places(content, path=()):
    """Every place in a JSON value."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def replaced(content, path, value):
    if not path:
        return value
    content = copy.deepcopy(content)
    at = content
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return content


@pytest.mark.parametrize("name", ["pi05_relative", "pi05_renamed", "pi0"])
@pytest.mark.parametrize("file", [BEFORE, AFTER, CONFIG])
def test_wrong_types_anywhere_give_one_line(data, tmp_path, name, file):
    """Each value replaced by each wrong one: the policy is described, or refused in one line."""
    folder = shutil.copytree(data / "lerobot_policy" / name, tmp_path / "checkpoint")
    original = json.loads((folder / file).read_text())
    for path in places(original):
        for value in WRONG:
            content = replaced(original, path, value)
            (folder / file).write_text(json.dumps(content))
            settings = json.loads((folder / CONFIG).read_text())
            if not isinstance(settings, dict):
                continue
            try:
                describe_policy(folder, "lerobot", settings, model(name.split("_")[0]), PolicyRequest())
            except KiEdgeError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000, (path, value)
