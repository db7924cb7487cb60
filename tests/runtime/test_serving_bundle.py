"""A server before a real bundle: batches, and both heads, as the policy itself answers."""

import threading

import numpy as np
import pytest

from ki_runtime import Policy
from ki_runtime.remote.connection import Connection
from ki_runtime.remote.packing import pack
from ki_runtime.serving import Server, ServerOptions
from ki_runtime.serving.engine import LocalEngine

ROBOTS, ROUNDS = 6, 4
APART = 1e-5  # an answer of a batch and alone, in the model's space


@pytest.fixture(scope="module")
def policy(fetch_bundle):
    return Policy.load(fetch_bundle, "ort")


@pytest.fixture(scope="module")
def server(policy):
    with Server(LocalEngine(policy, largest_batch=4), ServerOptions(port=0), say=lambda line: None) as server:
        yield server


def observation(policy, number):
    contract, random = policy.contract, np.random.default_rng(number)
    shape = (*contract.image_size, 3)
    images = {camera.key: random.integers(0, 256, shape, np.uint8) for camera in contract.cameras}
    state = random.uniform(0.0, 1e-5, contract.state_dim).astype(np.float32)
    return {"images": images, "state": state, "prompt": "go" if number % 2 else "reach the red target"}


def ask(server, questions):
    connection = Connection(server.uri)
    try:
        return [connection.ask(pack(question), 120.0) for question in questions]
    finally:
        connection.close()


def test_an_answer_does_not_depend_on_who_was_in_its_batch(server, policy):
    found = {}

    def robot(number):
        seen = observation(policy, number)
        found[number] = ask(server, [{**seen, "ki_edge": {"seed": round}} for round in range(ROUNDS)])

    robots = [threading.Thread(target=robot, args=(number,)) for number in range(ROBOTS)]
    for one in robots:
        one.start()
    for one in robots:
        one.join(300)
    stats = policy.stats["actions"]
    spread = np.asarray(stats.q99) - np.asarray(stats.q01) + 1e-6
    batches = []
    for number in range(ROBOTS):
        for round, answer in enumerate(found[number]):
            alone = policy.infer(observation(policy, number), seed=round)["actions"]
            assert np.abs(2.0 * (answer["actions"] - alone) / spread).max() <= APART
            batches.append(answer["ki_edge"]["batch"])
    assert max(batches) > 1


def test_the_second_head_answers_too(server, policy):
    seen = observation(policy, 0)
    (answer,) = ask(server, [{**seen, "ki_edge": {"head": "fast"}}])
    wanted = policy.infer_fast(seen)
    assert list(answer["tokens"]) == wanted["tokens"].tolist() and answer["problem"] == wanted["problem"]
    if wanted["actions"] is None:
        assert answer["actions"] is None
    else:
        np.testing.assert_array_equal(answer["actions"], wanted["actions"])
