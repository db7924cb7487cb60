"""The small vocabulary of a model that starts from nothing, and where FAST ids lie in one."""

from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece

from ki_edge.errors import ArgumentError, DatasetError
from ki_edge.policy.fast import FastIds
from ki_edge.policy.prompt import PromptTokenizer
from ki_edge.train.data.vocabulary import LOC_BINS, check_answers, fit_vocabulary, place_fast

TASKS = ("Reach the red target", "go home")
TEXTS = ("what is in the picture?\n", "a Red ball, 3 cm wide")
BINS = range(-1, 256)


@pytest.fixture(scope="module")
def content():
    return fit_vocabulary(TASKS, TEXTS)


@pytest.fixture(scope="module")
def words(content):
    """The fitted model in the library that defines the format."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(content)
    return processor


@pytest.fixture(scope="module")
def tokenizer(content):
    return PromptTokenizer(content, "ki", 200)


def test_every_state_bin_is_one_piece(words):
    before, after = words.encode("State:"), words.encode(";\n")
    for value in BINS:
        ids = words.encode(f"State: {value};\n")
        assert ids[: len(before)] == before
        assert ids[-len(after) :] == after
        assert words.id_to_piece(ids[len(before) : -len(after)]) == [f"▁{value}"]
    ids = words.encode("State: " + " ".join(map(str, BINS)))
    assert words.id_to_piece(ids[len(before) :]) == [f"▁{value}" for value in BINS]


def test_special_ids_are_paligemmas(words):
    assert (words.pad_id(), words.eos_id(), words.bos_id(), words.unk_id()) == (0, 1, 2, 3)
    for text in ("\n", "|"):
        assert words.id_to_piece(words.encode(text)) == [text]


def test_nothing_that_is_said_is_unknown(words):
    said = [f"Task: {task.lower()}, State: -1 0 255;\nAction: |" for task in TASKS]
    for text in (*said, *(f"Task: {task}, State: 7;\nAction: " for task in TASKS), *TEXTS):
        ids = words.encode(text)
        assert words.unk_id() not in ids
        assert words.decode(ids) == text


def test_loc_tokens_are_contiguous(words):
    """<loc0000>, <loc0016>, ... as PaliGemma spells them, one piece each."""
    ids = [words.piece_to_id(f"<loc{16 * i:04d}>") for i in range(LOC_BINS)]
    assert ids == list(range(ids[0], ids[0] + LOC_BINS))
    assert words.unk_id() not in ids
    assert words.encode("<loc0016><loc1008>") == [ids[1], ids[63]]


def test_two_fits_are_equal(content):
    assert fit_vocabulary(TASKS, reversed(TEXTS)) == content


def test_many_words_get_more_pieces():
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    many = [" ".join("".join(random.choice(letters, 6)) for _ in range(10)) for _ in range(200)]
    few, full = (PromptTokenizer(fit_vocabulary(TASKS, some), "ki", 200) for some in (TEXTS, many))
    assert 1000 < full.vocab_size <= 8000 and few.vocab_size < 900


def test_the_top_is_above_all_text(tokenizer):
    ids = place_fast(tokenizer, 100, "top")
    assert (ids.offset + 1) % 64 == 0 and ids.offset - ids.size + 1 >= tokenizer.vocab_size
    assert ids.offset - ids.size + 1 < tokenizer.vocab_size + 64


def like_paligemma():
    """A stand-in with PaliGemma's ids where they matter: its file may not be shipped."""
    pieces = {256_000 + i: f"<loc{i:04d}>" for i in range(1024)} | {257_024 + i: f"<seg{i:03d}>" for i in range(128)}
    named = {name: token for token, name in pieces.items()}
    known = {"\n": 108, "|": 235_371, "Action: ": 4022}

    def encode_alone(text):
        found = [token for name, token in named.items() if name in text]
        return found or [known.get(text, 235_276)]

    return SimpleNamespace(
        vocab_size=257_152, bos_id=2, eos_id=1, pad_id=0, action_ids=(4022, 235_292), end_ids=(235_371,),
        encode_alone=encode_alone, pieces=lambda: pieces,
    )  # fmt: skip


def test_in_paligemmas_vocabulary_the_ids_are_openpis_or_lerobots():
    """openpi: vocab_size - 1 - 128 - k, over the <loc> tokens; PI052 (LeRobot PR 4184): - 1152, below them."""
    tokenizer = like_paligemma()
    assert place_fast(tokenizer, 2048, "openpi") == FastIds(257_152 - 1 - 128, 2048) == FastIds()
    assert place_fast(tokenizer, 2048, "pi052") == FastIds(257_152 - 1 - 1152, 2048)
    tokenizer.vocab_size = 257_153  # with <image>
    assert place_fast(tokenizer, 2048, "openpi") == FastIds()
    loc, seg = range(256_000, 257_024), range(257_024, 257_152)
    openpi, pi052 = place_fast(tokenizer, 2048, "openpi"), place_fast(tokenizer, 2048, "pi052")
    assert all(openpi.contains(token) for token in loc) and not any(openpi.contains(token) for token in seg)
    assert not any(pi052.contains(token) for token in (*loc, *seg))


def test_answers_with_places_need_a_vocabulary_that_leaves_them_free():
    tokenizer = like_paligemma()
    openpi, pi052 = place_fast(tokenizer, 2048, "openpi"), place_fast(tokenizer, 2048, "pi052")
    with pytest.raises(DatasetError, match=r"<loc0007> is id 256007, which is a FAST token too: .*placement pi052"):
        check_answers(openpi, tokenizer, ["a ball", "<loc0007>"])
    check_answers(openpi, tokenizer, ["a ball", "<seg003>"])
    check_answers(pi052, tokenizer, ["a ball", "<loc0007><seg003>"])


@pytest.mark.parametrize("placement", ["openpi", "pi052"])
def test_a_small_vocabulary_has_no_such_place(tokenizer, placement):
    with pytest.raises(ArgumentError, match=f"--fast-placement {placement}: 100 FAST ids below the last"):
        place_fast(tokenizer, 100, placement)


def test_an_unknown_placement(tokenizer):
    with pytest.raises(ArgumentError, match="expected one of top, openpi, pi052"):
        place_fast(tokenizer, 100, "elsewhere")
