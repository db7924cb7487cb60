"""Every GPU backend of this machine against ONNX Runtime on its CPU, on a trained policy. Skipped without a GPU.

Float32 and float16, one observation and two at once, cameras that are absent, prompts of several buckets; eager runs,
recordings and replays of them, one after the other on the same connection.
"""

import shutil
from functools import partial

import numpy as np
import pytest

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_runtime import Sampler
from ki_runtime.backends.backend import SessionOptions
from ki_runtime.backends.registry import BACKENDS, connect
from ki_runtime.trt.build import MODULES, BuildOptions, build_bundle

GPU_BACKENDS = [backend for backend in BACKENDS if backend.device == "GPU"]
# Of float32: the same on both sides; TensorRT chooses the order of each sum, and ten steps add up. Of float16: what
# NVIDIA's own runtime holds against float32.
ATOL, COSINE = {"float32": 1e-3, "float16": 5e-3}, {"float32": 1e-6, "float16": 1e-5}
CONTENDERS = [
    (b, precision, record)
    for b in GPU_BACKENDS
    for precision in ATOL
    for record in ((False, True) if b.name == "ort-cuda" else (False,))
]
BATCH = 2
# Cameras that are there, tokens of each row's prompt, denoising steps. The repeated ones replay what others recorded.
CASES = [
    ([[True]], [9], 10),
    ([[True]], [9], 10),
    ([[True, True]], [30], 10),
    ([[True, False]], [9], 3),
    ([[False, True]], [17], 10),
    ([[True, False], [True, True]], [9, 40], 10),
    ([[True, False], [False, True]], [33, 12], 10),
    ([[True, False], [True, True]], [9, 40], 10),
    ([[True]], [9], 10),
]

pytestmark = pytest.mark.gpu


def random_inputs(config, present, lengths, seed=0):
    """present bool [B, N], lengths [B] -> the sampler's inputs; what is absent holds rubbish that nobody may see."""
    random, present = np.random.default_rng(seed), np.array(present)
    size, longest = config.vision.image_size, 64
    images = random.integers(0, 256, (*present.shape, size, size, 3), np.uint8)
    mask = np.arange(longest)[None] < np.array(lengths)[:, None]
    tokens = random.integers(3, config.vocab_size, mask.shape).astype(np.int32)
    return images, present, np.where(mask, tokens, 0), mask


@pytest.fixture(scope="module")
def bundles(fetch_bundle, fetch_checkpoint, tmp_path_factory):
    """The policy in both precisions; engines are built into copies, so each backend has its own."""
    half = tmp_path_factory.mktemp("half") / "bundle"
    export(fetch_checkpoint, half, ExportOptions(target="trt", precision="fp16", verify=False))
    return {"float32": fetch_bundle, "float16": half}


def recording(folder, backend):
    """A sampler whose backend is asked to record CUDA graphs; ONNX Runtime's does not by itself."""
    bundle = Bundle.open(folder)
    specs = graphs.specs(bundle.manifest.config)
    connection = connect(bundle, backend, SessionOptions(record=True), specs)
    return Sampler(bundle, connection.open, connection.backend)


@pytest.fixture(params=CONTENDERS, ids=lambda case: f"{case[0].name}{' recorded' if case[2] else ''} {case[1]}")
def pair(request, tmp_path_factory):
    """(the policy on a GPU backend, the float32 one on the CPU, their precision)."""
    backend, precision, record = request.param
    obstacle = backend.obstacle(None)
    if obstacle is not None:
        pytest.skip(f"{backend.name}: {obstacle}")
    bundles = request.getfixturevalue("bundles")
    folder = tmp_path_factory.mktemp("gpu") / "bundle"
    shutil.copytree(bundles[precision], folder)
    if backend.name in MODULES:
        options = BuildOptions(batch=BATCH, graphs=tuple(Bundle.open(folder).manifest.graphs))
        build_bundle(folder, backend.name, options=options, say=print)
    ours = recording(folder, backend.name) if record else Sampler.open(folder, backend.name, say=print)
    return ours, Sampler.open(bundles["float32"], "ort"), precision


def assert_close(found, expected, precision):
    np.testing.assert_allclose(found, expected, atol=ATOL[precision], rtol=0)
    along = np.vdot(found, expected) / (np.linalg.norm(found) * np.linalg.norm(expected))
    assert 1 - along <= COSINE[precision]


def test_parity(pair):
    ours, theirs, precision = pair
    for seed, (present, lengths, steps) in enumerate(CASES):
        inputs = random_inputs(ours.config, present, lengths)
        shape = (len(lengths), ours.config.action_horizon, ours.config.action_dim)
        noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
        expected = theirs.trace(*inputs, noise=noise, num_steps=steps)
        assert_close(ours.sample_actions(*inputs, noise=noise, num_steps=steps), expected.x[-1], precision)
        found = ours.trace(*inputs, noise=noise, num_steps=steps)  # not recorded, from contexts of its own
        assert_close(found.x, expected.x, precision)
        if precision == "float32":
            close = partial(np.testing.assert_allclose, atol=ATOL[precision], rtol=ATOL[precision])
            valid = expected.prefix_mask[None, :, None, :, None]
            close(found.prefix_k * valid, expected.prefix_k * valid)
            close(found.prefix_v * valid, expected.prefix_v * valid)


def test_tokens(pair):
    ours, theirs, precision = pair
    for present, lengths in (([[True]], [12]), ([[True, False], [True, True]], [12, 5])):
        inputs = random_inputs(ours.config, present, lengths)
        for _ in range(3):
            found, expected = (s.sample_fast_tokens(*inputs, max_tokens=12, forced=(5,)) for s in (ours, theirs))
            if precision == "float32":  # in float16 two tokens that are nearly as likely may change places
                np.testing.assert_array_equal(found, expected)
            assert found.shape[0] == len(lengths)
