"""Observations to robot actions over the fake engine, held to the pipelines called by hand."""

import numpy as np
import pytest

from ki_edge.errors import ArgumentError, BackendError, BundleError, ObservationError, PromptError
from ki_edge.policy.contract import Camera, FastContract, generic
from ki_edge.policy.fast import FastIds
from ki_edge.policy.fast_fitting import fit_codec
from ki_edge.policy.normalize import NormStats, read_norm_stats, write_norm_stats
from ki_edge.policy.prompt import PromptTokenizer
from ki_edge.policy.transforms import InputPipeline, OutputPipeline
from ki_runtime.policy import policy as policy_module
from ki_runtime.policy.assets import read_assets
from ki_runtime.policy.policy import Policy

from .conftest import CONFIG, EOS

HORIZON, DIM = CONFIG.action_horizon, 3
OFFSET, FOREIGN = 900, 399  # FAST ids end at 900; 399 is a token that means nothing in a FAST postfix


def contract(**changes):
    cameras = [Camera("base", "front"), Camera("wrist", "wrist", required=False)]
    fields = {"state_dim": 2, "action_dim": DIM, "action_horizon": HORIZON, "execute": 2, "image_size": (4, 4)}
    return generic(cameras, **{**fields, "model_action_dim": CONFIG.action_dim, "prompt_format": "ki", **changes})


@pytest.fixture(scope="module")
def codec():
    chunks = np.random.default_rng(0).uniform(-1, 1, (20, HORIZON, DIM))
    return fit_codec(chunks, scale=10.0, vocab_size=80, margin=2)


@pytest.fixture
def assets(tmp_path, tokenizer_model, codec):
    stats = {
        "state": NormStats(q01=[-1.0, -2.0], q99=[1.0, 2.0], mean=[0.0, 0.0], std=[1.0, 1.0]),
        "actions": NormStats(q01=[-1.0, 0.0, 5.0], q99=[1.0, 4.0, 6.0], mean=[0.0] * 3, std=[1.0] * 3),
    }
    write_norm_stats(tmp_path / "norm_stats.json", stats)
    codec.save(tmp_path / "codec")
    files = {f"assets/fast/{path.name}": path.read_bytes() for path in (tmp_path / "codec").iterdir()}
    norm_stats = (tmp_path / "norm_stats.json").read_bytes()
    return {"assets/tokenizer.model": tokenizer_model, "assets/norm_stats.json": norm_stats, **files}


@pytest.fixture
def make_policy(make_bundle, fake_sampler, assets, codec, tokenizer_model):
    """make_policy(name="bundle", **contract changes) -> (Policy, fake engine)."""

    def make(name="bundle", **changes):
        fast = FastContract(id_offset=OFFSET, size=codec.vocab_size, max_tokens=40)
        ends = [*PromptTokenizer(tokenizer_model, "ki", 99).end_ids, EOS, FOREIGN]
        vocabulary = {"first": OFFSET - codec.vocab_size + 1, "count": codec.vocab_size, "extra": ends}
        content = contract(**{"fast": fast, **changes}).to_json()
        bundle = make_bundle(name, assets, contract=content, decode_vocabulary=vocabulary)
        sampler, engine = fake_sampler(bundle)
        return Policy(sampler, read_assets(bundle)), engine

    return make


@pytest.fixture
def observation():
    random = np.random.default_rng(5)
    images = {name: random.integers(0, 256, (8, 6, 3), dtype=np.uint8) for name in ("front", "wrist")}
    return {"images": images, "state": np.array([0.3, -0.7]), "prompt": "pick up the red cube"}


def noise(seed=0):
    return np.random.default_rng(seed).standard_normal((HORIZON, CONFIG.action_dim), np.float32)


def test_an_absent_camera_is_told_once(make_policy, observation):
    made, _ = make_policy()
    said = []
    policy = Policy(made.sampler, read_assets(made.sampler.bundle), said.append)
    policy.infer(observation, seed=0)
    assert not said
    without = {**observation, "images": {"front": observation["images"]["front"]}}
    for _ in range(2):
        policy.infer(without, seed=0)
    assert said == ["camera wrist is not in the observation: the policy acts without it"]


