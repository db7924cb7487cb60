"""ki-serve --ray without a cluster: its options, its one line where Ray is not, and a replica, which needs no Ray.

On a cluster: tests/integrations/test_ray.py.
"""

import builtins
import os
import pickle
import socket
from types import SimpleNamespace

import numpy as np
import pytest

from ki_edge.bundle import Bundle
from ki_edge.errors import ArgumentError, BackendError, BundleError, DeviceError, ObservationError
from ki_runtime import Policy
from ki_runtime.serving import Question, ray_replica
from ki_runtime.serving.cli import main
from ki_runtime.serving.flags import build_parser
from ki_runtime.serving.ray_cluster import running_cluster
from ki_runtime.serving.ray_options import RayOptions, ray_options
from ki_runtime.serving.ray_replica import Replica

OBSERVATION = {
    "images": {name: np.full((96, 96, 3), 90, np.uint8) for name in ("front_left", "front_right")},
    "state": np.float32([1.3, 0.7, 0.5, 0.0, 0.0]),
}


def read(*words):
    return ray_options(build_parser().parse_args(["bundle", *words]), 4)


def test_options():
    assert read() is None
    assert read("--ray") == RayOptions(largest_batch=4)
    found = read(
        "--ray", "--replicas", "3", "--threads", "2", "--backend", "ort", "--ray-gpus", "0.5", "--ray-app", "arm"
    )
    assert found == RayOptions(3, 3, threads=2, gpus=0.5, backend="ort", application="arm", largest_batch=4)
    assert read("--ray", "--autoscale", "1:8") == RayOptions(1, 8, largest_batch=4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--replicas 2", "--replicas is for --ray"),
        ("--ray-app x", "--ray-app is for --ray"),
        ("--ray --replicas 0", "0 to 0 replicas: expected 1 to 10000"),
        ("--ray --replicas 2 --autoscale 1:2", "give one of them"),
        ("--ray --autoscale 8", "expected MIN:MAX, such as 1:8"),
        ("--ray --autoscale 0:4", "0 to 4 replicas"),
        ("--ray --autoscale 4:2", "the smaller number first"),
        ("--ray --autoscale 1:99999999", "expected MIN:MAX"),
        ("--ray --ray-gpus -1", "expected 0 to 64"),
        ("--ray --ray-gpus nan", "expected 0 to 64"),
        ("--ray --ray-app a/b", "expected letters, digits"),
        ("--ray --threads 0", "threads"),
    ],
)
def test_wrong_options_are_one_line(words, message, capsys):
    with pytest.raises(ArgumentError, match=message):
        read(*words.split())
    assert main(["bundle", *words.split()]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_without_ray_it_says_what_to_install(fetch_bundle, monkeypatch, capsys):
    imported = builtins.__import__

    def without(name, *rest, **more):
        if name.partition(".")[0] == "ray":
            raise ImportError("No module named 'ray'")
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main([str(fetch_bundle), "--ray", "--port", "0"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines == ["ki-serve: error: --ray needs Ray (No module named 'ray'): pip install 'ki-edge[ray]'"]


def test_a_cluster_that_is_gone_is_not_waited_for(tmp_path, monkeypatch):
    """Ray's note of one stays where that was killed; an address that was given must answer."""
    note = tmp_path / "ray" / "ray_current_cluster"
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert running_cluster() == "auto"
    note.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        note.write_text(address)
        assert running_cluster() == address
        monkeypatch.setenv("RAY_ADDRESS", "local")
        assert running_cluster() is None
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert running_cluster() == address
    for odd in (address, "ray://127.0.0.1:1", "nowhere", "127.0.0.1:99999999", ":1"):
        monkeypatch.setenv("RAY_ADDRESS", odd)
        with pytest.raises(BackendError, match="nothing answers there; expected HOST:PORT"):
            running_cluster()
        monkeypatch.delenv("RAY_ADDRESS")
        note.write_text(odd)
        assert running_cluster() is None


@pytest.fixture(scope="module")
def replica(fetch_bundle):
    return Replica(str(fetch_bundle), Bundle.open(fetch_bundle).digest, backend="ort", threads=1)


def test_a_replica_answers_as_the_policy_does(replica, fetch_bundle):
    """Questions and answers go from process to process: what is wrong with one comes back as its own kind of error."""
    questions = [Question(OBSERVATION, arguments={"seed": 3}), Question({"state": 1})]
    there = pickle.loads(pickle.dumps(questions))  # as Ray carries them
    right, wrong = pickle.loads(pickle.dumps(replica.answer(there)))
    wanted = Policy.load(fetch_bundle, "ort", threads=1).infer(OBSERVATION, seed=3)["actions"]
    assert np.abs(right["actions"] - wanted).max() < 1e-5
    assert isinstance(wrong, ObservationError)
    assert isinstance(replica.answer([Question(OBSERVATION, head="text")])[0], ArgumentError)
    told = replica.describe()
    assert told["pid"] == os.getpid() and told["digest"] == Bundle.open(fetch_bundle).digest and not told["declared"]


def test_a_replica_of_another_bundle_does_not_start(fetch_bundle):
    """One that starts anew after the bundle was replaced must not answer beside those of the old one."""
    with pytest.raises(BundleError, match=r"is another bundle now .* than the one that is served \(000000000000\)"):
        Replica(str(fetch_bundle), "0" * 64)


def test_errors_that_nobody_raised_on_purpose_are_carried_as_ours(replica, monkeypatch):
    class Odd(Exception):
        """Of this file alone."""

    monkeypatch.setattr(ray_replica, "answered", lambda policy, questions: [Odd("what")])
    (found,) = replica.answer([Question(OBSERVATION)])
    assert isinstance(found, BackendError) and str(found) == "Odd: what"


def test_a_replica_whose_device_is_lost_ends(replica, monkeypatch):
    ended = []
    monkeypatch.setattr(ray_replica, "os", SimpleNamespace(_exit=ended.append, getpid=os.getpid))
    monkeypatch.setattr(ray_replica, "answered", lambda policy, questions: [DeviceError("gone")])
    replica.answer([Question(OBSERVATION)])
    assert ended == [ray_replica.DEVICE_LOST]
