"""TensorRT behind the session seam: the sampler over a fake TensorRT on a fake GPU, held to the fake engine alone."""

import numpy as np
import pytest

from ki_edge import graphs
from ki_edge.errors import BackendError
from ki_edge.policy.contract import FastContract, generic
from ki_runtime.trt.bindings import CACHE_BUCKET, TensorRTSession

from .conftest import CONFIG
from .gpu_machine import CASES, CLOSE, Machine, noise

P = CONFIG.vision.patches


@pytest.mark.parametrize(("cameras", "prompts"), CASES)
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_actions_equal_the_engine_alone(machine, fake_sampler, batch, cameras, prompts, num_steps):
    inputs, x = batch(cameras, prompts, length=20), noise(len(prompts))
    plain, _ = fake_sampler(machine.bundle)
    sampler = machine.sampler()
    expected = plain.sample_actions(*inputs, noise=x, num_steps=num_steps)
    for _ in range(3):  # one by one, recorded, replayed
        np.testing.assert_allclose(sampler.sample_actions(*inputs, noise=x, num_steps=num_steps), expected, **CLOSE)


@pytest.mark.parametrize(("cameras", "prompts"), CASES)
@pytest.mark.parametrize("forced", [(), (50, 51)])
def test_tokens_equal_the_engine_alone(machine, fake_sampler, batch, cameras, prompts, forced):
    inputs = batch(cameras, prompts, length=20)
    plain, sampler = fake_sampler(machine.bundle)[0], machine.sampler()
    for count in (1, 9, 9):
        expected = plain.sample_fast_tokens(*inputs, max_tokens=count, forced=forced)
        np.testing.assert_array_equal(sampler.sample_fast_tokens(*inputs, max_tokens=count, forced=forced), expected)


@pytest.mark.parametrize(("cameras", "prompts"), CASES)
def test_a_trace_has_no_padding(machine, fake_sampler, batch, cameras, prompts):
    inputs, x = batch(cameras, prompts, length=20), noise(len(prompts))
    ours = machine.sampler().trace(*inputs, noise=x, num_steps=3)
    theirs = fake_sampler(machine.bundle)[0].trace(*inputs, noise=x, num_steps=3)
    for name in ("prefix_k", "prefix_v", "prefix_mask", "columns"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    np.testing.assert_allclose(ours.x, theirs.x, **CLOSE)


def test_changing_shapes_and_step_counts(machine, fake_sampler, batch):
    plain, sampler = fake_sampler(machine.bundle)[0], machine.sampler()
    random = np.random.default_rng(0)
    for call in range(40):
        rows = int(random.integers(1, 3))
        cameras = [[True, bool(random.integers(2))] for _ in range(rows)]
        prompts = [random.integers(2, 50, random.integers(1, 60)).tolist() for _ in range(rows)]
        inputs, x = batch(cameras, prompts, length=60), noise(rows, seed=call)
        steps = int(random.integers(1, 7))
        ours, theirs = (s.sample_actions(*inputs, noise=x, num_steps=steps) for s in (sampler, plain))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        if call % 5 == 0:
            ours, theirs = (s.sample_fast_tokens(*inputs, max_tokens=6, forced=(9,)) for s in (sampler, plain))
            np.testing.assert_array_equal(ours, theirs)
    assert not machine.lines


def test_run_once(machine):
    opened = machine.connection.open(graphs.DENOISE)
    assert isinstance(opened, TensorRTSession)
    random = np.random.default_rng(0)
    sizes = {**opened.sizes, "B": 2, "S": 6}
    feeds = {t.name: np.ones([sizes.get(d, d) for d in t.dims], t.dtype) for t in opened.inputs}
    feeds["x_t"] = random.standard_normal(feeds["x_t"].shape).astype(np.float32)
    np.testing.assert_allclose(opened.run(feeds)["x_next"], machine.engine.denoise(**feeds)["x_next"], **CLOSE)


def test_prompts_are_padded_to_buckets(machine, batch):
    sampler = machine.sampler()
    for length in (1, 5, 16, 17, 30):
        sampler.sample_actions(*batch([[True]], [[3] * length], length=40), noise=noise())
    fed = machine.engine.of("prefix")
    assert [call["prompt_tokens"].shape[1] for call in fed] == [16, 16, 16, 32, 32]
    assert [int(call["prompt_mask"].sum()) for call in fed] == [1, 5, 16, 17, 30]
    assert all((call["prompt_tokens"][~call["prompt_mask"]] == 0).all() for call in fed)
    assert len(machine.contexts("prefix")) == 2  # one for each shape


def test_a_prompt_is_not_padded_beyond_the_engine(make_bundle, batch):
    machine = Machine(make_bundle())
    least, best, most = machine.trt.profiles["prefix"][0]["prompt_tokens"]
    for name in ("prompt_tokens", "prompt_mask"):
        shapes = machine.trt.profiles["prefix"][0].shapes
        shapes[name] = (least, best, (most[0], 20))
    machine.sampler().sample_actions(*batch([[True]], [[3] * 18], length=40), noise=noise())
    assert machine.engine.of("prefix")[0]["prompt_tokens"].shape == (1, 20)


def test_caches_are_padded_to_buckets(machine, batch):
    sampler = machine.sampler()
    for count in (3, 9, 20):
        sampler.sample_fast_tokens(*batch([[True]], [[3, 4]]), max_tokens=count, forced=(5,))
    assert {call["cache_k"].shape[3] for call in machine.engine.of("fast_decode")} == {CACHE_BUCKET}
    assert len(machine.contexts("fast_decode")) == 2  # the opening and the tokens after it


def test_the_engine_s_ranges_are_told(machine, batch):
    sampler = machine.sampler()
    with pytest.raises(
        BackendError, match=r"graph prefix: outside .*'images' is \[1, 4, 4, 4, 3\], built for \[1, 1, "
    ):
        sampler.sample_actions(*batch([[True] * 4], [[3]]), noise=noise())
    with pytest.raises(BackendError, match=r"'cache_mask' is \[1, \d+\], built for"):
        sampler.sample_fast_tokens(*batch([[True]], [[3]]), max_tokens=4000)
    sampler.sample_actions(*batch([[True] * 3], [[3]]), noise=noise())


def test_profiles_hold_what_the_runtime_asks_for(make_bundle, batch, tokenizer_model):
    """A policy's longest prompt with all cameras, and its longest decoding, padded as the runtime pads them."""
    fast = FastContract(id_offset=900, size=20, max_tokens=60)
    contract = generic(["a", "b"], state_dim=2, action_dim=2, action_horizon=5, fast=fast)
    machine = Machine(make_bundle(assets={"assets/tokenizer.model": tokenizer_model}, contract=contract.to_json()))
    sampler = machine.sampler()
    inputs = batch([[True, True]], [[3] * contract.max_token_len], length=contract.max_token_len)
    sampler.sample_actions(*inputs, noise=noise())
    sampler.sample_fast_tokens(*inputs, max_tokens=60 - 2, forced=(5, 6))
    assert machine.engine.of("prefix")[0]["prompt_tokens"].shape[1] % 16 == 0
    assert machine.engine.of("fast_decode")[0]["cache_mask"].shape[1] >= 2 * P + contract.max_token_len + 60
