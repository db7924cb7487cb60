"""What accompanies the weights: contracts, statistics, and what a frame and a text sample become in tokens."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, DatasetError, KiEdgeError
from ki_edge.policy.contract import Camera, PolicyContract
from ki_edge.policy.fast import FastCodec
from ki_edge.policy.normalize import compute_stats, read_norm_stats
from ki_edge.policy.prompt import PromptTokenizer
from ki_edge.train.data.recipe import Choice, Recipe, Robot
from ki_edge.train.data.start import Start

TEXTS = (("point to the target", "<loc0512><loc0256>"), ("what is it?", "a red ball"))


def robot(name="arm", *, dims=3, horizon=4, frames=40, seed=0, tasks=("Reach the red target", "go home"), **more):
    """States at random, chunks that follow them."""
    random = np.random.default_rng(seed)
    state = random.uniform(-2, 2, (frames, dims)).astype(np.float32)
    ramp = np.linspace(0.5, 1.0, horizon, dtype=np.float32)[None, :, None]
    chunks = (ramp * state[:, None] + np.float32(0.25)).astype(np.float32)
    stats = {"state": compute_stats(state), "actions": compute_stats(chunks)}
    cameras = (Camera("top", "top"), Camera("hand", "hand"))
    names = tuple(f"{letter}" for letter in "xyzabcdef"[:dims])
    which = np.arange(frames) % len(tasks)
    return Robot(name, cameras, stats, tasks, which, state, chunks, 25.0, names, **more)


@pytest.fixture(scope="module")
def start(small_config):
    return Start.from_nothing(small_config)


@pytest.fixture(scope="module")
def recipe(start):
    return Recipe.fit(start, [robot()], TEXTS)


def coded(recipe, source, one, frame):
    state = recipe.normalize_state(source, one.state[frame])
    return one.tasks[one.frame_tasks[frame]], state, recipe.normalize_actions(source, one.chunks[frame])


# ---------------------------------------------------------------------- contracts and files


def test_contract(recipe):
    (contract,) = recipe.contracts
    assert [camera.slot for camera in contract.cameras] == ["top", "hand"]
    assert (contract.state_dim, contract.action_dim, contract.action_horizon) == (3, 3, 4)
    assert (contract.model_action_dim, contract.image_size, contract.prompt_format) == (4, (8, 8), "ki")
    assert (contract.default_prompt, contract.control_hz) == ("Reach the red target", 25)
    assert contract.action_names == ("x", "y", "z")
    assert (recipe.config.action_horizon, recipe.config.action_dim) == (4, 4)
    assert recipe.config.vocab_size == contract.fast.id_offset + 1 and recipe.config.vocab_size % 64 == 0


def test_assets_are_read_back(recipe, tmp_path):
    recipe.save_assets(tmp_path)
    contract = PolicyContract.load(tmp_path / "contract.json")
    assert contract == recipe.contracts[0]
    tokenizer = PromptTokenizer(tmp_path / "assets" / "tokenizer.model", contract.prompt_format, contract.max_token_len)
    np.testing.assert_array_equal(tokenizer.encode("go home", [0.5]), recipe.tokenizer.encode("go home", [0.5]))
    chunk = np.linspace(-1, 1, 12).reshape(4, 3)
    assert FastCodec.load(tmp_path / "assets" / contract.fast.folder).encode(chunk) == recipe.codec.encode(chunk)
    stats = read_norm_stats(tmp_path / "assets")
    for name, entry in recipe.stats[0].items():
        for field in ("mean", "std", "q01", "q99"):
            np.testing.assert_array_equal(getattr(stats[name], field), getattr(entry, field))
    assert not (tmp_path / "robots").exists()


def test_a_mixture_has_one_codec_and_a_contract_for_each_robot(start, tmp_path):
    robots = [robot(), robot("other", dims=2, seed=1, tasks=("fold the towel",))]
    recipe = Recipe.fit(start, robots)
    assert [contract.action_dim for contract in recipe.contracts] == [3, 2]
    assert len({contract.fast for contract in recipe.contracts}) == 1
    for source, one in enumerate(robots):
        prompt, postfix = recipe.encode_actions(*coded(recipe, source, one, 5))
        assert len(prompt) > 3
        back = recipe.encoder.decode_actions(postfix, 4, one.chunks.shape[2])
        np.testing.assert_allclose(recipe.unnormalize_actions(source, back), one.chunks[5], atol=0.25)
    recipe.save_assets(tmp_path)
    assert PolicyContract.load(tmp_path / "contract.json").action_dim == 3
    assert PolicyContract.load(tmp_path / "robots" / "other" / "contract.json") == recipe.contracts[1]
    assert read_norm_stats(tmp_path / "robots" / "other")["state"].dim == 2
    assert sorted(path.name for path in (tmp_path / "robots").iterdir()) == ["other"]


def test_two_fits_are_equal_and_facts_tell_others_apart(start, recipe, tmp_path):
    """A resumed run fits again and must get the same tokens."""
    again = Recipe.fit(start, [robot()], TEXTS)
    for folder, one in (("first", recipe), ("second", again)):
        one.save_assets(tmp_path / folder)
    for path in (tmp_path / "first").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes()
    assert again.facts() == recipe.facts()
    other = Recipe.fit(start, [robot(seed=1)], TEXTS).facts()
    assert other["recipe.tokenizer"] == recipe.facts()["recipe.tokenizer"]
    assert other["recipe.codec"] != recipe.facts()["recipe.codec"]
    assert other["recipe.robot.arm"] != recipe.facts()["recipe.robot.arm"]


def test_workers_get_it_as_it_is(recipe):
    one = robot()
    wanted = recipe.encode_actions(*coded(recipe, 0, one, 3))
    sent = pickle.loads(pickle.dumps(recipe))
    for ours, theirs in zip(wanted, sent.encode_actions(*coded(sent, 0, one, 3)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_real_time_training_is_recorded(start):
    contract = Recipe.fit(start, [robot()], (), Choice(rtc_max_delay=2)).contracts[0]
    assert (contract.rtc_max_delay, contract.rtc_distribution) == (2, "uniform")
    assert "rtc_max_delay" not in Recipe.fit(start, [robot()]).contracts[0].to_json()
    with pytest.raises(ArgumentError, match="rtc_max_delay 4: chunks have 4 actions, at least one of which"):
        Recipe.fit(start, [robot()], (), Choice(rtc_max_delay=4))


# ---------------------------------------------------------------------- what a frame becomes


def test_prompts_spell_task_and_state(recipe):
    one, words = robot(), recipe.tokenizer
    low, high = one.stats["state"].q01, one.stats["state"].q99
    for frame in range(12):
        prompt, _ = recipe.encode_actions(*coded(recipe, 0, one, frame))
        normalised = (one.state[frame].astype(np.float64) - low) / (high - low + 1e-6) * 2 - 1
        bins = np.clip(np.floor((normalised.astype(np.float32) + 1) * 128), -1, 255).astype(int)
        assert prompt[0] == words.bos_id and prompt.dtype == np.int32
        task = one.tasks[frame % 2].lower()
        assert words.decode(prompt[1:]) == f"Task: {task}, State: {' '.join(map(str, bins))};\n"


def test_postfixes_decode_to_the_actions(recipe):
    one, words = robot(), recipe.tokenizer
    for frame in range(12):
        _, postfix = recipe.encode_actions(*coded(recipe, 0, one, frame))
        assert words.decode(postfix[: len(words.action_ids)]) == "Action: "
        assert [words.decode(postfix[-2:-1]), postfix[-1]] == ["|", words.eos_id]
        decoded = recipe.encoder.decode_actions(postfix, 4, 3)
        low, high = one.stats["actions"].q01, one.stats["actions"].q99
        expected = (one.chunks[frame] - low) / (high - low + 1e-6) * 2 - 1
        np.testing.assert_allclose(decoded, expected, rtol=0, atol=0.1)
    assert recipe.encoder.decode_actions(postfix[:-2], 4, 3) is None


def test_a_long_instruction_loses_words_and_never_the_state(recipe):
    state, chunk = np.zeros(3), np.zeros((4, 3))
    prompt, _ = recipe.encode_actions("go home " * 100, state, chunk)
    assert len(prompt) <= recipe.contracts[0].max_token_len
    text = recipe.tokenizer.decode(prompt[1:])
    assert text.startswith("Task: go home go home ") and text.endswith(", State: 128 128 128;\n")
    with pytest.raises(DatasetError, match=r"task 'go home': the prompt has .* tokens, the contract allows 64"):
        recipe.encode_actions("go home", np.zeros(100), chunk)


def test_a_chunk_that_does_not_fit_has_no_postfix(recipe):
    state, wild = np.zeros(3), np.random.default_rng(0).uniform(-1, 1, (4, 3))
    short = replace(recipe.encoder, max_postfix=8)
    assert len(short.encode_actions("go home", state, wild)[1]) == 0
    assert short.measure("go home", state, wild)[1] > 8
    far = np.full((4, 3), 1000.0)  # beyond the codec's alphabet
    assert len(recipe.encode_actions("go home", state, far)[1]) == 0
    assert recipe.encoder.measure("go home", state, far)[1] == -1
    with pytest.raises(KiEdgeError, match="NaN"):
        recipe.encode_actions("go home", state, np.full((4, 3), np.nan))


def test_a_padded_state_is_padded_in_the_prompt(recipe):
    """As LeRobot did before 2026."""
    padded = replace(recipe.encoder, padded_state=5)
    text = recipe.tokenizer.decode(padded.encode_actions("go home", np.zeros(3), np.zeros((4, 3)))[0][1:])
    assert text.endswith("State: 128 128 128 128 128;\n")


# ---------------------------------------------------------------------- text samples


def test_questions_and_answers_have_paligemmas_form(recipe):
    words = recipe.tokenizer
    prompt, answer = recipe.encode_text("what is it?", "a red ball")
    np.testing.assert_array_equal(prompt, words.encode_question("what is it?"))
    assert (prompt[0], answer[-1]) == (words.bos_id, words.eos_id)
    assert words.decode(prompt[1:]) == "what is it?\n" and words.decode(answer[:-1]) == "a red ball"


def test_places_become_those_that_the_vocabulary_has(recipe):
    pieces = recipe.tokenizer.pieces()
    _, answer = recipe.encode_text("point to the target", "<loc0513><loc0007><loc1023>")
    assert [pieces[int(token)] for token in answer[:-1]] == ["<loc0512>", "<loc0000>", "<loc1008>"]
    with pytest.raises(DatasetError, match="<loc1024> is none of <loc0000> to <loc1023>"):
        recipe.encode_text("point to the target", "<loc1024>")


@pytest.mark.parametrize(
    ("question", "answer", "message"),
    [
        (" ", "yes", "question ' ': the question is empty"),
        ("what is it?", " \n", "answer .* of 2 characters: expected 1 to 4096"),
        ("what is it?", "a red ball " * 100, "answer .* has .* tokens with its end, at most 64 are learnt: shorten it"),
        ("what is it? " * 100, "yes", "question .*: the prompt has .* tokens"),
    ],
)
def test_texts_that_cannot_be_learnt(recipe, question, answer, message):
    with pytest.raises(DatasetError, match=message):
        recipe.encode_text(question, answer)


def test_room_is_made_for_long_texts_and_what_has_none_is_told_at_once(start):
    long = ("describe it at length please " * 5, "a red ball that lies on a table " * 6)
    recipe = Recipe.fit(start, [robot()], [long])
    assert recipe.contracts[0].fast.max_tokens == 64 or len(recipe.encode_text(*long)[1]) <= 256
    with pytest.raises(DatasetError, match="at most 256 are learnt"):
        numbers = " ".join(str(number) for number in range(1000, 1600))
        Recipe.fit(start, [robot()], [("count", numbers)])


# ---------------------------------------------------------------------- what does not fit together


@pytest.mark.parametrize(
    ("robots", "message"),
    [
        ([robot(), robot()], r"the datasets' names \['arm', 'arm'\]"),
        ([robot("../up")], "plain and different"),
        ([], "one or more"),
        ([robot(dims=5)], "arm: 5 numbers in an action, the model has 4"),
        ([robot(), robot("other", horizon=6)], "other: chunks of 6 actions, and arm has 4"),
    ],
)
def test_robots_that_do_not_fit(start, robots, message):
    with pytest.raises(KiEdgeError, match=message):
        Recipe.fit(start, robots)
