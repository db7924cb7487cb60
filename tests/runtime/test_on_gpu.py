"""Every GPU backend of this machine against ONNX Runtime on its CPU, on a trained policy. Skipped without a GPU."""

import shutil

import numpy as np
import pytest

from ki_edge.bundle import Bundle
from ki_runtime import Sampler
from ki_runtime.backends import BACKENDS

GPU_BACKENDS = [backend for backend in BACKENDS if backend.device == "GPU"]
ATOL = 1e-3  # float32 on both sides; TensorRT chooses the order of each sum, and ten steps add up

pytestmark = pytest.mark.gpu


def random_inputs(config, cameras, lengths):
    random = np.random.default_rng(0)
    size, longest = config.vision.image_size, 64
    images = random.integers(0, 256, (1, cameras, size, size, 3), np.uint8)
    mask = np.arange(longest)[None] < lengths
    tokens = random.integers(3, config.vocab_size, (1, longest)).astype(np.int32)
    return images, np.ones((1, cameras), np.bool_), np.where(mask, tokens, 0), mask


@pytest.fixture(params=GPU_BACKENDS, ids=lambda backend: backend.name)
def pair(request, tmp_path_factory):
    """The policy on a GPU backend, and on the CPU."""
    obstacle = request.param.obstacle(None)
    if obstacle is not None:
        pytest.skip(f"{request.param.name}: {obstacle}")
    folder = tmp_path_factory.mktemp("gpu") / "bundle"
    shutil.copytree(request.getfixturevalue("fetch_bundle"), folder)  # engines are built into it
    bundle = Bundle.open(folder)
    return Sampler.open(bundle, request.param.name, build=True, say=print), Sampler.open(bundle, "ort")


def test_parity(pair):
    ours, theirs = pair
    shape = (1, ours.config.action_horizon, ours.config.action_dim)
    for seed, (length, steps) in enumerate([(9, 10), (9, 10), (30, 10), (9, 3), (17, 10), (9, 10)]):
        inputs = random_inputs(ours.config, 1, length)
        noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
        actions = ours.sample_actions(*inputs, noise=noise, num_steps=steps)
        expected = theirs.trace(*inputs, noise=noise, num_steps=steps)
        np.testing.assert_allclose(actions, expected.x[-1], atol=ATOL, rtol=0)
        found = ours.trace(*inputs, noise=noise, num_steps=steps)
        np.testing.assert_allclose(found.prefix_k, expected.prefix_k, atol=ATOL, rtol=ATOL)
        np.testing.assert_allclose(found.prefix_v, expected.prefix_v, atol=ATOL, rtol=ATOL)
        np.testing.assert_allclose(found.x, expected.x, atol=ATOL, rtol=0)


def test_tokens(pair):
    ours, theirs = pair
    inputs = random_inputs(ours.config, 1, 12)
    for _ in range(3):
        found, expected = (s.sample_fast_tokens(*inputs, max_tokens=12, forced=(5,)) for s in (ours, theirs))
        np.testing.assert_array_equal(found, expected)
