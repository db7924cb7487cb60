"""Files and JSON from outside: whatever they hold, a value or one error that names the file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ki_edge.errors import BundleError
from ki_edge.files.reading import MAX_DEPTH, parse_json, read_file, read_json, read_object

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    # no NUL, no half characters
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abü€", max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES, st.booleans())
def test_whatever_json_writes_is_read(value: object, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode(), "x", BundleError) == value


@given(st.binary(max_size=60))
def test_any_bytes_give_a_value_or_one_error(content: bytes) -> None:
    try:
        parse_json(content, "the file", BundleError)
    except BundleError as error:
        assert str(error).startswith("the file is not valid JSON: ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), f"nested more than {MAX_DEPTH} deep"),
        (b'{"a": 9' + b"9" * 5000 + b"}", "more than 64 bits"),
        (b"[9223372036854775808]", "more than 64 bits"),
        (b"[Infinity]", "Infinity is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"[NaN]", "NaN is not a JSON number"),
        (b"[1e999]", "1e999 is too large"),
        (b'["\\ud800"]', "not UTF-8"),
        (b'["\xff"]', "not UTF-8"),
        (b'["a\\u0000b"]', "NUL"),
        (b'{"a": 1, "a": 2}', "'a' comes twice"),
        (b"", "Expecting value"),
    ],
)
def test_what_json_does_not_mean_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(BundleError, match=r"^here is not valid JSON") as refused:
        parse_json(content, "here", BundleError)
    assert said in str(refused.value)
    assert len(str(refused.value)) < 200


def test_a_pair_of_surrogates_is_one_character() -> None:
    assert parse_json(b'["\\ud83e\\udd16"]', "x", BundleError) == ["\N{ROBOT FACE}"]


def test_only_regular_files_of_bounded_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # reading it would wait forever
    (tmp_path / "long").write_bytes(b"1" * 11)
    cases = {tmp_path / "fifo": "not a regular", Path("/dev/zero"): "not a regular", tmp_path: "not a regular"}
    cases |= {
        tmp_path / "long": "more than 10",
        tmp_path / "none": "No such file",
        tmp_path / "a\0b": "cannot be a file name",
    }
    for path, said in cases.items():
        with pytest.raises(BundleError, match=said):
            read_file(path, 10, BundleError)


def test_an_object_is_asked_for_and_a_list_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1]", encoding="utf-8")
    assert read_json(tmp_path / "x.json", BundleError) == [1]
    with pytest.raises(BundleError, match=r"x\.json: expected a JSON object, found a list"):
        read_object(tmp_path / "x.json", BundleError)


def test_reading_imports_nothing_heavy() -> None:
    code = "import sys, ki_edge.files.reading; print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
