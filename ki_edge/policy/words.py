"""Text to ids and back over the two files in which a tokenizer comes: SentencePiece's model and tokenizer.json.

Both give the same ids for the same tokenizer. The names of special tokens, such as "<bos>", are text like any other: a
prompt cannot put one in.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ki_edge.errors import ContractError
from ki_edge.files.reading import read_file

MAX_TOKENIZER = 64_000_000  # bytes; PaliGemma's tokenizer.json has 17 MB
BOS, EOS, PAD = ("<bos>", "<s>"), ("<eos>", "</s>"), ("<pad>",)  # names of the special tokens, PaliGemma's first


@dataclass(frozen=True, eq=False)
class Words:
    """One tokenizer: `encode` gives the ids of a text alone, without bos and eos, `decode` the text of ids.

    `vocab_size` bounds the ids that text can give. One without a pad token pads with 0: the mask hides it. `pieces`:
    the name of every id that is a piece of text, <loc0000> and the like among them; control tokens are not.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    bos_id: int
    eos_id: int
    pad_id: int
    vocab_size: int
    pieces: Callable[[], dict[int, str]]


def open_words(model: str | Path | bytes) -> Words:
    """The tokenizer of a file or of a file's bytes. ContractError if they are neither of the two kinds."""
    if not isinstance(model, bytes | str | Path):
        raise ContractError(f"a tokenizer is a path or bytes, got {type(model).__name__}")
    content, where = model, "the given bytes"
    if not isinstance(content, bytes):
        if os.path.isdir(content):  # noqa: PTH112  False also for what cannot be a path
            raise ContractError(f"{content} is a folder: give its tokenizer.model or tokenizer.json")
        content, where = read_file(Path(content), MAX_TOKENIZER, ContractError), str(content)
    return _open_json(content, where) if is_json(content) else _open_pieces(content, where)


def is_json(content: bytes) -> bool:
    """Whether a tokenizer's bytes are those of a tokenizer.json."""
    return content[:64].removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def parse_tokenizer(content: bytes, where: str) -> Any:
    """A `tokenizers.Tokenizer`. ContractError names `where`."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(content.decode("utf-8-sig"))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises bare Exception, and a panic, which is none, on some files
        raise ContractError(f"{where} is not a tokenizer.json: {str(error) or type(error).__name__:.200}") from None


def _open_pieces(content: bytes, where: str) -> Words:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(content)
    except RuntimeError:
        raise ContractError(
            f"{where} is not a tokenizer: expected a SentencePiece model (tokenizer.model) or a tokenizer.json, found "
            f"{len(content)} bytes that are neither"
        ) from None
    special = {"bos": model.bos_id(), "eos": model.eos_id()}
    missing = [name for name, value in special.items() if value < 0]
    if missing:
        raise ContractError(
            f"{where}: the SentencePiece model has no {' and no '.join(missing)} token: PaliGemma's tokenizer.model is "
            "expected"
        )
    ids = special["bos"], special["eos"], max(model.pad_id(), 0), model.vocab_size()

    def pieces() -> dict[int, str]:
        absent = (model.is_control, model.is_unknown, model.is_unused)
        spelled = (i for i in range(model.vocab_size()) if not any(is_(i) for is_ in absent))
        return {i: model.id_to_piece(i) for i in spelled}

    return Words(model.encode, model.decode, *ids, pieces)


def _open_json(content: bytes, where: str) -> Words:
    model = parse_tokenizer(content, where)
    # What a file may have kept of its last use: no prompt is cut or padded here.
    model.no_padding()
    model.no_truncation()
    model.encode_special_tokens = True
    ids = [next((i for name in names if (i := model.token_to_id(name)) is not None), None) for names in (BOS, EOS, PAD)]
    bos, eos, pad = ids
    if bos is None or eos is None:
        raise ContractError(
            f"{where}: no token {' or '.join(BOS if bos is None else EOS)}: PaliGemma's tokenizer.json is expected"
        )
    special = {i for i, token in model.get_added_tokens_decoder().items() if token.special}
    spelled = [i for i in model.get_vocab(with_added_tokens=True).values() if i not in special]
    return Words(
        lambda text: list(model.encode(text, add_special_tokens=False).ids),
        lambda found: str(model.decode(found, skip_special_tokens=True)),
        *(bos, eos, pad or 0, max([*spelled, bos, eos]) + 1),
        lambda: {i: str(model.id_to_token(i)) for i in model.get_vocab(with_added_tokens=True).values()},
    )
