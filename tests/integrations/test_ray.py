"""ki-serve --ray on a Ray cluster of this machine: two replicas in two processes, killed and replaced."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from websockets.sync.client import connect

from ki_edge.bundle import Bundle
from ki_runtime.remote.packing import pack, unpack

from .conftest import succeed
from .ray_server import ROOT, Served, descendants, environment, expected, observation, robots, until

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def bundle(fetch_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(fetch_bundle, tmp_path_factory.mktemp("ray") / "bundle"))


@pytest.fixture(scope="module")
def wanted(fetch_bundle: Path) -> list[np.ndarray]:
    return expected(fetch_bundle)


@pytest.fixture(scope="module")
def served(ray_python: Path, bundle: Path) -> Iterator[Served]:
    server = Served(ray_python, bundle, "--replicas", 2)
    yield server
    started = [pid for pid, _ in descendants(server.process.pid)]
    assert len(started) > 3 and server.close() == 0, "".join(server.lines)
    until("its cluster ends with it", lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))


def publish(bundle: Path, spoil: bool = False) -> str:
    """Another bundle in its place: the same policy, of another digest; if it is to be spoilt, with weights that are not
    the witness's.
    """
    new = Path(shutil.copytree(bundle, bundle.with_name("new")))
    manifest = json.loads((new / "manifest.json").read_text())
    manifest["provenance"]["origin"] = f"export {os.urandom(4).hex()}"
    if spoil:
        weights = bytearray((new / "weights.safetensors").read_bytes())
        weights[len(weights) // 2 :] = bytes(len(weights) - len(weights) // 2)
        (new / "weights.safetensors").write_bytes(weights)
        manifest["files"]["weights.safetensors"]["sha256"] = sha256(weights).hexdigest()
    text = json.dumps(manifest)
    (new / "manifest.json").write_text(text)
    (new / "manifest.sha256").write_text(f"{sha256(text.encode()).hexdigest()}  manifest.json\n")
    old = bundle.with_name("old")
    bundle.rename(old)
    new.rename(bundle)
    shutil.rmtree(old)
    return Bundle.open(bundle).digest


def replaced(served: Served, killed: int) -> bool:
    return killed not in (now := served.replicas()) and len(now) == 2


def told(uri: str) -> dict[str, object]:
    with connect(uri, max_size=None) as connection:
        found: dict[str, object] = unpack(connection.recv(), "server")["ki_edge"]
        return found


def test_the_examples_are_what_ray_takes(ray_python: Path) -> None:
    """Its own schemas read examples/ray: the cluster of `ray up`, and what Ray Serve deploys, alone and for KubeRay."""
    command = [ray_python, Path(__file__).with_name("check_ray_examples.py"), ROOT / "examples" / "ray"]
    succeed(*command, env=environment())


def test_two_replicas_answer(served: Served, wanted: list[np.ndarray]) -> None:
    """The policy's answers, from two processes; what is wrong with a question comes back as its one line."""
    assert len(served.replicas()) == 2
    assert served.process.pid not in served.replicas() and told(served.uri)["replicas"] == [2, 2]
    with robots(served.uri, wanted, 4) as asking:
        asking.more(10)
    assert not asking.wrong
    with connect(served.uri, max_size=None) as connection:
        connection.recv()
        connection.send(pack({**observation(), "state": np.zeros(3)}))
        assert "state of the observation has shape (3,)" in str(connection.recv())


def test_a_killed_replica_costs_nobody_an_answer(served: Served, wanted: list[np.ndarray]) -> None:
    """Both are killed, one after the other, each while it computes: every robot goes on with the right answers."""
    with robots(served.uri, wanted, 4) as asking:
        for _ in range(2):
            asking.more(5)
            before = served.replicas()
            os.kill(min(before), signal.SIGKILL)
            asking.more(10)
            until("another in its place", partial(replaced, served, min(before)))
            asking.more(5)
    assert not asking.wrong


def test_a_reload_replaces_every_replica_without_a_gap(served: Served, bundle: Path, wanted: list[np.ndarray]) -> None:
    before = served.replicas()
    digest = publish(bundle)
    with robots(served.uri, wanted, 3) as asking:
        asking.more(3)
        said, answered = len(served.lines), sum(asking.answers)
        os.kill(served.process.pid, signal.SIGHUP)
        served.wait_for("ki-serve: reloaded: bundle answers", said)
        meanwhile = sum(asking.answers) - answered
        asking.more(3)
    assert not asking.wrong and meanwhile > 0
    assert told(served.uri)["digest"] == digest
    until("the old ones end", lambda: len(served.replicas()) == 2)
    assert not served.replicas() & before


def test_a_bad_bundle_is_refused_and_the_old_one_stays(served: Served, bundle: Path, wanted: list[np.ndarray]) -> None:
    before, digest = served.replicas(), told(served.uri)["digest"]
    kept = Path(shutil.copytree(bundle, bundle.with_name("kept")))
    publish(bundle, spoil=True)
    with robots(served.uri, wanted, 3) as asking:
        asking.more(3)
        said = len(served.lines)
        os.kill(served.process.pid, signal.SIGHUP)
        line = served.wait_for("ki-serve: not reloaded, the policy that was there goes on: (.*)", said)[1]
        asking.more(5)
    assert not asking.wrong
    assert "Ray Serve: ki-serve is DEPLOY_FAILED: BackendError: " in line, line
    assert told(served.uri)["digest"] == digest and before <= served.replicas()
    shutil.rmtree(bundle)
    kept.rename(bundle)
    said = len(served.lines)
    os.kill(served.process.pid, signal.SIGHUP)  # a good one is taken again
    served.wait_for("ki-serve: reloaded: bundle answers", said)
    until("the old ones end", lambda: len(served.replicas()) == 2)


def test_another_server_stands_before_the_same_replicas(
    ray_python: Path, served: Served, bundle: Path, wanted: list[np.ndarray]
) -> None:
    """It starts none, its robots get the same answers, and its end ends nothing. Another bundle needs another name."""
    before = served.replicas()
    second = Served(ray_python, bundle, alone=False)
    try:
        assert not second.replicas() and any("its replicas are used" in line for line in second.lines)
        with robots(second.uri, wanted, 2) as asking, robots(served.uri, wanted, 2) as others:
            asking.more(5)
            others.more(5)
        assert not asking.wrong and not others.wrong
    finally:
        assert second.close() == 0, "".join(second.lines)
    with robots(served.uri, wanted, 2) as asking:
        asking.more(3)
    assert served.replicas() == before


def test_replicas_come_with_the_work(ray_python: Path, bundle: Path, wanted: list[np.ndarray]) -> None:
    """One replica is there at the start, and two once four robots ask without end."""
    server = Served(ray_python, bundle, "--autoscale", "1:2", "--ray-app", "scaled")
    try:
        assert len(server.replicas()) == 1 and told(server.uri)["replicas"] == [1, 2]
        with robots(server.uri, wanted, 4) as asking:
            until("a second replica", lambda: len(server.replicas()) == 2)
            asking.more(5)
        assert not asking.wrong
    finally:
        assert server.close() == 0, "".join(server.lines)
