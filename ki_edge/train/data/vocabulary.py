"""The vocabulary of a model that starts from nothing: state bins, words, `<loc>` tokens; and where FAST ids lie in one.

PaliGemma's tokenizer has 257,152 ids: text, `<loc0000>` to `<loc1023>` from 256000 on, 128 `<seg...>` at the end.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from ki_edge.errors import ArgumentError, DatasetError
from ki_edge.policy.fast import FastIds
from ki_edge.policy.prompt import PromptTokenizer

PALIGEMMA_IDS = 257_152  # rows of every released checkpoint's embedding
Placement = Literal["top", "openpi", "pi052"]
SKIPPED = {"openpi": 128, "pi052": 1152}  # ids at the vocabulary's end that FAST leaves free: <seg>; <seg> and <loc>
LOC_BINS, LOC_SIDE = 64, 1024  # PaliGemma has every place; every 16th serves small pictures
PIECES, MORE_PIECES = 800, 8000  # of a small vocabulary; at most, where there are many words
MAX_TEXTS = 20_000  # that a vocabulary is fitted on
COPIES = 20  # of each text: pairs are merged where they come often


def loc(index: int) -> str:
    """The small vocabulary's `index`-th place, as PaliGemma spells it."""
    return f"<loc{index * (LOC_SIDE // LOC_BINS):04d}>"


def fit_vocabulary(tasks: Sequence[str], texts: Iterable[str] = ()) -> bytes:
    """A small SentencePiece model with PaliGemma's special ids: a piece for each state bin and `<loc>`, and words.

    `tasks`: instructions; `texts`: questions and answers. The same texts give the same bytes.
    """
    import sentencepiece

    known = sorted({text for text in texts if text.strip()})
    known = known[:: -(-len(known) // MAX_TEXTS)] if known else []
    sentences = [f"Task: {task.lower()}, State: 0 1 2;" for task in dict.fromkeys(tasks)] + ["Action: "] * 3
    sentences += [f"Task: {task}, State: 0 1 2;" for task in dict.fromkeys(tasks) if task != task.lower()]
    words = {word for text in (*sentences, *known) for word in text.split()}
    symbols = ["\n", "|", *(f"▁{i}" for i in range(256)), "▁-1", *(loc(i) for i in range(LOC_BINS))]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((sentences + known) * COPIES),
        model_writer=out,
        model_type="bpe",
        vocab_size=min(MORE_PIECES, max(PIECES, len(symbols) + 8 * len(words))),
        hard_vocab_limit=False,
        max_sentence_length=1 << 16,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=symbols,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def place_fast(tokenizer: PromptTokenizer, size: int, placement: Placement) -> FastIds:
    """Where `size` FAST ids lie.

    "top": above all text, which makes the vocabulary larger; "openpi" and "pi052": over the rarest of its words, below
    the last 128 or 1,152 ids. ArgumentError where they would lie over what the model needs.
    """
    if placement not in get_args(Placement):
        raise ArgumentError(f"--fast-placement {placement!r:.40}: expected one of {', '.join(get_args(Placement))}")
    if placement == "top":
        return FastIds(whole(tokenizer.vocab_size + size) - 1, size)
    # a tokenizer.json may have ids above the text, such as <image>: FAST is counted from the end of the text
    offset = min(tokenizer.vocab_size, PALIGEMMA_IDS) - 1 - SKIPPED[placement]
    needed = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *tokenizer.action_ids, *tokenizer.end_ids}
    needed |= {id for digits in "0123456789" for id in tokenizer.encode_alone(f"State: {digits};\n")}
    if offset - size < max(needed):
        raise ArgumentError(
            f"--fast-placement {placement}: {size} FAST ids below the last {SKIPPED[placement]} of a vocabulary of "
            f"{tokenizer.vocab_size} would lie over words of the prompt: it is for PaliGemma's tokenizer"
        )
    return FastIds(offset, size)


def check_answers(ids: FastIds, tokenizer: PromptTokenizer, answers: Iterable[str]) -> None:
    """DatasetError for an answer with a token that is a FAST id too, as all `<loc>` tokens are in openpi's place."""
    for answer in answers:
        both = [token for token in tokenizer.encode_alone(answer) if ids.contains(token)]
        if both:
            name = tokenizer.pieces().get(both[0], "?")
            raise DatasetError(
                f"answer {answer!r:.60}: {name} is id {both[0]}, which is a FAST token too: give "
                "--fast-placement pi052, which leaves <loc> and <seg> free"
            )


def whole(count: int) -> int:
    """A vocabulary's rows: whole 64s, as matrix products like them."""
    return -(-count // 64) * 64
