"""Reading safetensors files: against the official library, and damaged files of every kind."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from ki_edge.errors import CheckpointError
from ki_edge.files.safetensors_index import MAX_HEADER, SafetensorsIndex

TENSORS = {
    "matrix": torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7,
    "half": torch.tensor([1.5, -65504.0, 6e-8], dtype=torch.float16),
    "brain": torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "odd": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
    "double": torch.tensor([[1e300]], dtype=torch.float64),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    "ints": torch.tensor([-1, 2], dtype=torch.int32),
}


@pytest.fixture
def file(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "file.safetensors", metadata={"made by": "the library"})
    return tmp_path / "file.safetensors"


@pytest.fixture
def write(tmp_path):
    """write(header, data=b"") -> path of a file with that header: a dict, or bytes."""

    def make(header, data=b""):
        blob = header if isinstance(header, bytes) else json.dumps(header).encode()
        (tmp_path / "made.safetensors").write_bytes(struct.pack("<Q", len(blob)) + blob + data)
        return tmp_path / "made.safetensors"

    return make


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refused(path, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsIndex(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_tensor_equals_the_librarys(file):
    index = SafetensorsIndex(str(file))
    assert set(index.entries) == set(TENSORS)
    assert index.metadata == {"made by": "the library"}
    for name, expected in TENSORS.items():
        array = index.array(name)
        assert array.shape == tuple(expected.shape) == index.entries[name].shape
        reference = expected.float() if expected.dtype == torch.bfloat16 else expected
        np.testing.assert_array_equal(array, reference.numpy())
        assert array.dtype == reference.numpy().dtype
    assert "matrix" in index
    assert "other" not in index


def test_bfloat16_widening_is_torchs(tmp_path):
    """Of all 65536 values, infinities and NaN included."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    safetensors.torch.save_file({"x": every}, tmp_path / "bf16.safetensors")
    ours = SafetensorsIndex(tmp_path / "bf16.safetensors").array("x")
    np.testing.assert_array_equal(ours, every.float().numpy())
    np.testing.assert_array_equal(ours.view(np.uint32) << 16, 0)


def test_arrays_are_views_and_cannot_be_written(file):
    index = SafetensorsIndex(file)
    for array in (index.raw("matrix"), index.raw("brain")):
        assert not array.flags.writeable
        assert np.shares_memory(array, index.raw("matrix").base)
    assert not index.array("bytes").flags.writeable


def test_offsets_count_from_the_start_of_the_file(file):
    content, index = file.read_bytes(), SafetensorsIndex(file)
    for name, found in index.entries.items():
        assert content[found.offset : found.offset + found.nbytes] == index.raw(name).tobytes()
    found = index.entries["matrix"]
    assert content[found.offset : found.offset + found.nbytes] == TENSORS["matrix"].numpy().tobytes()


def test_unaligned_tensors_are_read(write):
    data = b"\x07" + np.array([1.25, -3.0], "<f4").tobytes()
    path = write({"byte": entry("U8", (1,), (0, 1)), "floats": entry("F32", (2,), (1, 9))}, data)
    if SafetensorsIndex(path).entries["floats"].offset % 4 == 0:
        pytest.fail("this test means to read an unaligned tensor")
    np.testing.assert_array_equal(SafetensorsIndex(path).array("floats"), [1.25, -3.0])


def test_unknown_tensor(file):
    for read in (SafetensorsIndex(file).array, SafetensorsIndex(file).raw):
        with pytest.raises(CheckpointError, match=rf"no tensor 'other' among its {len(TENSORS)}"):
            read("other")


def test_a_file_without_tensors(write):
    index = SafetensorsIndex(write({}))
    assert (index.entries, index.metadata) == ({}, {})


def test_missing_file(tmp_path):
    refused(tmp_path / "none.safetensors", "no such file")
    refused(tmp_path, "no such file")


