"""A real ki-serve, a process of its own, when clients and bundles fail, or itself."""

import os
import shutil
import signal
import socket
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from websockets.sync.client import connect

from ki_edge.errors import BackendError
from ki_runtime import Policy
from ki_runtime.remote.packing import pack, unpack
from ki_runtime.remote.policy import RemotePolicy

from .fuzz_server import LIMIT, REQUEST, Served

ROBOTS = 50


@pytest.fixture(scope="module")
def served(fetch_bundle: Path, tmp_path_factory: pytest.TempPathFactory):
    """One server for the faults that it survives."""
    found = Served(fetch_bundle, tmp_path_factory.mktemp("served"))
    found.check()
    yield found
    assert found.close() == 0
    assert "Traceback" not in found.log.read_text("utf-8")


def test_its_answers_are_those_of_the_policy_bit_for_bit(served: Served, fetch_bundle: Path) -> None:
    mine = Policy.load(fetch_bundle, "ort").infer(served.content, seed=7)["actions"]
    np.testing.assert_array_equal(served.wanted, mine)


def test_fifty_robots_at_once_have_their_answers(served: Served) -> None:
    answers: list[object] = []
    all_there = threading.Barrier(ROBOTS)

    def robot() -> None:
        with connect(f"ws://127.0.0.1:{served.port}", compression=None, max_size=None, open_timeout=60) as connection:
            connection.recv(timeout=60)
            all_there.wait(60)
            connection.send(served.sound)
            answers.append(unpack(connection.recv(timeout=120), "the server")["actions"])

    robots = [threading.Thread(target=robot) for _ in range(ROBOTS)]
    for one in robots:
        one.start()
    for one in robots:
        one.join(200)
    assert len(answers) == ROBOTS
    for answer in answers:  # those of a batch differ in the last bits
        np.testing.assert_allclose(answer, served.wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["half a frame", "half a header", "before its answer"])
def test_a_client_that_is_killed_hinders_nobody(served: Served, how: str) -> None:
    """Its system ends the connection with a reset, as of a process that is gone."""
    frame = struct.pack(">BBQ", 0x82, 0xFF, len(served.sound)) + b"\0\0\0\0" + served.sound  # masked with zeros
    sent = {"half a frame": frame[: len(frame) // 2], "half a header": frame[:3], "before its answer": frame}[how]
    with served.connect() as other:
        with socket.create_connection(("127.0.0.1", served.port), timeout=LIMIT) as killed:
            killed.sendall(REQUEST)
            assert killed.recv(12) == b"HTTP/1.1 101"
            killed.sendall(sent)
            killed.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        other.send(served.sound)
        answer = unpack(other.recv(timeout=LIMIT), "the server")["actions"]
    np.testing.assert_allclose(answer, served.wanted, rtol=0, atol=1e-5)
    served.check()


def test_a_server_that_is_killed_and_started_again_answers_the_same_question(
    fetch_bundle: Path, tmp_path: Path
) -> None:
    first = Served(fetch_bundle, tmp_path)
    policy = RemotePolicy(f"ws://127.0.0.1:{first.port}", absence=120.0, say=lambda line: None)
    before = policy.infer(first.content, seed=3)["actions"]
    found: list[dict[str, object]] = []
    os.kill(first.process.pid, signal.SIGSTOP)  # so that the question is on its way
    asking = threading.Thread(target=lambda: found.append(policy.infer(first.content, seed=3)))
    asking.start()
    first.process.kill()
    first.process.wait()
    second = Served(fetch_bundle, tmp_path, port=first.port)
    asking.join(120)
    np.testing.assert_array_equal(found[0]["actions"], before)  # type: ignore[arg-type]
    assert found[0]["outdated"]  # the loop does not send it to a robot that waited
    policy.close()
    assert second.close() == 0
    with pytest.raises(BackendError, match="no policy server answers"):
        RemotePolicy(f"ws://127.0.0.1:{first.port}")


def test_a_reload_to_a_broken_bundle_is_refused_and_to_a_good_one_taken(fetch_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(fetch_bundle, bundle)
    served = Served(bundle, tmp_path)
    served.check()
    with served.connect() as connection:
        shutil.copytree(bundle, tmp_path / "aside")
        manifest = bundle / "manifest.json"
        manifest.write_text(manifest.read_text("utf-8").replace('"action_horizon": 8', '"action_horizon": 9'))
        os.kill(served.process.pid, signal.SIGHUP)
        line = served.says(r"ki-serve: not reloaded, .*")[0]
        assert "the policy that was there goes on" in line
        served.check()
        manifest.write_bytes((tmp_path / "aside" / "manifest.json").read_bytes())
        os.kill(served.process.pid, signal.SIGHUP)
        served.says(r"ki-serve: reloaded: bundle answers")
        connection.send(served.sound)  # of before both reloads
        answer = unpack(connection.recv(timeout=LIMIT), "the server")["actions"]
        np.testing.assert_array_equal(answer, served.wanted)
    assert served.close() == 0


def test_a_busy_server_ends_within_a_second_and_one_inference(fetch_bundle: Path, tmp_path: Path) -> None:
    served = Served(fetch_bundle, tmp_path)
    served.check()
    with served.connect() as connection:
        connection.send(pack({**served.content, "ki_edge": {"seed": 7}}))
        served.process.send_signal(signal.SIGTERM)
        answer = connection.recv(timeout=LIMIT)
        if not isinstance(answer, str):  # it ran already; else it says that it ends
            np.testing.assert_array_equal(unpack(answer, "the server")["actions"], served.wanted)
    assert served.process.wait(30) == 0
