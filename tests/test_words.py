"""One tokenizer in its two files, SentencePiece and tokenizer.json: the same ids for any text."""

import json
import random

import pytest

from ki_edge.errors import ContractError
from ki_edge.policy.fast import FastIds
from ki_edge.policy.prompt import PromptTokenizer
from ki_edge.policy.words import open_words

# words of many scripts, digits, spaces of Unicode, newlines, and text that looks like special tokens
TEXT = """pick up the red cube and place it öffne die Schublade ramasse наливай воду 机器人 把杯子放好 ロボット 컵을
अलमारी افتح الباب פתח ไทย 🤖 👩\u200d👩\u200d👧 e\u0301 ﬁ Ⅷ ½ 12345 -1 255 0.5 _ __ | ▁ ▁▁
<bos> <eos> <s> </s> <pad> <unk> <loc0001> <0x0A>"""
SPACES = ("\u00a0", "\u2003", "\u3000", "\u200b", "\t", "\n", "\r", "\x07", "\ufeff")
WORDS = (*TEXT.split(), *SPACES)
GAPS = (" ", "", "  ", "\n", "\n\n\n", "   ")


@pytest.fixture(scope="module")
def both(data):
    folder = data / "policies" / "tokenizer"
    return folder / "tokenizer.model", folder / "tokenizer.json"


def prompts(count):
    rng = random.Random(0)
    for at in range(count):
        text = "".join(rng.choice(WORDS) + rng.choice(GAPS) for _ in range(rng.randint(1, 12)))
        bins = " ".join(str(rng.randint(-1, 255)) for _ in range(8))
        yield f"Task: {text}, State: {bins};\nAction: " if at % 2 else text


def test_equal_ids(both):
    pieces, plain = map(open_words, both)
    special = ("bos_id", "eos_id", "pad_id", "vocab_size")
    assert [getattr(pieces, name) for name in special] == [getattr(plain, name) for name in special]
    for text in prompts(2000):
        ids = plain.encode(text)
        assert ids == pieces.encode(text), text
        assert plain.decode(ids) == pieces.decode(ids)


@pytest.mark.parametrize("format", ["pi0", "pi05", "ki", "lerobot_pi0"])
def test_equal_prompts(both, format):
    one, other = (PromptTokenizer(path, format, 400) for path in both)
    for prompt in ("Pick_up the\nCUBE", "  把杯子放好 <bos>  "):
        assert one.encode(prompt, [0.1, -2.0]).tolist() == other.encode(prompt, [0.1, -2.0]).tolist()
    assert (one.action_ids, one.end_ids) == (other.action_ids, other.end_ids)
    assert FastIds(500, 20).postfix([1, 2], one).tolist() == FastIds(500, 20).postfix([1, 2], other).tolist()


def test_what_a_file_kept_of_its_last_use_has_no_effect(both):
    """transformers writes the truncation and padding of the last call into tokenizer.json."""
    content = json.loads(both[1].read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    content["padding"] = {"strategy": {"Fixed": 200}, "direction": "Right", "pad_to_multiple_of": None, **pad}
    words = open_words(json.dumps(content).encode())
    assert words.encode("pick up the red cube") == open_words(both[0]).encode("pick up the red cube")


def test_a_special_token_beyond_the_vocabulary_is_no_id_of_text(both):
    """PaliGemma's tokenizer.json has <image>, one more than its embedding has rows."""
    content = json.loads(both[1].read_text(encoding="utf-8"))
    image = {"id": 572, "content": "<image>", "special": True}
    content["added_tokens"].append({**content["added_tokens"][0], **image})
    words = open_words(json.dumps(content).encode())
    assert words.vocab_size == 572 and max(words.encode("<image> cube")) < 572


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a tokenizer: expected a SentencePiece model"),
        (b"<!doctype html>", "is not a tokenizer: expected a SentencePiece model"),
        (b"version https://git-lfs", "found 23 bytes that are neither"),
        (b"{}", "not a tokenizer.json"),
        (b'{"model": 3}', "not a tokenizer.json"),
        (b'{"a": "\xff"}', "not a tokenizer.json"),
        (b'\xef\xbb\xbf {"model": {"type": "BPE", "vocab": {}, "merges": []}}', "no token <bos> or <s>"),
    ],
)
def test_what_is_no_tokenizer(content, message, tmp_path):
    (tmp_path / "words").write_bytes(content)
    for given, where in ((content, "the given bytes"), (tmp_path / "words", str(tmp_path))):
        with pytest.raises(ContractError, match=message) as caught:
            open_words(given)
        assert "\n" not in str(caught.value) and where in str(caught.value)
