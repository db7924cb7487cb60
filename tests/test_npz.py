"""Archives of arrays: bombs, lies about sizes and pickles are refused before they are unpacked."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ki_edge.errors import DatasetError
from ki_edge.files.npz import read_headers, read_npz


def header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    out = io.BytesIO()
    content = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, content)  # type: ignore[no-untyped-call]
    return out.getvalue()


def archive(path: Path, *entries: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def test_what_numpy_writes_is_read(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3), "text": np.array("π"), "f": np.asfortranarray(np.ones((2, 3)))}
    np.savez_compressed(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    found = read_npz(tmp_path / "x.npz", 1000, DatasetError)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_bomb_is_refused_unopened(tmp_path: Path) -> None:
    zeros = header((1 << 26,)) + bytes(1 << 26)  # 65 kB in the file
    path = archive(tmp_path / "x.npz", ("a.npy", zeros))
    with pytest.raises(DatasetError, match="67108864 bytes of arrays, at most 1000 are read"):
        read_npz(path, 1000, DatasetError)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([("a.npy", header((1 << 40,)))], "does not fit its"),
        ([("a.npy", header((2**62, 2**62)))], "does not fit its"),
        ([("a.npy", header((1,) * 30) + b"0")], "has the shape"),
        ([("a.npy", header((1,), "|O") + b"0" * 8)], "holds Python objects"),
        ([("a.npy", b"no array")], "no .npz file of arrays that can be read"),
        ([("a\x1b[2J.npy", header((1,)) + b"0")], "the name"),
        ([("a", header((1,)) + b"0"), ("a.npy", header((1,)) + b"0")], "a name comes twice"),
    ],
)
def test_lies(tmp_path: Path, entries: list[tuple[str, bytes]], said: str) -> None:
    path = archive(tmp_path / "x.npz", *entries)
    with pytest.raises(DatasetError, match=said) as refused:
        read_npz(path, 1 << 20, DatasetError)
    assert str(refused.value).isprintable()


def test_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.npz")
    for path in (tmp_path / "fifo.npz", Path("/dev/zero"), tmp_path):
        with pytest.raises(DatasetError, match="not a regular file"):
            read_npz(path, 1000, DatasetError)
    with pytest.raises(DatasetError, match="no such file"):
        read_npz(tmp_path / "none.npz", 1000, DatasetError)


def test_what_the_caller_does_not_want_is_not_unpacked(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    with pytest.raises(DatasetError, match="a is float64"):
        read_npz(tmp_path / "x.npz", 1000, DatasetError, lambda headers: f"a is {headers['a'][1]}")


def test_what_is_not_chosen_may_be_anything(tmp_path: Path) -> None:
    """Headers of all are told, data and promises of those that are read are looked at."""
    np.savez(tmp_path / "x.npz", a=np.arange(3), big=np.zeros(9999), objects=np.array([{}], dtype=object))
    headers = read_headers(tmp_path / "x.npz", DatasetError)
    assert headers["big"] == ((9999,), np.dtype("float64")) and headers["objects"][1].hasobject
    found = read_npz(tmp_path / "x.npz", 24, DatasetError, choose=lambda headers: [n for n in headers if n == "a"])
    assert found.keys() == {"a"} and found["a"].tolist() == [0, 1, 2]
    with pytest.raises(DatasetError, match="Python objects"):
        read_npz(tmp_path / "x.npz", 1 << 20, DatasetError)


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_every_error_ends_with_the_cure(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, a=np.zeros(3))
    if content is not None:
        path.write_bytes(content)
    for read in (
        lambda: read_npz(path, 3, DatasetError, cure="; record it again"),
        lambda: read_headers(tmp_path / "none.npz", DatasetError, "; record it again"),
    ):
        with pytest.raises(DatasetError, match=r"npz: .*; record it again$"):
            read()
