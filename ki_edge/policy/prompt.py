"""From an instruction and a normalised state to the model's prompt tokens.

Formats, s = the state's bins joined by spaces, clean = strip, "_" and newline to space:

    pi0          [bos] enc(clean) + enc("\\n")                          no state
    lerobot_pi0  [bos] enc("{prompt}\\n")                               as given, one newline at the end; no state
    pi05         [bos] enc("Task: {clean}, State: {s};\\nAction: ")     case kept
    ki           [bos] enc("Task: {lower, strip, _ to space}, State: {s};\\n")
                                                     newlines kept; openpi's prefix of FAST tokens

The postfix of "ki", "Action: ...|<eos>", is built by `ki_edge.policy.fast.FastIds`.
"""

from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import array_of, count, numbers
from ki_edge.errors import ArgumentError, ContractError, ObservationError, PromptError

from .words import open_words

Int32 = npt.NDArray[np.int32]
PromptFormat = Literal["pi0", "pi05", "ki", "lerobot_pi0"]
STATE_FORMATS: tuple[PromptFormat, ...] = ("pi05", "ki")
MAX_LENGTH = 1 << 16  # tokens of a prompt
MAX_IDS = 1 << 20  # to decode
MAX_CHARACTERS = 100_000  # of a prompt
BIN_EDGES = np.linspace(-1.0, 1.0, 257)[:-1]