def test_infer_equals_the_pipelines_by_hand(make_policy, observation):
    policy, engine = make_policy()
    bundle = policy.sampler.bundle
    stats = read_norm_stats(bundle.file("assets/norm_stats.json"))
    tokenizer = PromptTokenizer(bundle.file("assets/tokenizer.model"), "ki", 200)
    inputs = InputPipeline(contract(), stats, tokenizer)(observation)
    result = policy.infer(observation, noise=noise(), num_steps=3)
    (prefix,) = engine.of("prefix")
    np.testing.assert_array_equal(prefix["images"][0], inputs.images)
    np.testing.assert_array_equal(prefix["prompt_tokens"][0], inputs.prompt_tokens)
    assert prefix["prompt_mask"].all() and len(engine.of("denoise")) == 3
    np.testing.assert_array_equal(engine.of("denoise")[0]["x_t"][0], noise())
    mask = np.ones((1, inputs.prompt_tokens.size), bool)
    batch = inputs.images[None], inputs.camera_mask[None], inputs.prompt_tokens[None], mask
    actions = policy.sampler.sample_actions(*batch, noise=noise()[None], num_steps=3)[0]
    expected = OutputPipeline(contract(), stats)(actions, inputs.raw_state)
    assert result["actions"].shape == (HORIZON, DIM) and result["actions"].dtype == np.float64
    np.testing.assert_array_equal(result["actions"], expected)


def test_an_absent_camera_is_not_computed(make_policy, observation):
    policy, engine = make_policy()
    del observation["images"]["wrist"]
    policy.infer(observation)
    assert engine.of("prefix")[0]["camera_mask"].tolist() == [[True]]


def test_timing_adds_up(make_policy, observation):
    policy, _ = make_policy()
    timing = policy.infer(observation)["timing"]
    assert list(timing) == ["preprocess_ms", "prefix_ms", "denoise_ms", "postprocess_ms", "total_ms"]
    total = timing.pop("total_ms")
    assert all(value > 0 for value in timing.values()) and sum(timing.values()) <= total


def test_seed_and_noise(make_policy, observation):
    policy, _ = make_policy()
    first, again, other = (policy.infer(observation, seed=seed)["actions"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    single, batched = (policy.infer(observation, noise=x)["actions"] for x in (noise(), noise()[None]))
    np.testing.assert_array_equal(single, batched)
    for wrong in (noise()[:-1], noise()[None].repeat(2, 0), noise().astype(np.float64)):
        with pytest.raises(ArgumentError, match="noise"):
            policy.infer(observation, noise=wrong)


def test_delta_actions_are_relative_to_the_state(make_policy, observation):
    absolute = make_policy()[0].infer(observation, noise=noise())["actions"]
    policy, _ = make_policy("second", delta_mask=(True, False))
    relative = policy.infer(observation, noise=noise())["actions"]
    np.testing.assert_allclose(relative - absolute, [[0.3, 0.0, 0.0]] * HORIZON, atol=1e-9)


def test_nan_never_reaches_the_robot(make_policy, observation):
    policy, engine = make_policy()
    engine.poison = "denoise"
    with pytest.raises(
        BackendError, match=r"denoise graph in float32 gave 30 of 30 .* NaN or infinite; nothing is sent"
    ):
        policy.infer(observation)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda o: o.pop("images"), ObservationError),
        (lambda o: o["images"].pop("front"), ObservationError),
        (lambda o: o.update(state=np.zeros(3)), ObservationError),
        (lambda o: o.pop("prompt"), PromptError),
    ],
)
def test_observations_that_do_not_fit(make_policy, observation, change, error):
    policy, engine = make_policy()
    change(observation)
    with pytest.raises(error):
        policy.infer(observation)
    assert not engine.calls


# ---------------------------------------------------------------- FAST


def say(engine, ids):
    """Make the engine say these ids, one after another."""
    script = iter(ids)
    rule = type(engine).fast_decode

    def fast_decode(**feeds):
        outputs = rule(engine, **feeds)
        outputs["logits"][:] = -1.0
        outputs["logits"][:, engine.column_ids.index(next(script))] = 1.0
        return outputs

    engine.fast_decode = fast_decode


