"""FAST: a chunk of actions as a few tokens, compatible with a `physical-intelligence/fast` folder.

    actions [T, A] -> orthonormal DCT-II along time -> q = around(scale * C), half to even -> flattened, all dimensions
    of frequency 0 first -> a string of chr(q - min_token) -> byte-level BPE -> FAST ids k

`FastIds` places the ids in the language model's vocabulary, `postfix` and `parse` frame them as "Action: ...|<eos>".
Formulas: Pertsch et al. 2025 (arXiv 2501.09747) and the published codec's data.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import count, integers, numbers
from ki_edge.errors import ArgumentError, ContractError
from ki_edge.files.reading import read_file, read_object
from ki_edge.files.writing import write_file

from .prompt import Int32, PromptTokenizer
from .words import parse_tokenizer

Float64 = npt.NDArray[np.float64]
SURROGATES = 0xD800  # chr() from here on is no valid text
REPLACEMENT = "\ufffd"  # what the byte-level decoder gives for broken UTF-8
MAX_COEFFICIENT = SURROGATES  # of the DCT, quantised
MAX_SCALE = 1_000_000
MAX_CHUNK = 4096  # actions, or numbers of an action
MAX_IDS = 10_000_000
CONFIG_FILE, CODEC_FILE = "processor_config.json", "tokenizer.json"
MAX_CODEC = 64_000_000  # bytes of one of the codec's files


@dataclass(frozen=True, eq=False)
class FastDecoding:
    """Result of decoding: `actions` float64 [T, A], normalised; or None and `problem` says what is wrong with the ids.

    `coefficients` counts the DCT coefficients that the ids spell; right is T * A.
    """

    actions: Float64 | None
    coefficients: int
    problem: str | None = None


@dataclass(frozen=True, eq=False)
class FastCodec:
    """The codec of one folder. `scale`: quantisation steps a unit; `min_token`: the smallest coefficient it spells."""

    tokenizer: Any  # tokenizers.Tokenizer
    scale: float
    min_token: int

    @property
    def vocab_size(self) -> int:
        """Number of FAST ids: k is in [0, vocab_size)."""
        return int(self.tokenizer.get_vocab_size())

    def quantize(self, actions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Quantised DCT coefficients int64 [T, A] of normalised actions float [T, A]."""
        x = numbers(actions, "actions")
        if x.ndim != 2 or x.size == 0:
            raise ArgumentError(f"FAST encodes one chunk of shape [horizon, action_dim], got {x.shape}")
        if not np.isfinite(x).all():
            raise ArgumentError("FAST cannot encode NaN or infinite actions")
        if max(x.shape) > MAX_CHUNK:
            raise ArgumentError(f"FAST encodes chunks of up to {MAX_CHUNK} actions of as many numbers, got {x.shape}")
        return quantized(x, self.scale)

    def encode(self, actions: npt.ArrayLike, *, lossy: bool = False) -> list[int]:
        """FAST ids of normalised, unpadded actions float [T, A] (about [-1, 1]).

        Coefficients below `min_token`, or made of bytes that the vocabulary lacks, cannot be spelled: ArgumentError.
        `lossy` does what the published codec does without a word: the former become `min_token`, the latter vanish, so
        that the ids decode to another motion or to none. Use it to reproduce that codec, not to train.
        """
        if not isinstance(lossy, bool | np.bool_):
            raise ArgumentError(f"lossy {lossy!r:.60}: expected True or False")
        q = self.quantize(actions)
        lowest, highest = int(q.min()), int(q.max())
        if lowest < self.min_token and not lossy:
            raise ArgumentError(
                f"DCT coefficient {lowest} is below the codec's min_token {self.min_token} (largest action "
                f"{np.abs(np.asarray(actions)).max():.3g}): it was fitted on other data; check norm_stats or refit"
            )
        if highest - self.min_token >= SURROGATES:
            raise ArgumentError(f"a DCT coefficient of {highest} is too large to spell: are the actions normalised?")
        text = "".join(map(chr, np.maximum(q - self.min_token, 0).reshape(-1).tolist()))
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not lossy and self._text(ids) != text:
            raise ArgumentError(
                f"the codec's alphabet cannot spell these actions (DCT coefficients {lowest}..{highest}): "
                "it was fitted on data without them; check norm_stats or fit a codec"
            )
        return ids

    def decode(self, ids: Iterable[int], horizon: int, action_dim: int) -> FastDecoding:
        """Normalised actions [horizon, action_dim] of FAST ids; a malformed sequence gives a problem, never zeros.

        Each value is within about 0.5 / scale of what was encoded (the quantisation of the DCT).
        """
        horizon, action_dim = count(horizon, "horizon", MAX_CHUNK), count(action_dim, "action_dim", MAX_CHUNK)
        ids = integers(ids, "FAST ids", MAX_IDS)
        foreign = [k for k in ids if not 0 <= k < self.vocab_size]
        if foreign:
            return FastDecoding(None, 0, f"FAST id {foreign[0]} is outside the codec's 0..{self.vocab_size - 1}")
        text = self._text(ids)
        if REPLACEMENT in text:
            return FastDecoding(None, len(text), f"the ids spell broken UTF-8 at coefficient {text.index(REPLACEMENT)}")
        expected = horizon * action_dim
        if len(text) != expected:
            problem = f"{len(text)} coefficients, expected {expected} (horizon {horizon} x {action_dim})"
            return FastDecoding(None, len(text), problem)
        q = np.array([ord(char) for char in text], dtype=np.float64).reshape(horizon, action_dim) + self.min_token
        return FastDecoding(dct_matrix(horizon).T @ (q / self.scale), len(text))

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    @classmethod
    def load(cls, folder: str | Path) -> "FastCodec":
        """Read a codec folder: processor_config.json and tokenizer.json, the latter in bpe_tokenizer/ as transformers 5
        saves it. Raises ContractError naming the file.
        """
        folder = Path(folder)
        place = tokenizer_place(folder)
        settings = folder / CONFIG_FILE
        try:
            config = read_object(settings, ContractError)
            content = read_file(place, MAX_CODEC, ContractError)
        except ContractError as error:
            raise ContractError(f"no FAST codec in {folder}: {error}") from None
        scale, min_token = (config.get(name) for name in ("scale", "min_token"))
        if type(min_token) is not int or abs(min_token) > MAX_COEFFICIENT:
            raise ContractError(
                f"FAST codec: {settings}: 'min_token' is {min_token!r:.40}, expected an integer within "
                f"{MAX_COEFFICIENT} of 0"
            )
        if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale <= MAX_SCALE:
            raise ContractError(
                f"FAST codec: {settings}: 'scale' is {scale!r:.40}, expected a number above 0, up to {MAX_SCALE}"
            )
        tokenizer = parse_tokenizer(content, f"FAST codec: {place}")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return cls(tokenizer, float(scale), min_token)

    def save(self, folder: str | Path) -> None:
        """Write the folder in the published layout (processor_config.json, tokenizer.json and its two companions)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "action_dim": None,
            "auto_map": {"AutoProcessor": "processing_action_tokenizer.UniversalActionProcessor"},
            "min_token": self.min_token,
            "processor_class": "UniversalActionProcessor",
            "scale": int(self.scale) if float(self.scale).is_integer() else self.scale,
            "time_horizon": None,
            "vocab_size": self.vocab_size,
        }
        tokenizer = {
            "added_tokens_decoder": {},
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": {},
            "model_max_length": 10**30,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        contents: dict[str, dict[str, Any]] = {
            "processor_config": config,
            "tokenizer_config": tokenizer,
            "special_tokens_map": {},
        }
        for name, content in contents.items():
            write_file(folder / f"{name}.json", json.dumps(content, indent=2) + "\n", ContractError)
        write_file(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True), ContractError)


@dataclass(frozen=True)
class FastParse:
    """FAST ids of a generated postfix; `terminated`: "|" or eos was reached; `problem`: the id that does not belong."""

    fast_ids: tuple[int, ...]
    terminated: bool
    problem: str | None = None


@dataclass(frozen=True)
class FastIds:
    """Where FAST ids lie in the model's vocabulary: model id = offset - k, k in [0, size).

    pi0-FAST with PaliGemma's tokenizer: offset 257023 = 257152 - 1 - 128, size 2048.
    """

    offset: int = 257023
    size: int = 2048

    def __post_init__(self) -> None:
        count(self.size, "FAST ids: size", 1 << 31, ContractError)
        count(self.offset, "FAST ids: offset", (1 << 31) - 1, ContractError, least=0)
        if self.offset - self.size + 1 < 0:
            raise ContractError(f"FAST ids: offset {self.offset} and size {self.size} give ids below 0")

    def to_model(self, fast_ids: Iterable[int]) -> Int32:
        """Model ids i32 [F] of FAST ids; ArgumentError outside [0, size)."""
        ids = integers(fast_ids, "FAST ids", MAX_IDS)
        if ids and not 0 <= min(ids) <= max(ids) < self.size:
            raise ArgumentError(f"FAST ids must be in 0..{self.size - 1}, got {min(ids)!s:.30}..{max(ids)!s:.30}")
        return (self.offset - np.array(ids, np.int64)).astype(np.int32)

    def contains(self, model_id: int) -> bool:
        """Whether this id of the model's vocabulary is a FAST id."""
        return 0 <= self.offset - model_id < self.size

    def postfix(self, fast_ids: Iterable[int], tokenizer: PromptTokenizer) -> Int32:
        """ "Action: ", the FAST ids, "|", eos: model ids i32 [F], unpadded."""
        ids = (tokenizer.action_ids, self.to_model(fast_ids), tokenizer.end_ids, (tokenizer.eos_id,))
        return np.concatenate([np.asarray(part, dtype=np.int32) for part in ids])

    def parse(self, model_ids: Sequence[int] | npt.NDArray[np.integer[Any]], tokenizer: PromptTokenizer) -> FastParse:
        """FAST ids of generated model ids [F], with or without "Action: " in front, up to "|", eos or the end.

        Works on ids, never on text. At an id that is neither FAST nor an end it stops and names it as the problem.
        """
        ids = integers(model_ids, "model ids", MAX_IDS)
        opening, end = list(tokenizer.action_ids), list(tokenizer.end_ids)
        start = len(opening) if ids[: len(opening)] == opening else 0
        found: list[int] = []
        for at in range(start, len(ids)):
            if ids[at] == tokenizer.eos_id or ids[at : at + len(end)] == end:
                return FastParse(tuple(found), terminated=True)
            if not self.contains(ids[at]):
                own = f"they are {self.offset - self.size + 1}..{self.offset}"
                problem = f"id {ids[at]} at place {at} is not a FAST id ({own})"
                return FastParse(tuple(found), terminated=False, problem=problem)
            found.append(self.offset - ids[at])
        return FastParse(tuple(found), terminated=False)


