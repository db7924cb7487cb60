"""A π0 through the same export: its graphs, its proof, and the runtime on its bundle."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from ki_edge.bundle import Bundle
from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import ArgumentError, DatasetError
from ki_edge.model import load_model, save_checkpoint
from ki_edge.policy.contract import PolicyContract, generic
from ki_edge.policy.normalize import NormStats, write_norm_stats
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.parity.comparison import observe
from ki_export.parity.parity import compare_with_checkpoint
from ki_export.parity.recorded import compare_with_recording
from ki_export.parity.reference import ReferencePolicy
from ki_runtime import Policy, Sampler

from .conftest import CONFIG, random_model
from .test_graphs import ALLOWED, weights
from .test_parity import damage

PI0 = replace(CONFIG, variant="pi0")
BAR = 2e-5
OBSERVATION = {
    "images": {"left": np.full((20, 30, 3), 200, np.uint8), "right": np.zeros((14, 14, 3), np.uint8)},
    "state": [0.3, 1.7],
    "prompt": "pick up the red cube",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_model):
    """A π0 policy: z-scores, two cameras, the prompt without the state."""
    folder = tmp_path_factory.mktemp("pi0") / "checkpoint"
    save_checkpoint(random_model(config=PI0), folder, max_token_len=48)
    (folder / "assets").mkdir()
    (folder / "assets" / "tokenizer.model").write_bytes(tokenizer_model)
    stats = NormStats(mean=[0.1, 1.0], std=[0.5, 2.0])
    write_norm_stats(folder / "assets" / "norm_stats.json", {"state": stats, "actions": stats})
    sizes = {"state_dim": 2, "action_dim": 2, "action_horizon": 5, "model_action_dim": 6, "max_token_len": 48}
    generic(
        ["left", "right"], **sizes, image_size=(14, 14), prompt_format="pi0", normalization="zscore", num_steps=4
    ).save(folder / "contract.json")
    return folder


@pytest.fixture(scope="module")
def bundle(folder, tmp_path_factory):
    """Exported and proven."""
    return export(folder, tmp_path_factory.mktemp("pi0") / "bundle", ExportOptions())


@pytest.fixture(scope="module")
def sampler(bundle):
    return Sampler.open(bundle, threads=1)


@pytest.fixture
def case(bundle):
    """Two observations, unlike each other."""
    from ki_export.parity.cases import standard_cases

    return standard_cases(bundle.manifest.config, cameras=2, max_prompt=12, num_steps=4, forced=())[-1]


def test_proof(bundle):
    report = json.loads((bundle.path / "parity.json").read_text())
    assert report["verified"] is True
    compared = {(m["graph"], m["tensor"]) for m in report["measurements"]}
    assert {("denoise", "x_next"), ("runtime", "modulation"), ("runtime", "x"), ("runtime", "actions")} <= compared
    assert ("prefix", "prefix_k") in compared and {graph for graph, _ in compared} == {"prefix", "denoise", "runtime"}
    assert max(m["error"] for m in report["measurements"]) <= BAR


def test_the_model_alone_has_no_fast_head_either(folder, tmp_path):
    """A π0.5's may have one that nothing records; π0 was never trained on FAST tokens."""
    options = {"model_only": True, "verify": False}
    assert not export(folder, tmp_path / "alone", ExportOptions(**options)).manifest.has_fast
    assert export(folder, tmp_path / "asked", ExportOptions(**options, fast_head=True)).manifest.has_fast


def test_denoise_graph(bundle):
    """One input more, one row of time, norms with weights; silu, and a slice that leaves the state token out."""
    proto = onnx.load(bundle.graph("denoise"), load_external_data=False)
    found = {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
             for value in proto.graph.input}  # fmt: skip
    plain = ["x_t", "modulation", "dt", "prefix_k", "prefix_v", "prefix_mask", "state"]
    assert list(found) == [*plain, "previous", "previous_weights", "guidance", "time"]
    assert (found["modulation"], found["state"]) == ([1, 16], ["B", 6])
    assert {node.op_type for node in proto.graph.node} <= ALLOWED["denoise"] | {"Sigmoid", "Slice"}
    projections = ("action_in_proj", "action_time_mlp_in", "action_time_mlp_out", "state_proj", "action_out_proj")
    norms = {name for name in weights(proto) if "norm" in name}
    assert len(norms) == 2 * PI0.expert.depth + 1
    assert weights(proto) == {
        *norms,
        *(f"{name}.{part}" for name in projections for part in ("weight", "bias")),
        *(name for name in weights(proto) if name.startswith("expert.layers.")),
    }
    assert [t["name"] for t in bundle.manifest.graphs["denoise"]["inputs"]] == list(found)
    assert bundle.manifest.weights["runtime"] == {}
    assert bundle.manifest.config == PI0


