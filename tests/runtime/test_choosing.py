"""`auto` among engines for a CPU: measured once, remembered, and never with two of them open."""

import gc
import json
import math
import os
import shutil
import weakref

import pytest

from ki_edge.errors import BackendError
from ki_runtime.backends import choice as choices
from ki_runtime.backends.backend import Backend, NotInstalled, Slower
from ki_runtime.backends.choice import Choice, find_choice, keep_choice
from ki_runtime.backends.registry import choose_backend, on_cpu
from ki_runtime.policy import choosing
from ki_runtime.policy.choosing import measure_once
from ki_runtime.policy.sampler import Sampler

from .conftest import FakeEngine

DATE = "2026-11-26T10:00:00+00:00"


@pytest.fixture
def both(monkeypatch, tmp_path):
    """Both engines for a CPU are installed, no GPU's; the user's cache is empty, and so is what was not written."""
    monkeypatch.setattr(
        "ki_runtime.backends.backend.find_spec", lambda name: name if name in ("openvino", "onnxruntime") else None
    )
    obstacle = Backend.obstacle
    monkeypatch.setattr(Backend, "obstacle", lambda self, bundle: None if self.device == "CPU" else "no GPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "_unwritten", {})
    return obstacle


class Race:
    """Fake samplers, of which one at most is alive; `took` tells each backend's milliseconds."""

    def __init__(self, bundle, monkeypatch, **took):
        self.bundle, self.took, self.opened, self.alive, self.now = bundle, took, [], [], 0.0
        monkeypatch.setattr(choosing.time, "perf_counter", lambda: self.now)

    def open(self, name):
        gc.collect()
        assert not any(reference() for reference in self.alive), "two engines hold the model at once"
        self.opened.append(name)
        if isinstance(self.took[name], Exception):
            raise self.took[name]
        sampler = Sampler(self.bundle, FakeEngine(self.bundle.manifest.vocabulary.ids).open)
        original, race = sampler.sample_actions, weakref.proxy(self)

        def sample(*inputs, **more):
            race.now += 1e-3 * race.took[name]
            return original(*inputs, **more)

        sampler.sample_actions = sample
        self.alive.append(weakref.ref(sampler))
        return sampler


@pytest.mark.parametrize(("openvino", "ort", "taken"), [(50.0, 100.0, "openvino"), (100.0, 50.0, "ort")])
def test_the_faster_one_is_taken_from_then_on(both, make_bundle, monkeypatch, openvino, ort, taken):
    bundle, lines = make_bundle(), []
    race = Race(bundle, monkeypatch, openvino=openvino, ort=ort)
    measure_once(bundle, race.open, lines.append)
    assert sorted(race.opened) == ["openvino", "ort"]
    assert lines[0].startswith("measuring once which is faster here")
    backend = choose_backend("auto", bundle)
    other = "ort" if taken == "openvino" else "openvino"
    assert backend.name == taken
    assert dict(backend.passed)[other].startswith("slower here, 100 ms against 50, measured on 20")
    assert not isinstance(dict(backend.passed)["trt"], Slower)
    quiet = [why for name, why in backend.passed if name == other]
    assert all(isinstance(why, NotInstalled) for why in quiet)  # nobody is told who did not ask
    lines.clear()
    measure_once(bundle, race.open, lines.append)
    assert len(race.opened) == 2 and not lines
    assert choose_backend(other, bundle).name == other  # a backend that is named is taken


def test_an_engine_that_cannot_is_out_and_not_tried_again(both, make_bundle, monkeypatch):
    bundle, lines = make_bundle(), []
    race = Race(bundle, monkeypatch, openvino=BackendError("it does not compute this model"), ort=10.0)
    measure_once(bundle, race.open, lines.append)
    assert "openvino is left out: it does not compute this model" in lines
    backend = choose_backend("auto", bundle)
    assert backend.name == "ort" and "could not run it" in dict(backend.passed)["openvino"]
    measure_once(bundle, race.open, lines.append)
    assert len(race.opened) == 2


def test_nothing_is_kept_where_no_engine_can(both, make_bundle, monkeypatch):
    bundle = make_bundle()
    race = Race(bundle, monkeypatch, openvino=BackendError("no"), ort=BackendError("no"))
    measure_once(bundle, race.open, lambda line: None)
    assert find_choice(bundle, on_cpu()) is None


def test_no_room_for_a_copy_of_the_weights(both, make_bundle, monkeypatch):
    bundle, lines = make_bundle(), []
    monkeypatch.setattr(choosing, "available_memory", lambda: 2300)  # of graphs with 1000 bytes each
    race = Race(bundle, monkeypatch, openvino=1.0, ort=2.0)
    measure_once(bundle, race.open, lines.append)
    assert not race.opened and ["its copy of the weights takes" in line for line in lines] == [True]
    assert find_choice(bundle, on_cpu()) is None and choose_backend("auto", bundle).name == "ort"
    monkeypatch.setattr(choosing, "available_memory", lambda: 2500)  # memory is free again: nothing stale holds
    measure_once(bundle, race.open, lines.append)
    assert sorted(race.opened) == ["openvino", "ort"] and choose_backend("auto", bundle).name == "openvino"


def test_what_one_engine_cannot_run_is_not_measured(both, make_bundle, monkeypatch):
    bundle, lines = make_bundle(), []
    obstacles = {"openvino": "OpenVINO misreads int8 graphs"}
    monkeypatch.setattr(Backend, "obstacle", lambda self, bundle: obstacles.get(self.name))
    monkeypatch.setattr(choosing, "BACKENDS", on_cpu())
    race = Race(bundle, monkeypatch, openvino=1.0, ort=2.0)
    measure_once(bundle, race.open, lines.append)
    assert not race.opened and not lines and find_choice(bundle, on_cpu()) is None


def test_one_graph_at_a_time_measures_nothing(both, make_bundle, monkeypatch):
    """Most of such an inference is loading: its times would mislead starts that keep the graphs."""
    bundle, connected = make_bundle(), []
    engine = FakeEngine(bundle.manifest.vocabulary.ids)
    monkeypatch.setattr(Backend, "connect", lambda self, bundle, options: connected.append(self.name) or engine.open)
    assert Sampler.open(bundle, sequential=True, say=lambda line: None).backend.name == "ort"
    assert connected == ["ort"] and find_choice(bundle, on_cpu()) is None


def test_a_gpu_comes_first_and_nothing_is_measured(both, make_bundle, monkeypatch):
    bundle = make_bundle()
    monkeypatch.setattr(Backend, "obstacle", lambda self, bundle: None)
    race = Race(bundle, monkeypatch, openvino=1.0, ort=2.0)
    measure_once(bundle, race.open, lambda line: None)
    assert not race.opened


def test_one_engine_is_not_measured(both, make_bundle, monkeypatch):
    monkeypatch.setattr("ki_runtime.backends.backend.find_spec", lambda name: name if name == "onnxruntime" else None)
    bundle = make_bundle()
    race = Race(bundle, monkeypatch, ort=2.0)
    measure_once(bundle, race.open, lambda line: None)
    assert not race.opened and choose_backend("auto", bundle).name == "ort"


def test_a_record_is_for_one_bundle_and_these_engines(both, make_bundle, monkeypatch):
    bundle, rivals = make_bundle(), on_cpu()
    keep_choice(bundle, rivals, Choice({"openvino": 1.0, "ort": math.inf}, DATE))
    assert find_choice(bundle, rivals) == Choice({"openvino": 1.0, "ort": math.inf}, DATE)
    for name, other in (
        ("_version", lambda package: "2099.1"),
        ("processor", lambda: "another"),
        ("_cores", lambda: 999),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(choices, name, other)
            assert find_choice(bundle, rivals) is None, name
    other = make_bundle("other")
    assert find_choice(other, rivals) is None  # its own folder; and where both share the user's cache:
    shutil.copytree(bundle.path / "engines", other.path / "engines")
    assert find_choice(other, rivals) is not None
    other.manifest.files["weights.safetensors"]["sha256"] = "0" * 64
    assert find_choice(other, rivals) is None


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", "not json", '{"schema": 2, "date": "x", "milliseconds": {"openvino": 1, "ort": 2}}',
        '{"schema": 1, "date": "x", "milliseconds": {"openvino": 1}}',
        '{"schema": 1, "date": "x", "milliseconds": {"openvino": -1, "ort": 2}}',
        '{"schema": 1, "date": "x", "milliseconds": {"openvino": true, "ort": 2}}',
        '{"schema": 1, "date": "x", "milliseconds": {"openvino": "1", "ort": 2}}',
        '{"schema": 1, "date": "x", "milliseconds": [1, 2]}',
    ],
)  # fmt: skip
def test_a_damaged_record_is_none(both, make_bundle, content):
    bundle, rivals = make_bundle(), on_cpu()
    keep_choice(bundle, rivals, Choice({"openvino": 1.0, "ort": 2.0}, DATE))
    (path,) = (bundle.path / "engines").glob("choice-*.json")
    assert json.loads(path.read_text())["milliseconds"] == {"openvino": 1.0, "ort": 2.0}
    path.write_text(content)
    assert find_choice(bundle, rivals) is None
    assert choose_backend("auto", bundle).name == "ort"


def test_a_bundle_that_cannot_be_written(both, make_bundle, tmp_path, monkeypatch):
    bundle, rivals = make_bundle(), on_cpu()
    (bundle.path / "engines").write_text("in the way")
    found = Choice({"openvino": 1.0, "ort": 2.0}, DATE)
    keep_choice(bundle, rivals, found)
    assert len(list((tmp_path / "cache" / "ki-edge" / "proofs").glob("choice-*.json"))) == 1
    assert find_choice(bundle, rivals) == found
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)  # nowhere: kept until exit
    assert find_choice(bundle, rivals) is None
    keep_choice(bundle, rivals, found)
    assert find_choice(bundle, rivals) == found
