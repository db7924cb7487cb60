"""Several robots' questions in one run of the model: each gets what it would have got alone."""

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, BackendError, ObservationError
from ki_edge.policy.chunking import Guiding, PreviousChunk
from ki_runtime import Policy
from ki_runtime.policy.rows import Question

APART = 1e-5  # of the model's space, between a question in a batch and alone


@pytest.fixture(scope="module")
def policy(fetch_bundle):
    return Policy.load(fetch_bundle, "ort")


@pytest.fixture
def observation(policy):
    contract, random = policy.contract, np.random.default_rng(0)

    def make(prompt="reach the target", **changes):
        shape = (*contract.image_size, 3)
        pictures = {
            camera.key: random.integers(0, 256, shape, np.uint8)
            for camera in contract.cameras
            if camera.key is not None
        }
        state = random.uniform(-0.5, 0.5, contract.state_dim).astype(np.float32)
        return {"images": pictures, "state": state, "prompt": prompt, **changes}

    return make


def in_model_space(policy, actions):
    spread = policy.stats["actions"].q99 - policy.stats["actions"].q01
    return 2.0 * np.asarray(actions) / (spread + 1e-6)  # as it is normalised


def alone(policy, question):
    return policy.infer(**{name: getattr(question, name) for name in question.__dataclass_fields__})


def test_an_answer_does_not_depend_on_who_else_asks(policy, observation, monkeypatch):
    width = policy.sampler.config.action_dim
    before = PreviousChunk(np.zeros((6, policy.contract.action_dim)), 2)
    questions = [
        Question(observation(), seed=1),
        Question(observation("pick up the red cube, slowly, and put it down beside the blue one"), seed=2),
        Question(observation("go"), noise=np.ones((policy.contract.action_horizon, width), np.float32)),
        Question(observation(), seed=3, num_steps=2),
        Question(observation(), seed=4, previous=before),
        Question(observation("go"), seed=5, previous=before),
        Question(observation(), seed=6, previous=before, guiding=Guiding(maximum=2.0)),
        Question({}, seed=7),
        Question(observation(), seed=8, num_steps=0),
    ]
    ran = []
    original = policy.sampler.sample_actions
    monkeypatch.setattr(policy.sampler, "sample_actions", lambda *a, **k: ran.append(len(a[0])) or original(*a, **k))
    answers = policy.infer_many(questions)
    assert ran == [3, 1, 2, 1, 1]  # as they are; other steps; continued; pulled less; no steps
    assert isinstance(answers[7], ObservationError) and isinstance(answers[8], ArgumentError)
    for question, answer in zip(questions[:7], answers, strict=False):
        wanted = alone(policy, question)
        apart = np.abs(in_model_space(policy, answer["actions"]) - in_model_space(policy, wanted["actions"]))
        assert apart.max() <= APART
    assert [answer["timing"]["batch"] for answer in answers[:7]] == [3, 3, 3, 1, 2, 2, 1]
    assert answers[0]["timing"].keys() - {"batch"} == alone(policy, questions[0])["timing"].keys()


def test_one_question_alone_is_what_infer_answers_bit_for_bit(policy, observation):
    question = Question(observation(), seed=1)
    (answer,) = policy.infer_many([question])
    np.testing.assert_array_equal(answer["actions"], alone(policy, question)["actions"])
    assert policy.infer_many([]) == []


def test_a_batch_that_fails_is_asked_one_by_one(policy, observation, monkeypatch):
    """The model fails for what one of them saw: the others have their answers."""
    bad = observation()
    marked = next(iter(bad["images"].values()))
    original = policy.sampler.sample_actions

    def failing(images, *others, **more):
        if (images == marked).all(axis=(-1, -2, -3)).any():
            raise BackendError("the denoise graph gave NaN")
        return original(images, *others, **more)

    monkeypatch.setattr(policy.sampler, "sample_actions", failing)
    first, second, third = policy.infer_many(
        [Question(observation(), seed=1), Question(bad, seed=2), Question(observation(), seed=3)]
    )
    assert isinstance(second, BackendError)
    assert first["timing"]["batch"] == third["timing"]["batch"] == 1
