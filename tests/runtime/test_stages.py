"""Stages after a failure, the times of several threads, and the tensors that the runtime itself computes with."""

import threading

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ki_edge import flow
from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError, BundleError
from ki_runtime.policy.denoise import runtime_weights
from ki_runtime.policy.trace import StageTimes

from .conftest import CONFIG


def test_a_failed_trace_keeps_no_memory(fake_sampler, batch):
    """NaN that one run left would reach the next through 0 * NaN."""
    sampler, engine = fake_sampler()
    inputs = batch([[True, True]], [[2, 3, 4]])
    expected = sampler.trace(*inputs, seed=1).x
    stage = sampler._denoise
    before, run = stage._storage, engine.denoise

    def fails(**feeds):
        raise BackendError("the device failed")

    engine.denoise = fails
    with pytest.raises(BackendError, match="the device failed"):
        sampler.trace(*inputs, seed=1)
    assert stage._storage is not before
    assert not stage._clocks
    engine.denoise = run
    np.testing.assert_array_equal(sampler.trace(*inputs, seed=1).x, expected)


def test_memory_that_does_not_suffice_is_an_error_of_the_backend(fake_sampler, batch):
    sampler, engine = fake_sampler()
    inputs = batch([[True, True]], [[2, 3, 4]])

    def fails(**feeds):
        raise MemoryError("of 9 GiB")

    engine.prefix = fails
    with pytest.raises(BackendError, match="memory does not suffice for this call: of 9 GiB"):
        sampler.sample_actions(*inputs, seed=1)


def test_times_are_those_of_the_thread_that_called(fake_sampler, batch):
    sampler, _ = fake_sampler()
    sampler.sample_actions(*batch([[True, True]], [[2, 3, 4]]), seed=1)
    mine, theirs = sampler.timing, []
    thread = threading.Thread(target=lambda: theirs.append(sampler.timing))
    thread.start()
    thread.join()
    assert theirs == [StageTimes()]
    assert sampler.timing == mine != StageTimes()


@pytest.mark.parametrize("change", ["shape", "type", "swap"])
def test_runtime_tensors_are_checked_at_load(make_bundle, change):
    bundle = make_bundle()
    path = bundle.path / "weights.safetensors"
    tensors = {name: value.copy() for name, value in load_file(path).items()}
    runtime = dict(bundle.manifest.weights["runtime"])
    name = "model.time_mlp_in.weight"
    if change == "shape":
        tensors[name] = tensors[name].reshape(-1)
    elif change == "type":
        tensors[name] = tensors[name].astype(np.float64)
    else:
        other = "time_mlp_out.weight"
        runtime["time_mlp_in.weight"], runtime[other] = runtime[other], runtime["time_mlp_in.weight"]
    save_file(tensors, path)
    changed = Bundle(bundle.path, bundle.manifest)
    changed.manifest.weights["runtime"] = runtime
    with pytest.raises(BundleError, match="swapped" if change == "swap" else r"expected \[8, 8\] in F32, BF16, F16"):
        runtime_weights(changed)


def test_silu_of_any_number():
    """Exact to the last bit of float32's own formula, and without a warning where e^-x overflows."""
    x = np.array([-1e30, -1000, -104, -100, -88.8, -80.1, -80, -1, 0, 1, 80, 100, 1e30], np.float32)
    wide = x.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.where(wide < -700, 0.0, wide / (1 + np.exp(-wide)))
    np.testing.assert_allclose(flow._silu(x), exact.astype(np.float32), rtol=3e-7, atol=1e-44)


def test_weights_that_are_not_finite_are_told(fake_sampler, make_bundle, batch):
    bundle = make_bundle()
    path = bundle.path / "weights.safetensors"
    tensors = {name: value.copy() for name, value in load_file(path).items()}
    tensors["model.time_mlp_in.weight"][0, 0] = np.inf
    save_file(tensors, path)
    sampler, _ = fake_sampler(bundle)
    with pytest.raises(BackendError, match="the time modulation is not finite"):
        sampler.sample_actions(*batch([[True, True]], [[2, 3, 4]]), seed=1)
    assert CONFIG.variant == "pi05"
