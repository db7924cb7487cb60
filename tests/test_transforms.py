"""Observations in and actions out against openpi's golden transforms, and every bad observation."""

import json
from dataclasses import replace

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, ContractError, DatasetError, ObservationError, PromptError
from ki_edge.policy import contract as contracts
from ki_edge.policy.fast import FastIds
from ki_edge.policy.fast_fitting import fit_codec
from ki_edge.policy.normalize import NormStats
from ki_edge.policy.prompt import PromptTokenizer, digitize_state
from ki_edge.policy.transforms import (
    InputPipeline,
    OutputPipeline,
    aloha_actions_to_model,
    aloha_actions_to_robot,
    read_images,
    read_prompt,
    read_state,
)

HORIZON = 6
GROUPS = {
    "droid": contracts.droid(action_horizon=HORIZON),
    "droid_pos": contracts.droid_joint_position(action_horizon=HORIZON),
    "libero": contracts.libero(action_horizon=HORIZON, prompt_format="pi05"),
    "aloha": contracts.aloha(action_horizon=HORIZON),
    "libero_zscore": contracts.libero(action_horizon=HORIZON, normalization="zscore", prompt_format="pi05"),
}
PLAIN = contracts.generic(
    ["top", contracts.Camera("wrist", "hand", required=False)],
    state_dim=3,
    action_dim=2,
    action_horizon=4,
    image_size=(20, 30),
    model_action_dim=5,
    normalization="none",
)


@pytest.fixture(scope="module")
def golden(data):
    return dict(np.load(data / "transforms" / "vectors.npz"))


@pytest.fixture(scope="module")
def stats(data):
    content = json.loads((data / "transforms" / "norm_stats.json").read_text())
    return {group: {name: NormStats(**fields) for name, fields in entry.items()} for group, entry in content.items()}


@pytest.fixture(scope="module")
def pipelines(stats, tokenizer_model):
    def make(contract, group=None):
        tokenizer = PromptTokenizer(tokenizer_model, contract.prompt_format, contract.max_token_len)
        return InputPipeline(contract, stats[group] if group else {}, tokenizer)

    return make


def raw(golden, group):
    """The raw observation of a group, nested as the robot sends it."""
    prefix = f"{group}/raw/"
    flat = {key[len(prefix) :]: value for key, value in golden.items() if key.startswith(prefix)}
    images = {key[len("images/") :]: flat.pop(key) for key in list(flat) if key.startswith("images/")}
    return {**flat, "images": images} if images else flat


def plain(**changes):
    top = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    return {"images": {"top": top}, "state": np.array([0.5, -0.5, 0.0]), "prompt": "open the drawer", **changes}


def without(key):
    return {name: value for name, value in plain().items() if name != key}


@pytest.mark.parametrize("group", GROUPS)
def test_golden_inputs(golden, pipelines, group):
    contract = GROUPS[group]
    pipeline = pipelines(contract, group)
    inputs = pipeline(raw(golden, group))
    np.testing.assert_allclose(inputs.state, golden[f"{group}/before_pad/state"], rtol=1e-12, atol=1e-6)
    np.testing.assert_array_equal(digitize_state(inputs.state), golden[f"{group}/state_bins"])
    padded = np.pad(inputs.state, (0, 32 - contract.state_dim))
    np.testing.assert_allclose(padded, golden[f"{group}/model_in/state"], rtol=1e-12, atol=1e-6)
    for slot, camera in enumerate(contract.cameras):
        np.testing.assert_array_equal(inputs.images[slot], golden[f"{group}/before_pad/image/{camera.slot}"])
        assert inputs.camera_mask[slot] == golden[f"{group}/before_pad/image_mask/{camera.slot}"]
    assert (inputs.images.dtype, inputs.camera_mask.dtype, inputs.prompt_tokens.dtype) == (np.uint8, bool, np.int32)
    bins = " ".join(map(str, golden[f"{group}/state_bins"]))
    prompt = raw(golden, group)["prompt"].item().strip().replace("_", " ")
    assert pipeline.tokenizer.decode(inputs.prompt_tokens) == f"Task: {prompt}, State: {bins};\nAction: "


