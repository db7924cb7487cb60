"""One graph in memory at a time: the same results, and never two sessions that live."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, BackendError
from ki_runtime.backends.session import Loaded
from ki_runtime.control.flags import build_parser
from ki_runtime.control.sources import check_source
from ki_runtime.policy.sampler import Sampler
from ki_runtime.serving.cli import _on_ray
from ki_runtime.serving.ray_options import RayOptions

from .conftest import FakeEngine


class Counted:
    """A fake engine whose sessions are counted while they live."""

    def __init__(self, bundle):
        self.engine = FakeEngine(bundle.manifest.vocabulary.ids)
        self.living, self.opened, self.most = weakref.WeakSet(), [], 0

    def open(self, spec):
        session = self.engine.open(spec)
        session.itself = session  # engines' sessions know themselves: counting references does not free them
        self.living.add(session)
        self.opened.append(spec.name)
        self.most = max(self.most, len(self.living))
        return session


@pytest.fixture
def both(make_bundle):
    """(resident sampler, sequential sampler, the latter's sessions)."""
    bundle = make_bundle()
    counted = Counted(bundle)
    return Sampler(bundle, Counted(bundle).open), Sampler(bundle, counted.open, sequential=True), counted


def test_results_are_the_same_and_one_graph_lives_at_a_time(both, batch):
    inputs = batch([[True, False], [True, True]], [[2, 3, 4], [5, 6]])
    resident, sequential, counted = both
    assert counted.opened == ["prefix", "denoise"] and sequential.sequential and not resident.sequential
    for seed in (1, 2):
        given, expected = (sampler.sample_actions(*inputs, seed=seed) for sampler in (sequential, resident))
        np.testing.assert_array_equal(given, expected)
    tokens = [sampler.sample_fast_tokens(*inputs, max_tokens=4) for sampler in (sequential, resident)]
    np.testing.assert_array_equal(*tokens)
    traces = [sampler.trace(*inputs, seed=3) for sampler in (sequential, resident)]
    for name in ("prefix_k", "prefix_v", "x"):
        np.testing.assert_array_equal(*(getattr(trace, name) for trace in traces))
    assert counted.most == 1
    assert counted.opened == ["prefix", "denoise"] * 3 + ["prefix", "fast_decode"] + ["prefix", "denoise"]


def test_a_graph_that_cannot_be_loaded_again_is_an_error_and_the_next_call_tries_again(make_bundle, batch):
    bundle = make_bundle()
    counted = Counted(bundle)
    broken = []

    def open_graph(spec):
        if spec.name in broken:
            raise BackendError("no room for it")
        return counted.open(spec)

    sampler = Sampler(bundle, open_graph, sequential=True)
    inputs = batch([[True]], [[2, 3, 4]])
    expected = sampler.sample_actions(*inputs, seed=1)
    broken.append("denoise")
    with pytest.raises(BackendError, match="no room for it"):
        sampler.sample_actions(*inputs, seed=1)
    broken.clear()
    np.testing.assert_array_equal(sampler.sample_actions(*inputs, seed=1), expected)


def test_another_engine_in_the_place_of_the_proven_one_does_not_act(make_bundle, batch, tmp_path):
    """Engines are read again for every inference; the proof is about those that were there when it ran."""
    bundle, built = make_bundle(), {"prefix": "1", "denoise": "1"}
    counted = Counted(bundle)

    def open_graph(spec):
        session = counted.open(spec)
        session.loaded = Loaded({f"engine of {spec.name}": built[spec.name]}, tmp_path)
        return session

    sampler = Sampler(bundle, open_graph, sequential=True)
    inputs = batch([[True]], [[2, 3, 4]])
    expected = sampler.sample_actions(*inputs, seed=1)
    built["denoise"] = "2"
    for _ in range(2):
        with pytest.raises(BackendError, match="graph denoise: what was loaded now is not what was loaded and proven"):
            sampler.sample_actions(*inputs, seed=1)
    built["denoise"] = "1"
    np.testing.assert_array_equal(sampler.sample_actions(*inputs, seed=1), expected)


def test_modulation_tables_are_computed_once(both, batch, monkeypatch):
    _, sequential, _ = both
    inputs = batch([[True]], [[2, 3, 4]])
    expected = sequential.sample_actions(*inputs, seed=1)
    monkeypatch.setattr("ki_edge.flow.modulation_table", None)
    np.testing.assert_array_equal(sequential.sample_actions(*inputs, seed=1), expected)


def test_on_a_gpu_work_is_done_before_its_engine_goes(machine, batch):
    """K/V stay where they are; engines are read again, proven once, and nothing is recorded."""
    inputs, resident = batch([[True]], [[2, 3, 4]]), machine.sampler()
    sequential = Sampler(machine.bundle, machine.connection.open, sequential=True)
    expected = resident.sample_actions(*inputs, seed=1)
    np.testing.assert_array_equal(sequential.sample_actions(*inputs, seed=1), expected)
    assert sequential.facts("prefix") is not None and sequential.session("prefix") is None


def test_what_it_costs_is_told(both):
    _, sequential, _ = both
    sequential._stages.seconds.update(prefix=1.25, denoise=0.5)
    assert sequential._stages.describe().startswith(
        "sequential: one graph in memory at a time; of every inference 1.75 s are spent loading (prefix 1.25, denoise "
    )


def test_who_cannot_run_in_turn_says_so():
    """A server's own policy is its own affair, and replicas of a cluster keep their graphs."""
    options = build_parser().parse_args(["--policy", "ws://localhost:1", "--robot", "replay:x.npz", "--sequential"])
    with pytest.raises(ArgumentError, match="--sequential is for a bundle: not with --policy, whose server decides"):
        check_source(options)
    with pytest.raises(ArgumentError, match="--sequential is for a policy in this process"):
        _on_ray(SimpleNamespace(sequential=True), RayOptions())
