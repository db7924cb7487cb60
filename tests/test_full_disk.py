"""A disk that is full names the file that could not be written, and no half of a file is left."""

import json
import os
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ki_edge.bundle import Manifest, write_bundle
from ki_edge.bundle.linked import record_link
from ki_edge.errors import BackendError, BundleError, CheckpointError, ContractError, ExportError, KiEdgeError
from ki_edge.files.writing import write_file, writing
from ki_edge.model.checkpoint import write_tensors as write_trained
from ki_edge.policy.contract import PolicyContract, generic
from ki_edge.policy.fast_fitting import fit_codec
from ki_edge.policy.normalize import NormStats, write_norm_stats
from ki_export.weights.safetensors_writer import Part, copy_file, write_tensors
from ki_export.weights.shared_file import own_file
from ki_runtime.trt.compiling import _Notes
from ki_runtime.trt.engines import Engines

LIMIT = 64  # bytes
BIG = np.zeros(100_000, np.float32)


def contract(folder):
    generic(["left"], state_dim=2, action_dim=2, action_horizon=5).save(folder / "file")


def statistics(folder):
    write_norm_stats(folder / "file", {"state": NormStats(q01=[0.0] * 20, q99=[1.0] * 20)})


def codec(folder):
    fit_codec(np.random.default_rng(0).uniform(-1, 1, (20, 5, 2)), vocab_size=60, margin=2).save(folder)


def link(folder):
    record_link(folder / "weights.safetensors")


def training(folder):
    write_trained(folder / "file", {"a": (100_000,)}, [("a", torch.zeros(100_000))], {"format": "pt"})


def weights(folder):
    write_tensors(folder / "file", [Part("x", "F32", (100_000,), lambda: iter([BIG]))], {})


def copied(folder):
    copy_file(folder / "big", folder / "file")


def owned(folder):
    own_file(folder / "big", folder / "file")


def engines(folder):
    identity = SimpleNamespace(key="0" * 16, to_json=lambda: {"long": "x" * 100})
    Engines(folder, identity, {}).write()  # type: ignore[arg-type]


def anything(folder):
    write_file(folder / "file", "x" * 1000, ExportError)


WRITERS = [
    (contract, ContractError, "file"),
    (statistics, ContractError, "file"),
    (codec, ContractError, "processor_config.json"),
    (link, BundleError, "weights.link.json"),
    (training, CheckpointError, "file"),
    (weights, ExportError, "file"),
    (copied, ExportError, "file"),
    (owned, ExportError, "file"),
    (engines, BackendError, "engine.json"),
    (anything, ExportError, "file"),
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "weights.safetensors").write_bytes(b"x")
    (tmp_path / "work" / "big").write_bytes(BIG.tobytes())
    return tmp_path / "work"


@pytest.mark.parametrize(("write", "kind", "name"), WRITERS)
def test_every_writer_names_its_file(folder, largest_file, write, kind, name):
    with largest_file(LIMIT), pytest.raises(kind) as caught:
        write(folder)
    assert f"cannot write {folder / name}: " in str(caught.value) and "File too large" in str(caught.value)
    left = (
        {path.name: path.stat().st_size for path in folder.iterdir()} if write not in (weights, copied, owned) else {}
    )
    assert not {key for key in left if "partial" in key or key.startswith(".")}
    assert name not in left  # what is written into a staging folder goes with it


@pytest.mark.parametrize(("write", "kind", "name"), WRITERS[:5])
def test_the_old_file_stays(folder, largest_file, write, kind, name):
    (folder / name).write_bytes(b"old")
    with largest_file(LIMIT), pytest.raises(kind):
        write(folder)
    assert (folder / name).read_bytes() == b"old"


def test_a_bundle(tmp_path, largest_file):
    fields = {name: {} for name in ("model", "graphs", "decode_vocabulary", "tools", "provenance", "parity")}
    manifest = Manifest(**fields, contract=None, sampling={}, precision="float32", weights={"file": "w"})
    with (
        largest_file(300),
        pytest.raises(BundleError, match=r"cannot write \S+/manifest\.json: File too large"),
        write_bundle(tmp_path / "bundle") as writer,
    ):
        (writer.folder / "w").write_bytes(b"x")
        writer.seal(manifest)
    assert list(tmp_path.iterdir()) == []
    with largest_file(10), pytest.raises(BundleError, match="bundle could not be written: File too large"):  # noqa: SIM117
        with write_bundle(tmp_path / "bundle"):  # not even its lock file
            pass


def test_a_builders_log():
    """The builder must not see exceptions, so the first one is kept."""

    def full(_):
        raise OSError(28, "No space left on device")

    notes = _Notes(SimpleNamespace(write=full, closed=False))  # type: ignore[arg-type]
    notes.add("info", "x")
    assert notes.failure is not None and notes.failure.errno == 28


@pytest.mark.parametrize("number", [28, 122, 27, 30, 13])  # no space, quota, too large, read only, no permission
def test_every_reason_in_the_systems_words(number):
    with (
        pytest.raises(KiEdgeError, match=f"cannot write some/file: {os.strerror(number)}"),
        writing("some/file", ExportError),
    ):
        raise OSError(number, os.strerror(number))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    mount = tmp_path / "mount"
    mount.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64k", "none", str(mount)]
    done = (
        subprocess.run(["mount", *options], check=False, capture_output=True, text=True) if os.geteuid() == 0 else None
    )
    if done is None or done.returncode:
        pytest.skip("a small file system takes root and mount")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_is_full(small_disk):
    path = small_disk / "contract.json"
    made = generic(["left"], state_dim=2, action_dim=2, action_horizon=5)
    made.save(path)
    before = json.loads(path.read_text())
    try:
        (small_disk / "filler").write_bytes(b"x" * 100_000)
    except OSError as error:
        assert error.errno == 28
    with pytest.raises(ContractError, match=f"cannot write {path}: No space left on device"):
        made.save(path)
    assert json.loads(path.read_text()) == before and PolicyContract.load(path) == made
    with pytest.raises(ExportError, match=r"GB are free|No space left"):
        write_tensors(small_disk / "weights", [Part("x", "F32", (100_000,), lambda: iter([BIG]))], {})
