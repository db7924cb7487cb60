"""What is recorded as CUDA graphs: replays equal runs, and no recorded context is used for anything else."""

import gc
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ki_runtime.policy.denoise import MAX_TABLES
from ki_runtime.trt import contexts

from .gpu_machine import CLOSE, Machine, noise


@pytest.mark.parametrize("quirks", [{}, {"late": True}], ids=["", "addresses in host memory"])
@pytest.mark.parametrize("num_steps", [2, 5])
def test_replays_use_the_addresses_of_their_recording(make_bundle, fake_sampler, batch, quirks, num_steps):
    """Also where a replay would take the addresses that its context has by then, and with eager runs in between."""
    machine = Machine(make_bundle(), quirks)
    plain, sampler = fake_sampler(machine.bundle)[0], machine.sampler()
    cases = [batch([[True]], [[2, 30]], length=40), batch([[True]], [[3] * 20], length=40)]
    for seed in range(3):
        for inputs in cases:
            x = noise(seed=seed)
            expected = plain.trace(*inputs, noise=x, num_steps=num_steps).x
            ours = sampler.sample_actions(*inputs, noise=x, num_steps=num_steps)
            np.testing.assert_allclose(ours, expected[-1], **CLOSE)
            np.testing.assert_allclose(sampler.trace(*inputs, noise=x, num_steps=num_steps).x, expected, **CLOSE)
            expected, ours = (s.sample_fast_tokens(*inputs, max_tokens=5) for s in (plain, sampler))
            np.testing.assert_array_equal(ours, expected)


def test_a_loop_is_one_launch(machine, batch):
    sampler, inputs = machine.sampler(), batch([[True]], [[3, 4]])
    sampler.sample_actions(*inputs, noise=noise(), num_steps=10)
    assert machine.cuda.launches == 0 and machine.cuda.execs == 2  # prefix and loop, recorded after their first run
    made = len(machine.trt.contexts), machine.cuda.calls.count("cudaMalloc")
    machine.cuda.calls.clear()
    sampler.sample_actions(*inputs, noise=noise(), num_steps=10)
    assert machine.cuda.launches == 2
    copies = machine.cuda.calls.count("cudaMemcpyAsync")
    assert copies == 4 + 1 + 1  # images, their mask, prompt, its mask and x up; actions down
    assert machine.cuda.calls.count("cudaStreamSynchronize") == 1
    assert (len(machine.trt.contexts), made[1] + machine.cuda.calls.count("cudaMalloc")) == made


def test_each_step_count_and_shape_has_its_recording(machine, batch):
    sampler = machine.sampler()
    short, long = batch([[True]], [[3, 4]]), batch([[True]], [[3] * 20], length=20)
    for _ in range(2):
        for inputs in (long, short):
            for steps in (2, 3):
                sampler.sample_actions(*inputs, noise=noise(), num_steps=steps)
    assert machine.cuda.execs == 2 + 4  # two prefixes, two loops for each
    assert len(machine.contexts("denoise")) == 2 * (2 + 3)  # each recorded step has its own


def test_few_recordings_are_kept(machine, batch):
    sampler, inputs = machine.sampler(), batch([[True]], [[3, 4]])
    for steps in range(1, 10):
        sampler.sample_actions(*inputs, noise=noise(), num_steps=steps)
    gc.collect()
    assert machine.cuda.execs == 1 + MAX_TABLES


def test_decoding_replays_and_fetches_only_logits(machine, batch):
    sampler, inputs = machine.sampler(), batch([[True]], [[3, 4]])
    for _ in range(2):
        machine.cuda.calls.clear()
        sampler.sample_fast_tokens(*inputs, max_tokens=8)
    fed = sum(graph == "fast_decode" for graph, _ in machine.engine.calls) // 2
    assert machine.cuda.calls.count("cudaStreamSynchronize") == fed  # one wait a token, for its logits
    assert machine.cuda.calls.count("cudaMemcpy2DAsync") == 2 + 2 * fed  # K and V, on the device
    assert machine.cuda.calls.count("cudaMalloc") == 0
    assert machine.cuda.calls.count("cudaGraphLaunch") == 1 + fed