@pytest.mark.parametrize("group", ["droid_pos", "aloha"])
def test_golden_training_actions(golden, pipelines, group):
    contract, observation = GROUPS[group], raw(golden, group)
    actions = observation.pop("actions")
    before = actions.copy()
    example = pipelines(contract, group).example(observation, actions)
    np.testing.assert_allclose(example.actions, golden[f"{group}/model_in/actions"], rtol=1e-12, atol=1e-6)
    assert example.fast_actions.shape == (HORIZON, contract.action_dim)
    np.testing.assert_array_equal(example.fast_actions, example.actions[:, : contract.action_dim])
    np.testing.assert_array_equal(actions, before)


@pytest.mark.parametrize("group", GROUPS)
def test_golden_outputs(golden, stats, pipelines, group):
    contract = GROUPS[group]
    raw_state = pipelines(contract, group)(raw(golden, group)).raw_state
    np.testing.assert_allclose(raw_state, golden[f"{group}/unnorm/state"][: contract.state_dim], rtol=0, atol=1e-6)
    output = OutputPipeline(contract, stats[group])
    model_actions = golden[f"{group}/model_actions"]
    for given in (model_actions, model_actions[:, : contract.action_dim]):
        actions = output(given, raw_state)
        np.testing.assert_allclose(actions, golden[f"{group}/policy_actions"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("group", ["droid_pos", "aloha"])
def test_actions_come_back(golden, stats, pipelines, group):
    contract, observation = GROUPS[group], raw(golden, group)
    actions = observation.pop("actions")
    example = pipelines(contract, group).example(observation, actions)
    back = OutputPipeline(contract, stats[group])(example.actions, example.inputs.raw_state)
    np.testing.assert_allclose(back, actions, rtol=0, atol=1e-9)


def test_fast_way_round(golden, stats, tokenizer_model):
    """Actions -> FAST postfix -> parse -> decode -> robot actions, within the codec's quantisation."""
    contract, observation = replace(GROUPS["aloha"], prompt_format="ki"), raw(golden, "aloha")
    actions = observation.pop("actions")
    tokenizer, ids = PromptTokenizer(tokenizer_model, "ki", 200), FastIds(offset=3000, size=1024)
    example = InputPipeline(contract, stats["aloha"], tokenizer).example(observation, actions)
    # Index 0 has q01 == q99, which normalises to millions: no codec spells that, so it is left out here.
    target = np.where(np.arange(14) == 0, 0.0, example.fast_actions)
    codec = fit_codec(target[None], vocab_size=1024)
    parse = ids.parse(ids.postfix(codec.encode(target), tokenizer), tokenizer)
    decoding = codec.decode(parse.fast_ids, HORIZON, 14)
    assert np.abs(decoding.actions - target).max() < 0.05 * HORIZON**0.5
    output = OutputPipeline(contract, stats["aloha"])
    expected, found = output(target, example.inputs.raw_state), output(decoding.actions, example.inputs.raw_state)
    width = stats["aloha"]["actions"].q99 - stats["aloha"]["actions"].q01
    assert (np.abs(found - expected) <= (width + 1e-6) / 2 * 0.05 * HORIZON**0.5).all()
    np.testing.assert_allclose(expected[:, 1:], actions[:, 1:], atol=1e-9)


def test_aloha_convention_is_invertible():
    actions = np.random.default_rng(0).normal(size=(4, 14))
    np.testing.assert_allclose(aloha_actions_to_model(aloha_actions_to_robot(actions)), actions, atol=1e-12)


def test_aloha_without_adaption(golden):
    contract = replace(GROUPS["aloha"], adapt_to_pi=False)
    np.testing.assert_array_equal(read_state(contract, raw(golden, "aloha")), golden["aloha/raw/state"])


def test_generic(pipelines):
    hand = np.full((3, 40, 60), 7, dtype=np.uint8)
    inputs = pipelines(PLAIN)(plain(images={"top": plain()["images"]["top"], "hand": hand}))
    assert inputs.images.shape == (2, 20, 30, 3)
    np.testing.assert_array_equal(inputs.images[0], plain()["images"]["top"])
    assert (inputs.images[1] == 7).all()
    assert inputs.camera_mask.tolist() == [True, True]
    assert inputs.state.tolist() == inputs.raw_state.tolist() == [0.5, -0.5, 0.0]
    np.testing.assert_array_equal(OutputPipeline(PLAIN, {})(np.ones((4, 5)), np.zeros(3)), np.ones((4, 2)))


def test_optional_camera_may_be_absent(pipelines):
    for images in (plain()["images"], {**plain()["images"], "hand": None}):
        inputs = pipelines(PLAIN)(plain(images=images))
        assert inputs.camera_mask.tolist() == [True, False]
        assert not inputs.images[1].any()


def test_old_lerobot_prompt_holds_the_padded_state(pipelines):
    pipeline = pipelines(replace(PLAIN, pad_state_first=True))
    inputs = pipeline(plain())
    assert "State: 192 64 128 128 128;" in pipeline.tokenizer.decode(inputs.prompt_tokens)
    assert inputs.state.shape == (3,)
    for width, numbers in ((7, "192 64 128 128 128 128 128"), (2, "192 64 128")):  # a longer state stays as it is
        other = pipelines(replace(PLAIN, pad_state_first=True, prompt_state_dim=width))
        assert f"State: {numbers};" in other.tokenizer.decode(other(plain()).prompt_tokens)


def test_one_camera_must_be_there(pipelines):
    cameras = tuple(contracts.Camera(name, name, required=False) for name in ("top", "hand"))
    pipeline = pipelines(replace(PLAIN, cameras=cameras))
    picture = np.full((4, 4, 3), 9, np.uint8)
    assert pipeline(plain(images={"hand": picture})).camera_mask.tolist() == [False, True]
    with pytest.raises(ObservationError, match=r"no camera is there: .* one of top, hand; .* has nothing"):
        pipeline(plain(images={}))
    with pytest.raises(ObservationError, match="unknown camera hnad"):
        pipeline(plain(images={"hnad": picture, "top": picture}))


@pytest.mark.parametrize("prompt", ["fold", b"fold", np.array("fold"), np.str_("fold")])
def test_prompt_types(prompt):
    assert read_prompt(PLAIN, plain(prompt=prompt)) == "fold"


def test_default_prompt():
    contract = replace(PLAIN, default_prompt="wait")
    assert read_prompt(contract, {}) == read_prompt(contract, {"prompt": None}) == "wait"
    assert read_prompt(contract, {"prompt": ""}) == ""  # given, and refused by the tokenizer


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (plain(images={}), "camera top is missing; the observation has nothing"),
        (plain(images={"hand": np.zeros((4, 4, 3), np.uint8)}), "camera top is missing; the observation has hand"),
        (plain(images={**plain()["images"], "left": None}), "unknown camera left; the contract has top, hand"),
        (plain(images=[1]), '"images" must map camera names'),
        (without("images"), '"images" must map camera names to images; the observation has prompt, state'),
        (plain(images={"top": np.zeros((4, 4), np.uint8)}), r"camera top: expected an RGB image .*\(4, 4\)"),
        (plain(images={"top": np.zeros((4, 4, 3), np.int32)}), "camera top: expected dtype uint8 .* got int32"),
        (without("state"), "state is missing; the observation has images, prompt"),
        (plain(state=np.zeros(4)), r"state of the observation has shape \(4,\), the policy.s contract has \(3,\)"),
        (
            plain(state=np.zeros((1, 3))),
            r"state of the observation has shape \(1, 3\), the policy.s contract has \(3,\)",
        ),
        (plain(state=["a", "b", "c"]), "state: expected numbers"),
        (plain(state=[0.0, np.nan, 0.0]), "state holds NaN or infinity"),
        (plain(state=[0.0, np.inf, 0.0]), "state holds NaN or infinity"),
        (plain(state=[0.0, 1e300, 0.0]), "state holds numbers that are too large for float32"),
    ],
)
def test_bad_observation(pipelines, observation, message):
    with pytest.raises(ObservationError, match=message) as error:
        pipelines(PLAIN)(observation)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (without("prompt"), '"prompt" is missing'),
        (plain(prompt=" "), "the prompt is empty"),
        (plain(prompt=3), '"prompt" must be text, got int'),
        (plain(prompt="drawer " * 90), "tokens, the contract allows 200"),
    ],
)
def test_bad_prompt(pipelines, observation, message):
    with pytest.raises(PromptError, match=message):
        pipelines(PLAIN)(observation)


