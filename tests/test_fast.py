"""FAST against the golden codec, the real `tokenizers` library, and itself."""

import json

import numpy as np
import pytest
import scipy.fft
import tokenizers

from ki_edge.errors import ArgumentError, ContractError
from ki_edge.policy.fast import FastCodec, FastIds, dct_matrix
from ki_edge.policy.fast_fitting import fit_codec
from ki_edge.policy.prompt import PromptTokenizer

BEYOND = (2, 3)  # golden rows whose coefficients this codec cannot spell
IDS = FastIds(offset=5000, size=512)


@pytest.fixture(scope="module")
def codec(data):
    return FastCodec.load(data / "fast")


@pytest.fixture(scope="module")
def golden(data):
    arrays = np.load(data / "fast" / "vectors.npz")
    return {**arrays, **json.loads((data / "fast" / "vectors.json").read_text())}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_model):
    return PromptTokenizer(tokenizer_model, "ki", 200)


def test_golden_encode(codec, golden):
    for row, (actions, ids) in enumerate(zip(golden["actions"], golden["token_ids"], strict=True)):
        np.testing.assert_array_equal(codec.quantize(actions), golden["dct_quantized"][row])
        assert codec.encode(actions, lossy=row in BEYOND) == ids


@pytest.mark.parametrize("row", BEYOND)
def test_what_cannot_be_spelled_is_refused(codec, golden, row):
    with pytest.raises(ArgumentError, match=r"below the codec's min_token -45"):
        codec.encode(golden["actions"][row])


def test_coefficients_without_symbol_are_refused(codec, golden):
    actions = np.full((16, 8), 60.0)
    with pytest.raises(ArgumentError, match="alphabet cannot spell"):
        codec.encode(actions)
    with pytest.raises(ArgumentError, match="too large to spell"):
        codec.encode(actions * 100)


def test_golden_decode(codec, golden):
    for row, ids in enumerate(golden["token_ids"]):
        decoding = codec.decode(ids, 16, 8)
        if decoding.actions is None:  # the published codec gave zeros here, in silence
            assert row == 2
            assert decoding.problem == "125 coefficients, expected 128 (horizon 16 x 8)"
            assert not golden["decoded"][row].any()
        else:
            np.testing.assert_allclose(decoding.actions, golden["decoded"][row], rtol=0, atol=1e-9)


def test_golden_malformed(codec, golden):
    for ids, count in zip(golden["malformed"], golden["malformed_decoded_char_counts"], strict=True):
        decoding = codec.decode(ids, 16, 8)
        assert decoding.actions is None
        assert decoding.coefficients == count
        assert decoding.problem == f"{count} coefficients, expected 128 (horizon 16 x 8)"


def test_decode_problems(codec):
    assert codec.decode([3, 512], 16, 8).problem == "FAST id 512 is outside the codec's 0..511"
    assert codec.decode([-1], 16, 8).problem == "FAST id -1 is outside the codec's 0..511"
    with pytest.raises(ArgumentError, match="expected an integer from 1"):
        codec.decode([], 0, 8)


def test_agrees_with_the_real_library(codec, golden, data):
    real = tokenizers.Tokenizer.from_file(str(data / "fast" / "tokenizer.json"))
    for q, ids in zip(golden["dct_quantized"][4:], golden["token_ids"][4:], strict=True):
        text = "".join(chr(value + 45) for value in q.reshape(-1))
        assert real.encode(text).ids == ids
        assert real.decode(ids) == text


def test_half_a_character_is_a_problem():
    codec = fit_codec(np.random.default_rng(3).uniform(-40, 40, size=(5, 4, 2)), vocab_size=400)
    first_byte = codec.tokenizer.encode(chr(0x80)).ids[:1]
    assert codec.decode(first_byte, 1, 1).problem == "the ids spell broken UTF-8 at coefficient 0"


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((0, 3)), np.full((4, 2), np.nan)])
def test_encode_refuses(codec, bad):
    with pytest.raises(ArgumentError):
        codec.encode(bad)


@pytest.mark.parametrize("size", [1, 2, 16, 50])
def test_dct(size):
    matrix = dct_matrix(size)
    np.testing.assert_allclose(matrix, scipy.fft.dct(np.eye(size), axis=0, norm="ortho"), atol=1e-14)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(size), atol=1e-12)


