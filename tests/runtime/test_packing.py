"""openpi's frames: what is packed comes back, and no frame from outside does more than be refused."""

import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from ki_edge.errors import ArgumentError, BackendError
from ki_runtime.remote.measuring import check_size
from ki_runtime.remote.packing import pack, unpack

from .policy_server import arrays, plain

KINDS = [np.bool_, np.uint8, np.int64, np.float16, np.float32, np.float64, np.dtype("<U3"), np.dtype(">f4")]
ARRAYS = st.sampled_from(KINDS).flatmap(
    lambda kind: arrays_of.arrays(kind, arrays_of.array_shapes(min_dims=0, min_side=0, max_side=4))
)
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(), st.text(max_size=9), ARRAYS
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=9), inner, max_size=4)),
    max_leaves=12,
)


@given(value=VALUES)
@settings(max_examples=300, deadline=None)
def test_what_is_packed_comes_back(value):
    np.testing.assert_equal(unpack(pack(value), "server"), value)
    assert pack(value) == msgpack.packb(value, default=plain)  # the form as another hand wrote it


def test_arrays_keep_type_shape_and_order_and_are_read_only():
    given_ = np.arange(24, dtype=">i2").reshape(2, 3, 4).transpose(2, 0, 1)
    found = unpack(pack({"a": given_, "b": np.float32(1.5)}), "server")
    assert found["a"].dtype == given_.dtype and not found["a"].flags.writeable
    np.testing.assert_array_equal(found["a"], given_)
    assert found["b"] == np.float32(1.5) and found["b"].dtype == np.float32
    assert unpack(msgpack.packb({"a": given_.astype("<f4")}, default=plain), "server")["a"].shape == (4, 2, 3)
    assert msgpack.unpackb(pack({"a": given_}), object_hook=arrays)["a"].tolist() == given_.tolist()


@pytest.mark.parametrize("value", [np.array([{}]), np.zeros(2, [("a", "f4")]), np.complex64(1), {1, 2}, object()])
def test_what_has_no_place_in_a_frame(value):
    with pytest.raises(ArgumentError):
        pack({"a": value})


def entry(**changes):
    """An array's map, with one thing wrong."""
    fields = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2]}
    return msgpack.packb({**fields, **{name.encode(): value for name, value in changes.items()}})


@pytest.mark.parametrize(
    "frame",
    [
        entry(dtype="|O"),
        entry(dtype="O"),
        entry(dtype="<c8"),
        entry(dtype="V8"),
        entry(dtype="(2,)<f4"),
        entry(dtype="i4,i4"),
        entry(dtype="nonsense"),
        entry(dtype="i4," * 9 + "i4"),
        entry(dtype="<U" + "9" * 12),
        msgpack.packb({b"__npgeneric__": True, b"data": 1.5, b"dtype": "f4,f4"}),
        entry(dtype=b"<f4"),
        entry(dtype=["<f4"]),
        entry(shape=[3]),
        entry(shape=[-2]),
        entry(shape=[1 << 62, 4]),
        entry(shape=[2.0]),
        entry(shape=2),
        entry(shape=[True, 2]),
        entry(shape=[1] * 40 + [2]),
        entry(data="text of len"),
        entry(data=None),
        msgpack.packb({b"__ndarray__": True}),
        msgpack.packb({b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}),
        msgpack.packb({b"__npgeneric__": True, b"data": 1 << 40, b"dtype": "<i2"}),
        msgpack.packb(msgpack.ExtType(5, b"abc")),
        msgpack.packb(msgpack.Timestamp(1, 2)),
        msgpack.packb({1: 2}),
        msgpack.packb("a") + b"\0",
        b"\x91" * 100_000,  # nested
        b"\xdd\xff\xff\xff\xff",  # a list of four billion
        b"\xc6\xff\xff\xff\xff",  # bytes, four billion
        b"\xa3a",
        b"",
    ],
)
def test_malformed_frames_are_refused_in_one_line(frame):
    with pytest.raises(BackendError, match=r"^server sent a frame that is not of openpi's form") as error:
        unpack(frame, "server")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("mark", [b"__ndarray__", b"__npgeneric__"])