def test_fast_actions(make_policy, observation, codec):
    policy, engine = make_policy()
    wanted = np.random.default_rng(1).uniform(-0.8, 0.8, (HORIZON, DIM))
    ids = FastIds(OFFSET, codec.vocab_size).to_model(codec.encode(wanted))
    say(engine, [*ids, *policy.tokenizer.end_ids, EOS])
    result = policy.infer_fast(observation)
    assert result["problem"] is None
    assert result["tokens"].tolist() == [*ids, *policy.tokenizer.end_ids, EOS]
    first = engine.of("fast_decode")[0]["tokens"][0]
    assert first.tolist() == [engine.of("prefix")[0]["prompt_tokens"][0, -1], *policy.tokenizer.action_ids]
    low, high = np.array([-1.0, 0.0, 5.0]), np.array([1.0, 4.0, 6.0])
    np.testing.assert_allclose(result["actions"], (wanted + 1) / 2 * (high - low) + low, atol=0.3)
    assert list(result["timing"]) == ["preprocess_ms", "prefix_ms", "fast_ms", "postprocess_ms", "total_ms"]


def test_fast_problems_are_told_not_hidden(make_policy, observation, codec):
    policy, engine = make_policy()
    good = FastIds(OFFSET, codec.vocab_size).to_model(codec.encode(np.zeros((HORIZON, DIM))))
    say(engine, [*good, *good, EOS])
    result = policy.infer_fast(observation)
    assert result["actions"] is None and "coefficients, expected 15" in result["problem"]
    say(engine, [OFFSET, FOREIGN, EOS])
    result = policy.infer_fast(observation)
    assert result["actions"] is None and "id 399 at place 1 is not a FAST id" in result["problem"]
    say(engine, [OFFSET] * 100)
    result = policy.infer_fast(observation)
    assert result["actions"] is None and "no end within" in result["problem"]
    assert len(result["tokens"]) == 40 - len(policy.tokenizer.action_ids)


def test_fast_needs_a_contract_and_a_codec(make_policy, observation, assets):
    for name in [name for name in assets if name.startswith("assets/fast/")]:
        del assets[name]
    policy, engine = make_policy()
    say(engine, [EOS])
    with pytest.raises(BundleError, match="no FAST codec"):
        policy.infer_fast(observation)


def test_fast_without_a_head(make_policy, observation):
    policy, _ = make_policy(fast=None)
    with pytest.raises(ArgumentError, match="no FAST head"):
        policy.infer_fast(observation)


# ---------------------------------------------------------------- bundles


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (("contract",), "it has no contract. Open it as a Sampler"),
        (("assets/tokenizer.model",), "it has no tokenizer."),
        (("assets/norm_stats.json",), "it has no norm_stats."),
        (("contract", "assets/tokenizer.model", "assets/norm_stats.json"), "no contract, no tokenizer, no norm_stats"),
    ],
)
def test_a_model_is_no_policy(make_bundle, assets, missing, message):
    content = None if "contract" in missing else contract().to_json()
    bundle = make_bundle(assets={k: v for k, v in assets.items() if k not in missing}, contract=content)
    with pytest.raises(BundleError, match=message):
        read_assets(bundle)


def test_statistics_are_needed_only_to_normalise(make_bundle, assets):
    del assets["assets/norm_stats.json"]
    bundle = make_bundle(assets=assets, contract=contract(normalization="none").to_json())
    assert read_assets(bundle).stats == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_action_dim": 7}, "model_action_dim is 7, the model's 6"),
        ({"action_horizon": 4}, "action_horizon is 4, the model's 5"),
        ({"image_size": (4, 6)}, r"image_size is \(4, 6\), the model's \(4, 4\)"),
        ({"resize": "torch_pad"}, r"pictures \(torch_pad\) is float32, the model's uint8: export it again"),
    ],
)
def test_a_contract_of_another_model(make_bundle, assets, changes, message):
    with pytest.raises(BundleError, match=message):
        read_assets(make_bundle(assets=assets, contract=contract(**changes).to_json()))


def test_load(make_bundle, assets, monkeypatch):
    seen = {}

    def open_sampler(bundle, backend, **options):
        seen.update(bundle=bundle, backend=backend, **options)
        return type("Sampler", (), {"bundle": bundle})()

    monkeypatch.setattr(policy_module.Sampler, "open", open_sampler)
    bundle = make_bundle(assets=assets, contract=contract().to_json())
    given = {"threads": 2, "verify": True, "build": True, "trust_engines": True, "sequential": True, "say": print}
    assert Policy.load(bundle, "ort", **given).contract == contract()
    assert seen == {"bundle": bundle, "backend": "ort", **given}
    Policy.load(bundle)
    assert not seen["build"] and not seen["trust_engines"]  # minutes, and code of others, are asked for