def test_fit_save_load(tmp_path, data):
    chunks = np.cumsum(np.random.default_rng(0).normal(size=(60, 10, 4)) * 0.15, axis=1).clip(-1, 1)
    codec = fit_codec(chunks, scale=10, vocab_size=300)
    codec.save(tmp_path)
    again = FastCodec.load(tmp_path)
    assert again.vocab_size == codec.vocab_size <= 300
    for chunk in chunks:
        ids = codec.encode(chunk)
        assert again.encode(chunk) == ids
        decoding = again.decode(ids, 10, 4)
        assert decoding.problem is None
        assert np.abs(dct_matrix(10) @ (decoding.actions - chunk)).max() <= 0.5 / 10 + 1e-9
    assert len(codec.encode(chunks[0])) < 40  # it compresses
    names = ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    for name in names:
        ours, published = (json.loads((folder / name).read_text()) for folder in (tmp_path, data / "fast"))
        assert ours.keys() == published.keys()


def test_fit_is_repeatable_and_its_margin_widens_the_range():
    chunks = np.random.default_rng(2).uniform(-1, 1, size=(20, 8, 2))
    first, second = (fit_codec(chunks, vocab_size=400) for _ in range(2))
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    lowest = chunks.min() * np.ones((8, 2)) * 1.5
    with pytest.raises(ArgumentError, match="min_token"):
        first.encode(lowest)
    wide = fit_codec(chunks, vocab_size=400, margin=40)
    assert wide.min_token == first.min_token - 40
    assert wide.decode(wide.encode(lowest), 8, 2).problem is None


def test_fit_refuses():
    with pytest.raises(ArgumentError, match="vocab_size 10 is below"):
        fit_codec(np.random.default_rng(0).uniform(-1, 1, size=(5, 8, 2)), vocab_size=10)
    with pytest.raises(ArgumentError, match="finite chunks"):
        fit_codec(np.zeros((4, 2)))
    with pytest.raises(ArgumentError, match="span too much"):
        fit_codec(np.linspace(-1e4, 1e4, 24).reshape(1, 12, 2))


def test_load_refuses(tmp_path, codec):
    with pytest.raises(ContractError, match=r"processor_config\.json"):
        FastCodec.load(tmp_path)
    codec.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ContractError, match=r"tokenizer\.json"):
        FastCodec.load(tmp_path)
    codec.save(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"scale": 0, "min_token": -4}')
    with pytest.raises(ContractError, match="'scale' is 0, expected a number above 0"):
        FastCodec.load(tmp_path)


def test_id_mapping():
    paligemma = FastIds()
    assert paligemma.to_model([0, 1, 1024, 2047]).tolist() == [257023, 257022, 255999, 254976]
    assert paligemma.contains(257023)
    assert not paligemma.contains(257024)
    assert not paligemma.contains(254975)
    for bad in ([-1], [2048]):
        with pytest.raises(ArgumentError, match=r"0\.\.2047"):
            paligemma.to_model(bad)
    with pytest.raises(ContractError, match="below 0"):
        FastIds(offset=100, size=102)
    assert FastIds(offset=100, size=101).contains(0)


def test_postfix_and_parse(tokenizer):
    postfix = IDS.postfix([3, 0, 511], tokenizer)
    opening, end = list(tokenizer.action_ids), list(tokenizer.end_ids)
    assert postfix.dtype == np.int32
    assert postfix.tolist() == [*opening, 4997, 5000, 4489, *end, 1]
    for ids in (postfix, postfix[len(opening) :], [*postfix, 7, 7], [4997, 5000, 4489, 1, *end]):
        parse = IDS.parse(ids, tokenizer)
        assert parse.fast_ids == (3, 0, 511)
        assert parse.terminated
        assert parse.problem is None


def test_parse_problems(tokenizer):
    parse = IDS.parse([*tokenizer.action_ids, 4997, 5001, 1], tokenizer)
    assert parse.fast_ids == (3,)
    assert not parse.terminated
    assert parse.problem == f"id 5001 at place {len(tokenizer.action_ids) + 1} is not a FAST id (they are 4489..5000)"
    cut = IDS.parse([4997, 4996], tokenizer)
    assert (cut.fast_ids, cut.terminated, cut.problem) == ((3, 4), False, None)
    assert IDS.parse([], tokenizer).fast_ids == ()