def quantized(x: Float64, scale: float) -> npt.NDArray[np.int64]:
    """DCT coefficients int64 [..., T, A] in steps of 1 / scale; ArgumentError for some that no codec spells."""
    with np.errstate(over="ignore", invalid="ignore"):
        q = np.around(dct_matrix(x.shape[-2]) @ x * scale)
    if not np.abs(q).max() < 1 << 31:
        raise ArgumentError("a DCT coefficient is too large to spell: are the actions normalised?")
    return q.astype(np.int64)


def tokenizer_place(folder: Path) -> Path:
    """The tokenizer.json of a codec's folder: in it, or in bpe_tokenizer/ (transformers 5)."""
    nested = folder / "bpe_tokenizer" / CODEC_FILE
    return nested if nested.is_file() and not (folder / CODEC_FILE).is_file() else folder / CODEC_FILE


@lru_cache(maxsize=32)
def dct_matrix(size: int) -> Float64:
    """The orthonormal DCT-II as a float64 [size, size] matrix M, read-only: C = M @ x, x = M.T @ C."""
    k, n = np.arange(size)[:, None], np.arange(size)[None, :]
    matrix = math.sqrt(2.0 / size) * np.cos(np.pi * (n + 0.5) * k / size)
    matrix[0] = math.sqrt(1.0 / size)
    matrix.setflags(write=False)
    return matrix
