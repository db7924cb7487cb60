"""A policy whose pictures go in as floats: every precision, every proof, calibration, recordings and the benchmark."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from ki_edge.checkpoints import Checkpoint
from ki_edge.model import Observation, load_model
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.images import LOWEST, model_pictures
from ki_edge.policy.transforms import read_images
from ki_export.bench.options import Case as BenchCase
from ki_export.bench.stages import draw_inputs, room
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.parity import cli as parity_cli
from ki_export.parity.cases import standard_cases
from ki_export.parity.parity import compare_with_checkpoint
from ki_export.policies import PolicyRequest
from ki_export.precision.calibration import calibration
from ki_runtime import Sampler
from ki_runtime.trt.profiles import profiles

from .complete import read_policy


@pytest.fixture(scope="module")
def floats(checkpoint, tmp_path_factory):
    """The small checkpoint, whose contract says that its pictures were resized as by LeRobot 0.4."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("floats") / "checkpoint")
    contract = json.loads((folder / "contract.json").read_text())
    (folder / "contract.json").write_text(json.dumps({**contract, "resize": "torch_pad_04"}))
    return folder


@pytest.fixture(scope="module")
def exported(floats, tmp_path_factory):
    return export(floats, tmp_path_factory.mktemp("floats") / "bundle", ExportOptions())


def model_inputs(config, pictures):
    """Bytes of two cameras as `pictures`, a prompt, noise."""
    rng, size = np.random.default_rng(0), config.vision.image_size
    images = model_pictures(rng.integers(0, 256, (1, 2, size, size, 3), np.uint8), pictures)
    tokens = rng.integers(2, config.vocab_size, (1, 6))
    noise = rng.standard_normal((1, config.action_horizon, config.action_dim), np.float32)
    return (images, np.ones((1, 2), np.bool_), tokens, np.ones((1, 6), np.bool_)), noise


def test_the_contract_decides(exported, bundle):
    assert (exported.manifest.config.pictures, bundle.manifest.config.pictures) == ("float32", "uint8")
    assert exported.manifest.config == bundle.manifest.config  # one geometry
    assert exported.manifest.parity["verified"]


def test_bytes_and_floats_give_the_same_actions(exported, bundle):
    actions = []
    for found in (exported, bundle):
        sampler = Sampler.open(found, "ort")
        inputs, noise = model_inputs(sampler.config, sampler.config.pictures)
        actions.append(sampler.sample_actions(*inputs, noise=noise))
    np.testing.assert_allclose(*actions, rtol=0, atol=2e-6)


def test_the_margin_reaches_the_model(floats, exported):
    """A wide picture, as the contract makes it and as the model in PyTorch sees it with a margin of -3."""
    wide = np.full((8, 16, 3), 255, np.uint8)
    contract = PolicyContract.from_json(exported.manifest.contract)
    images, mask = read_images(contract, {"images": {"left": wide, "right": wide}})
    assert images.dtype == np.float32 and mask.all()
    assert (images[:, :3] == LOWEST).all() and images[:, 3:10] == pytest.approx(1)
    (_, camera_mask, tokens, prompt_mask), noise = model_inputs(exported.manifest.config, "float32")
    given = (images[None], camera_mask, tokens, prompt_mask)
    model = load_model(Checkpoint.open(floats))
    expected = model.sample_actions(
        Observation(*map(torch.from_numpy, given)), noise=torch.from_numpy(noise), num_steps=4
    )
    found = Sampler.open(exported, "ort").sample_actions(*given, noise=noise, num_steps=4)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=2e-5)


def test_an_absent_camera_is_black_and_changes_nothing(exported):
    contract = PolicyContract.from_json(exported.manifest.contract)
    optional = replace(contract, cameras=(contract.cameras[0], replace(contract.cameras[1], required=False)))
    images, mask = read_images(optional, {"images": {"left": np.zeros((8, 16, 3), np.uint8)}})
    assert (images[1] == -1).all() and mask.tolist() == [True, False]
    (_, _, tokens, prompt_mask), noise = model_inputs(exported.manifest.config, "float32")
    sampler = Sampler.open(exported, "ort")
    actions = sampler.sample_actions(images[None], mask[None], tokens, prompt_mask, noise=noise)
    alone = sampler.sample_actions(images[None, :1], mask[None, :1], tokens, prompt_mask, noise=noise)
    np.testing.assert_array_equal(actions, alone)


@pytest.mark.parametrize(
    "options",
    [{"precision": "int8"}, {"target": "trt", "precision": "fp16"}, {"target": "trt", "precision": "bf16"}],
    ids=lambda options: options["precision"],
)
def test_every_precision_takes_them(floats, tmp_path, options):
    found = export(floats, tmp_path / "bundle", ExportOptions(**options))
    assert found.manifest.parity["verified"] and found.manifest.config.pictures == "float32"
    images = found.manifest.graphs["prefix"]["inputs"][0]
    assert (images["name"], images["dtype"]) == ("images", "float32")


def test_a_large_models_proof_takes_them(floats, exported):
    comparison = compare_with_checkpoint(exported, Checkpoint.open(floats), lambda line: None, method="streamed")
    assert comparison.explanation is None


def test_the_proof_covers_the_widest_margin(exported):
    config = exported.manifest.config
    case = standard_cases(config, cameras=2, max_prompt=9, num_steps=1, forced=())[0]
    assert case.images.dtype == np.float32 and case.images.min() == LOWEST and case.images.max() <= 1


def test_calibration_sees_floats_and_the_margin(floats):
    opened = Checkpoint.open(floats).with_pictures("float32")
    files = read_policy(opened.path, opened.format, opened.settings, opened.config, PolicyRequest())
    for policy in (files, None):
        made = calibration(opened.config, policy, None).observations
        assert {observed.images.dtype for observed in made} == {np.dtype(np.float32)}
        assert min(observed.images.min() for observed in made) == LOWEST


@pytest.mark.parametrize("recorded", ["uint8", "float32"])
def test_recordings_of_bytes_and_of_floats(exported, tmp_path, recorded, capsys):
    sampler = Sampler.open(exported, "ort")
    (images, mask, tokens, prompt_mask), noise = model_inputs(sampler.config, "float32")
    expected = sampler.sample_actions(images, mask, tokens, prompt_mask, noise=noise)
    kept, _ = model_inputs(sampler.config, recorded)
    arrays = {f"image/{name}": kept[0][:, at] for at, name in enumerate(("left", "right"))}
    arrays |= {f"image_mask/{name}": mask[:, at] for at, name in enumerate(("left", "right"))}
    np.savez(
        tmp_path / "inputs.npz", **arrays, tokenized_prompt=tokens, tokenized_prompt_mask=prompt_mask, noise=noise,
    )  # fmt: skip
    np.savez(tmp_path / "outputs.npz", actions=expected)
    assert parity_cli.main([str(exported.path), "--outputs", str(tmp_path / "outputs.npz")]) == 0, capsys.readouterr()
    found = calibration(sampler.config, None, tmp_path / "inputs.npz").observations
    np.testing.assert_array_equal(found[0].images, images)


def test_the_benchmark_draws_floats(exported):
    inputs = draw_inputs(exported.manifest.config, room(exported), BenchCase(1, 5, 2))
    assert inputs.images.dtype == np.float32
    assert np.isfinite(Sampler.open(exported, "ort").sample_actions(*inputs.arrays, seed=0)).all()


def test_tensorrts_profiles_name_the_same_inputs(exported, bundle):
    assert profiles(exported) == profiles(bundle)
