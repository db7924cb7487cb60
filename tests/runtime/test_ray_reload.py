"""What a reload of `ki-serve --ray` refuses leaves the replicas, and their cluster, as they were.

Ray Serve's part is played by a stand-in that starts real replicas in this process; on a cluster:
tests/integrations/test_ray.py.
"""

import asyncio
import shutil
from types import SimpleNamespace

import pytest

from ki_edge.bundle import Bundle
from ki_runtime import Policy
from ki_runtime.serving import Server, ray_engine
from ki_runtime.serving.engine import described
from ki_runtime.serving.ray_cluster import Cluster
from ki_runtime.serving.ray_engine import RayEngine
from ki_runtime.serving.ray_options import RayOptions
from ki_runtime.serving.ray_replica import Replica
from ki_runtime.serving.reloading import TOLD, Promise


class Serve:
    """Of Ray and Ray Serve what `RayEngine` uses; `deployed`: the digests of what was, `ended`: what was ended."""

    def __init__(self):
        self.replica, self.deployed, self.ended = None, [], []
        self.RunTarget = lambda application, **more: application

    def deployment(self, kind, **more):
        assert kind is Replica
        return SimpleNamespace(bind=lambda *given, **named: (given, named))

    def run_many(self, targets, **more):
        ((given, named),) = targets
        self.replica = Replica(*given, **named)
        self.deployed.append(given[1])

    def status(self):
        there = SimpleNamespace(status=SimpleNamespace(value="RUNNING"), message="", deployments={})
        return SimpleNamespace(applications={} if self.replica is None else {"ki-serve": there})

    def get_app_handle(self, name):
        result = SimpleNamespace(result=lambda timeout_s: self.replica.describe())
        return SimpleNamespace(describe=SimpleNamespace(remote=lambda: result))

    def delete(self, name, **more):
        self.ended.append(name)

    def shutdown(self):
        self.ended.append("cluster")


@pytest.fixture
def folder(fetch_bundle, tmp_path):
    return shutil.copytree(fetch_bundle, tmp_path / "bundle")


def put(new, folder):
    shutil.rmtree(folder)
    shutil.copytree(new, folder)


@pytest.fixture(params=[True, False], ids=["owned", "joined"])
def cluster(request, monkeypatch):
    serve = Serve()
    found = Cluster(serve, serve, request.param)
    monkeypatch.setattr(ray_engine, "connect", lambda options, say: found)
    return found


@pytest.fixture
def engine(cluster, folder):
    return RayEngine(folder, RayOptions(backend="ort"), say=lambda line: None)


def reload(engine, load):
    server = Server(engine, load=load, say=lambda line: None)
    return server, *asyncio.run(server.reload())


def test_what_clients_would_miss_is_refused_before_any_replica_has_it(cluster, engine, folder, words_bundle):
    before = cluster.serve.replica
    put(words_bundle, folder)
    server, done, line = reload(engine, engine.reloaded)
    assert not done and "it has another heads, and clients know the old one" in line
    assert server.engine is engine and cluster.serve.replica is before
    assert len(cluster.serve.deployed) == 1 and not cluster.serve.ended


def test_an_engine_that_the_server_refuses_ends_nothing(cluster, engine):
    """Whatever replicas tell after all: its close leaves the cluster to the engine that goes on."""

    def load():
        new = engine.reloaded()
        new.metadata = {**new.metadata, "rtc": "other"}
        return new

    server, done, line = reload(engine, load)
    assert not done and "another rtc" in line and server.engine is engine
    assert not cluster.serve.ended
    engine.close()
    assert cluster.serve.ended == (["ki-serve", "cluster"] if cluster.owned else [])


def test_the_engine_after_a_reload_ends_what_the_first_one_started(cluster, engine):
    server, done, _ = reload(engine, engine.reloaded)
    assert done and server.engine is not engine and len(cluster.serve.deployed) == 2
    engine.close()
    assert not cluster.serve.ended
    for _ in range(2):  # the second time there is nothing to end
        server.engine.close()
    assert cluster.serve.ended == (["ki-serve", "cluster"] if cluster.owned else [])


@pytest.mark.parametrize("name", ["fetch_bundle", "words_bundle"])
def test_a_bundle_promises_what_its_policy_then_is(request, name):
    bundle = request.getfixturevalue(name)
    promise, found = Promise.of(Bundle.open(bundle)), described(Policy.load(bundle, "ort", threads=1))
    assert promise.contract.to_json() == found["contract"]
    assert promise.metadata == {told: found[told] for told in TOLD}
