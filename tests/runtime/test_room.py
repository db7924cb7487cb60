"""A device whose memory is short: earlier plans make room, and a recording that found none is tried again."""

import gc

import numpy as np
import pytest

from ki_edge.errors import BackendError, DeviceMemoryError
from ki_runtime.policy.room import within_memory
from ki_runtime.trt.bindings import RECORD_TRIES

from .gpu_machine import CLOSE, Machine, noise


class Stage:
    def __init__(self, log, name, plans):
        self.log, self.name, self.plans = log, name, plans

    def drop_oldest(self):
        if self.plans < 2:
            return False
        self.plans -= 1
        self.log.append(f"{self.name} drops")
        return True

    def forget(self):
        self.plans = 0
        self.log.append(f"{self.name} forgets")


@pytest.mark.parametrize("fits_after", [0, 1, 3, 4, None])
def test_plans_go_one_by_one(fits_after):
    log, tries = [], []
    stages = Stage(log, "a", 2), Stage(log, "b", 3)

    def run():
        tries.append(len(log))
        if fits_after is None or len(tries) <= fits_after:
            raise DeviceMemoryError("no room")
        return "result"

    steps = ["a drops", "b drops", "b drops", "a forgets", "b forgets"]
    if fits_after is None:
        with pytest.raises(DeviceMemoryError, match="no room"):
            within_memory(lambda: stages, run)
        assert log == [*steps, "a forgets", "b forgets"]
    else:
        assert within_memory(lambda: stages, run) == "result"
        assert log == steps[: {4: 5}.get(fits_after, fits_after)]


def test_other_errors_are_not_tried_again():
    with pytest.raises(BackendError, match=r"^other$"):
        within_memory(lambda: (), lambda: (_ for _ in ()).throw(BackendError("other")))


def lengths(batch):
    return [batch([[True]], [[3] * length], length=60) for length in (60, 40, 20)]


def test_older_prompt_lengths_make_room(machine, fake_sampler, batch):
    """Each context takes memory; there is room for two lengths."""
    machine.trt.quirks["persistent"] = 5000
    plain, sampler = fake_sampler(machine.bundle)[0], machine.sampler()
    inputs = lengths(batch)
    for case in inputs[:2]:
        sampler.sample_actions(*case, noise=noise())
    assert len(sampler._prefix._plans) == 2
    machine.cuda.memory -= machine.cuda.free - 5500
    records = machine.cuda.execs
    for case in (*inputs, *inputs):
        expected = plain.sample_actions(*case, noise=noise())
        np.testing.assert_allclose(sampler.sample_actions(*case, noise=noise()), expected, **CLOSE)
    assert len(sampler._prefix._plans) <= 2 and machine.cuda.execs <= records


def test_step_counts_make_room(machine, fake_sampler, batch):
    plain, sampler = fake_sampler(machine.bundle)[0], machine.sampler()
    inputs = batch([[True]], [[3, 4]])
    for steps in (10, 9, 8):
        sampler.sample_actions(*inputs, noise=noise(), num_steps=steps)
    machine.cuda.memory -= machine.cuda.free - 500
    ours = sampler.sample_actions(*inputs, noise=noise(), num_steps=7)
    np.testing.assert_allclose(ours, plain.sample_actions(*inputs, noise=noise(), num_steps=7), **CLOSE)
    assert len(sampler._denoise._clocks) < 4


def test_a_recording_without_room_is_tried_again(make_bundle, fake_sampler, batch):
    machine = Machine(make_bundle())
    plain, sampler = fake_sampler(machine.bundle)[0], machine.sampler()
    inputs = batch([[True]], [[3, 4]])
    for seed, launches in ((0, 0), (1, 0), (2, 2)):
        if seed == 0:
            machine.cuda.fail["cudaStreamEndCapture"] = machine.cuda.fail["cudaGraphInstantiate"] = 2
        x = noise(seed=seed)
        ours = sampler.sample_actions(*inputs, noise=x)
        np.testing.assert_allclose(ours, plain.sample_actions(*inputs, noise=x), **CLOSE)
        assert machine.cuda.launches == launches
    assert len([line for line in machine.lines if "until there is more memory" in line]) == len(machine.lines) > 0


def test_contexts_without_room_leave_eager_runs(make_bundle, fake_sampler, batch):
    """Of ten contexts for a recording only a few fit: one for everything does."""
    machine = Machine(make_bundle(), {"persistent": 1000})
    plain, sampler = fake_sampler(machine.bundle)[0], machine.sampler()
    inputs = batch([[True]], [[3, 4]])
    sampler.sample_actions(*inputs, noise=noise(), num_steps=1)  # all memory but the contexts' is there
    tight, machine.cuda.memory = machine.cuda.memory, machine.cuda.memory - machine.cuda.free + 6000
    for seed in range(RECORD_TRIES + 2):
        x = noise(seed=seed)
        ours = sampler.sample_actions(*inputs, noise=x, num_steps=10)
        np.testing.assert_allclose(ours, plain.sample_actions(*inputs, noise=x, num_steps=10), **CLOSE)
    (line,) = machine.lines
    assert line.startswith("graph denoise runs without CUDA graphs, slower, until there is more memory: no room for")
    gc.collect()
    launches, machine.cuda.memory = machine.cuda.launches, tight
    for _ in range(2):  # another step count is another sequence: it has its own tries
        sampler.sample_actions(*inputs, noise=noise(), num_steps=9)
    assert machine.cuda.launches == launches + 3  # the prefix twice, the loop once


def test_a_refusal_is_for_good(make_bundle, batch):
    machine = Machine(make_bundle(), {"capturable": False})
    sampler = machine.sampler()
    for inputs in lengths(batch):
        for _ in range(2):
            sampler.sample_actions(*inputs, noise=noise())
    assert "cudaStreamBeginCapture" not in machine.cuda.calls
    assert len(machine.lines) == 2 and all("the engine cannot be recorded" in line for line in machine.lines)
