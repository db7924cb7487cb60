"""Prompts over a real SentencePiece model."""

import numpy as np
import pytest
import sentencepiece

from ki_edge.errors import ArgumentError, ContractError, ObservationError, PromptError
from ki_edge.policy.prompt import PromptTokenizer, digitize_state, pad

STATE = np.array([-2.0, -1.0, 0.0, 0.999, np.nan])
BINS = "-1 0 128 255 255"


@pytest.fixture(scope="module")
def real(tokenizer_model):
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)


def test_digitize_golden(data):
    golden = np.load(data / "transforms" / "vectors.npz")
    np.testing.assert_array_equal(digitize_state(golden["digitize/x"]), golden["digitize/bins"])


@pytest.mark.parametrize("group", ["droid", "droid_pos", "libero", "aloha", "libero_zscore"])
def test_digitize_golden_states(data, group):
    golden = np.load(data / "transforms" / "vectors.npz")
    bins = digitize_state(golden[f"{group}/before_pad/state"])
    np.testing.assert_array_equal(bins, golden[f"{group}/state_bins"])


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("pi0", "Pick up the\tRED cube now\n"),
        ("lerobot_pi0", "  Pick_up the\tRED cube\nnow \n"),
        ("pi05", f"Task: Pick up the\tRED cube now, State: {BINS};\nAction: "),
        ("ki", f"Task: pick up the\tred cube\nnow, State: {BINS};\n"),
    ],
)
def test_formats(tokenizer_model, real, format, text):
    tokenizer = PromptTokenizer(tokenizer_model, format, 200)
    ids = tokenizer.encode("  Pick_up the\tRED cube\nnow \n", STATE)
    assert ids.dtype == np.int32
    expected = [2, *real.encode(text)] if format != "pi0" else [2, *real.encode(text[:-1]), *real.encode("\n")]
    assert ids.tolist() == expected
    assert tokenizer.text("  Pick_up the\tRED cube\nnow \n", STATE) == text
    assert tokenizer.decode(ids) == text
    assert tokenizer.uses_state == (format not in ("pi0", "lerobot_pi0"))


def test_model_from_file_and_special_ids(tokenizer_model, real, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    tokenizer = PromptTokenizer(tmp_path / "tokenizer.model", "ki", 200)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    assert list(tokenizer.action_ids) == real.encode("Action: ")
    assert list(tokenizer.end_ids) == real.encode("|")
    assert tokenizer.vocab_size == real.vocab_size()


def test_length_limit_is_exact(tokenizer_model):
    count = PromptTokenizer(tokenizer_model, "pi05", 200).encode("open the drawer", STATE).size
    assert PromptTokenizer(tokenizer_model, "pi05", count).encode("open the drawer", STATE).size == count
    with pytest.raises(PromptError, match=f"has {count} tokens, the contract allows {count - 1}: shorten"):
        PromptTokenizer(tokenizer_model, "pi05", count - 1).encode("open the drawer", STATE)


@pytest.mark.parametrize("prompt", ["", " \n\t", "_", "_ _"])
@pytest.mark.parametrize("format", ["pi0", "pi05", "ki"])
def test_empty_prompt(tokenizer_model, format, prompt):
    with pytest.raises(PromptError, match="empty"):
        PromptTokenizer(tokenizer_model, format, 200).encode(prompt, STATE)


def test_prompt_must_be_text(tokenizer_model):
    with pytest.raises(PromptError, match="must be a str, got bytes"):
        PromptTokenizer(tokenizer_model, "pi05", 200).encode(b"open", STATE)


@pytest.mark.parametrize(
    ("state", "message"), [(None, "contains the state"), (np.zeros((1, 3)), r"\(1, 3\)"), (np.zeros(0), r"\(0,\)")]
)
def test_bad_state(tokenizer_model, state, message):
    with pytest.raises(ObservationError, match=message):
        PromptTokenizer(tokenizer_model, "ki", 200).encode("open", state)


def test_pad():
    tokens, mask = pad([2, 5, 7], 5)
    assert (tokens.dtype, mask.dtype) == (np.int32, np.bool_)
    assert tokens.tolist() == [2, 5, 7, 0, 0]
    assert mask.tolist() == [True, True, True, False, False]
    assert pad([2, 5], 3, pad_id=9)[0].tolist() == [2, 5, 9]
    with pytest.raises(PromptError, match="3 tokens do not fit into 2"):
        pad([2, 5, 7], 2)
    with pytest.raises(ArgumentError, match="one-dimensional"):
        pad([[2]], 2)


def test_bad_construction(tokenizer_model, tmp_path):
    with pytest.raises(ContractError, match="unknown prompt format 'pi1'"):
        PromptTokenizer(tokenizer_model, "pi1", 200)
    with pytest.raises(ContractError, match="expected an integer from 1"):
        PromptTokenizer(tokenizer_model, "pi05", 0)
    with pytest.raises(ContractError, match="the given bytes"):
        PromptTokenizer(b"nonsense", "pi05", 200)
    with pytest.raises(ContractError, match=r"none\.model"):
        PromptTokenizer(tmp_path / "none.model", "pi05", 200)
