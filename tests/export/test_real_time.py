"""Real-time chunking in exported graphs: the same step where nothing is continued, else the papers' numbers, from an
observation to robot actions.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from ki_edge import flow, graphs
from ki_edge.bundle import Bundle
from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.model import Observation, load_model, sampling
from ki_edge.model.steering import Steering
from ki_edge.overlap import nothing_before
from ki_edge.policy.chunking import Guiding, PreviousChunk
from ki_edge.policy.contract import PolicyContract
from ki_export.arithmetic.session import arithmetic_sampler, arithmetic_sessions
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.parity.cases import CONTINUING
from ki_export.parity.parity import compare_with_checkpoint
from ki_runtime import Policy, Sampler
from ki_runtime.backends.backend import SessionOptions
from ki_runtime.backends.registry import choose_backend, open_session
from tests import expert

from .conftest import CONFIG

BAR = 2e-5
MOST = 3  # delay
STATE = np.array([0.3, 1.7])
ROBOT = {
    "images": {"left": np.full((20, 30, 3), 200, np.uint8), "right": np.zeros((14, 14, 3), np.uint8)},
    "state": STATE,
    "prompt": "pick up the red cube",
}


@pytest.fixture(scope="module")
def checkpoints(checkpoint, tmp_path_factory):
    """By how its chunks may continue others; the trained one's actions are relative to its state."""
    settled = {"rtc_max_delay": MOST, "rtc_distribution": "uniform", "delta_mask": (True, False)}
    made = {}
    for name, changes in (("guided", {}), ("trained", settled)):
        made[name] = shutil.copytree(checkpoint, tmp_path_factory.mktemp(name) / "checkpoint")
        contract = PolicyContract.load(made[name] / "contract.json")
        replace(contract, max_token_len=60, **changes).save(made[name] / "contract.json")
    return {"none": made["guided"], **made}


@pytest.fixture(scope="module")
def bundles(checkpoints, tmp_path_factory):
    """By what their denoise graph takes; all proven."""
    folder = tmp_path_factory.mktemp("real_time")
    asked = {"none": False, "guided": None, "trained": None}
    return {name: export(checkpoints[name], folder / name, ExportOptions(rtc=rtc)) for name, rtc in asked.items()}


def test_what_a_bundle_says_of_itself(bundles):
    assert {name: bundle.manifest.config.rtc for name, bundle in bundles.items()} == {name: name for name in bundles}
    for name, bundle in bundles.items():
        inputs = [tensor["name"] for tensor in bundle.manifest.graphs["denoise"]["inputs"]]
        assert inputs == [tensor.name for tensor in graphs.specs(replace(CONFIG, rtc=name))[1].inputs]
    assert "rtc" not in bundles["none"].manifest.model  # which older versions can open
    policies = {name: Policy.load(bundle) for name, bundle in bundles.items()}
    assert [policy.rtc for policy in policies.values()] == [None, "guided", "trained"]
    assert [policy.max_delay for policy in policies.values()] == [None, None, MOST]


@pytest.mark.parametrize(
    ("target", "asked", "max_delay", "expected"),
    [
        ("ort", None, None, "guided"), ("ort", None, 4, "trained"), ("ort", False, 4, "none"), ("trt", None, 4, "none"),
        ("trt", True, None, "guided"), ("trt-rtx", True, 4, "trained"), ("trt-rtx", None, None, "none"),
    ],
)  # fmt: skip
def test_which_graph_is_asked_for(target, asked, max_delay, expected):
    assert ExportOptions(target=target, rtc=asked).real_time(max_delay) == expected


def random_feeds(bundle, seed):
    """What any denoise graph takes, of a batch of two."""
    rng, config = np.random.default_rng(seed), bundle.manifest.config
    sizes = {**graphs.sizes(config, 0), "B": 2, "S": 9}
    feeds = {}
    for tensor in graphs.specs(config)[1].inputs:
        shape = [int(dim) for dim in tensor.resolve(sizes)]
        feeds[tensor.name] = (3 * rng.standard_normal(shape)).astype(tensor.dtype)
    return {**feeds, "prefix_mask": np.arange(9) < np.array([[9], [5]]), "dt": np.array(-0.1, np.float32)}


def sessions(bundle, exact):
    opener = arithmetic_sessions(bundle) if exact else None
    spec = graphs.specs(bundle.manifest.config)[1]
    return opener(spec) if opener else open_session(bundle, spec, choose_backend("ort"), SessionOptions())