def digitize_state(state: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Bins of a normalised, unpadded state [s]: floor((x + 1) * 128) on [-1, 1), int64 [s].

    As the model was trained (openpi): x >= 127/128 and NaN give 255, x < -1 gives -1. Nothing is clamped to 0.
    """
    bins: npt.NDArray[np.int64] = np.digitize(numbers(state, "state", ObservationError), BIN_EDGES) - 1
    return bins


def pad(ids: npt.ArrayLike, length: int, pad_id: int = 0) -> tuple[Int32, npt.NDArray[np.bool_]]:
    """Left-align `ids` [T] in `length` places: (tokens i32 [length], mask bool [length], True where a token is).

    Raises PromptError if T > length: a cut prompt loses its end, which the model needs.
    """
    count(length, "length", MAX_LENGTH)
    count(pad_id, "pad_id", (1 << 31) - 1, least=0)
    array = array_of(ids, "ids")
    if array.ndim != 1:
        raise ArgumentError(f"ids to pad must be one-dimensional, got shape {array.shape}")
    if array.size > length:
        raise PromptError(f"{array.size} tokens do not fit into {length}: shorten the prompt or raise the length")
    if array.size and (array.dtype.kind not in "iu" or array.min() < -(1 << 31) or array.max() >= 1 << 31):
        raise ArgumentError(f"ids to pad: expected integers of 32 bits, got {array.dtype} {list(array.shape)}")
    tokens = np.full(length, pad_id, dtype=np.int32)
    tokens[: array.size] = array
    return tokens, np.arange(length) < array.size


class PromptTokenizer:
    """One prompt format over one tokenizer.

    `model` is the path of a `tokenizer.model` (SentencePiece) or `tokenizer.json` file, or its bytes; bos, eos and pad
    ids are the tokenizer's own (PaliGemma: 2, 1, 0). `max_token_len` is the longest prompt allowed, in tokens
    (pi0 48, pi05 200). Raises ContractError if the file cannot be read or has no bos or eos.
    """

    def __init__(self, model: str | Path | bytes, format: PromptFormat, max_token_len: int) -> None:
        if not isinstance(format, str) or format not in get_args(PromptFormat):
            raise ContractError(f"unknown prompt format {format!r:.60}, expected one of {get_args(PromptFormat)}")
        max_token_len = count(max_token_len, "max_token_len", MAX_LENGTH, ContractError)
        self.format: PromptFormat = format
        self.max_token_len = max_token_len
        self._words = open_words(model)
        self.bos_id, self.eos_id, self.pad_id = self._words.bos_id, self._words.eos_id, self._words.pad_id
        self.vocab_size: int = self._words.vocab_size

    @property
    def uses_state(self) -> bool:
        """Whether the prompt contains the state."""
        return self.format in STATE_FORMATS

    def text(self, prompt: str, state: npt.ArrayLike | None = None) -> str:
        """The text that `encode` turns into tokens ("pi0": its final newline, encoded apart, is included)."""
        _check_text(prompt)
        clean = prompt.strip().replace("_", " ")
        clean = clean.lower() if self.format == "ki" else clean.replace("\n", " ")
        if not clean.strip():
            raise PromptError(
                f"the prompt is empty (got {prompt!r:.80}): give the task in words, or set a default_prompt"
            )
        if self.format == "lerobot_pi0":
            return prompt.removesuffix("\n") + "\n"
        if self.format == "pi0":
            return clean + "\n"
        bins = " ".join(map(str, digitize_state(self._state(state))))
        ending = "Action: " if self.format == "pi05" else ""
        return f"Task: {clean}, State: {bins};\n{ending}"

    def encode(self, prompt: str, state: npt.ArrayLike | None = None) -> Int32:
        """Token ids i32 [T], bos first, not padded; 1 < T <= max_token_len.

        `state` float [s] is the normalised, unpadded state (π0's formats ignore it). Raises PromptError on an empty
        prompt or one that is too long (it is never cut), ObservationError if the state is missing or not
        one-dimensional.
        """
        text = self.text(prompt, state)
        if self.format == "pi0":
            ids = self.encode_alone(text[:-1]) + self.encode_alone("\n")
        else:
            ids = self.encode_alone(text)
        return self._opened(ids, prompt)

    def encode_question(self, question: str) -> Int32:
        """Token ids i32 [T] of a question that is answered in words, in PaliGemma's form: bos, the text, a newline.

        The text goes in as it is, without the state. Raises PromptError if it is empty or too long.
        """
        _check_text(question)
        if not question.strip():
            raise PromptError(f"the question is empty (got {question!r:.80}): say what the policy is to answer")
        return self._opened(self.encode_alone(question.removesuffix("\n") + "\n"), question)

    def _opened(self, ids: list[int], prompt: str) -> Int32:
        """The ids behind bos; PromptError if they are too many."""
        count = len(ids) + 1
        if count > self.max_token_len:
            raise PromptError(
                f"the prompt has {count} tokens, the contract allows {self.max_token_len}: "
                f"shorten the instruction ({len(prompt)} characters) or train with a larger max_token_len"
            )
        return np.array([self.bos_id, *ids], dtype=np.int32)

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of `ids`, for people to read; special tokens vanish."""
        array = array_of(ids, "ids")
        known = array.size <= MAX_IDS and array.dtype.kind in "iu"
        if array.size and not (known and 0 <= array.min() <= array.max() < self.vocab_size):
            size = f"{array.dtype} {list(array.shape)}"
            raise ArgumentError(f"ids to decode: expected up to {MAX_IDS} of 0..{self.vocab_size - 1}, got {size}")
        return self._words.decode([int(i) for i in array.reshape(-1)])

    def pieces(self) -> dict[int, str]:
        """The name of every id that is a piece of text; control tokens are not."""
        return self._words.pieces()

    @property
    def action_ids(self) -> tuple[int, ...]:
        """Ids of "Action: ", which opens the FAST postfix."""
        return tuple(self.encode_alone("Action: "))

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of "|", which closes the FAST tokens; `eos_id` follows."""
        return tuple(self.encode_alone("|"))

    def encode_alone(self, text: str) -> list[int]:
        """Ids of a text alone, without bos and eos, of any length."""
        return self._words.encode(text)

    def _state(self, state: npt.ArrayLike | None) -> npt.NDArray[np.float64]:
        if state is None:
            raise ObservationError(f'prompt format "{self.format}" contains the state, but no state was given')
        array = array_of(state, "state", ObservationError)
        if array.ndim != 1 or array.size == 0:
            raise ObservationError(f"the state in the prompt must be of shape [s], got {array.shape}")
        return numbers(array, "state", ObservationError)


def _check_text(prompt: str) -> None:
    """PromptError unless it is text of a bearable length."""
    if not isinstance(prompt, str):
        raise PromptError(f"the prompt must be a str, got {type(prompt).__name__}")
    if len(prompt) > MAX_CHARACTERS:
        raise PromptError(f"the prompt has {len(prompt)} characters, at most {MAX_CHARACTERS}: shorten it")
    if any("\ud800" <= char <= "\udfff" for char in prompt):
        raise PromptError(f"the prompt {prompt!r:.80} holds halves of characters, which are not text: send Unicode")