def test_numpy_reads_no_long_name_of_a_type(monkeypatch, mark):
    """It takes seconds for one of a MiB, in which a server would move no frame."""
    long = "i4," * 300_000 + "i4"
    frame = msgpack.packb({mark: True, b"data": b"", b"dtype": long, b"shape": [0]})
    asked = []
    with monkeypatch.context() as patched, pytest.raises(BackendError, match="expected numbers or text"):
        patched.setattr(np, "dtype", lambda name: asked.append(name))
        unpack(frame, "server")
    assert not asked


def test_a_frame_that_is_too_large_is_not_read():
    with pytest.raises(BackendError, match="sent a frame of 11 bytes, at most 10 are read"):
        unpack(b"x" * 11, "server", most=10)


def inside(value, times):
    """A value in so many lists."""
    for _ in range(times):
        value = [value]
    return value


BOMBS = {
    "a text of no length, a billion times": entry(dtype="|S0", shape=[1_000_000_000], data=b""),
    "as many of the other kind": entry(dtype="<U0", shape=[1 << 30, 1 << 3], data=b""),
    "bytes of a billion zeros": msgpack.packb({b"__npgeneric__": True, b"data": 1_000_000_000, b"dtype": "|S1"}),
    "an array as a number": msgpack.packb({b"__npgeneric__": True, b"data": [0.0] * 9, b"dtype": "<f4"}),
    "a million small values": msgpack.packb([[0] * 1000] * 1000),
    "as many empty maps": msgpack.packb([[{}] * 1000] * 1000),
    "as many keys": msgpack.packb({str(key): None for key in range(20_000)}),
    "17 lists in each other": msgpack.packb(inside(1, 17)),
    "a text of two million": msgpack.packb("x" * (2 << 20)),
}


@pytest.mark.parametrize("frame", BOMBS.values(), ids=BOMBS)
def test_small_frames_that_would_be_large_are_refused_before_anything_is_made(frame):
    tracemalloc.start()
    try:
        with pytest.raises(BackendError, match="not of openpi's form"):
            unpack(frame, "server")
        assert tracemalloc.get_traced_memory()[1] < len(frame) + (1 << 20)
    finally:
        tracemalloc.stop()


def test_what_is_just_within_the_bounds_is_taken():
    assert unpack(msgpack.packb(inside(1, 16)), "server") == inside(1, 16)
    many = [[0] * 1000] * 32
    assert unpack(msgpack.packb(many), "server") == many
    assert unpack(entry(dtype="|S0", shape=[3], data=b""), "server").shape == (3,)


@given(frame=st.one_of(st.binary(max_size=60), VALUES.map(pack)), cut=st.integers(0, 60))
@settings(max_examples=500, deadline=None)
def test_a_frame_is_measured_as_msgpack_reads_it(frame, cut):
    """Where one comes to its end, the other does too."""

    def extension(code, content):
        raise ValueError("of no other program")

    for one in (frame, frame[:cut]):
        try:
            msgpack.unpackb(one, strict_map_key=False, raw=True, ext_hook=extension)
            whole = True
        except TypeError:  # a map as the key of a map: its length was read nevertheless
            continue
        except Exception:
            whole = False
        try:
            check_size(one)
            measured = True
        except ValueError:
            measured = False
        assert measured == whole


@given(frame=st.binary(max_size=60), at=st.integers(0, 200), byte=st.integers(0, 255))
@settings(max_examples=500, deadline=None)
def test_no_frame_does_more_than_be_refused(frame, at, byte):
    whole = bytearray(pack({"actions": np.ones((2, 2), np.float32), "state": np.float32(1), "more": ["a", 1]}))
    whole[at % len(whole)] = byte
    for one in (frame, bytes(whole)):
        try:
            unpack(one, "server")
        except BackendError:
            continue
