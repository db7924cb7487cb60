"""What may stand in an answer in words, and what its points mean."""

import numpy as np
import pytest

from ki_edge.errors import ArgumentError
from ki_edge.policy.answers import Answers
from ki_edge.policy.contract import FastContract, generic
from ki_edge.policy.prompt import PromptTokenizer

PIECES = {
    2: "<unused0>", 4: "▁lift", 5: "▁the", 6: "▁cup", 7: "\n", 8: "<mask>", 9: "<seg012>", 10: "<0x0A>", 11: "<b>",
    20: "<loc0000>", 21: "<loc0001>", 22: "<loc1023>", 30: "▁rare",
}  # fmt: skip


class Words:
    """A tokenizer of these pieces."""

    bos_id, eos_id, pad_id = 1, 3, 0

    def pieces(self):
        return PIECES

    def decode(self, ids):
        return "".join(PIECES[int(i)] for i in ids).replace("▁", " ")


def contract(**changes):
    return generic(["front"], state_dim=2, action_dim=2, action_horizon=2, **changes)


def test_text_alone_is_allowed():
    answers = Answers.of(contract(), Words())
    assert answers.text.tolist() == [4, 5, 6, 7, 10, 11, 30]
    assert answers.allowed(locs=False).tolist() == [3, 4, 5, 6, 7, 10, 11, 30]
    assert answers.allowed(locs=True).tolist() == [3, 4, 5, 6, 7, 10, 11, 20, 21, 22, 30]


def test_codes_of_actions_are_none_although_they_are_pieces():
    """As in π0-FAST, whose codes lie over the <loc> tokens and the rarest pieces below them."""
    answers = Answers.of(contract(fast=FastContract(id_offset=30, size=20)), Words())
    assert answers.text.tolist() == [4, 5, 6, 7, 10]
    assert answers.allowed(locs=True).tolist() == [3, 4, 5, 6, 7, 10, 20, 21, 22]  # asked for, they are places again


def test_points_are_pairs_y_before_x():
    pieces = {100 + i: f"<loc{i:04d}>" for i in range(1024)}
    words = Words()
    words.pieces = lambda: pieces
    answers = Answers.of(contract(), words)
    assert answers.points([100, 1123, 612, 356]).tolist() == [[1023.5 / 1024, 0.5 / 1024], [256.5 / 1024, 512.5 / 1024]]
    assert answers.points([100, 1123, 612]).shape == (1, 2)  # a half
    assert answers.points([]).shape == (0, 2)


def test_the_middle_of_coarser_places():
    pieces = {100 + i: f"<loc{16 * i:04d}>" for i in range(64)}
    words = Words()
    words.pieces = lambda: pieces
    assert Answers.of(contract(), words).points([100, 163]).tolist() == [[127 / 128, 1 / 128]]


def test_the_end_and_the_words():
    answers = Answers.of(contract(), Words())
    kept, finished = answers.ended([4, 5, 20, 6, 3, 3])
    assert (kept.tolist(), finished) == ([4, 5, 20, 6], True)
    assert answers.words(kept, Words()) == "lift the cup"
    assert answers.ended([4, 5])[1] is False


def test_a_policy_without_loc_cannot_point():
    words = Words()
    words.pieces = lambda: {4: "▁lift"}
    with pytest.raises(ArgumentError, match="has no <loc> tokens"):
        Answers.of(contract(), words).allowed(locs=True)


def test_both_files_of_a_tokenizer_allow_the_same(data):
    folder = data / "policies" / "tokenizer"
    one, other = (
        Answers.of(contract(), PromptTokenizer(folder / name, "pi05", 200))
        for name in ("tokenizer.model", "tokenizer.json")
    )
    assert one.text.tolist() == other.text.tolist()
    assert one.locs.tolist() == other.locs.tolist()
    assert len(one.text) > 100
    assert not np.isin([one.eos_id, 0, 1, 2, 3], one.text).any()
