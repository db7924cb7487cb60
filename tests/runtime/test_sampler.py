"""The sampler's pipeline over a fake engine: what runs, with what, and what is refused."""

import numpy as np
import pytest

from ki_edge import flow
from ki_edge.errors import ArgumentError, BackendError, BundleError
from ki_runtime.policy.sampler import Sampler

from .conftest import BAR, CONFIG, EOS, FAST_COUNT, FAST_FIRST

P = CONFIG.vision.patches
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # the formula is summed in another order
SHAPE = (CONFIG.action_horizon, CONFIG.action_dim)


def noise(rows=1, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, *SHAPE), np.float32)


def expected_actions(bundle, inputs, x, num_steps, convention="openpi"):
    """The fake engine's formula without any cache, buffer or trimming."""
    images, camera_mask, tokens, mask = inputs
    pixels = images.astype(np.float32).mean(axis=(2, 3, 4))
    seen = P * (pixels * camera_mask).sum(axis=1) + (tokens * mask).sum(axis=1)
    weights = bundle.weights()
    times = flow.denoise_times(num_steps, convention)
    table = flow.modulation_table(lambda name: weights.array(f"model.{name}"), times, CONFIG)
    for row in table:
        x = x + flow.step_size(num_steps) * (row[1, 2] + np.float32(1e-3) * seen[:, None, None])
    return x


# ---------------------------------------------------------------- the prefix


def test_only_what_exists_runs(fake_sampler, batch):
    sampler, engine = fake_sampler()
    inputs = batch([[True, False, True]], [[2, 30, 40]])
    sampler.sample_actions(*inputs, noise=noise())
    (prefix,) = engine.of("prefix")
    np.testing.assert_array_equal(prefix["images"], inputs[0][:, [0, 2]])
    assert prefix["camera_mask"].tolist() == [[True, True]]
    assert prefix["prompt_tokens"].tolist() == [[2, 30, 40]]
    assert prefix["prompt_mask"].all()
    assert engine.of("denoise")[0]["prefix_k"].shape == (2, 1, 1, 2 * P + 3, 4)


def test_batch_drops_only_what_no_row_uses(fake_sampler, batch):
    sampler, engine = fake_sampler()
    inputs = batch([[True, False, False], [False, False, True]], [[2, 30], [2, 30, 40, 50]])
    actions = sampler.sample_actions(*inputs, noise=noise(2))
    (prefix,) = engine.of("prefix")
    np.testing.assert_array_equal(prefix["images"], inputs[0][:, [0, 2]])
    assert prefix["camera_mask"].tolist() == [[True, False], [False, True]]
    assert prefix["prompt_mask"].tolist() == [[True, True, False, False], [True] * 4]
    np.testing.assert_allclose(actions, expected_actions(sampler.bundle, inputs, noise(2), 10), **CLOSE)
    for row in range(2):
        alone = sampler.sample_actions(*(part[row : row + 1] for part in inputs), noise=noise(2)[row : row + 1])
        np.testing.assert_allclose(actions[row], alone[0], **CLOSE)


def test_no_camera_at_all_keeps_one_masked(fake_sampler, batch):
    sampler, engine = fake_sampler()
    sampler.sample_actions(*batch([[False, False]], [[2, 9]]), noise=noise())
    assert engine.of("prefix")[0]["camera_mask"].tolist() == [[False]]


def test_garbage_in_masked_places_changes_nothing(fake_sampler, batch):
    sampler, _ = fake_sampler()
    images, camera_mask, tokens, mask = batch([[True, False]], [[2, 9, 11]])
    first = sampler.sample_actions(images, camera_mask, tokens, mask, noise=noise())
    images[:, 1] = 77
    tokens = np.where(mask, tokens, 123456789)  # outside the vocabulary, but padding
    second = sampler.sample_actions(images, camera_mask, tokens, mask, noise=noise())
    np.testing.assert_array_equal(first, second)


