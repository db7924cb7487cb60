"""Bundles on disk: written whole or not at all, and opened only if nothing is wrong with them."""

import hashlib
import json
import shutil
import subprocess

import pytest

from ki_edge.bundle import SCHEMA, Bundle, DecodeVocabulary, Manifest, sha256, write_bundle
from ki_edge.bundle.files import BUILT
from ki_edge.config import TINY
from ki_edge.errors import BundleError

CONTENT = {"weights.safetensors": b"\x02\0\0\0\0\0\0\0{}", "prefix.onnx": b"graph", "assets/fast/tokenizer.json": b"{}"}


def manifest(**changes):
    fields = {
        "model": TINY.to_dict(),
        "contract": None,
        "sampling": {"time_convention": "openpi", "num_steps": 10},
        "precision": "float32",
        "graphs": {"prefix": {"file": "prefix.onnx"}},
        "weights": {"file": "weights.safetensors", "runtime": {}},
        "decode_vocabulary": {"first": 600, "count": 3, "extra": [7, 1]},
        "tools": {"ki-edge": "0.1.0 π"},
        "provenance": {},
        "parity": {"verified": False},
    }
    return Manifest(**{**fields, **changes})


def fill(writer, content=None):
    for name, data in (content or CONTENT).items():
        (writer.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (writer.folder / name).write_bytes(data)


@pytest.fixture
def write(tmp_path):
    """write(name="bundle", force=False, content=None, **manifest fields) -> path of a new bundle."""

    def make(name="bundle", *, force=False, content=None, **changes):
        with write_bundle(tmp_path / name, force=force) as writer:
            fill(writer, content)
            writer.seal(manifest(**changes))
        return tmp_path / name

    return make


def edit(bundle, change):
    """Rewrite the manifest with change(data)."""
    data = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    change(data)
    (bundle / "manifest.json").write_text(json.dumps(data), encoding="utf-8")


def refused(path, message, **options):
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(path, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def names(folder):
    """What lies in a folder, hidden or not."""
    return {path.name for path in folder.iterdir()}


def tree(folder):
    """Everything in a folder, hidden or not: {relative path: content}."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------- write and open


def test_round_trip(write, tmp_path):
    path = write()
    assert names(tmp_path) == {"bundle"}
    bundle = Bundle.open(str(path), verify=True)
    assert {name: (path / name).read_bytes() for name in bundle.manifest.files} == CONTENT
    for name, facts in bundle.manifest.files.items():
        assert facts == {"size": len(CONTENT[name]), "sha256": hashlib.sha256(CONTENT[name]).hexdigest()}
    assert bundle.manifest == manifest(files=bundle.manifest.files)
    assert bundle.manifest.config == TINY
    assert bundle.manifest.vocabulary == DecodeVocabulary(600, 3, (7, 1))
    assert bundle.manifest.vocabulary.ids == [600, 601, 602, 7, 1]
    assert bundle.file("prefix.onnx").read_bytes() == b"graph"
    assert bundle.weights().entries == {}
    assert bundle.file("assets/fast/tokenizer.json") == path / "assets" / "fast" / "tokenizer.json"


def test_sealing_again_after_changes(tmp_path):
    """Also one that keeps a file's size."""
    with write_bundle(tmp_path / "bundle") as writer:
        fill(writer)
        writer.seal(manifest())
        (writer.folder / "prefix.onnx").write_bytes(b"GRAPH")
        (writer.folder / "parity.json").write_bytes(b"{}")
        sealed = writer.seal(manifest(parity={"verified": True}))
        assert sealed.path == writer.folder
    bundle = Bundle.open(tmp_path / "bundle", verify=True)
    assert bundle.manifest.parity == {"verified": True}
    assert set(bundle.manifest.files) == {*CONTENT, "parity.json"}


def test_unchanged_files_are_hashed_once(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr("ki_edge.bundle.bundle.sha256", lambda path: hashed.append(path.name) or sha256(path))
    with write_bundle(tmp_path / "bundle") as writer:
        fill(writer)
        writer.seal(manifest())
        (writer.folder / "parity.json").write_bytes(b"{}")
        writer.seal(manifest())
    assert sorted(hashed) == ["parity.json", "prefix.onnx", "tokenizer.json", "weights.safetensors"]


def test_hashing_tells_its_progress(tmp_path):
    (tmp_path / "file").write_bytes(bytes(5_000_000))
    done = []
    assert sha256(tmp_path / "file", done.append) == hashlib.sha256(bytes(5_000_000)).hexdigest()
    assert sum(done) == 5_000_000
    assert len(done) > 1


def test_a_bundle_may_be_moved_and_linked_to(write, tmp_path):
    moved = write().rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(moved)
    assert Bundle.open(tmp_path / "link", verify=True).manifest == Bundle.open(moved).manifest


def test_the_digest_covers_the_manifest(write):
    """What is changed by hand is found; who changes the digest beside it too needs the one that was printed."""
    path = write()
    digest = Bundle.open(path, verify=True).digest
    assert digest == hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
    assert (
        subprocess.run(["sha256sum", "--check", "--status", "manifest.sha256"], cwd=path, check=False).returncode == 0
    )
    assert Bundle.open(path, verify=f" {digest.upper()}\n").digest == digest
    edit(path, lambda data: data["sampling"].update(num_steps=3))
    assert Bundle.open(path).manifest.sampling["num_steps"] == 3
    refused(path, r"'manifest\.json' has changed since the export", verify=True)
    (path / "manifest.sha256").write_text(hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest() + "  x\n")
    Bundle.open(path, verify=True)
    refused(path, f"has the digest [0-9a-f]{{64}}, not '{digest}': it is another bundle, or changed", verify=digest)
    refused(path, "has the digest [0-9a-f]{64}, not ''", verify="")  # such as a variable that is not set
    (path / "manifest.sha256").unlink()
    refused(path, r"manifest\.sha256 cannot be read: No such file", verify=True)


def test_a_bundle_that_was_replaced_is_not_mixed_with_its_successor(write):
    """Graphs are opened long after the manifest was read, those for FAST at their first use."""
    bundle = Bundle.open(write())
    write(force=True)
    with pytest.raises(BundleError, match="was replaced or removed since it was opened: open it again"):
        bundle.file("prefix.onnx")
    shutil.rmtree(bundle.path)
    with pytest.raises(BundleError, match="was replaced or removed"):
        bundle.weights()


def test_names_that_are_not_there(write):
    bundle = Bundle.open(write())
    with pytest.raises(BundleError, match="no graph 'decode', only prefix"):
        bundle.graph("decode")
    with pytest.raises(BundleError, match=r"'manifest\.json' is not in the manifest's file list"):
        bundle.file("manifest.json")


# ---------------------------------------------------------------------- damaged, foreign, hostile


def test_no_bundle(tmp_path):
    refused(tmp_path / "none", "no bundle at")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "no bundle at")
    refused(tmp_path, "has no manifest.json: not a bundle, or its export was interrupted")


@pytest.mark.parametrize("name", CONTENT)
def test_changed_byte(write, name):
    path = write()
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    Bundle.open(path)
    refused(path, f"'{name}' has changed since the export", verify=True)


@pytest.mark.parametrize("name", CONTENT)
def test_changed_size_and_missing_file(write, name):
    path = write()
    with (path / name).open("ab") as file:
        file.write(b"!")
    refused(path, f"'{name}' has {len(CONTENT[name]) + 1} bytes, recorded {len(CONTENT[name])}; copy it again")
    (path / name).unlink()
    refused(path, f"file '{name}' is missing; copy the bundle again")
    (path / name).mkdir()
    refused(path, f"file '{name}' is missing")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "no integer 'schema'"),
        (b"{}", "no integer 'schema'"),
        (b'{"schema": "1"}', "no integer 'schema'"),
        (b'{"schema": 1}', r"missing \['contract', .*\], unknown \[\]"),
        (b" " * 16_000_001, "more than such a file can have"),
    ],
)
def test_bad_manifest(write, content, message):
    path = write()
    (path / "manifest.json").write_bytes(content)
    refused(path, message)


