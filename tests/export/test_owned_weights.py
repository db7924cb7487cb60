"""A bundle owns its weights: nobody who writes into the checkpoint reaches them, unless --link was asked for."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ki_edge.bundle import Bundle, sha256
from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import ArgumentError, BundleError, CheckpointError, ExportError
from ki_export import exporter
from ki_export.exporter import export
from ki_export.options import ExportOptions
from ki_export.weights import finite, shared_file
from ki_export.weights.weights import StorageFormat, place_weights
from ki_runtime.policy.sampler import Sampler

WEIGHTS, MODEL = "weights.safetensors", "model.safetensors"
KEY = "time_mlp_in.weight"


@pytest.fixture
def linked(copied, tmp_path):
    """A bundle that shares its checkpoint's file."""
    return export(copied, tmp_path / "bundle", ExportOptions(verify=False, model_only=True, link=True))


def opened(path):
    """What opening a bundle says."""
    said = []
    Bundle.open(path, say=said.append)
    return said


def place(folder, tmp_path, **options):
    (tmp_path / "out").mkdir(exist_ok=True)
    return place_weights(Checkpoint.open(folder), tmp_path / "out", [KEY], **options)


def test_overwriting_and_truncating_the_checkpoint_changes_nothing(copied, tmp_path):
    """Neither on the disk nor in a robot that runs."""
    bundle = export(copied, tmp_path / "bundle", ExportOptions(verify=False, model_only=True))
    assert bundle.manifest.provenance["weights"] in ("copied", "reflinked") and not bundle.linked
    before = (bundle.path / WEIGHTS).read_bytes()
    assert before == (copied / MODEL).read_bytes()
    assert (bundle.path / WEIGHTS).stat().st_nlink == 1
    sampler, config = Sampler.open(bundle, threads=1), bundle.manifest.config
    size = config.vision.image_size
    given = np.zeros((1, 1, size, size, 3), np.uint8), np.ones((1, 1), bool), np.ones((1, 3)), np.ones((1, 3), bool)
    inputs = (*given[:2], given[2].astype(np.int32), given[3])
    actions = sampler.sample_actions(*inputs, seed=1)
    with (copied / MODEL).open("r+b") as file:  # as cp writes into a file that is there
        file.write(b"\0" * 100_000)
        file.truncate(10)
    assert (bundle.path / WEIGHTS).read_bytes() == before
    np.testing.assert_array_equal(sampler.sample_actions(*inputs, seed=1), actions)
    Bundle.open(bundle.path, verify=True)


def test_a_file_system_with_reflinks(copied, tmp_path, monkeypatch):
    """As such a file system answers: its blocks are shared, the copy has another inode."""

    def clone(target, request, source):
        assert request == 0x40049409
        os.write(target, Path(f"/proc/self/fd/{source}").read_bytes())

    monkeypatch.setattr(fcntl, "ioctl", clone)
    placed = place(copied, tmp_path)
    assert (placed.how, placed.sha256) == ("reflinked", None)
    assert placed.index.path.read_bytes() == (copied / MODEL).read_bytes()


@pytest.mark.parametrize("number", shared_file.NO_REFLINK)
def test_a_file_system_without_reflinks_gets_a_copy(copied, tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: fail(number))
    placed = place(copied, tmp_path)
    assert placed.how == "copied"
    assert placed.index.path.read_bytes() == (copied / MODEL).read_bytes()


def fail(number):
    raise OSError(number, os.strerror(number))


