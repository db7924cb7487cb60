"""The runtime on exported graphs under ONNX Runtime, held to the same model in PyTorch."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ki_edge import graphs
from ki_edge.config import GemmaConfig, Pi05Config, VisionConfig
from ki_edge.model import Observation, Pi05, save_checkpoint
from ki_edge.model.sampling import denoise_trace
from ki_edge.overlap import nothing_before
from ki_edge.policy.contract import FastContract, generic
from ki_edge.policy.fast_fitting import fit_codec
from ki_edge.policy.normalize import NormStats, write_norm_stats
from ki_edge.policy.prompt import PromptTokenizer
from ki_export.exporter import export
from ki_export.graphs import tracing
from ki_export.options import ExportOptions
from ki_export.parity.reference import ReferencePolicy
from ki_runtime import ControlLoop, LoopOptions, Policy, Sampler
from ki_runtime.backends.backend import SessionOptions
from ki_runtime.backends.ort import OrtSession
from ki_runtime.backends.registry import choose_backend, open_session
from ki_runtime.backends.session import Bucket
from ki_runtime.robots import EpisodeStatus

GEMMA = GemmaConfig(width=32, depth=2, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8)
CONFIG = Pi05Config(
    vision=VisionConfig(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=2, image_size=4),
    backbone=GEMMA,
    expert=replace(GEMMA, width=16, mlp_dim=24),
    vocab_size=1000,
    action_dim=6,
    action_horizon=5,
)
ATOL = 2e-5  # float32 against float32: only the order of summation differs
KV_ATOL = 2e-5
SHAPE = (CONFIG.action_horizon, CONFIG.action_dim)
OFFSET = 980
CASES = [  # cameras present, prompt lengths
    ([[True, True]], [7]),
    ([[True, False]], [12]),
    ([[False, True]], [1]),
    ([[True, False], [False, True]], [4, 9]),
    ([[True, True, False], [True, False, False], [False, True, False]], [1, 12, 6]),
]


def random_model():
    """Sharp attention over tokens and a small embedding, or else every token predicts itself."""
    torch.manual_seed(0)
    model = Pi05(CONFIG).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = 2.0 if name.startswith("backbone.layers") else 1.0
            scale = gain * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn_like(parameter) * scale)
        model.backbone.embed_tokens.weight.mul_(0.05)
    return model


def export_both(folder):
    """Tracing is slow: the graphs that the vocabulary does not change are traced once."""
    memo, trace = {}, tracing.trace

    def trace_once(traceable, opset, sizes):
        key = traceable.spec.name, sizes["F"] if traceable.spec is graphs.FAST_DECODE else None
        if key not in memo:
            memo[key] = trace(traceable, opset, sizes)
        return memo[key].clone()

    options = ExportOptions(verify=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "trace", trace_once)
        export(folder / "checkpoint", folder / "policy", options)
        export(folder / "checkpoint", folder / "full", replace(options, full_vocabulary=True))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer_model):
    """A random model as a policy checkpoint; bundles of it with the FAST vocabulary and with all tokens."""
    folder = tmp_path_factory.mktemp("exported")
    model = random_model()
    save_checkpoint(model, folder / "checkpoint")
    codec = fit_codec(np.random.default_rng(0).uniform(-1, 1, (20, SHAPE[0], 2)), vocab_size=60, margin=2)
    codec.save(folder / "checkpoint" / "assets" / "fast")
    (folder / "checkpoint" / "assets" / "tokenizer.model").write_bytes(tokenizer_model)
    stats = NormStats(q01=[-1.0, 0.0], q99=[1.0, 3.0])
    write_norm_stats(folder / "checkpoint" / "assets" / "norm_stats.json", {"state": stats, "actions": stats})
    fields = {"state_dim": 2, "action_dim": 2, "action_horizon": SHAPE[0], "model_action_dim": SHAPE[1]}
    fast = FastContract(id_offset=OFFSET, size=codec.vocab_size, max_tokens=60)
    contract = generic(["left", "right"], **fields, image_size=(4, 4), prompt_format="ki", execute=3, fast=fast)
    contract.save(folder / "checkpoint" / "contract.json")
    export_both(folder)
    ends = [*PromptTokenizer(tokenizer_model, "ki", 200).end_ids, 1]
    model.decode_ids = tuple(sorted({*range(OFFSET - codec.vocab_size + 1, OFFSET + 1), *ends}))
    return SimpleNamespace(folder=folder, model=model)


@pytest.fixture(scope="module")
def sampler(exported):
    return Sampler.open(exported.folder / "policy", threads=1)


@pytest.fixture(scope="module")
def full_sampler(exported):
    return Sampler.open(exported.folder / "full", threads=1)


def random_batch(cameras, lengths, seed=0):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (*np.shape(cameras), 4, 4, 3), dtype=np.uint8)
    mask = np.arange(12) < np.array(lengths)[:, None]
    tokens = np.where(mask, random.integers(3, CONFIG.vocab_size, mask.shape), 0).astype(np.int32)
    return images, np.array(cameras), tokens, mask


def observation(inputs):
    return Observation(*map(torch.from_numpy, inputs))


def noise(rows, seed=1):
    return np.random.default_rng(seed).standard_normal((rows, *SHAPE), np.float32)


@pytest.mark.parametrize(("cameras", "lengths"), CASES)
@pytest.mark.parametrize("num_steps", [1, 10])
def test_actions_equal_pytorch(exported, sampler, cameras, lengths, num_steps):
    inputs, x = random_batch(cameras, lengths), noise(len(lengths))
    actions = sampler.sample_actions(*inputs, noise=x, num_steps=num_steps)
    expected = exported.model.sample_actions(observation(inputs), noise=torch.from_numpy(x), num_steps=num_steps)
    np.testing.assert_allclose(actions, expected.numpy(), atol=ATOL, rtol=0)


@pytest.mark.parametrize(("cameras", "lengths"), CASES)
def test_kv_and_every_step_equal_pytorch(exported, sampler, cameras, lengths):
    inputs, x = random_batch(cameras, lengths), noise(len(lengths))
    trace = sampler.trace(*inputs, noise=x, num_steps=4)
    steps = denoise_trace(exported.model, observation(inputs), noise=torch.from_numpy(x), num_steps=4)
    np.testing.assert_allclose(trace.x, torch.stack(steps).numpy(), atol=ATOL, rtol=0)
    with torch.no_grad():
        k, v, mask = exported.model.prefix_forward(*map(torch.from_numpy, inputs))
    np.testing.assert_array_equal(trace.prefix_mask, mask[:, trace.columns].numpy())
    valid = trace.prefix_mask[None, :, None, :, None]
    for ours, theirs in ((trace.prefix_k, k), (trace.prefix_v, v)):
        np.testing.assert_allclose(ours * valid, theirs[..., trace.columns, :].numpy() * valid, atol=KV_ATOL, rtol=0)


@pytest.mark.parametrize(("cameras", "lengths"), CASES)
def test_dropping_equals_the_padded_run(exported, sampler, cameras, lengths):
    """The graphs on all columns, masked and padded, without the sampler's trimming."""
    inputs, x = random_batch(cameras, lengths), noise(len(lengths))
    trace = sampler.trace(*inputs, noise=x, num_steps=1)
    run = {
        spec.name: open_session(sampler.bundle, spec, choose_backend("ort"), SessionOptions(threads=1)).run
        for spec in graphs.specs(sampler.config)
    }
    feeds = dict(zip(("images", "camera_mask", "prompt_tokens", "prompt_mask"), inputs, strict=True))
    prefix = run["prefix"](feeds)
    clock = sampler._denoise.clock(1)
    alone = nothing_before(sampler.config, len(x))
    rest = {"x_t": x, "modulation": clock.rows[0].read(), "dt": clock.dt.read(), **alone}
    np.testing.assert_allclose(run["denoise"]({**prefix, **rest})["x_next"], trace.x[1], atol=ATOL, rtol=0)