def test_addresses_are_set_where_runs_are_not_recorded(make_bundle, fake_sampler, batch):
    machine = Machine(make_bundle(), record=False)
    sampler, inputs = machine.sampler(), batch([[True]], [[3, 4]])
    plain, _ = fake_sampler(machine.bundle)
    for seed in range(3):
        x = noise(seed=seed)
        np.testing.assert_allclose(
            sampler.sample_actions(*inputs, noise=x), plain.sample_actions(*inputs, noise=x), **CLOSE
        )
    assert machine.cuda.launches == 0 and "cudaStreamBeginCapture" not in machine.cuda.calls and not machine.lines


@pytest.mark.parametrize("what", ["capturable", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_without_recording_it_says_so_once_and_runs(make_bundle, fake_sampler, batch, what):
    machine = Machine(make_bundle(), {"capturable": False} if what == "capturable" else {})
    sampler, inputs = machine.sampler(), batch([[True]], [[3, 4]])
    plain, _ = fake_sampler(machine.bundle)
    for seed in range(3):
        if what != "capturable":
            machine.cuda.fail[what] = 901
        x = noise(seed=seed)
        np.testing.assert_allclose(
            sampler.sample_actions(*inputs, noise=x), plain.sample_actions(*inputs, noise=x), **CLOSE
        )
    said = [line for line in machine.lines if "without CUDA graphs" in line]
    assert len({line.split()[1] for line in said}) == len(said) and "prefix" in {line.split()[1] for line in said}


def test_scratch_memory_is_shared(machine, batch):
    sampler = machine.sampler()
    for length in (3, 20, 40):
        sampler.sample_actions(*batch([[True]], [[3] * length], length=40), noise=noise())
    assert len(machine.trt.contexts) == 3 * (1 + 10)
    assert len({context.scratch for _, context in machine.trt.contexts}) == 1


def test_nothing_stays_behind(make_bundle, batch):
    machine = Machine(make_bundle())
    free = machine.cuda.free
    sampler = machine.sampler()
    sampler.sample_actions(*batch([[True]], [[3, 4]]), noise=noise())
    sampler.sample_fast_tokens(*batch([[True]], [[3, 4]]), max_tokens=3)
    assert machine.cuda.execs > 0
    del sampler
    machine.connection.scratch._memory = None
    machine.trt.contexts.clear()
    gc.collect()
    assert machine.cuda.execs == machine.cuda.graphs == 0 and machine.cuda.free == free


def test_rtx_keeps_the_kernels_that_it_compiled_here(make_bundle, fake_sampler, batch):
    bundle, quirks = make_bundle(), {"rtx": True, "capturable": True}
    inputs = batch([[True]], [[3, 4]])
    expected = fake_sampler(bundle)[0].sample_actions(*inputs, noise=noise())
    for start in (1, 2):
        machine = Machine(bundle, quirks)
        sampler = machine.sampler()
        assert machine.connection.api.is_rtx
        for _ in range(3):
            ours = sampler.sample_actions(*inputs, noise=noise())
            np.testing.assert_allclose(ours, expected, **CLOSE)
        assert (bundle.path / "denoise.kernels").read_bytes() == b"k" * 10 * start
    assert not list(bundle.path.glob("*.partial*"))
    bundle.path.joinpath("denoise.kernels").unlink()
    bundle.path.joinpath("denoise.kernels").mkdir()  # cannot be written: no harm
    Machine(bundle, quirks).sampler().sample_actions(*inputs, noise=noise())


def test_rtx_keeps_kernels_where_runs_are_not_recorded(make_bundle, batch):
    bundle = make_bundle()
    sampler = Machine(bundle, {"rtx": True, "capturable": True}, record=False).sampler()
    for _ in range(2):
        sampler.sample_actions(*batch([[True]], [[3, 4]]), noise=noise())
    assert {path.name: path.read_bytes() for path in bundle.path.glob("*.kernels")} == {
        "prefix.kernels": b"k",
        "denoise.kernels": b"k",
    }


def test_two_processes_do_not_share_a_partial_file(tmp_path, monkeypatch):
    """Two containers may have one process id."""
    opened, whole = [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: (opened.append(path.name), whole(path, *a, **k))[1])
    monkeypatch.setattr(os, "getpid", lambda: 11)
    cache = SimpleNamespace(serialize=lambda: b"k")
    engine = SimpleNamespace(create_runtime_config=lambda: SimpleNamespace(create_runtime_cache=lambda: cache))
    for _ in range(2):
        contexts._Kernels(engine, tmp_path / "x.kernels").write()
        (tmp_path / "x.kernels").unlink()
    assert len(set(opened)) == 2
