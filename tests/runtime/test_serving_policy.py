"""`RemotePolicy` and the control loop against ki-serve: what openpi's server cannot be told reaches it."""

import threading

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, BackendError
from ki_edge.policy.chunking import Guiding, PreviousChunk
from ki_runtime import ControlLoop, LoopOptions, Policy
from ki_runtime.control import cli
from ki_runtime.policy.warming import blank_observation
from ki_runtime.remote.abilities import Abilities
from ki_runtime.remote.policy import RemotePolicy
from ki_runtime.robots import open_robot
from ki_runtime.serving import Server, ServerOptions

from .policy_server import CONTRACT, ROWS, SEEN, PolicyServer
from .serving_parts import HeldPolicy, Watching, wait_until


@pytest.fixture(scope="module")
def policy(fetch_bundle):
    return Policy.load(fetch_bundle)


@pytest.fixture
def watching():
    return Watching()


@pytest.fixture
def remote(policy, watching, monkeypatch):
    monkeypatch.delenv("KI_API_KEY", raising=False)
    with Server(policy, ServerOptions(port=0), watchers=[watching]) as server:
        found = RemotePolicy(server.uri, say=lambda line: None)
        found.uri = server.uri
        yield found
        found.close()


def test_every_argument_gives_what_it_gives_here(policy, remote):
    """To the bit: the same policy answers, alone."""
    assert (remote.rtc, remote.max_delay, remote.contract) == (policy.rtc, policy.max_delay, policy.contract)
    seen = blank_observation(policy.contract, "reach the red target")
    shape = (policy.contract.action_horizon, policy.contract.model_action_dim)
    chunk = policy.infer(seen, seed=2)["actions"]
    for arguments in (
        {"seed": 3},
        {"noise": np.ones(shape, np.float32)},
        {"noise": np.ones((1, *shape), np.float32), "num_steps": 4},
        {"seed": 3, "previous": PreviousChunk(chunk[2:6], 1)},
        {"seed": 3, "previous": PreviousChunk(chunk[2:], 2), "way": "guided"},
        {"seed": 3, "previous": PreviousChunk(chunk[2:], 2), "guiding": Guiding(3.0, "exponential", 5)},
    ):
        found, wanted = remote.infer(seen, **arguments)["actions"], policy.infer(seen, **arguments)["actions"]
        np.testing.assert_array_equal(found, wanted)
    with pytest.raises(BackendError, match="failed: arguments: noise: expected float32"):
        remote.infer(seen, noise=np.ones((2, 2), np.float32))
    assert remote.infer(seen)["actions"].shape == chunk.shape  # and goes on


def commands(policy, replay, **options):
    """What a run sends to a replayed robot."""
    robot = open_robot(f"replay:{replay}")
    sent, act = [], robot.act

    def acted(action):
        sent.append(np.array(action))
        act(action)

    robot.act = acted
    report = ControlLoop(policy, robot, LoopOptions(**options)).run()
    return np.stack(sent), report.mode


def test_a_run_in_real_time_chunking_is_the_same_over_the_network(policy, remote, watching, fetch_replay):
    options = {"mode": "rtc", "delay": 2, "seed": 7}
    here, mode = commands(policy, fetch_replay, **options)
    there, same = commands(remote, fetch_replay, **options)
    assert mode == same == "rtc guided"
    np.testing.assert_array_equal(there, here)
    plain, _ = commands(remote, fetch_replay, mode="async", delay=2, seed=7)
    assert not np.array_equal(plain, here)  # the chunk before made a difference
    begun = [request.begins for request in watching.requests]
    assert begun[0] and sum(begun) == 2  # one for each episode


def test_ki_run_has_it(remote, fetch_replay, capsys):
    words = ["--policy", remote.uri, "--robot", f"replay:{fetch_replay}", "--mode", "rtc", "--delay", "2"]
    assert cli.main([*words, "--num-steps", "5"]) == 0
    assert "mode rtc guided" in capsys.readouterr().out