@torch.no_grad()
def test_runtime(folder, sampler, case):
    """Each row of the batch has its own state."""
    model = load_model(Checkpoint.open(folder))
    arguments = {"state": case.state, "noise": case.noise, "num_steps": 3}
    actions = sampler.sample_actions(*case.inputs, **arguments)
    expected = model.sample_actions(observe(case), noise=torch.from_numpy(case.noise), num_steps=3)
    np.testing.assert_allclose(actions, expected, rtol=0, atol=BAR)
    np.testing.assert_array_equal(sampler.trace(*case.inputs, **arguments).x[-1], actions)
    swapped = sampler.sample_actions(*case.inputs, **{**arguments, "state": case.state[::-1].copy()})
    assert np.abs(swapped - actions).max(axis=(1, 2)).min() > 1e-3
    np.testing.assert_array_equal(sampler.sample_actions(*case.inputs, **arguments), actions)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, r"state: missing; this model is a π0, which takes it as float32 \[2, 6\], normalised"),
        (np.zeros((2, 2), np.float32), r"state: expected float32 \[2, 6\], got float32 \[2, 2\]"),
        (np.zeros((1, 6), np.float32), r"state: expected float32 \[2, 6\], got float32 \[1, 6\]"),
        (np.zeros((2, 6)), r"state: expected float32 \[2, 6\], got float64"),
        (np.full((2, 6), np.nan, np.float32), "state holds NaN or infinity"),
    ],
)
def test_wrong_states(sampler, case, state, message):
    for call in (sampler.sample_actions, sampler.trace):
        with pytest.raises(ArgumentError, match=message):
            call(*case.inputs, state=state)


def test_policy(folder, bundle):
    """Robot's observation to robot's actions, as PyTorch gives them; the state is not in the prompt, and matters."""
    policy, reference = Policy.load(bundle), ReferencePolicy(folder)
    noise = np.random.default_rng(3).standard_normal((5, 6), np.float32)
    actions = policy.infer(OBSERVATION, noise=noise)["actions"]
    np.testing.assert_allclose(actions, reference.infer(OBSERVATION, noise=noise)["actions"], rtol=0, atol=2 * BAR)
    moved = policy.infer({**OBSERVATION, "state": [0.4, 1.7]}, noise=noise)["actions"]
    assert np.abs(moved - actions).max() > 1e-4


def test_the_policys_state_is_its_z_score_then_zeros(bundle, monkeypatch):
    policy, seen = Policy.load(bundle), []
    sample = policy.sampler.sample_actions
    monkeypatch.setattr(policy.sampler, "sample_actions", lambda *a, **k: seen.append(k["state"]) or sample(*a, **k))
    policy.infer(OBSERVATION, seed=0)
    assert seen[0].dtype == np.float32
    np.testing.assert_allclose(seen[0], [[0.4, 0.35, 0, 0, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("layer", ["state_proj", "action_time_mlp_in", "expert.layers.1.mlp.up_proj"])
def test_a_damaged_weight_is_found_and_named(folder, bundle, tmp_path, layer):
    copied = Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))
    key = layer.replace("expert.", "paligemma_with_expert.gemma_expert.model.") + ".weight"
    damage(copied.path / "weights.safetensors", key)
    comparison = compare_with_checkpoint(copied, Checkpoint.open(folder), lambda line: None)
    assert comparison.explanation.startswith("denoise: x_next step ")
    assert f"first wrong layer {layer};" in comparison.explanation
    assert f"weight '{key}' differs from the checkpoint's" in comparison.explanation


@torch.no_grad()
def test_recorded_outputs(folder, bundle, case, tmp_path):
    cameras = [camera.slot for camera in PolicyContract.load(folder / "contract.json").cameras]
    inputs = {f"image/{camera}": case.images[:, i] for i, camera in enumerate(cameras)}
    inputs |= {f"image_mask/{camera}": case.camera_mask[:, i] for i, camera in enumerate(cameras)}
    inputs |= {"tokenized_prompt": case.prompt_tokens, "tokenized_prompt_mask": case.prompt_mask}
    inputs |= {"noise": case.noise, "num_steps": 4}
    model = load_model(Checkpoint.open(folder))
    actions = model.sample_actions(observe(case), noise=torch.from_numpy(case.noise), num_steps=4).numpy()
    np.savez(tmp_path / "outputs.npz", actions=actions)
    np.savez(tmp_path / "inputs.npz", **inputs)
    with pytest.raises(DatasetError, match="state missing"):
        compare_with_recording(bundle, tmp_path / "outputs.npz")
    np.savez(tmp_path / "inputs.npz", **inputs, state=case.state)
    comparison = compare_with_recording(bundle, tmp_path / "outputs.npz")
    assert comparison.failures == []
    np.savez(tmp_path / "inputs.npz", **inputs, state=case.state + 0.1)
    assert compare_with_recording(bundle, tmp_path / "outputs.npz").failures