@pytest.mark.parametrize(("cameras", "lengths"), CASES)
@pytest.mark.parametrize("forced", [(), (50, 7)])
def test_fast_tokens_equal_pytorch(exported, sampler, full_sampler, cameras, lengths, forced):
    inputs = random_batch(cameras, lengths)
    options = {"max_tokens": 12, "forced": forced}
    constrained = exported.model.sample_fast_tokens(observation(inputs), **options).numpy()
    np.testing.assert_array_equal(sampler.sample_fast_tokens(*inputs, **options), constrained)
    np.testing.assert_array_equal(full_sampler.sample_fast_tokens(*inputs, **options), constrained)
    free = exported.model.sample_fast_tokens(observation(inputs), constrained=False, **options).numpy()
    np.testing.assert_array_equal(full_sampler.sample_fast_tokens(*inputs, constrained=False, **options), free)
    assert len(np.unique(free)) > 3


def test_decoding_ends_where_it_is_told_to(sampler):
    """With what there is."""
    inputs, asked = random_batch(*CASES[0]), []
    whole = sampler.sample_fast_tokens(*inputs, max_tokens=12)
    assert whole.shape[1] > 4
    part = sampler.sample_fast_tokens(*inputs, max_tokens=12, stop=lambda: asked.append(1) or len(asked) == 5)
    np.testing.assert_array_equal(part, whole[:, :3])  # asked before both stages too
    assert sampler.sample_fast_tokens(*inputs, max_tokens=12, stop=lambda: True).shape == (len(whole), 0)