@pytest.mark.parametrize(("schema", "message"), [(SCHEMA + 1, "newer; upgrade"), (SCHEMA - 1, "older; export")])
def test_other_schema(write, schema, message):
    """Found before anything else is complained about: a newer manifest may have other fields."""
    path = write()
    edit(path, lambda data: data.update(schema=schema, future={}))
    refused(path, f"schema {schema} where this version reads {SCHEMA}: the bundle is {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"future": {}}, r"unknown \['future'\]"),
        ({"graphs": []}, "'graphs' must be dict, not list"),
        ({"graphs": {"prefix": "prefix.onnx"}}, "every entry of 'graphs' must be an object"),
        ({"graphs": {"prefix": {}}}, "'None' is not in the manifest's file list"),
        ({"graphs": {"prefix": {"file": "other.onnx"}}}, r"'other\.onnx' is not in the manifest's file list"),
        ({"graphs": {"prefix": {"file": "../secret"}}}, r"'\.\./secret' is not in the manifest's file list"),
        ({"weights": {"file": "/etc/hostname"}}, "'/etc/hostname' is not in the manifest's file list"),
        ({"weights": {}}, "'None' is not in the manifest's file list"),
        ({"model": None}, "'model' must be dict, not NoneType"),
        ({"contract": 3}, "'contract' must be dict"),
        ({"precision": 32}, "'precision' must be str, not int"),
        (
            {"precision": "fp4"},
            "precision 'fp4', known are float32, float16, bfloat16, int8, int8_static, float8, nvfp4: upgrade",
        ),
        ({"precision": "float32\x1b[2J"}, r"precision 'float32\\x1b\[2J', known are"),
        ({"schema": True}, "no integer 'schema'"),
        ({"graphs": {"prefix": {"file": "prefix.onnx"}, "x" * 9000: {}}}, "expected prefix, denoise, fast_decode"),
        ({"graphs": {}}, "expected prefix, denoise, fast_decode"),
        ({"graphs": {"prefix": {"file": "prefix.onnx", "inputs": 3}}}, "needs its inputs in a list or an object"),
        ({"weights": {"file": "weights.safetensors", "runtime": []}}, r"'weights\.runtime' must be an object"),
        ({"weights": {"file": "weights.safetensors", "runtime": {"a": 3}}}, "expected names of tensors"),
        ({"weights": {"file": "weights.safetensors", "runtime": {"a": "b\x07"}}}, "expected names of tensors"),
        ({"tools": {"torch": 2}}, r"tools\['torch'\] is not text"),
        ({"parity": {"verified": "yes"}}, r"'parity\.verified' must be true or false"),
        ({"decode_vocabulary": {"first": 1, "count": 1, "extra": [1] * 100_001}}, "has 100001 tokens, at most"),
        ({"files": {"prefix.onnx": {"size": True, "sha256": "0" * 64}}}, "needs an integer size"),
        ({"files": {"prefix.onnx": {"size": -1, "sha256": "0" * 64}}}, "needs an integer size"),
        ({"files": {"a\x1b[2J": {"size": 1, "sha256": "0" * 64}}}, "cannot be the name of a file"),
        ({"files": {"a" * 5000: {"size": 1, "sha256": "0" * 64}}}, "cannot be the name of a file"),
        ({"files": {name: {"size": 1, "sha256": "0" * 64} for name in ("a", "A")}}, "are one file on some disks"),
        ({"files": {str(i): {} for i in range(10_001)}}, "10001 entries, at most 10000"),
        ({"files": {"prefix.onnx": {}}}, r"files\['prefix\.onnx'\] needs an integer size"),
        ({"files": {"prefix.onnx": 3}}, r"files\['prefix\.onnx'\] needs"),
    ],
)
def test_wrong_fields(write, changes, message):
    path = write()
    edit(path, lambda data: data.update(changes))
    refused(path, message)


