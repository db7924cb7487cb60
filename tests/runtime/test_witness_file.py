"""witness.npz as a file from outside: what is written is read, and everything else is one BundleError."""

import io
import struct
import time
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from ki_edge.bundle.witness import ARRAYS, picture_type, read_witness
from ki_edge.errors import BundleError

from .conftest import CONFIG
from .witnesses import observations, packed, proven_bundle, witness_of


@pytest.fixture
def parts(make_bundle):
    """{array name: bytes in .npy form} of a good witness."""
    with zipfile.ZipFile(io.BytesIO(packed(witness_of(make_bundle("parts"))))) as archive:
        return {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}


@pytest.fixture
def read(make_bundle):
    """read(content) -> the witness of a bundle with this file."""
    names = iter(range(1000))
    return lambda content, **more: read_witness(proven_bundle(make_bundle, f"read{next(names)}", content, **more))


def npy(array):
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def zipped(parts, kind=zipfile.ZIP_DEFLATED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", kind) as archive:
        for name, content in parts.items():
            archive.writestr(f"{name}.npy", content)
    return out.getvalue()


def test_what_is_written_is_read(make_bundle, read):
    written = witness_of(make_bundle())
    found = read(packed(written))
    for name in ARRAYS:
        if hasattr(found, name):
            np.testing.assert_array_equal(getattr(found, name), getattr(written, name), err_msg=name)
    assert found.fast.forced == (3,) and found.fast.constrained is True and found.fast.max_tokens == 4
    np.testing.assert_array_equal(found.fast.ids, written.fast.ids)
    assert found.describe(1) == "1 camera, 9 tokens" and len(found) == 3
    assert packed(written) == packed(witness_of(make_bundle("again")))  # the same witness is the same bytes


def test_pictures_are_of_the_prefix_graph_s_type(make_bundle, read):
    graphs = dict(make_bundle().manifest.graphs)
    graphs["prefix"] = {**graphs["prefix"], "inputs": [{"name": "images", "dtype": "float32"}]}
    pictures = observations().images.astype(np.float32) / 127.5 - 1
    content = packed(replace(observations(), images=pictures))
    np.testing.assert_array_equal(read(content, graphs=graphs).images, pictures)
    with pytest.raises(BundleError, match=r"'images' is float32\[.*expected uint8"):
        read(content)
    graphs["prefix"]["inputs"][0]["dtype"] = "object"
    with pytest.raises(BundleError, match="pictures are 'object'"):
        picture_type(make_bundle("objects", graphs=graphs).manifest)


def test_every_truncation_is_refused(make_bundle, read):
    content = packed(witness_of(make_bundle()))
    for length in [0, 1, 21, 22, 30, *range(40, len(content), len(content) // 12), len(content) - 1]:
        with pytest.raises(BundleError, match=r"witness\.npz"):
            read(content[:length])


def test_flipped_bytes_are_refused_or_harmless(make_bundle, read):
    content, random = packed(witness_of(make_bundle())), np.random.default_rng(0)
    for place in random.integers(0, len(content), 60):
        broken = bytearray(content)
        broken[place] ^= 1 << random.integers(8)
        try:
            read(bytes(broken))
        except BundleError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "array", "text"),
    [
        ("actions", np.full((3, 5, 6), np.nan, np.float32), "'actions' holds NaN"),
        ("noise", np.full((3, 5, 6), np.inf, np.float32), "'noise' holds NaN or infinity"),
        ("max_abs", np.full(3, np.inf), "'max_abs' holds NaN or infinity"),
        ("max_abs", np.full(3, -1.0), "negative bars"),
        ("actions", np.zeros((3, 5, 7), np.float32), "'actions' is float32"),
        ("actions", np.zeros((3, 5, 6)), "'actions' is float64"),
        ("actions", np.asfortranarray(np.ones((3, 5, 6), np.float32)), "'actions' is float32"),
        ("noise", np.zeros((2, 5, 6), np.float32), "'noise' is float32"),
        ("images", np.zeros((3, 2, 8, 8, 3), np.uint8), "'images' .* more than it can have|'images' is uint8"),
        ("images", np.zeros((3, 17, 4, 4, 3), np.uint8), "'images' is uint8|'camera_mask' is bool"),
        ("prompt_tokens", np.full((3, 12), CONFIG.vocab_size, np.int32), "outside of the model's vocabulary"),
        ("prompt_tokens", np.full((3, 12), -1, np.int32), "outside of the model's vocabulary"),
        ("prompt_mask", np.zeros((3, 12), np.bool_), "empty or has a gap"),
        ("fast_ids", np.full(4, 1 << 40), "outside of the model's vocabulary"),
        ("fast_row", np.array(3), "'fast_row' is 3, expected 0 to 2"),
        ("num_steps", np.array(10**9), "'num_steps' is 1000000000"),
        ("fast_max_tokens", np.array(10**9), "'fast_max_tokens' is"),
        ("format", np.array(2), "format 2, this version reads 1: upgrade"),
        ("state", np.zeros((3, 6), np.float32), "'state' belongs to a π0"),
        ("secret", np.zeros(3), "its arrays are"),
    ],
)
def test_values_that_no_export_writes(parts, read, name, array, text):
    with pytest.raises(BundleError, match=text) as caught:
        read(zipped({**parts, name: npy(array)}))
    assert "witness.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_no_observations_at_all(parts, read):
    empty = {}
    for name, content in parts.items():
        array = np.load(io.BytesIO(content))
        empty[name] = npy(array[:0] if ARRAYS[name][1][:1] == ("n",) else array)
    with pytest.raises(BundleError, match="no observations"):
        read(zipped(empty))


def test_a_missing_array(parts, read):
    del parts["actions"]
    with pytest.raises(BundleError, match="its arrays are"):
        read(zipped(parts))


def test_pickled_objects_are_never_loaded(parts, read):
    out = io.BytesIO()
    np.lib.format.write_array(out, np.array([print], object))
    with pytest.raises(BundleError, match=r"'actions' is object\[1\]"):
        read(zipped({**parts, "actions": out.getvalue()}))


def test_a_bomb_is_not_unpacked(parts, read):
    header = npy(np.zeros((3, 5, 6), np.float32))[:128]
    others = {name: content for name, content in parts.items() if name != "actions"}
    start = time.monotonic()
    with pytest.raises(BundleError, match="more than it can have"):
        read(zipped({**parts, "actions": header + bytes(100_000_000)}))  # 97 kB in the file
    bomb = bytearray(zipped({"actions": header + bytes(30_000_000), **others}))
    at = bomb.index(b"PK\1\2")
    bomb[at + 24 : at + 28] = struct.pack("<I", 500)  # it says that it is small
    with pytest.raises(BundleError, match=r"witness\.npz"):
        read(bytes(bomb))
    assert time.monotonic() - start < 60


def test_a_directory_of_a_million_files_is_not_read(read):
    content = zipped({})
    entry = zipped({"a": b""})
    entry = entry[entry.index(b"PK\1\2") : entry.index(b"PK\5\6")]
    end = bytearray(content[-22:])
    end[8:12] = struct.pack("<HH", 0xFFFF, 0xFFFF)
    end[12:16] = struct.pack("<I", len(entry) * 300)
    with pytest.raises(BundleError, match="files, more than a witness has"):
        read(entry * 300 + bytes(end))


def test_a_file_longer_than_any_witness(read):
    with pytest.raises(BundleError, match="has more than"):
        read(bytes(3_000_000))


def test_encrypted_and_strange_packing(parts, read):
    content = bytearray(zipped(parts))
    at = content.index(b"PK\1\2")
    content[at + 8] |= 1
    with pytest.raises(BundleError, match="encrypted or packed in an unknown way"):
        read(bytes(content))
    with pytest.raises(BundleError, match="encrypted or packed in an unknown way"):
        read(zipped(parts, zipfile.ZIP_BZIP2))
    assert len(read(zipped(parts, zipfile.ZIP_STORED))) == 3


def test_every_read_is_of_its_own_geometry(parts, read):
    """A π0's witness needs the state, whose width is the action's."""
    with pytest.raises(BundleError, match="'state' belongs to a π0"):
        read(zipped(parts), model={**CONFIG.to_dict(), "variant": "pi0"})
    with_state = {**parts, "state": npy(np.zeros((3, 6), np.float32))}
    assert read(zipped(with_state), model={**CONFIG.to_dict(), "variant": "pi0"}).state.shape == (3, 6)