def test_a_bundle_without_it_is_refused_as_such(monkeypatch):
    plain = HeldPolicy()
    plain.rtc = None
    with Server(plain, ServerOptions(port=0)) as server:
        remote = RemotePolicy(server.uri)
        with pytest.raises(ArgumentError, match=r"the bundle of ws://.* was exported without real-time chunking"):
            remote.infer(SEEN, previous=PreviousChunk(np.ones((2, 2)), 1))
        remote.close()


@pytest.mark.parametrize("line", ["busy: 64 requests wait", "ending: the server ends", "late: it waited 11 s"])
def test_what_passes_is_waited_for(line):
    """A server that is busy, or is started anew, does not end a run."""
    told = {"ki_edge": {"contract": CONTRACT.to_json(), "request": []}}
    server = PolicyServer(lambda number, seen: line if number == 0 else {"actions": ROWS}, told)
    said = []
    remote = RemotePolicy(server.uri, absence=60.0, say=said.append)
    answer = remote.infer(SEEN)
    np.testing.assert_array_equal(answer["actions"], ROWS)
    assert answer["outdated"] and f"cannot answer now ({line})" in said[0]
    remote.close()
    server.stop()


def test_a_question_outlives_a_restart_of_the_server():
    """In the middle of it: the robot waits, and the server that is back is asked."""
    holding = HeldPolicy(held=True)
    first = Server(holding, ServerOptions(port=0)).start()
    remote = RemotePolicy(first.uri, absence=60.0, say=lambda line: None)
    port = first.port
    answers = []
    asking = threading.Thread(target=lambda: answers.append(remote.infer(SEEN)))
    asking.start()
    holding.wait()
    first.abort()
    first.close()
    with Server(HeldPolicy(), ServerOptions(port=port)):
        asking.join(60)
        assert answers[0]["actions"].shape == (5, 2) and answers[0]["outdated"]
    remote.close()
    holding.go.set()


@pytest.mark.parametrize(
    "told",
    [None, 3, {}, {"rtc": "guided"}, {"request": "all", "rtc": "guided"}, {"request": [], "rtc": ["guided"]},
     {"request": [], "rtc": "other", "max_delay": "2", "heads": "flow"}],
)  # fmt: skip
def test_what_a_server_tells_in_another_form_is_as_good_as_not_told(told):
    found = Abilities.of({"ki_edge": told})
    assert (found.rtc, found.max_delay, found.heads) == (None, None, ())


def test_what_the_client_counts_reaches_the_server_once(watching):
    """Also its deadline, and where its episodes begin."""
    policy = HeldPolicy()
    with Server(policy, ServerOptions(port=0), watchers=[watching]) as server:
        remote = RemotePolicy(server.uri, answer=3.0)
        remote.reset()
        for misses in (0, 2, 2, 5):
            remote.report({"deadline_misses": misses, "guards.velocity": 1})
            remote.infer(SEEN)
        remote.close()
        wait_until(lambda: len(watching.requests) == 4)
    assert [request.begins for request in watching.requests] == [True, False, False, False]
    velocity = {"guards.velocity": 1.0}
    assert [request.reported for request in watching.requests] == [
        velocity, {"deadline_misses": 2.0}, {}, {"deadline_misses": 3.0}
    ]  # fmt: skip
    assert not any("ki_edge" in observation for observation, _ in policy.calls)


def test_the_loop_reports_what_it_counts(remote, watching, fetch_replay):
    told = []
    remote.report = lambda counts, kept=remote.report: (told.append(dict(counts)), kept(counts))
    commands(remote, fetch_replay, mode="async", delay=2)
    assert told and {"deadline_misses", "guards.position", "guards.velocity"} <= set(told[0])
    assert told[-1]["deadline_misses"] >= told[0]["deadline_misses"]