def test_padding_reaches_the_graph_as_a_token_that_exists(fake_sampler, batch):
    sampler, engine = fake_sampler()
    images, camera_mask, tokens, mask = batch([[True], [True]], [[2, 9], [2, 9, 11, 12]])
    sampler.sample_actions(images, camera_mask, np.where(mask, tokens, 123456789), mask)
    assert engine.of("prefix")[0]["prompt_tokens"].tolist() == [[2, 9, 0, 0], [2, 9, 11, 12]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, c, t, m: (i.astype(np.float32), c, t, m), "images: expected uint8"),
        (lambda i, c, t, m: (i[0], c, t, m), "images: expected uint8"),
        (lambda i, c, t, m: (i[..., :3, :, :], c, t, m), r"\[B, N, 4, 4, 3\], got"),
        (lambda i, c, t, m: (i[:0], c[:0], t[:0], m[:0]), "images: expected"),
        (lambda i, c, t, m: (i, c[:, :1], t, m), r"camera_mask: expected bool \[1, 2\]"),
        (lambda i, c, t, m: (i, c.astype(np.int32), t, m), "camera_mask: expected bool"),
        (lambda i, c, t, m: (i, c, t.astype(np.float32), m), "prompt_tokens: expected integers"),
        (lambda i, c, t, m: (i, c, np.repeat(t, 2, 0), np.repeat(m, 2, 0)), r"integers \[1, T\]"),
        (lambda i, c, t, m: (i, c, t, m[:, :-1]), "prompt_mask: expected bool"),
        (lambda i, c, t, m: (i, c, t, m & False), "prompt_mask: row 0 does not start with a token"),
        (lambda i, c, t, m: (i, c, t, m ^ (np.arange(12) == 1)), "prompt_mask: row 0 has a gap"),
        (lambda i, c, t, m: (i, c, t + 998, m), "id 1000 is outside the model's vocabulary 0..999"),
        (lambda i, c, t, m: (i, c, t - 3, m), "id -1 is outside"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit(fake_sampler, batch, change, message):
    sampler, engine = fake_sampler()
    with pytest.raises(ArgumentError, match=message):
        sampler.sample_actions(*change(*batch([[True, True]], [[2, 9, 11]])))
    assert not engine.calls


# ---------------------------------------------------------------- the denoise loop


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
@pytest.mark.parametrize("convention", ["openpi", "lerobot"])
def test_steps_and_times(fake_sampler, make_bundle, batch, num_steps, convention):
    bundle = make_bundle(sampling={"time_convention": convention, "num_steps": 5})
    sampler, engine = fake_sampler(bundle)
    inputs = batch([[True, True]], [[2, 9, 11]])
    actions = sampler.sample_actions(*inputs, noise=noise(), num_steps=num_steps)
    assert len(engine.of("denoise")) == num_steps
    np.testing.assert_allclose(
        actions, expected_actions(bundle, inputs, noise(), num_steps, convention), rtol=1e-5, atol=1e-5
    )
    weights = bundle.weights()
    times = flow.denoise_times(num_steps, convention)
    table = flow.modulation_table(lambda name: weights.array(f"model.{name}"), times, CONFIG)
    np.testing.assert_array_equal([call["modulation"] for call in engine.of("denoise")], table)
    assert {float(call["dt"]) for call in engine.of("denoise")} == {float(np.float32(-1 / num_steps))}


def test_the_manifest_gives_the_number_of_steps(fake_sampler, make_bundle, batch):
    sampler, engine = fake_sampler(make_bundle(sampling={"time_convention": "openpi", "num_steps": 4}))
    sampler.sample_actions(*batch([[True]], [[2]]), seed=1)
    assert len(engine.of("denoise")) == sampler.num_steps == 4


def test_kv_stay_where_the_prefix_wrote_them_and_x_swaps_buffers(fake_sampler, batch):
    sampler, engine = fake_sampler()
    sampler.sample_actions(*batch([[True]], [[2, 9]]), noise=noise(), num_steps=3)
    (prefix,) = (buffers for name, buffers in engine.bindings if name == "prefix")
    steps = [buffers for name, buffers in engine.bindings if name == "denoise"]
    for name in ("prefix_k", "prefix_v", "prefix_mask"):
        assert all(step[name] is prefix[name] for step in steps)
    assert steps[0]["x_next"] is steps[1]["x_t"] and steps[1]["x_next"] is steps[2]["x_t"] is steps[0]["x_t"]
    assert steps[0]["x_t"] is not steps[0]["x_next"]


def test_nothing_is_bound_or_allocated_again(fake_sampler, batch, monkeypatch):
    sampler, engine = fake_sampler()
    long, short = batch([[True, True]], [[2, 9, 11]]), batch([[True]], [[2, 9]])
    for inputs in (long, short):
        sampler.sample_actions(*inputs, noise=noise())
    bound = len(engine.bindings)
    for inputs in (long, short, long):
        sampler.sample_actions(*inputs, noise=noise())
    assert len(engine.bindings) == bound
    shared = [buffers["prefix_k"].array for name, buffers in engine.bindings if name == "prefix"]
    assert np.shares_memory(*shared)


def test_growing_shapes_keep_results_right(fake_sampler, batch):
    sampler, _ = fake_sampler()
    cases = [batch([[True] * n], [[2, *range(10, 10 + t)]]) for n, t in ((1, 1), (2, 3), (1, 9), (3, 9), (1, 1))]
    for inputs in (*cases, *cases):
        actions = sampler.sample_actions(*inputs, noise=noise(), num_steps=3)
        np.testing.assert_allclose(actions, expected_actions(sampler.bundle, inputs, noise(), 3), **CLOSE)


def test_a_longer_prompt_replaces_the_memory_of_all_shapes(fake_sampler, batch):
    sampler, engine = fake_sampler()
    short, long = batch([[True]], [[2]]), batch([[True]], [[2, 9, 10, 11]])
    for inputs in (short, long, short):
        sampler.sample_actions(*inputs, noise=noise())
    old, new, again = (buffers["prefix_k"].array for name, buffers in engine.bindings if name == "prefix")
    assert np.shares_memory(new, again) and not np.shares_memory(old, again)


def test_the_modulation_of_recent_step_counts_is_kept(fake_sampler, batch, monkeypatch):
    sampler, _ = fake_sampler()
    computed, table = [], flow.modulation_table
    monkeypatch.setattr(flow, "modulation_table", lambda *a: computed.append(len(a[1])) or table(*a))
    for num_steps in (1, 2, 3, 4, 1, 5, 1, 2):
        sampler.sample_actions(*batch([[True]], [[2]]), num_steps=num_steps)
    assert computed == [1, 2, 3, 4, 5, 2]


def test_step_counts_alternate(fake_sampler, batch):
    sampler, _ = fake_sampler()
    inputs = batch([[True]], [[2, 9]])
    for num_steps in (2, 5, 1, 2, 3, 4, 6, 7, 2):
        actions = sampler.sample_actions(*inputs, noise=noise(), num_steps=num_steps)
        np.testing.assert_allclose(
            actions, expected_actions(sampler.bundle, inputs, noise(), num_steps), rtol=1e-5, atol=1e-5
        )


def test_results_are_the_callers(fake_sampler, batch):
    sampler, _ = fake_sampler()
    inputs, given = batch([[True]], [[2, 9]]), noise()
    first = sampler.sample_actions(*inputs, noise=given)
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(given, noise())
    np.testing.assert_array_equal(sampler.sample_actions(*inputs, noise=given), kept)


def test_seed_draws_the_noise(fake_sampler, batch):
    sampler, engine = fake_sampler()
    inputs = batch([[True]], [[2, 9]])
    a, b, c = (sampler.sample_actions(*inputs, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(a, b)
    assert (a != c).all() and (sampler.sample_actions(*inputs) != sampler.sample_actions(*inputs)).all()
    np.testing.assert_array_equal(engine.of("denoise")[0]["x_t"], noise(seed=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": noise()[0]}, r"noise: expected float32 \[1, 5, 6\], got float32 \[5, 6\]"),
        ({"noise": noise().astype(np.float64)}, "noise: expected float32"),
        ({"noise": noise() * np.float32(np.nan)}, "noise holds NaN"),
        ({"noise": noise(), "seed": 1}, "noise and seed"),
        ({"num_steps": 0}, "num_steps 0"),
        ({"num_steps": 2.0}, "num_steps 2.0"),
    ],
)
def test_arguments_that_do_not_fit(fake_sampler, batch, arguments, message):
    sampler, engine = fake_sampler()
    with pytest.raises(ArgumentError, match=message):
        sampler.sample_actions(*batch([[True]], [[2]]), **arguments)
    assert not engine.calls


def test_trace(fake_sampler, batch):
    sampler, _ = fake_sampler()
    inputs = batch([[False, True], [False, True]], [[2, 9], [2, 9, 10]])
    trace = sampler.trace(*inputs, noise=noise(2), num_steps=3)
    assert trace.x.shape == (4, 2, *SHAPE)
    np.testing.assert_array_equal(trace.x[0], noise(2))
    np.testing.assert_array_equal(trace.x[3], sampler.sample_actions(*inputs, noise=noise(2), num_steps=3))
    assert trace.columns.tolist() == [*range(P, 2 * P), *range(2 * P, 2 * P + 3)]
    np.testing.assert_array_equal(trace.prefix_mask, np.arange(P + 3) < [[P + 2], [P + 3]])
    assert trace.prefix_k[0, 1, 0, P:, 0].tolist() == [2, 9, 10]
    assert (trace.prefix_v == trace.prefix_k + 0.5).all()


def test_stages_are_timed(fake_sampler, batch):
    sampler, _ = fake_sampler()
    sampler.sample_actions(*batch([[True]], [[2]]))
    assert sampler.timing.prefix > 0 and sampler.timing.denoise > 0 and sampler.timing.fast == 0
    sampler.sample_fast_tokens(*batch([[True]], [[2]]), max_tokens=2)
    assert sampler.timing.prefix > 0 and sampler.timing.denoise == 0 and sampler.timing.fast > 0


# ---------------------------------------------------------------- bundles


@pytest.mark.parametrize("sampling", [{}, {"time_convention": "mine", "num_steps": 10}, {"time_convention": "openpi"}])
def test_malformed_sampling(fake_sampler, make_bundle, sampling):
    with pytest.raises(BundleError, match="manifest 'sampling'"):
        fake_sampler(make_bundle(sampling=sampling))


@pytest.mark.parametrize(
    "changes",
    [{"first": "600"}, {"first": -1}, {"count": 0}, {"count": 10**12}, {"extra": None}, {"extra": [CONFIG.vocab_size]}],
)
def test_a_decode_vocabulary_that_the_model_does_not_have(make_bundle, changes):
    bundle = make_bundle(decode_vocabulary={"first": FAST_FIRST, "count": FAST_COUNT, "extra": [BAR, EOS], **changes})
    with pytest.raises(BundleError, match="'decode_vocabulary'"):
        Sampler.open(bundle)


@pytest.mark.parametrize("runtime", [{}, {"time_mlp_in.weight": "nowhere"}])
def test_missing_runtime_weights(fake_sampler, make_bundle, runtime):
    with pytest.raises(BundleError, match="time modulation"):
        fake_sampler(make_bundle(weights={"file": "weights.safetensors", "runtime": runtime}))


def test_unknown_backend(make_bundle):
    with pytest.raises(
        BackendError, match=r"no backend 'abacus'; there are: auto, trt, trt-rtx, ort-cuda, openvino, ort$"
    ):
        Sampler.open(make_bundle(), "abacus")


def test_missing_backend_says_what_to_install(make_bundle, monkeypatch):
    monkeypatch.setattr("ki_runtime.backends.backend.find_spec", lambda name: None)
    with pytest.raises(
        BackendError,
        match=r"no backend can run this: trt: .*; ort: no onnxruntime package; .*; pip install 'ki-edge\[ort\]'",
    ):
        Sampler.open(make_bundle())


def test_verify_reads_every_file(make_bundle):
    bundle = make_bundle()
    path = bundle.path / "denoise.onnx"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(BundleError, match="has changed since the export"):
        Sampler.open(bundle.path, verify=True)
