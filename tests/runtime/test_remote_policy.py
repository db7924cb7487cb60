"""A policy behind a real websocket server: what is sent, what comes back, and a server that fails in every way."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, BackendError, ContractError, ObservationError
from ki_edge.policy import contract as contracts
from ki_edge.policy.images import fit_image
from ki_runtime.remote.abilities import read_contract
from ki_runtime.remote.policy import RemotePolicy

from .policy_server import CONTRACT, PICTURE, ROWS, SEEN, PolicyServer, rows


@pytest.fixture
def served(monkeypatch):
    """served(answers, contract, ...) -> (policy, its server); both are closed."""
    monkeypatch.delenv("KI_API_KEY", raising=False)
    opened = []

    def serve(answers=rows, contract=CONTRACT, metadata=None, **options):
        server = PolicyServer(answers, metadata)
        opened.append(server.stop)
        policy = RemotePolicy(server.uri, contract, say=said.append, **options)
        opened.append(policy.close)
        return policy, server

    said = serve.said = []
    yield serve
    for close in reversed(opened):
        close()


def test_an_observation_goes_out_and_actions_come_back(served):
    policy, server = served()
    result = policy.infer(SEEN, noise=np.zeros((5, 4), np.float32))
    np.testing.assert_array_equal(result["actions"], ROWS)
    assert result["actions"].dtype == np.float64
    assert set(result["timing"]) == {"preprocess_ms", "server_ms", "network_ms", "total_ms"}
    assert result["timing"]["server_ms"] == 0.01
    (asked,) = server.asked
    assert sorted(asked) == ["images", "prompt", "state"] and asked["prompt"] == "fold"
    np.testing.assert_array_equal(asked["state"], SEEN["state"])
    np.testing.assert_array_equal(asked["images"]["cam"], fit_image(PICTURE, 8, 8, "pil_pad"))  # as the server would


def test_every_form_of_observation_is_sent_as_openpis_server_expects(served):
    droid = contracts.droid(action_horizon=5, image_size=(8, 8))
    keys = [camera.key for camera in droid.cameras if camera.key]
    lerobot = {f"observation.images.{key.split('/')[1]}": PICTURE for key in keys}
    policy, server = served(lambda n, o: {"actions": np.zeros((5, 8), np.float32)}, droid)
    policy.infer({**lerobot, "observation.state": np.arange(8.0), "task": "fold"})
    (asked,) = server.asked
    assert sorted(asked) == sorted([*keys, "observation/gripper_position", "observation/joint_position", "prompt"])
    assert asked[keys[0]].shape == (8, 8, 3) and asked["observation/joint_position"].tolist() == list(range(7))
    aloha = contracts.aloha(action_horizon=5, image_size=(8, 8))
    policy, server = served(lambda n, o: {"actions": np.zeros((5, 14), np.float32)}, aloha)
    policy.infer({"images": {"cam_high": PICTURE}, "state": np.zeros(14), "prompt": "fold"})
    assert server.asked[0]["images"]["cam_high"].shape == (3, 8, 8)  # openpi's ALOHA has the colours first


def test_pictures_that_were_resized_as_floats_go_out_as_they_are(served):
    contract = contracts.generic(
        ["cam"], state_dim=2, action_dim=2, action_horizon=5, model_action_dim=4, image_size=(8, 8), resize="torch_pad"
    )
    policy, server = served(contract=contract)
    policy.infer(SEEN)
    np.testing.assert_array_equal(server.asked[0]["images"]["cam"], PICTURE)


def test_warming_up_asks_twice_in_the_contracts_form(served):
    policy, server = served()
    prepared = policy.warm_up(prompt="fold")
    assert len(server.asked) == 2 and prepared.inference_ms < prepared.milliseconds
    assert server.asked[0]["images"]["cam"].tolist() == np.full((8, 8, 3), 128).tolist()
    assert server.asked[0]["prompt"] == "fold" and server.asked[0]["state"].tolist() == [0, 0]


def test_the_contract_comes_from_the_server_or_must_be_given(served, tmp_path):
    policy, _ = served(contract=None, metadata={"ki_edge": {"contract": CONTRACT.to_json()}})
    assert policy.contract == CONTRACT
    with pytest.raises(ContractError, match=r"does not tell its policy's contract.*give --contract FILE"):
        served(contract=None, metadata={"policy": "pi05"})
    with pytest.raises(ContractError, match="unknown key surprise"):
        served(contract=None, metadata={"ki_edge": {"contract": {"surprise": 1}}})
    with pytest.raises(ContractError, match="tells its policy's contract, and --contract gives another one"):
        served(contract=replace(CONTRACT, control_hz=7.0), metadata={"ki_edge": {"contract": CONTRACT.to_json()}})
    served(contract=CONTRACT, metadata={"ki_edge": {"contract": CONTRACT.to_json()}})
    CONTRACT.save(tmp_path / "contract.json")
    assert read_contract(str(tmp_path / "contract.json")) == CONTRACT
    assert read_contract("pi05_droid").action_horizon == 15
    with pytest.raises(ArgumentError, match="neither a file nor one of droid"):
        read_contract("nothing")
    with pytest.raises(ArgumentError, match=r"differ in their horizon, 15 \(pi05_droid\), 16"):
        read_contract("droid")


def test_the_key_goes_out_as_openpis_client_sends_it(served, monkeypatch):
    _, server = served()
    assert "Authorization" not in server.headers[0]
    monkeypatch.setenv("KI_API_KEY", "secret")
    RemotePolicy(server.uri, CONTRACT).close()
    assert server.headers[1]["Authorization"] == "Api-Key secret"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"actions": ROWS[:4]}, r"answered actions float32 \[4, 2\], and the contract has \[5, 2\]: .*--contract"),
        ({"actions": ROWS[:, :1]}, r"float32 \[5, 1\]"),
        ({"actions": np.array("abc")}, r"answered actions <U3 \[\]"),
        ({"actions": [[1, 2], [3]]}, "actions of ws://.*expected an array"),
        ({"actions": ROWS + np.nan}, r"10 of 10 actions that cannot be sent"),
        ({"action": ROWS}, "answered action, expected actions"),
        ({}, "answered nothing, expected actions"),
        ([[1, 2]], "answered list, expected a map"),
        ("Traceback (most recent call last):\n  File x\nValueError: no \x1b[31mgripper\n\n", r"failed: ValueError: no"),
        ("", "failed: no reason given"),
        (b"\xc1", "sent a frame that is not of openpi's form"),
        (b"\x80\x80", "sent a frame that is not of openpi's form"),
        (b"", "sent a frame that is not of openpi's form"),
    ],
)  # fmt: skip
def test_answers_that_are_none(served, answer, words):
    policy, server = served(lambda number, observation: answer)
    with pytest.raises(BackendError, match=words) as error:
        policy.infer(SEEN)
    assert server.uri in str(error.value) and "\n" not in str(error.value)


def test_a_server_that_is_gone_and_back_is_asked_again(served):
    """It hangs up in the middle of a question, and is away for a while."""
    back = threading.Event()

    def answers(number, observation):
        if number == 1:
            threading.Thread(target=lambda: (server.stop(), back.wait(30), server.start())).start()
            return None
        return rows(number, observation)

    policy, server = served(answers, absence=30.0)
    policy.infer(SEEN)
    threading.Timer(0.5, back.set).start()
    np.testing.assert_array_equal(policy.infer(SEEN)["actions"], ROWS + 2)
    assert len(served.said) == 1 and "it is asked again once it is back" in served.said[0]


def test_a_server_that_stays_away_is_an_error(served):
    policy, server = served(absence=0.3)
    server.stop()
    with pytest.raises(BackendError, match=r"it did not come back within 0\.3 s"):
        policy.infer(SEEN)
    server.start()
    assert policy.infer(SEEN)["actions"].shape == (5, 2)


def test_a_server_that_is_back_with_another_policy_is_not_asked(served):
    policy, server = served(contract=None, metadata={"ki_edge": {"contract": CONTRACT.to_json()}}, absence=20.0)
    server.stop()
    server.metadata = {"ki_edge": {"contract": {**CONTRACT.to_json(), "execute": 1}}}
    server.start()
    with pytest.raises(BackendError, match="is back with another policy"):
        policy.infer(SEEN)


def test_a_late_answer_is_never_taken_for_that_to_another_question(served):
    release = threading.Event()

    def answers(number, observation):
        if number == 0:
            release.wait(30)
        return rows(number, observation)

    policy, server = served(answers, answer=0.2)
    with pytest.raises(BackendError, match=r"did not answer within 0\.2 s"):
        policy.infer(SEEN)
    release.set()
    policy._answer = 30.0
    number = len(server.asked)
    np.testing.assert_array_equal(policy.infer(SEEN)["actions"], ROWS + number)


def test_an_answer_that_comes_twice_is_refused(served):
    policy, server = served(lambda number, observation: [rows(number, observation)] * (2 if number == 1 else 1))
    policy.infer(SEEN)
    np.testing.assert_array_equal(policy.infer(SEEN)["actions"], ROWS + 1)
    _until(lambda: policy._connection._socket.recv_messages.frames.qsize() > 0)
    with pytest.raises(BackendError, match="answered a question twice"):
        policy.infer(SEEN)
    np.testing.assert_array_equal(policy.infer(SEEN)["actions"], ROWS + 2)  # over a connection that has no leftovers
    assert len(server.asked) == 3


def test_closing_ends_a_question_that_waits(served):
    asked, release = threading.Event(), threading.Event()

    def answers(number, observation):
        asked.set()
        release.wait(30)
        return rows(number, observation)

    policy, _ = served(answers)
    found = []

    def ask():
        try:
            policy.infer(SEEN)
        except BackendError as error:
            found.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    assert asked.wait(30)
    policy.close()
    thread.join(30)
    release.set()
    assert found and "was closed" in found[0]


def test_what_does_not_fit_is_not_sent(served):
    policy, server = served()
    for change, words in [
        ({"state": np.zeros(3)}, r"state of the observation has shape \(3,\)"),
        ({"state": np.array([np.nan, 0])}, "NaN"),
        ({"images": {}}, "camera cam is missing"),
        ({"images": {"cam": PICTURE, "side": PICTURE}}, "unknown camera side"),
    ]:
        with pytest.raises(ObservationError, match=words):
            policy.infer({**SEEN, **change})
    with pytest.raises(ArgumentError, match="decides how many steps"):
        policy.infer(SEEN, num_steps=3)
    with pytest.raises(ArgumentError, match="a part of the observation: expected an array of numbers, got set"):
        policy.infer({**SEEN, "more": {1, 2}})
    assert server.asked == []


def test_addresses_that_are_none():
    for uri in ("http://robot:1", "robot:8000", "", 7):
        with pytest.raises(ArgumentError, match="no address of a policy server"):
            RemotePolicy(uri, CONTRACT)
    with pytest.raises(ArgumentError, match="no address of a policy server"):
        RemotePolicy("ws://", CONTRACT)
    server = PolicyServer(rows)
    server.stop()
    with pytest.raises(BackendError, match=r"no policy server answers at ws://127.*: is it running\?"):
        RemotePolicy(server.uri, CONTRACT)


def test_servers_of_another_kind(served):
    with pytest.raises(BackendError, match="sent list first, expected a map: is it a policy server"):
        served(metadata=[1])
    with pytest.raises(BackendError, match="failed: starting up"):
        served(metadata="starting up")


def _until(reached):
    """Wait for what another thread does."""
    waiting = threading.Event()
    for _ in range(3000):
        if reached():
            return
        waiting.wait(0.01)
    raise AssertionError("it never happened")
