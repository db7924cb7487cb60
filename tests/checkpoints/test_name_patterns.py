"""Patterns of module names against Python's own `re`, and those that `re` would never finish."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_edge.checkpoints.peft.name_patterns import MAX_STATES, NamePattern, PatternError

NAMES = [
    "paligemma.model.language_model.layers.0.self_attn.q_proj",
    "paligemma.model.language_model.layers.12.mlp.down_proj",
    "gemma_expert.model.layers.1.self_attn.o_proj",
    "q_proj", "layers.0", "a", "", ".", "a.", "..a", "x1.y-2", "aab", "abab.ab",
]  # fmt: skip
PATTERNS = [
    "q_proj", ".*q_proj", r".*\.layers\.(0|1)\..*", r"layers\.\d+\.self_attn\.(q|o)_proj", "(q|k|v|o)_proj",
    r"^paligemma\..*", r"model\.layers\.[0-9]{1,2}\.mlp\.\w+", "[^.]+", "a?b*", "(?:ab)+", "(ab){2}", "", "a|",
    "x1.y-2",
    r"[\w.-]*", "a{2,}b", "(a*)*b", ".", r"\.", "$", "^$", "^a$", "a$b", "(^a|b)", "[a-c]+", "[]a]", "[a-]", r".*?\d",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_agrees_with_re(pattern: str) -> None:
    ours = NamePattern(pattern)
    for name in NAMES:
        assert ours.ends(name) == bool(re.match(rf"(.*\.)?({pattern})$", name)), name


PIECES = st.recursive(
    st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\d", "1"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,1}", "*?"])).map(lambda two: f"({two[0]}){two[1]}"),
    ),
    max_leaves=5,
)


@settings(deadline=None)
@given(PIECES, st.text("ab.1", max_size=6))
def test_agrees_with_re_whatever_they_are(pattern: str, name: str) -> None:
    assert NamePattern(pattern).ends(name) == bool(re.match(rf"(.*\.)?({pattern})$", name))


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*", "(a|aa)+", ".*" * 200, "((a*)*)*", "(a?){30}a{30}"])
def test_patterns_that_re_never_finishes(pattern: str) -> None:
    """Bounded by structure: at most states times characters, which this would exceed a billion times over."""
    ours = NamePattern(pattern)
    assert ours.states <= MAX_STATES
    assert ours.ends("a" * 100 + "!") is (pattern == ".*" * 200)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "without its"), ("a)", "unmatched"), ("[a", "without its"), ("*a", "nothing to repeat"),
        ("[b-a]", "not a range"),
        ("a**", "repetition of a repetition"), ("a{", "braces"), ("a{2,1}", "more than"), ("a{1000}", "braces"),
        ("a{101}", "more than 100"), ("((a{100}){100}){100}", "larger than 2000 states"),
        ("x" * 1001, "longer than 1000"),
        ("(" * 50 + ")" * 50, "more than 40 parentheses"), ("(?=a)", "is not understood"),
        (r"(a)\1", "not understood"),
        ("(?P<x>a)", "is not understood"), (r"\b", "not understood"), ("\\", "not understood"),
    ],
)  # fmt: skip
def test_what_is_refused(pattern: str, said: str) -> None:
    with pytest.raises(PatternError, match=said):
        NamePattern(pattern)


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_text_is_a_pattern_or_refused(pattern: str, name: str) -> None:
    try:
        NamePattern(pattern).ends(name)
    except PatternError:
        return
