"""A proven bundle in the cache of the Hub runs there, and engines are built there."""

import hashlib
import os

import numpy as np
import pytest

from ki_edge.bundle import Bundle
from ki_export.parity.cli import main as parity
from ki_runtime.policy.sampler import Sampler


@pytest.fixture
def cached(bundle, tmp_path):
    """The bundle as the Hub's client lays out a repository that holds it."""
    home = tmp_path / "hub" / "models--org--policy"
    folder = home / "snapshots" / ("a1" * 20)
    (home / "blobs").mkdir(parents=True)
    for path in sorted(bundle.path.rglob("*")):
        if path.is_file():
            blob = home / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.write_bytes(path.read_bytes())
            link = folder / path.relative_to(bundle.path)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


def test_it_acts_as_the_one_that_was_uploaded(bundle, cached, checkpoint, capsys):
    pictures = np.random.default_rng(0).integers(0, 256, (1, 2, 14, 14, 3), dtype=np.uint8)
    inputs = pictures, np.ones((1, 2), bool), np.arange(2, 9, dtype=np.int32)[None], np.ones((1, 7), bool)
    actions, tokens = [], []
    for path in (bundle.path, cached):
        sampler = Sampler.open(path, "ort", threads=1, verify=True)
        actions.append(sampler.sample_actions(*inputs, seed=0))
        tokens.append(sampler.sample_fast_tokens(*inputs, max_tokens=5)[0])
    np.testing.assert_array_equal(*actions)
    np.testing.assert_array_equal(*tokens)
    assert parity([str(cached), "--checkpoint", str(checkpoint)]) == 0, capsys.readouterr().err


def test_engines_are_built_beside_the_links(cached):
    pytest.importorskip("tensorrt_rtx")
    from ki_runtime.trt.api import Api
    from ki_runtime.trt.build import BuildOptions, build

    bundle = Bundle.open(cached)
    options = BuildOptions(capabilities=((8, 6),), graphs=("denoise",), ignore_memory=True)
    engines = build(bundle, Api.load("tensorrt_rtx"), None, options)
    assert engines.folders[0].parent == cached / "engines"
    assert all(found.damage(verify=True) == [] for found in engines.of.values())
    assert not (cached / "engines").is_symlink()
    Bundle.open(cached, verify=True)