def assert_same_bits(plain, steered, exact):
    """The steered graph, whatever its inputs hold that count for nothing."""
    one, other = sessions(plain, exact), sessions(steered, exact)
    names = {tensor.name for tensor in one.spec.inputs}
    for seed in range(10):
        feeds = random_feeds(steered, seed)
        feeds["previous_weights"][:] = 0
        if "committed" in feeds:
            feeds["committed"][:] = False
        expected = one.run({name: value for name, value in feeds.items() if name in names})["x_next"]
        np.testing.assert_array_equal(other.run(feeds)["x_next"].view(np.uint32), expected.view(np.uint32))
        zeros = nothing_before(steered.manifest.config, 2)
        np.testing.assert_array_equal(other.run({**feeds, **zeros})["x_next"], expected)


@pytest.mark.parametrize("rtc", ["guided", "trained"])
def test_a_step_that_continues_nothing_is_the_same_bit_for_bit(bundles, rtc):
    assert_same_bits(bundles["none"], bundles[rtc], exact=False)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_in_every_precision(checkpoints, tmp_path, precision):
    """16-bit graphs in exactly their types."""
    options = {"precision": precision, "verify": False}
    plain = export(checkpoints["none"], tmp_path / "plain", ExportOptions(rtc=False, **options))
    for name in ("guided", "trained"):
        steered = export(checkpoints[name], tmp_path / name, ExportOptions(rtc=True, **options))
        assert_same_bits(plain, steered, exact=True)


def test_in_eight_bits(checkpoints, tmp_path):
    """A gate that is one for all tokens joins the weights' scales, one that differs by token cannot."""
    options = {"precision": "int8", "verify": False}
    plain = export(checkpoints["none"], tmp_path / "plain", ExportOptions(rtc=False, **options))
    for name in ("guided", "trained"):
        steered = export(checkpoints[name], tmp_path / name, ExportOptions(rtc=True, **options))
        one, other = sessions(plain, exact=False), sessions(steered, exact=False)
        names = {tensor.name for tensor in one.spec.inputs}
        feeds = {**random_feeds(steered, 0), **nothing_before(steered.manifest.config, 2)}
        expected = one.run({name: value for name, value in feeds.items() if name in names})["x_next"]
        error = np.linalg.norm(other.run(feeds)["x_next"] - expected) / np.linalg.norm(expected)
        assert error < 1e-4, name


# ---------------------------------------------------------------- from the papers


def reference(folder, inputs, noise, previous, way, maximum=None, steps=4):
    """Robot actions [H,a] in float64: the papers' loops over an expert written out, then what the contract undoes."""
    contract = PolicyContract.load(folder / "contract.json")
    model = load_model(folder)
    batch = [torch.from_numpy(array)[None] for array in (inputs.images, inputs.camera_mask, inputs.prompt_tokens)]
    observation = Observation(*batch, torch.ones(batch[2].shape, dtype=torch.bool))
    with torch.no_grad():
        keys, values, mask = (part.numpy() for part in sampling.prefix(model, observation))
    keys, values, mask = keys[:, 0].astype(np.float64), values[:, 0].astype(np.float64), mask[0]
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    low, high = np.array([-1.0, 0.0]), np.array([1.0, 3.0])  # of the statistics
    relative = STATE * np.array([contract.delta_mask is not None, False])
    rows = np.concatenate([previous.actions, np.repeat(previous.actions[-1:], 5 - len(previous.actions), axis=0)])
    before = np.zeros((5, 6))
    before[:, :2] = (rows - relative - low) / (high - low + 1e-6) * 2 - 1
    times = flow.denoise_times(steps)

    def at(x, each):
        times_of_tokens = np.broadcast_to(each, len(x))
        return expert.velocity(weights, CONFIG, x, times_of_tokens, keys, values, mask)

    if way == "trained":
        found = expert.trained(at, noise, times, before, previous.delay)
    else:
        end, start = len(previous.actions), previous.delay
        line = np.clip((start - 1 - np.arange(5)) / (end - start + 1) + 1, 0, 1)
        pull = np.where(np.arange(5) < end, line * np.expm1(line) / (np.e - 1), 0.0)
        found = expert.guided(at, noise, times, before, pull, maximum or steps)
    return (found[:, :2] + 1) / 2 * (high - low + 1e-6) + low + relative