def test_flat_observations(golden):
    contract, observation = GROUPS["droid"], raw(golden, "droid")
    for gripper in (0.3, [0.3], np.float32(0.3)):
        state = read_state(contract, {**observation, "observation/gripper_position": gripper})
        np.testing.assert_allclose(state[-1], 0.3, rtol=1e-7)
    with pytest.raises(ObservationError, match=r"gripper_position of the observation has shape .* has \(1,\) or \(\)"):
        read_state(contract, {**observation, "observation/gripper_position": [0.3, 0.3]})
    second = {**observation, "observation/exterior_image_2_left": np.zeros((2, 2, 3), np.uint8)}
    np.testing.assert_array_equal(read_images(contract, second)[1], [True, True, False])
    with pytest.raises(ObservationError, match="unknown camera observation/image_3"):
        read_images(contract, {**observation, "observation/image_3": None})
    del observation["observation/wrist_image_left"]
    with pytest.raises(ObservationError, match="camera observation/wrist_image_left is missing"):
        read_images(contract, observation)


def test_bad_actions(pipelines):
    pipeline = pipelines(PLAIN)
    with pytest.raises(DatasetError, match=r"shape \(4, 2\), got \(3, 2\)"):
        pipeline.example(plain(), np.zeros((3, 2)))
    with pytest.raises(DatasetError, match="NaN or infinity"):
        pipeline.example(plain(), np.full((4, 2), np.nan))
    with pytest.raises(ArgumentError, match=r"\[H, 5 or 2\], got \(4, 3\)"):
        OutputPipeline(PLAIN, {})(np.zeros((4, 3)), np.zeros(3))
    with pytest.raises(ArgumentError, match=r"raw_state must be of shape \(3,\)"):
        OutputPipeline(PLAIN, {})(np.zeros((4, 5)), np.zeros(5))


