"""Answers in words, on the shipped policy exported with its whole vocabulary."""

import numpy as np
import pytest
import torch

from ki_edge.errors import ArgumentError, ObservationError, PromptError
from ki_edge.model import Observation, load_model
from ki_edge.policy.answers import Answers
from ki_edge.policy.prompt import PromptTokenizer
from ki_edge.recordings.episode_file import RecordedEpisode
from ki_edge.recordings.episodes import EpisodeView
from ki_runtime import Policy
from ki_runtime.policy.decode import Choices
from ki_runtime.policy.drawing import drawing
from ki_runtime.robots.fetch import FetchScene

POINT = "point to the target"
LENGTH = 12


@pytest.fixture(scope="module")
def policy(words_bundle):
    return Policy.load(words_bundle)


@pytest.fixture(scope="module")
def observation(fetch_replay):
    return EpisodeView(RecordedEpisode.open(fetch_replay)).observation(0)


@pytest.fixture(scope="module")
def model(fetch_checkpoint):
    return load_model(fetch_checkpoint)


@torch.no_grad()
def greedy(model, policy, observation, prompt, *, locs):
    """Slow and obvious: the whole sequence through the training path again for each token."""
    images, camera_mask, ids, mask = map(torch.from_numpy, policy._answering.inputs(observation, prompt))
    allowed = torch.from_numpy(policy._answering.answers.allowed(locs=locs))
    found = []
    while len(found) < LENGTH and policy.tokenizer.eos_id not in found:
        tokens = torch.tensor([[*found, 0]])  # the last one is what is to be predicted
        batch = Observation(images, camera_mask, ids, mask, tokens, torch.ones_like(tokens, dtype=torch.bool))
        found.append(int(allowed[model.fast_logits(batch)[0, -1, allowed].argmax()]))
    return [token for token in found if token != policy.tokenizer.eos_id]


@pytest.mark.parametrize("locs", [False, True])
@pytest.mark.parametrize("prompt", [POINT, "reach the red target", "Task: where?, State: 1 2 3;"])
def test_greedy_text_is_pytorchs_token_for_token(prompt, locs, policy, observation, model):
    found = policy.infer_text(observation, prompt=prompt, max_tokens=LENGTH, allow_loc=locs)
    assert found["tokens"].tolist() == greedy(model, policy, observation, prompt, locs=locs)
    assert set(found["timing"]) == {"preprocess_ms", "prefix_ms", "fast_ms", "postprocess_ms", "total_ms"}


def test_the_prompt_of_the_observation_is_asked(policy, observation):
    asked = policy.infer_text({**observation, "prompt": POINT}, allow_loc=True)
    assert asked["tokens"].tolist() == policy.infer_text(observation, prompt=POINT, allow_loc=True)["tokens"].tolist()
    assert asked["finished"] and asked["points"].shape == (2, 2)  # the target, in each camera's picture


def test_it_points_to_the_target(policy):
    """Within a twentieth of a picture, in scenes that no training saw."""
    scene = FetchScene()
    try:
        for seed in range(1000, 1006):
            scene.reset(seed)
            found = policy.infer_text({"images": scene.pictures(), "prompt": POINT}, allow_loc=True)
            np.testing.assert_allclose(found["points"], scene.target_points(), atol=0.05)
    finally:
        scene.close()


def test_only_text_comes_however_wildly_it_is_drawn(policy, observation):
    answers = Answers.of(policy.contract, policy.tokenizer)
    for seed in range(5):
        found = policy.infer_text(observation, max_tokens=40, temperature=100.0, seed=seed)
        assert np.isin(found["tokens"], answers.text).all()
        assert not found["points"].size
        assert "<loc" not in found["text"]
    assert not np.isin(answers.text, np.arange(512, 768)).any()  # the codes of FAST


def test_a_seed_repeats_what_was_drawn(policy, observation):
    def draw(seed):
        return policy.infer_text(observation, temperature=5.0, seed=seed, max_tokens=8)["tokens"].tolist()

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(4)}) > 1


def test_tokens_are_drawn_by_their_probability():
    choices = Choices.of([10, 20, 30], 30)
    logits = np.log(np.array([[0.6, 0.3, 0.1]], np.float32))
    drawn = [int(drawn.best(logits)[0]) for drawn in [drawing(choices, 1.0, 0)] for _ in range(4000)]
    assert [drawn.count(i) / 4000 for i in (10, 20, 30)] == pytest.approx([0.6, 0.3, 0.1], abs=0.03)
    cold = drawing(choices, 0.01, 0)
    assert {int(cold.best(logits)[0]) for _ in range(50)} == {10}


def test_a_bundle_of_fast_alone_says_how_to_get_words(fetch_bundle, observation):
    with pytest.raises(ArgumentError, match=r"without the whole vocabulary.*--full-vocabulary"):
        Policy.load(fetch_bundle).infer_text(observation)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"max_tokens": 0}, ArgumentError, "max_tokens"),
        ({"temperature": -1.0}, ArgumentError, "temperature -1.0"),
        ({"temperature": float("nan")}, ArgumentError, "temperature nan"),
        ({"temperature": True}, ArgumentError, "temperature True"),
        ({"seed": 3}, ArgumentError, "nothing is drawn"),
        ({"prompt": " \n"}, PromptError, "the question is empty"),
        ({"prompt": "target " * 100}, PromptError, "the contract allows 64"),
        ({"prompt": 3}, PromptError, "must be a str"),
    ],
)
def test_wrong_arguments(given, error, message, policy, observation):
    with pytest.raises(error, match=message):
        policy.infer_text(observation, **given)


def test_wrong_observations(policy, observation):
    images = {**observation["images"]}
    images.pop("front_left")
    for wrong in ([1], {**observation, "images": images}, {**observation, "images": {**images, "elsewhere": images}}):
        with pytest.raises(ObservationError):
            policy.infer_text(wrong, prompt=POINT)


def test_a_question_goes_in_as_it_is(tokenizer_model):
    tokenizer = PromptTokenizer(tokenizer_model, "pi05", 64)
    assert tokenizer.encode_question("Where_is it?").tolist() == [2, *tokenizer.encode_alone("Where_is it?\n")]
    assert tokenizer.encode_question("one\n").tolist() == tokenizer.encode_question("one").tolist()