def test_a_reflink_that_fails_is_an_error(copied, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: fail(errno.EIO))
    with pytest.raises(ExportError, match=rf"cannot write {tmp_path}/out/{WEIGHTS}: Input/output error"):
        place(copied, tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def reflinking(tmp_path):
    """A folder on a file system that has reflinks: this one, or one that is made for the test."""
    (tmp_path / "a").write_bytes(b"x")
    if shared_file.reflink(tmp_path / "a", tmp_path / "b"):
        yield tmp_path
        return
    make = shutil.which("mkfs.btrfs", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if make is None or os.geteuid() != 0:
        pytest.skip("the tests' file system has no reflinks, and making one takes root and mkfs.btrfs")
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(200_000_000)
    subprocess.run([make, "-q", str(image)], check=True, capture_output=True)
    done = subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the tests' file system has no reflinks, and none can be mounted: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_real_reflink(copied, reflinking):
    shutil.copytree(copied, reflinking / "checkpoint")
    placed = place(reflinking / "checkpoint", reflinking)
    assert placed.how == "reflinked"
    with (reflinking / "checkpoint" / MODEL).open("r+b") as file:
        file.write(b"\0" * 1000)
    assert placed.index.path.read_bytes() == (copied / MODEL).read_bytes()


def test_a_copy_that_is_not_what_was_hashed(copied, tmp_path, monkeypatch):
    """Another checkpoint is copied over it with the old time, as cp -p and rsync do, before it is copied."""

    def late(*arguments, **options):
        before = (copied / MODEL).stat()
        with (copied / MODEL).open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\1")
        os.utime(copied / MODEL, ns=(before.st_atime_ns, before.st_mtime_ns))
        return place_weights(*arguments, **options)

    monkeypatch.setattr(exporter, "place_weights", late)
    monkeypatch.setattr(exporter, "hash_files", lambda files: {files[0]: sha256(files[0])})
    with pytest.raises(CheckpointError, match="changed while it was read"):
        export(copied, tmp_path / "bundle", ExportOptions(verify=False, model_only=True))


def test_a_link_that_is_made_to_the_checkpoint_meanwhile_is_no_change(copied, tmp_path, monkeypatch):
    """Such as that of an export with --link beside this one."""

    def late(*arguments, **options):
        os.link(copied / MODEL, tmp_path / "link")
        return place_weights(*arguments, **options)

    monkeypatch.setattr(exporter, "place_weights", late)
    export(copied, tmp_path / "bundle", ExportOptions(verify=False, model_only=True))


# ---------------------------------------------------------------------- --link


def test_a_linked_file_is_checked_at_every_open(linked, copied):
    """Silently as long as the system says that it is the same; hashed again after any difference, and said."""
    path = linked.path / WEIGHTS
    assert linked.linked and path.samefile(copied / MODEL)
    assert opened(linked.path) == []
    os.utime(path, ns=(1, 1))
    first, second = opened(linked.path)
    assert first == f"{path} is shared with its checkpoint and may have changed: hashing it"
    assert second.startswith(f"{path} is what was exported (hashed in ")
    assert opened(linked.path) == []  # noted


@pytest.mark.parametrize("preserve", [False, True])
def test_another_checkpoint_copied_over_it_is_refused(linked, copied, tmp_path, preserve):
    """`cp new.safetensors model.safetensors`, also with the old time, as cp -p and rsync set it."""
    before = (copied / MODEL).stat()
    with (copied / MODEL).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\1")
    if preserve:
        os.utime(copied / MODEL, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(
            BundleError, match=r"is shared with its checkpoint \(--link\) and has changed since the exp"
        ):
            opened(linked.path)
    with (copied / MODEL).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(BundleError, match=f"'{WEIGHTS}' has 1000 bytes, recorded"):
        opened(linked.path)


def test_a_checkpoint_that_was_replaced_by_a_rename_leaves_the_link(linked, copied):
    (copied / "new").write_bytes(b"another")
    (copied / "new").replace(copied / MODEL)
    assert len(opened(linked.path)) == 2 and opened(linked.path) == []
    Bundle.open(linked.path, verify=True)


@pytest.mark.parametrize("record", [None, "{", "[]", '{"size": 3}', '{"size": 1e999}'])
def test_without_a_note_the_hash_decides(linked, record):
    note = linked.path / "weights.link.json"
    note.unlink() if record is None else note.write_text(record)
    assert len(opened(linked.path)) == 2
    assert json.loads(note.read_text())["size"] == (linked.path / WEIGHTS).stat().st_size
    assert opened(linked.path) == []


def test_a_copy_of_a_linked_bundle_is_hashed_once(linked, tmp_path):
    copy = shutil.copytree(linked.path, tmp_path / "robot")
    assert len(opened(copy)) == 2 and opened(copy) == []


def test_a_note_that_cannot_be_written(linked, monkeypatch):
    def full(*_):
        raise BundleError("cannot write weights.link.json: Read-only file system")

    (linked.path / "weights.link.json").unlink()
    monkeypatch.setattr("ki_edge.bundle.linked.write_file", full)
    for _ in range(2):
        assert opened(linked.path)[
            -1
        ] == "it is hashed at every start: cannot write weights.link.json: Read-only file sys" + ("tem")


def test_large_files_say_how_long_it_takes(linked, monkeypatch):
    monkeypatch.setattr("ki_edge.bundle.linked.SAMPLE", 1000)
    monkeypatch.setattr(
        "ki_edge.bundle.linked.sha256", lambda path, progress: [progress(n) for n in (999, 1, 1000)] and ""
    )
    said = []
    (linked.path / "weights.link.json").unlink()
    with pytest.raises(BundleError, match="has changed since the export"):
        Bundle.open(linked.path, say=said.append)
    assert len(said) == 1 and said[0].endswith(" s") and "hashing 0.0 GB, about" in said[0]


def test_links_that_cannot_be(copied, tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match="and pack writes another: leave one out"):
        ExportOptions(link=True, pack=True)
    with pytest.raises(ArgumentError, match="and precision int8 writes another"):
        ExportOptions(link=True, precision="int8")
    monkeypatch.setattr(os, "link", lambda *_: fail(errno.EXDEV))
    with pytest.raises(ExportError, match="Invalid cross-device link; leave --link out, and the bundle gets a copy"):
        place(copied, tmp_path, link=True)
    state = {name: tensor.bfloat16() for name, tensor in load_file(copied / MODEL).items()}
    save_file(state, copied / MODEL)
    with pytest.raises(ExportError, match="--link needs one safetensors file with every weight in the type"):
        place(copied, tmp_path, link=True)


# ---------------------------------------------------------------------- values that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"stored": "stored"}, {"pack": True}, {"stored": "stored", "pack": True}])
def test_weights_that_are_not_finite_are_refused_by_name(copied, tmp_path, monkeypatch, value, dtype, options):
    monkeypatch.setattr(finite, "PIECE", 64)
    state = {name: tensor.to(dtype) for name, tensor in load_file(copied / MODEL).items()}
    state[KEY].view(-1)[-1] = value
    save_file(state, copied / MODEL)
    with pytest.raises(ExportError, match=f"'{KEY}' holds values that are not finite: the training diverged"):
        place(copied, tmp_path, **options)


@pytest.mark.parametrize("form", [StorageFormat("F16"), StorageFormat("BF16"), StorageFormat("F32", 2)])
def test_also_where_they_are_lowered_or_quantised(copied, tmp_path, form):
    state = load_file(copied / MODEL)
    state[KEY][0, 0] = float("nan")
    save_file(state, copied / MODEL)
    for options in ({"forms": {KEY: form}},):
        with pytest.raises(ExportError, match=f"'{KEY}' holds values that are not finite"):
            place(copied, tmp_path, **options)
    with pytest.raises(ExportError, match="holds values that are not finite"):
        export(copied, tmp_path / "bundle", ExportOptions(verify=False, model_only=True, precision="fp32"))
    assert not (tmp_path / "bundle").exists()


def test_large_values_are_finite(copied, tmp_path):
    """Their sum is not."""
    state = load_file(copied / MODEL)
    state[KEY].fill_(3e38)
    save_file(state, copied / MODEL)
    place(copied, tmp_path)