def test_statistics_and_tokenizer_must_fit(tokenizer_model, stats):
    tokenizer = PromptTokenizer(tokenizer_model, "pi05", 200)
    contract = GROUPS["aloha"]
    with pytest.raises(ContractError, match='norm stats have no "state"'):
        InputPipeline(contract, {}, tokenizer)
    with pytest.raises(ContractError, match="8 dimensions, the data 14"):
        InputPipeline(contract, stats["droid"], tokenizer)
    with pytest.raises(ContractError, match="8 dimensions, the data 14"):
        OutputPipeline(contract, stats["droid"])
    with pytest.raises(ContractError, match="tokenizer's"):
        InputPipeline(contract, stats["aloha"], PromptTokenizer(tokenizer_model, "ki", 200))
    with pytest.raises(ContractError, match="tokenizer's"):
        InputPipeline(contract, stats["aloha"], PromptTokenizer(tokenizer_model, "pi05", 48))


@pytest.mark.parametrize("epsilon", ["openpi", "lerobot"])
def test_a_state_that_overflows_when_it_is_normalised_is_refused(tokenizer_model, epsilon):
    """It would be an infinity in the prompt's bins, and in the state of a π0."""
    contract = replace(PLAIN, normalization="quantile", normalization_epsilon=epsilon)
    still = NormStats(q01=[0.0, 1.0, 0.0], q99=[1.0, 1.0, 1.0])
    tokenizer = PromptTokenizer(tokenizer_model, contract.prompt_format, contract.max_token_len)
    pipeline = InputPipeline(contract, {"state": still}, tokenizer)
    with pytest.raises(ObservationError, match=r"number 1 of the state is 3e\+38, which normalised is too large"):
        pipeline(plain(state=[0.5, 3e38, 0.5]))
    assert np.isfinite(pipeline(plain(state=[0.5, 1.1, 0.5])).state).all()
