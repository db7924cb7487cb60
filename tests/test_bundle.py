"""Bundles on disk: what is refused when one is opened, and that writing leaves a whole one or nothing."""

import json
import os

import pytest

from ki_edge.bundle import SCHEMA, Bundle, Manifest, write_bundle
from ki_edge.config import TINY
from ki_edge.errors import BundleError
from ki_edge.graphs import GRAPHS

FIELDS = {
    "model": TINY.to_dict(),
    "contract": None,
    "sampling": {"time_convention": "openpi", "num_steps": 10},
    "precision": "float32",
    "graphs": {spec.name: {"file": f"{spec.name}.onnx"} for spec in GRAPHS},
    "weights": {"file": "weights.safetensors", "runtime": {}},
    "decode_vocabulary": {"first": 600, "count": 40, "extra": [7, 1]},
    "tools": {},
    "provenance": {},
    "parity": {"verified": False},
}


def fill(folder):
    for name in (*(f"{spec.name}.onnx" for spec in GRAPHS), "weights.safetensors", "assets/norm_stats.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())


@pytest.fixture
def bundle(tmp_path):
    """A bundle whose files hold nothing but their names."""
    with write_bundle(tmp_path / "bundle") as writer:
        fill(writer.folder)
        writer.seal(Manifest(**FIELDS))
    return tmp_path / "bundle"


def edit(bundle, change):
    file = bundle / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def refused(bundle, message, **options):
    with pytest.raises(BundleError, match=message) as error:
        Bundle.open(bundle, **options)
    assert "\n" not in str(error.value)


def test_opens_and_lists_every_file(bundle):
    opened = Bundle.open(bundle, verify=True)
    assert set(opened.manifest.files) == {
        "prefix.onnx", "denoise.onnx", "fast_decode.onnx", "weights.safetensors", "assets/norm_stats.json"
    }  # fmt: skip
    assert opened.manifest.schema == SCHEMA
    assert opened.manifest.vocabulary.ids == [*range(600, 640), 7, 1]
    assert opened.graph("prefix") == bundle / "prefix.onnx"


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["denoise.onnx", "weights.safetensors", "assets/norm_stats.json"])
def test_a_changed_byte(bundle, name):
    content = bytearray((bundle / name).read_bytes())
    content[3] ^= 1
    (bundle / name).write_bytes(content)
    refused(bundle, f"'{name}' has changed since the export", verify=True)


@pytest.mark.parametrize("name", ["denoise.onnx", "weights.safetensors", "assets/norm_stats.json"])
def test_a_missing_or_truncated_file(bundle, name):
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[:-1])
    refused(bundle, f"'{name}' has {len(content) - 1} bytes, recorded {len(content)}; copy it again")
    (bundle / name).unlink()
    refused(bundle, f"file '{name}' is missing; copy the bundle again")


@pytest.mark.parametrize(
    ("schema", "message"),
    [(SCHEMA + 1, "newer; upgrade ki-edge"), (SCHEMA - 1, "older; export"), ("1", "no integer 'schema'")],
)
def test_another_schema(bundle, schema, message):
    edit(bundle, lambda content: content.update(schema=schema))
    refused(bundle, message)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret", "assets/../../secret", "assets\\..\\secret", "..", ".", ""]
)
def test_a_path_that_leaves_the_bundle(bundle, name):
    (bundle.parent / "secret").write_text("secret")
    edit(bundle, lambda content: content["files"].update({name: {"size": 6, "sha256": ""}}))
    refused(bundle, "leaves the bundle; do not use this bundle")


@pytest.mark.parametrize("field", ["weights", "graph"])
def test_a_path_that_is_not_in_the_list_of_files(bundle, field):
    (bundle.parent / "secret").write_text("secret")

    def change(content):
        (content["weights"] if field == "weights" else content["graphs"]["prefix"])["file"] = "../secret"

    edit(bundle, change)
    refused(bundle, r"'\.\./secret' is not in the manifest's file list")


def test_a_link_that_leaves_the_bundle(bundle):
    secret = bundle.parent / "secret"
    secret.write_bytes((bundle / "denoise.onnx").read_bytes())
    (bundle / "denoise.onnx").unlink()
    os.symlink(secret, bundle / "denoise.onnx")
    refused(bundle, "'denoise.onnx' is a link that leaves the bundle")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("sampling"), r"missing \['sampling'\]"),
        (lambda c: c.update(colour="red"), r"unknown \['colour'\]"),
        (lambda c: c.update(graphs=[]), "'graphs' must be dict, not list"),
        (lambda c: c["graphs"].update(prefix=3), "every entry of 'graphs' must be an object"),
        (lambda c: c["files"].update({"denoise.onnx": {"sha256": ""}}), "needs an integer size"),
        (lambda c: c["weights"].pop("file"), "'None' is not in the manifest's file list"),
    ],
)
def test_a_manifest_that_is_no_manifest(bundle, change, message):
    edit(bundle, change)
    refused(bundle, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"schema": 1e999}'])
def test_a_manifest_that_cannot_be_read(bundle, text):
    (bundle / "manifest.json").write_text(text)
    refused(bundle, "manifest.json")


def test_no_bundle(tmp_path):
    refused(tmp_path / "none", "no bundle at .*none: expected a folder written by ki-export")
    refused(tmp_path, "has no manifest.json: not a bundle, or its export was interrupted")


@pytest.mark.parametrize(
    "changes",
    [
        {"first": "600"}, {"first": -1}, {"count": 0}, {"count": 10**12}, {"first": 1000}, {"count": float("inf")},
        {"extra": None}, {"extra": [1024]}, {"extra": [True]},
    ],
)  # fmt: skip
def test_a_decode_vocabulary_that_the_model_does_not_have(changes):
    manifest = Manifest(**{**FIELDS, "decode_vocabulary": {**FIELDS["decode_vocabulary"], **changes}})
    with pytest.raises(BundleError, match="'decode_vocabulary'"):
        _ = manifest.vocabulary


# ---------------------------------------------------------------- writing


def test_an_existing_target_stays_without_force(bundle):
    with pytest.raises(BundleError, match="exists: choose another name, or replace it with --force"), write_bundle(bundle):
        raise AssertionError("the block must not run")
    Bundle.open(bundle, verify=True)


def test_force_replaces_bundles_only(bundle, tmp_path):
    with write_bundle(bundle, force=True) as writer:
        fill(writer.folder)
        (writer.folder / "prefix.onnx").write_bytes(b"new")
        writer.seal(Manifest(**FIELDS))
    assert Bundle.open(bundle, verify=True).graph("prefix").read_bytes() == b"new"
    (tmp_path / "thesis").mkdir()
    with pytest.raises(BundleError, match="is no bundle"), write_bundle(tmp_path / "thesis", force=True):
        raise AssertionError("the block must not run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "thesis"]


def test_an_error_leaves_the_old_bundle(bundle):
    with pytest.raises(RuntimeError, match="not today"), write_bundle(bundle, force=True) as writer:
        fill(writer.folder)
        raise RuntimeError("not today")
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]
    Bundle.open(bundle, verify=True)