@pytest.mark.parametrize(
    ("rtc", "way", "rows", "delay", "maximum"),
    [
        ("guided", None, 4, 2, None),
        ("guided", None, 5, 0, 2.0),
        ("guided", None, 1, 1, 10.0),
        ("trained", None, 4, 2, None),
        ("trained", None, 3, 3, None),
        ("trained", None, 5, 0, None),
        ("trained", "guided", 4, 2, 3.0),
    ],
)
def test_robot_actions_of_the_papers(bundles, checkpoints, rtc, way, rows, delay, maximum):
    """The whole way of a bundle: pictures, prompt, re-anchoring, ONNX Runtime, and back to the robot's units."""
    policy, rng = Policy.load(bundles[rtc]), np.random.default_rng(rows)
    previous = PreviousChunk(rng.uniform([-1, 0], [1, 3], (rows, 2)), delay)
    noise = rng.standard_normal((5, 6), np.float32)
    found = policy.infer(ROBOT, noise=noise, previous=previous, way=way, guiding=Guiding(maximum, "exponential"))[
        "actions"
    ]
    expected = reference(checkpoints[rtc], policy._inputs(ROBOT), noise, previous, way or rtc, maximum)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3 * BAR)  # half a range of 3 in robot units, in float32
    if rtc == "trained" and way is None:
        np.testing.assert_allclose(found[:delay], previous.actions[:delay], rtol=0, atol=1e-6)
    plain = policy.infer(ROBOT, noise=noise)["actions"]
    np.testing.assert_array_equal(plain, Policy.load(bundles[rtc]).infer(ROBOT, noise=noise)["actions"])
    settled = (rtc, way, delay) == ("trained", None, 0)
    assert (np.abs(found - plain).max() == 0) if settled else (np.abs(found - plain).max() > 1e-3)


# ---------------------------------------------------------------- the proof


def test_the_proof_continues_a_chunk(bundles, checkpoints):
    for rtc, bundle in bundles.items():
        found = compare_with_checkpoint(bundle, Checkpoint.open(checkpoints[rtc]), lambda _: None)
        assert found.explanation is None
        names = {(m.graph, m.tensor) for m in found.measurements if m.case.endswith(CONTINUING)}
        wanted = {("denoise", "x_next"), ("denoise", "velocity"), ("runtime", "modulation"), ("runtime", "actions")}
        assert names == (set() if rtc == "none" else wanted)


@pytest.mark.parametrize("rtc", ["guided", "trained"])
def test_a_chunk_continued_in_another_way_fails_the_proof(bundles, checkpoints, rtc, monkeypatch):
    """Where the model pulls a little less than the graph, all else is as it was."""
    guided = Steering._guided

    def weaker(self, x_t, v_t):
        return guided(replace(self, guidance=self.guidance * 0.999), x_t, v_t)

    monkeypatch.setattr(Steering, "_guided", weaker)
    found = compare_with_checkpoint(bundles[rtc], Checkpoint.open(checkpoints[rtc]), lambda _: None)
    assert {m.case.endswith(CONTINUING) for m in found.failures} == {True}
    assert "usually what the denoise graph is told of the one before" in found.explanation


def test_sixteen_bits_are_proven_too(checkpoints, tmp_path):
    bundle = export(checkpoints["trained"], tmp_path / "bundle", ExportOptions(precision="fp16"))
    assert bundle.manifest.parity["verified"]
    sampler = arithmetic_sampler(bundle)
    assert isinstance(sampler, Sampler) and sampler.config.rtc == "trained"


def test_a_pi0_cannot_be_trained_for_it():
    with pytest.raises(CheckpointError, match=r"'model\.rtc': trained, but a pi0 has one time for all actions"):
        replace(CONFIG, variant="pi0", rtc="trained")


def test_a_bundle_of_before_opens_as_it_was(bundles, tmp_path):
    """Neither its manifest nor its graph knows of any of this."""
    folder = shutil.copytree(bundles["none"].path, tmp_path / "old")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "rtc" not in manifest["model"] and not {"rtc_max_delay", "rtc_distribution"} & manifest["contract"].keys()
    old, new = Policy.load(Bundle.open(folder)), Policy.load(bundles["guided"])
    np.testing.assert_array_equal(old.infer(ROBOT, seed=1)["actions"], new.infer(ROBOT, seed=1)["actions"])
    with pytest.raises(ArgumentError, match="was exported without real-time chunking"):
        old.infer(ROBOT, previous=PreviousChunk(np.zeros((2, 2)), 1))
