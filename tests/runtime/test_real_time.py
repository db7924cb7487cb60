"""Chunks that continue another one, over the fake engine: what is written where, when, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from ki_edge import flow
from ki_edge.errors import ArgumentError, BundleError
from ki_edge.overlap import Overlap, guidance_weights, prefix_weights
from ki_edge.policy.chunking import Guiding, PreviousChunk, overlap_of
from ki_edge.policy.contract import Camera, generic
from ki_edge.policy.normalize import NormStats, write_norm_stats
from ki_runtime.policy.assets import read_assets
from ki_runtime.policy.policy import Policy

from .conftest import CONFIG

HORIZON, DIM = CONFIG.action_horizon, 3
SHAPE = (CONFIG.action_horizon, CONFIG.action_dim)
ROBOT = {"images": {"front": np.zeros((4, 4, 3), np.uint8)}, "state": [0.5, -1.0], "prompt": "fold the towel"}


def geometry(rtc):
    return replace(CONFIG, rtc=rtc).to_dict()


def overlap(batch=1, *, committed=0, maximum=None, seed=1):
    actions = np.random.default_rng(seed).uniform(-1, 1, (batch, *SHAPE)).astype(np.float32)
    weights = np.tile(prefix_weights(1, 3, SHAPE[0]), (batch, 1))
    return Overlap(actions, weights, np.tile(np.arange(SHAPE[0]) < committed, (batch, 1)), maximum)


@pytest.fixture
def rtc_sampler(make_bundle, fake_sampler):
    """rtc_sampler(rtc) -> (sampler, engine, a call's inputs)."""

    def make(rtc, batch):
        sampler, engine = fake_sampler(make_bundle(rtc, model=geometry(rtc)))
        inputs = batch([[True, False]], [[2, 30, 40]])
        noise = np.random.default_rng(0).standard_normal((1, *SHAPE), np.float32)
        return sampler, engine, lambda **more: sampler.sample_actions(*inputs, noise=noise, **more)

    return make


def test_what_every_step_is_told(rtc_sampler, batch):
    sampler, engine, sample = rtc_sampler("trained", batch)
    given = overlap(committed=2, maximum=3.0)
    sample(overlap=given, num_steps=4)
    steps, times = engine.of("denoise"), flow.denoise_times(4)
    assert len(steps) == 4
    weights = sampler.bundle.weights()
    settled = flow.modulation_table(lambda name: weights.array(f"model.{name}"), np.zeros(1, np.float32), CONFIG)[0]
    for step, time, pull in zip(steps, times, guidance_weights(times, 3.0), strict=True):
        np.testing.assert_array_equal(step["previous"], given.actions)
        np.testing.assert_array_equal(step["previous_weights"], given.weights)
        np.testing.assert_array_equal(step["committed"], given.committed)
        np.testing.assert_array_equal(step["committed_modulation"], settled)
        assert (step["time"], step["guidance"]) == (time, pull)


@pytest.mark.parametrize("rtc", ["guided", "trained"])
def test_a_call_without_a_chunk_before_is_as_if_there_had_been_none(rtc_sampler, batch, rtc):
    """Whatever the call before it was; and its binding is the same, so a record of it can be replayed."""
    plain = rtc_sampler("none", batch)[2](num_steps=3)
    _, engine, sample = rtc_sampler(rtc, batch)
    np.testing.assert_array_equal(sample(num_steps=3), plain)
    bound = len(engine.bindings)
    assert np.abs(sample(overlap=overlap(committed=2 * (rtc == "trained")), num_steps=3) - plain).max() > 0.01
    np.testing.assert_array_equal(sample(num_steps=3), plain)
    assert len(engine.bindings) == bound
    last = engine.of("denoise")[-1]
    assert not any(last[name].any() for name in ("previous", "previous_weights", "committed") if name in last)


def test_the_maximum_is_each_calls_own(rtc_sampler, batch):
    """The number of steps, where a call does not say."""
    _, engine, sample = rtc_sampler("guided", batch)
    wanted = [(None, 4), (2.5, 4), (None, 6), (None, 4), (2.5, 6), (2.5, 4)]
    for maximum, steps in wanted:
        sample(overlap=overlap(maximum=maximum), num_steps=steps)
        found = [float(step["guidance"]) for step in engine.of("denoise")[-steps:]]
        np.testing.assert_array_equal(found, guidance_weights(flow.denoise_times(steps), maximum or steps))


def test_the_trace_is_what_is_sampled(rtc_sampler, batch):
    sampler = rtc_sampler("guided", batch)[0]
    inputs, noise = batch([[True, False]], [[2, 30, 40]]), np.zeros((1, *SHAPE), np.float32)
    trace = sampler.trace(*inputs, noise=noise, overlap=overlap(), num_steps=3)
    actions = sampler.sample_actions(*inputs, noise=noise, overlap=overlap(), num_steps=3)
    np.testing.assert_array_equal(trace.x[-1], actions)


@pytest.mark.parametrize(
    ("rtc", "given", "message"),
    [
        ("none", overlap(), "was exported without real-time chunking: export its checkpoint with --rtc"),
        ("guided", overlap(committed=1), "was not trained to take committed actions"),
        ("guided", overlap(batch=2), r"its actions are \[2, 5, 6\], expected \[1, 5, 6\]"),
    ],
)
def test_overlaps_that_a_bundle_does_not_take(rtc_sampler, batch, rtc, given, message):
    _, engine, sample = rtc_sampler(rtc, batch)
    with pytest.raises(ArgumentError, match=message):
        sample(overlap=given)
    assert not engine.calls


@pytest.mark.parametrize("given", [{"actions": 1}, np.zeros((1, *SHAPE), np.float32), True])
def test_what_is_no_overlap(rtc_sampler, batch, given):
    _, engine, sample = rtc_sampler("guided", batch)
    with pytest.raises(ArgumentError, match=f"expected an Overlap of ki_edge.overlap, got {type(given).__name__}"):
        sample(overlap=given)
    assert not engine.calls


# ---------------------------------------------------------------- the policy


TRAINED = {"rtc_max_delay": 2, "rtc_distribution": "uniform"}


@pytest.fixture
def make_policy(make_bundle, fake_sampler, tokenizer_model, tmp_path):
    """make_policy(rtc, **contract changes) -> (Policy, fake engine)."""
    stats = {
        "state": NormStats(q01=[-1.0, -2.0], q99=[1.0, 2.0]),
        "actions": NormStats(q01=[-1.0, 0.0, 5.0], q99=[1.0, 4.0, 6.0]),
    }
    write_norm_stats(tmp_path / "norm_stats.json", stats)
    assets = {
        "assets/tokenizer.model": tokenizer_model,
        "assets/norm_stats.json": (tmp_path / "norm_stats.json").read_bytes(),
    }

    def make(rtc="none", **changes):
        cameras = [Camera("base", "front"), Camera("wrist", "wrist", required=False)]
        sizes = {"state_dim": 2, "action_dim": DIM, "action_horizon": HORIZON, "model_action_dim": CONFIG.action_dim}
        contract = generic(cameras, image_size=(4, 4), prompt_format="ki", **{**sizes, **changes})
        bundle = make_bundle("bundle", assets, contract=contract.to_json(), model=geometry(rtc))
        sampler, engine = fake_sampler(bundle)
        return Policy(sampler, read_assets(bundle)), engine

    return make


def chunk(rows=4):
    return np.random.default_rng(2).uniform([-1, 0, 5], [1, 4, 6], (rows, DIM))


@pytest.mark.parametrize(
    ("rtc", "changes", "way", "expected"),
    [
        ("guided", {}, None, "guided"),
        ("trained", TRAINED, None, "trained"),
        ("trained", TRAINED, "guided", "guided"),
        ("guided", {"delta_mask": (True, False)}, None, "guided"),
    ],
)
def test_the_policy_chooses_the_way(make_policy, rtc, changes, way, expected):
    policy, engine = make_policy(rtc, **changes)
    assert (policy.rtc, policy.max_delay) == (rtc, 2 if rtc == "trained" else None)
    previous, guiding = PreviousChunk(chunk(), delay=2), Guiding(maximum=4.0, schedule="linear")
    policy.infer(ROBOT, seed=0, previous=previous, way=way, guiding=guiding)
    given = overlap_of(previous, policy.contract, policy._outputs.stats, ROBOT["state"], way=expected, guiding=guiding)
    step = engine.of("denoise")[0]
    np.testing.assert_array_equal(step["previous"], given.actions)
    np.testing.assert_array_equal(step["previous_weights"], given.weights)
    assert step["guidance"] == 4.0
    assert "committed" not in step or (step["committed"] == given.committed).all()
    assert given.committed.any() == (expected == "trained") and given.weights.any() == (expected == "guided")


def test_without_real_time_chunking(make_policy):
    policy, engine = make_policy()
    assert (policy.rtc, policy.max_delay) == (None, None)
    with pytest.raises(ArgumentError, match="was exported without real-time chunking"):
        policy.infer(ROBOT, previous=PreviousChunk(chunk(), delay=1))
    assert not engine.calls
    policy.infer(ROBOT)


@pytest.mark.parametrize(
    ("rtc", "previous", "more", "message"),
    [
        ("trained", (chunk(), 3), {}, "delay 3: this policy was trained for delays up to 2"),
        ("guided", (chunk(), 1), {"way": "trained"}, "way 'trained': this policy's chunks can be guided"),
        ("trained", (chunk(), 1), {"way": "both"}, "way 'both': this policy's chunks can be guided or trained"),
        ("guided", (chunk(HORIZON + 1), 1), {}, "6 rows, but a chunk has 5"),
        ("guided", (np.zeros((2, 2)), 1), {}, "2 numbers each, the policy's have 3"),
    ],
)
def test_what_the_policy_refuses(make_policy, rtc, previous, more, message):
    policy, engine = make_policy(rtc, **(TRAINED if rtc == "trained" else {}))
    with pytest.raises(ArgumentError, match=message):
        policy.infer(ROBOT, previous=PreviousChunk(*previous), **more)
    assert not engine.calls


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"previous": chunk()}, "expected a PreviousChunk of ki_edge.policy.chunking, got ndarray"),
        ({"previous": {"actions": chunk()}}, "expected a PreviousChunk of ki_edge.policy.chunking, got dict"),
        ({"previous": PreviousChunk(chunk(), 1), "guiding": 5.0}, "expected a Guiding of ki_edge.policy.chunking"),
    ],
)
def test_what_is_no_chunk(make_policy, more, message):
    policy, engine = make_policy("guided")
    with pytest.raises(ArgumentError, match=message):
        policy.infer(ROBOT, **more)
    assert not engine.calls


def test_a_trained_geometry_needs_the_contracts_word(make_policy):
    with pytest.raises(BundleError, match=r"the model's rtc is trained, and the contract has no rtc_max_delay"):
        make_policy("trained")
