"""What datasets of a command line are called in folders and logs."""

import json
import unicodedata

import pytest

from ki_edge.errors import ArgumentError
from ki_edge.train.data.asked import named
from ki_edge.train.data.mapping import read_map
from ki_edge.train.data.names import is_plain


def names(*given):
    return [one.name for one in named([str(path) for path in given], lambda line: None)]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("pick up cubes", "pick-up-cubes"),
        ("Würfel_v2", "Würfel_v2"),
        (unicodedata.normalize("NFD", "Würfel"), "Würfel"),
        ("つかむ", "つかむ"),
        ("हिन्दी", "हिन्दी"),
        ("การหยิบ", "การหยิบ"),
        ("தமிழ்", "தமிழ்"),
        ("क्‍ष", "क्ष"),  # a joiner shows nothing of itself
        ("a/../b", "b"),
        ("собрать.кубики", "собрать"),  # as of any file, what is behind the last dot is no part of the name
        ("--hidden", "hidden"),
        ("!!!", "dataset"),
    ],
)
def test_the_name_is_the_folders(tmp_path, folder, name):
    assert names(tmp_path / folder) == [name] and is_plain(name)


def test_long_names_are_cut_between_letters(tmp_path):
    (name,) = names(tmp_path / ("掴" * 60))
    assert name == "掴" * 26 and is_plain(name)  # three bytes each


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "_a", "-a", "a\x00", "掴" * 100, "Wu\u0308rfel"])
def test_what_is_no_name(name):
    assert not is_plain(name)


def test_a_map_may_spell_a_name_otherwise(tmp_path):
    """Some file systems and editors take letters apart."""
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"datasets": {unicodedata.normalize("NFD", "Würfel"): {"state": ["s"]}}}))
    assert read_map(path, ["Würfel", "b"]) == {"Würfel": {"state": ["s"]}}


def test_a_name_that_is_taken_has_a_number(tmp_path):
    assert names(tmp_path / "a" / "ü", tmp_path / "b" / "ü", tmp_path / "ü-2") == ["ü", "ü-2", "ü-2-2"]


def test_weights(tmp_path):
    (tmp_path / "with:3").mkdir()
    one, other = named([f"{tmp_path}/with:3:.5", f"{tmp_path}/b:2"], lambda line: None)
    assert (one.path.name, one.weight, other.path.name, other.weight) == ("with:3", 0.5, "b", 2.0)
    for wrong, message in [(":0", "above 0"), (":x", "'x'"), (":-1", "'-1'")]:
        with pytest.raises(ArgumentError, match=message):
            named([f"{tmp_path}/b{wrong}"], lambda line: None)
    with pytest.raises(ArgumentError, match="give all of them a weight, or none"):
        named([f"{tmp_path}/a:1", f"{tmp_path}/b"], lambda line: None)