def test_every_truncation_is_refused(file):
    content = file.read_bytes()
    for length in range(0, len(content), 7):
        file.write_bytes(content[:length])
        refused(file, "is truncated|is not a safetensors file")


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER + 1, 1 << 63, (1 << 64) - 1])
def test_impossible_header_length(tmp_path, length):
    path = tmp_path / "file.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    refused(path, "is not a safetensors file: its first 8 bytes give no header length")


def test_header_longer_than_the_file(tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER) + b"{}")
    refused(path, f"is truncated: 10 bytes, but the header alone needs {8 + MAX_HEADER}")


@pytest.mark.parametrize("blob", [b"{,}", b"nu", b"\xff\xff", b"[" * 50_000, b'{"a":' * 50_000])
def test_header_that_is_no_json(write, blob):
    refused(write(blob), "its header is not valid JSON")


def test_header_that_is_no_object(write):
    refused(write(b"[1]"), "its header is not a JSON object")


@pytest.mark.parametrize("name", ["F8_E5M2", "F4", "C64"])
def test_a_type_that_is_not_supported_is_no_damage(write, name):
    refused(write({"x": entry(dtype=name)}, bytes(8)), f"'x' has the type {name}, which is not supported: save the")


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\nb", "a\x7f", "\u202ea", "x" * 1001])
def test_names_that_a_terminal_would_obey(write, name):
    refused(write({name: entry()}, bytes(8)), "cannot be the name of a tensor")


def test_shapes_that_take_forever_to_multiply(write):
    refused(write({"x": {**entry(), "shape": [2**62] * 100_000}}, bytes(8)), "tensor 'x' is malformed")


@pytest.mark.parametrize("metadata", [[], "text", 5])
def test_bad_metadata(write, metadata):
    if metadata:
        refused(write({"__metadata__": metadata}), "__metadata__ must be an object")
    else:
        assert SafetensorsIndex(write({"__metadata__": metadata})).metadata == {}


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        "F32",
        {},
        {"dtype": "F32", "shape": [1]},
        entry(dtype="f32 "),
        entry(dtype=None),
        entry(dtype=["F32"]),
        {**entry(), "shape": 1},
        {**entry(), "shape": "1"},
        {**entry(), "shape": None},
        entry(shape=(1.0,)),
        entry(shape=(True,)),
        entry(shape=(-1,)),
        entry(shape=("1",)),
        entry(offsets=(0,)),
        entry(offsets=(0, 2, 4)),
        entry(offsets=(-4, 0)),
        entry(offsets=(0.0, 4.0)),
        {**entry(), "data_offsets": None},
    ],
)
def test_malformed_entry(write, bad):
    refused(write({"good": entry(), "bad": bad}, bytes(8)), "the header entry of tensor 'bad' is malformed")


@pytest.mark.parametrize(
    "bad",
    [entry(offsets=(0, 3)), entry(offsets=(4, 0)), entry(shape=(1 << 40, 1 << 40)), entry("F64"), entry(shape=(2, 0))],
)
def test_shape_that_does_not_fit_its_bytes(write, bad):
    refused(write({"bad": bad}, bytes(64)), "tensor 'bad' .* does not fit its .* bytes")


def test_data_behind_the_end(write):
    refused(write({"far": entry(offsets=(4, 8))}, bytes(7)), "is truncated: tensor 'far' ends at byte")
    refused(write({"far": entry("U8", (1 << 62,), (0, 1 << 62))}), "is truncated: tensor 'far'")


@pytest.mark.parametrize("offsets", [(0, 8), (4, 12), (0, 4)])
def test_overlapping_tensors(write, offsets):
    size = (offsets[1] - offsets[0]) // 4
    header = {"first": entry(shape=(2,), offsets=(0, 8)), "second": entry(shape=(size,), offsets=offsets)}
    refused(write(header, bytes(16)), "overlap: the file is damaged")


def test_the_library_refuses_overlaps_too(write):
    path = write({"first": entry(shape=(2,), offsets=(0, 8)), "second": entry(shape=(2,), offsets=(4, 12))}, bytes(12))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.numpy.load_file(path)