@pytest.mark.parametrize("digest", [None, "", "0" * 63, "G" * 64, 5, ["0" * 64]])
def test_a_hash_that_is_none(write, digest):
    path = write()
    edit(path, lambda data: data["files"]["prefix.onnx"].update(sha256=digest))
    refused(path, r"files\['prefix\.onnx'\] needs a sha256 of 64")


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../secret", "assets/../../secret", "..", ".", "", "..\\secret", "C:\\secret"]
)
def test_paths_that_leave_the_bundle(write, tmp_path, name):
    (tmp_path / "secret").write_bytes(b"x")
    path = write()
    edit(path, lambda data: data["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    refused(path, "which leaves the bundle; do not use this bundle")


def test_links_that_leave_the_bundle(write, tmp_path):
    (tmp_path / "secret").write_bytes(b"graph")
    path = write()
    (path / "prefix.onnx").unlink()
    (path / "prefix.onnx").symlink_to(tmp_path / "secret")
    refused(path, "'prefix.onnx' is a link that leaves the bundle")
    (path / "prefix.onnx").unlink()
    (path / "prefix.onnx").write_bytes(b"graph")
    (path / "assets" / "fast").rename(tmp_path / "outside")
    (path / "assets" / "fast").symlink_to(tmp_path / "outside")
    refused(path, "'assets/fast/tokenizer.json' is a link that leaves the bundle")


def test_a_manifest_that_is_a_link_out_of_the_bundle(write, tmp_path):
    path = write()
    (path / "manifest.json").rename(tmp_path / "manifest.json")
    (path / "manifest.json").symlink_to(tmp_path / "manifest.json")
    refused(path, r"'manifest\.json' is a link that leaves the bundle")


def test_links_inside_the_bundle_are_fine(write):
    path = write()
    (path / "prefix.onnx").rename(path / "real.onnx")
    (path / "prefix.onnx").symlink_to("real.onnx")
    Bundle.open(path, verify=True)
    (path / "real.onnx").unlink()
    (path / "prefix.onnx").unlink()
    (path / "prefix.onnx").symlink_to("prefix.onnx")
    refused(path, "'prefix.onnx' is missing")


def test_malformed_model_and_weights_are_found_on_use(write):
    bundle = Bundle.open(write(model={**TINY.to_dict(), "vocab_size": 0}))
    with pytest.raises(BundleError, match=r"manifest: geometry 'model\.vocab_size'"):
        _ = bundle.manifest.config
    damaged = Bundle.open(write("damaged", content={**CONTENT, "weights.safetensors": b"pickle"}))
    with pytest.raises(BundleError, match="is not a safetensors file"):
        damaged.weights()


@pytest.mark.parametrize(
    "changes",
    [
        {"first": "600"}, {"first": -1}, {"count": 0}, {"count": 10**12}, {"first": 1022}, {"count": float("inf")},
        {"extra": None}, {"extra": [1024]}, {"extra": [True]}, {"extra": 3},
    ],
)  # fmt: skip
def test_decode_vocabulary_that_the_model_does_not_have(changes):
    with pytest.raises(BundleError, match="'decode_vocabulary'"):
        vocabulary = {"first": 600, "count": 3, "extra": [7, 1], **changes}
        _ = manifest(decode_vocabulary=vocabulary, graphs={"fast_decode": {}}).vocabulary


def test_without_the_fast_head_no_token_can_be_chosen():
    found = manifest(decode_vocabulary={"first": 0, "count": 0, "extra": []})
    assert (found.has_fast, found.vocabulary.ids) == (False, [])
    assert manifest(graphs={"fast_decode": {}}).has_fast


# ---------------------------------------------------------------------- what exists already


def test_existing_output(write, tmp_path):
    path = write()
    before = tree(tmp_path)
    with pytest.raises(BundleError, match="exists: choose another name, or replace it with --force"):
        write(content={**CONTENT, "prefix.onnx": b"other"})
    assert tree(tmp_path) == before
    write(force=True, content={"weights.safetensors": b"", "prefix.onnx": b"other"})
    assert set(Bundle.open(path, verify=True).manifest.files) == {"weights.safetensors", "prefix.onnx"}
    assert names(tmp_path) == {"bundle"}


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link", "link to a folder"])
@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_bundle_is_never_replaced(write, tmp_path, kind, force):
    target, home = tmp_path / "bundle", tmp_path / "home"
    home.mkdir()
    (home / "precious.txt").write_text("x")
    if kind == "folder":
        shutil.copytree(home, target)
    elif kind == "file":
        target.write_text("x")
    else:
        target.symlink_to(home if kind == "link to a folder" else tmp_path / "nothing")
    before = tree(tmp_path)
    with pytest.raises(
        BundleError, match="is not a bundle, so --force does not" if force else "exists: choose another"
    ):
        write(force=force)
    assert tree(tmp_path) == before
    assert target.is_symlink() == kind.endswith(("link", "link to a folder"))


@pytest.mark.parametrize("name", ["notes.txt", "checkpoint/model.safetensors", "engines/old/model.safetensors"])
def test_a_bundle_with_foreign_files_is_not_replaced(write, tmp_path, name):
    path = write()
    (path / "engines" / "0123456789abcdef").mkdir(parents=True)
    for own in ("engine.json", "prefix.engine", "prefix.log", "prefix.kernels", "proof-0123456789abcdef.json"):
        (path / "engines" / "0123456789abcdef" / own).write_text("built here")
    (path / "engines" / "nvidia.timings").write_text("known")
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(BundleError, match=f"holds {name}, which is not part of the bundle: move it elsewhere first"):
        write(force=True)
    assert tree(tmp_path) == before
    (path / name).unlink()
    write(force=True)
    assert names(path) == {"manifest.json", "manifest.sha256", "weights.safetensors", "prefix.onnx", "assets"}


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "my web site", "icons": []}', '{"schema": 1, "files": []}'])
def test_a_folder_with_another_kind_of_manifest_is_not_replaced(write, tmp_path, content):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match="is not a bundle, so --force does not replace it: remove it yourself"):
        write(force=True)
    assert tree(tmp_path) == {"bundle/manifest.json": content.encode()}


