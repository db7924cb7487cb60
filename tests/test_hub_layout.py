"""Bundles in the cache of the Hugging Face Hub, whose files are links into the cache's own blobs."""

import hashlib
import os

import pytest

from ki_edge.bundle import Bundle, Manifest, write_bundle
from ki_edge.bundle.files import hub_blobs
from ki_edge.errors import BundleError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = {"weights.safetensors": b"\x02\0\0\0\0\0\0\0{}", "prefix.onnx": b"", "assets/tokenizer.model": b"words"}


def snapshot(source, cache, repository="models--org--bundle", inside=""):
    """Lay files out as the Hub's client does."""
    home = cache / repository
    folder = home / "snapshots" / COMMIT / inside
    (home / "blobs").mkdir(parents=True)
    for path in source.rglob("*"):
        if path.is_file():
            blob = home / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.write_bytes(path.read_bytes())
            link = folder / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


@pytest.fixture
def source(tmp_path):
    with write_bundle(tmp_path / "source") as writer:
        for name, content in CONTENT.items():
            (writer.folder / name).parent.mkdir(exist_ok=True)
            (writer.folder / name).write_bytes(content)
        fields = {name: {} for name in ("model", "decode_vocabulary", "tools", "provenance", "parity")}
        fields |= {"contract": None, "sampling": {"num_steps": 10}, "precision": "float32"}
        graphs = {"prefix": {"file": "prefix.onnx"}}
        writer.seal(Manifest(**fields, graphs=graphs, weights={"file": "weights.safetensors"}))
    return tmp_path / "source"


@pytest.mark.parametrize("repository", ["models--org--bundle", "datasets--org--b.c_d-e", "models--bundle"])
@pytest.mark.parametrize("inside", ["", "fp16", "robots/left"])
def test_a_snapshot_opens(source, tmp_path, repository, inside):
    """Also a folder of one: a repository may hold several bundles."""
    folder = snapshot(source, tmp_path / "hub", repository, inside)
    bundle = Bundle.open(folder, verify=True)
    assert bundle.graph("prefix").read_bytes() == b"" and bundle.weights().entries == {}
    (tmp_path / "elsewhere").symlink_to(folder)
    assert Bundle.open(tmp_path / "elsewhere", verify=bundle.digest).digest == bundle.digest


def relink(path, target):
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("name", [*CONTENT, "manifest.json"])
def test_links_that_go_anywhere_else(source, tmp_path, name):
    """Another repository's blobs, a folder below the blobs, the repository itself, the world."""
    folder = snapshot(source, tmp_path / "hub")
    home, content = folder.parents[1], (folder / name).read_bytes()
    other = snapshot(source, tmp_path / "hub", "models--org--other").parents[1] / "blobs"
    (home / "blobs" / "deep").mkdir()
    places = (home / "blobs" / "deep", home, home / "refs", other, tmp_path / "hub", tmp_path)
    for place in places:
        place.mkdir(exist_ok=True)
        (place / "secret").write_bytes(content)
        relink(folder / name, place / "secret")
        with pytest.raises(BundleError, match=f"'{name}' is a link that leaves the bundle"):
            Bundle.open(folder)


@pytest.mark.parametrize(
    "path",
    ["models--o--n/snapshots/main", f"models--o--n/snap/{COMMIT}", f"mine/snapshots/{COMMIT}", f"snapshots/{COMMIT}"],
)
def test_what_only_looks_like_a_cache(source, tmp_path, path):
    folder = tmp_path / path
    folder.parent.mkdir(parents=True)
    source.rename(folder)
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    (folder / "prefix.onnx").rename(blobs / "prefix")
    (folder / "prefix.onnx").symlink_to(blobs / "prefix")
    assert hub_blobs(folder) is None
    with pytest.raises(BundleError, match=r"'prefix\.onnx' is a link that leaves the bundle"):
        Bundle.open(folder)