@pytest.mark.parametrize(("cameras", "lengths"), CASES)
def test_padding_to_buckets_changes_nothing(exported, sampler, full_sampler, monkeypatch, cameras, lengths):
    """What engines of few shapes are given: prompts of 16, 32.. tokens and caches of 64, 128.. places, masked."""
    inputs, x = random_batch(cameras, lengths), noise(len(lengths))
    decoding = {"max_tokens": 12, "forced": (50, 7), "constrained": False}
    actions, trace = (run(*inputs, noise=x, num_steps=4) for run in (sampler.sample_actions, sampler.trace))
    tokens = full_sampler.sample_fast_tokens(*inputs, **decoding)
    monkeypatch.setattr(OrtSession, "prompt_bucket", Bucket(16))
    monkeypatch.setattr(OrtSession, "cache_bucket", Bucket(64))
    padded, padded_full = (Sampler.open(exported.folder / name, threads=1) for name in ("policy", "full"))
    np.testing.assert_allclose(padded.sample_actions(*inputs, noise=x, num_steps=4), actions, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(padded_full.sample_fast_tokens(*inputs, **decoding), tokens)
    again = padded.trace(*inputs, noise=x, num_steps=4)
    for name in ("prefix_mask", "columns"):
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name))
    valid = trace.prefix_mask[None, :, None, :, None]
    for ours, theirs in ((again.prefix_k, trace.prefix_k), (again.prefix_v, trace.prefix_v)):
        np.testing.assert_allclose(ours * valid, theirs * valid, atol=1e-5, rtol=0)
    lengths_met = (
        {key[2] for key in padded._stages.prefix._plans},
        {key[1] for key in padded_full._stages.fast._caches},
    )
    assert lengths_met == ({16}, {64})


class Still:
    """A robot whose pictures depend on the step; over after 7 steps."""

    name, control_hz, simulated = "still", 10.0, True

    def reset(self, seed=None):
        self.random, self.steps, self.actions = np.random.default_rng(seed), 0, []

    def observe(self):
        images = {name: self.random.integers(0, 256, (4, 4, 3), dtype=np.uint8) for name in ("left", "right")}
        return {"images": images, "state": self.random.uniform(0, 1, 2), "prompt": "open the drawer"}

    def frame(self):
        return None

    def close(self):
        pass

    def act(self, action):
        self.actions.append(action)
        self.steps += 1

    def status(self):
        return EpisodeStatus(self.steps >= 7, None, self.steps)


def test_a_policy_does_what_the_reference_does(exported):
    """Same seeds, same noise, same loop: the bundle and PyTorch send the robot the same actions."""
    sent = []
    for policy in (Policy.load(exported.folder / "policy"), ReferencePolicy(exported.folder / "checkpoint")):
        robot = Still()
        ControlLoop(policy, robot, LoopOptions(seed=5, num_steps=3, paced=False)).run()
        sent.append(np.stack(robot.actions))
    np.testing.assert_allclose(*sent, atol=1e-4, rtol=0)  # robot units: 1.5 times the model's


def test_fast_of_a_policy(exported):
    """A random model says nothing that decodes; that is told, and the tokens are the model's own."""
    policy = Policy.load(exported.folder / "policy")
    robot = Still()
    robot.reset(0)
    result = policy.infer_fast(robot.observe())
    assert (result["actions"] is None) == (result["problem"] is not None)
    assert set(result["tokens"].tolist()) <= set(exported.model.decode_ids)


def test_the_runtime_acts_without_torch(exported):
    script = """if True:
        import sys
        import numpy as np
        from ki_runtime import Policy
        image = np.zeros((4, 4, 3), np.uint8)
        observation = {"images": {"left": image, "right": image}, "state": np.zeros(2), "prompt": "fold the towel"}
        actions = Policy.load(sys.argv[1], threads=1).infer(observation, seed=0)["actions"]
        assert actions.shape == (5, 2) and np.isfinite(actions).all()
        assert not {"torch", "onnx", "ki_export", "PIL", "matplotlib", "tokenizers"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", script, str(exported.folder / "policy")], check=True)