def test_force_on_a_link_to_a_bundle_keeps_what_it_points_to(write, tmp_path):
    original = write("original")
    (tmp_path / "bundle").symlink_to(original)
    for content in (b"first", b"second"):
        path = write(force=True, content={**CONTENT, "prefix.onnx": content})
        assert not path.is_symlink()
        assert Bundle.open(path, verify=True).file("prefix.onnx").read_bytes() == content
        assert names(tmp_path) == {"bundle", "original"}
    assert Bundle.open(original, verify=True).file("prefix.onnx").read_bytes() == b"graph"


def test_parent_folders_are_made(write, tmp_path):
    assert Bundle.open(write("a/b/bundle")).path == tmp_path / "a" / "b" / "bundle"


# ---------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_what_was_there(write, tmp_path, exists, error):
    if exists:
        write()
    before = tree(tmp_path)
    with pytest.raises(error), write_bundle(tmp_path / "bundle", force=True) as writer:
        fill(writer, {**CONTENT, "prefix.onnx": b"half"})
        writer.seal(manifest())
        raise error
    assert tree(tmp_path) == before
    assert names(tmp_path) == ({"bundle"} if exists else set())


def test_what_a_kill_leaves_of_our_own_writing_is_ours():
    """So that it never stands in the way of --force."""
    ours = ("engines/ort/.proof-0a.json.0b.partial", "engines/0a/.engine.json.0b", ".weights.link.json.0a1b2c3d")
    assert all(BUILT.fullmatch(name) for name in ours)
    assert not any(
        BUILT.fullmatch(name) for name in ("notes.txt", "engines/0a/notes.txt", "checkpoint/model.safetensors")
    )
