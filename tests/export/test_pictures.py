"""LeRobot's pictures, end to end: raw observations of its cameras to the actions that LeRobot itself answered."""

from dataclasses import replace

import numpy as np
import onnx
import pytest

from ki_edge.bundle import Bundle
from ki_edge.errors import ArgumentError
from ki_edge.policy.images import LOWEST, fit_image
from ki_export import cli
from ki_export.parity import cli as parity_cli
from ki_export.parity.reference import ReferencePolicy
from ki_export.policies import PolicyRequest
from ki_runtime import Policy, Sampler
from ki_runtime.policy.assets import read_assets

# folder of the golden policy -> the flags that it needs, the method of its maker
POLICIES = {
    "v2_044_480x640": (["--lerobot-version", "0.4"], "torch_pad_04"),
    "h_a01_q_2cam_480x640": ([], "torch_pad"),
}
FLOAT32 = 1e-5  # of actions up to 5: two implementations of float32, measured 8e-7


def observation(path):
    """(observation, noise f32 [H,A], LeRobot's actions f32 [H,a]) of a golden file."""
    golden = np.load(path / "golden.npz")
    images = {name.split("/")[-1]: golden[name] for name in golden.files if "/observation:images/" in name}
    seen = {"images": images, "state": golden["0/observation:state"], "prompt": str(golden["0/prompt"])}
    return seen, golden["0/noise"], golden["0/actions"]


@pytest.fixture(scope="module", params=POLICIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def bundle(data, name, tmp_path_factory):
    """Exported as a user exports it, and proven."""
    output = tmp_path_factory.mktemp("policies") / name
    flags = ["--tokenizer", str(data / "policies" / "tokenizer.model"), *POLICIES[name][0]]
    assert cli.main([str(data / "policies" / name), "-o", str(output), "--target", "ort", *flags]) == 0
    return Bundle.open(output)


def test_the_actions_are_lerobots(data, name, bundle):
    seen, noise, expected = observation(data / "policies" / name)
    policy = Policy.load(bundle, "ort")
    assert policy.contract.resize == POLICIES[name][1]
    np.testing.assert_allclose(policy.infer(seen, noise=noise)["actions"], expected, rtol=0, atol=FLOAT32)
    other = replace(policy.contract, resize="torch_pad" if name.startswith("v2") else "torch_pad_04")
    wrong = Policy(policy.sampler, replace(read_assets(bundle), contract=other))  # the other version's margin
    assert np.abs(wrong.infer(seen, noise=noise)["actions"] - expected).max() > 0.01


def test_the_reference_policy_is_lerobots_too(data, name):
    version = dict(zip(*[iter(POLICIES[name][0])] * 2, strict=True)).get("--lerobot-version")
    request = PolicyRequest(tokenizer=data / "policies" / "tokenizer.model", lerobot_version=version)
    seen, noise, expected = observation(data / "policies" / name)
    policy = ReferencePolicy(data / "policies" / name, request)
    np.testing.assert_allclose(policy.infer(seen, noise=noise)["actions"], expected, rtol=0, atol=FLOAT32)


def test_everything_in_a_bundle_says_that_pictures_are_floats(bundle):
    manifest = bundle.manifest
    assert manifest.config.pictures == manifest.model["pictures"] == "float32"
    images = manifest.graphs["prefix"]["inputs"][0]
    assert (images["name"], images["dtype"]) == ("images", "float32")
    graph = onnx.load(bundle.graph("prefix"), load_external_data=False).graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert manifest.parity["verified"]


def test_the_runtime_takes_floats_alone(bundle):
    sampler = Sampler.open(bundle, "ort")
    size = sampler.config.vision.image_size
    rest = (np.ones((1, 1), np.bool_), np.ones((1, 3), np.int32), np.ones((1, 3), np.bool_))
    black = np.zeros((1, 1, size, size, 3), np.uint8)
    with pytest.raises(ArgumentError, match=r"expected float32 \[B, N, 224, 224, 3\], got uint8 .*model_pictures"):
        sampler.sample_actions(black, *rest)
    for wrong in (255.0, np.nan, np.inf, LOWEST - 0.1):
        with pytest.raises(ArgumentError, match=r"images: expected numbers in \[-1, 1\], -3 in a margin"):
            sampler.sample_actions(np.full(black.shape, wrong, np.float32), *rest)


def test_another_proof_of_the_bundle(data, name, bundle, capsys):
    assert parity_cli.main([str(bundle.path), "--checkpoint", str(data / "policies" / name)]) == 0, capsys.readouterr()


def test_half_a_grey_level_is_not_lost(data, name):
    """Pixels that bytes cannot hold are in what the model gets."""
    seen, _, _ = observation(data / "policies" / name)
    pixels = fit_image(seen["images"]["front"], 224, 224, POLICIES[name][1])
    levels = (pixels[28:-28] + 1) * 127.5
    assert (np.abs(levels - np.rint(levels)) > 0.01).mean() > 0.5
