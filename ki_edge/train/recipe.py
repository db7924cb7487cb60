"""From demonstrations to what the model trains on: contract, statistics, tokenizer, FAST codec, token arrays.

A model that starts from nothing also gets a small vocabulary of its own: state bins, words, `<loc>` tokens for pointing
and, above them, the FAST ids.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError, CheckpointError, DatasetError
from ki_edge.files.writing import write_file
from ki_edge.policy.contract import FastContract, PolicyContract, generic
from ki_edge.policy.fast import FastCodec, FastIds
from ki_edge.policy.normalize import NormStats, compute_stats, normalize, write_norm_stats
from ki_edge.policy.prompt import PromptTokenizer

from .demonstrations import Demonstrations

LOC_BINS = 64  # PaliGemma has 1024; every 16th serves small pictures
POINTING_PROMPT = "point to the target"
MAX_PROMPT, MAX_POSTFIX = 64, 64


@dataclass(frozen=True)
class Recipe:
    """All that accompanies the weights in a checkpoint folder."""

    config: Pi05Config
    contract: PolicyContract
    stats: dict[str, NormStats]
    tokenizer_model: bytes
    codec: FastCodec

    @classmethod
    def fit(
        cls, data: Demonstrations, config: Pi05Config, *, fast_vocabulary: int = 256, rtc_max_delay: int = 0
    ) -> Recipe:
        """Fit statistics, tokenizer and FAST codec to demonstrations; `config` gives widths and depths.

        `rtc_max_delay`: up to so many first actions of a chunk are given in training; 0: none. ArgumentError for one
        that leaves no action to learn.
        """
        size = config.vision.image_size
        if data.image_size != (size, size):
            raise DatasetError(f"{data.path}: pictures of {data.image_size}, the model takes {size} x {size}")
        horizon, action_dim = data.actions.shape[1:]
        if rtc_max_delay and rtc_max_delay >= horizon:
            raise ArgumentError(
                f"rtc_max_delay {rtc_max_delay}: the demonstrations' chunks have {horizon} actions, at least one of "
                "which must be left to learn"
            )
        stats = {"state": compute_stats(data.state), "actions": compute_stats(data.each_action)}
        chunks = normalize(data.actions, stats["actions"], "quantile")
        codec = FastCodec.fit(chunks, vocab_size=fast_vocabulary, margin=8)
        words = train_tokenizer([*data.meta["prompts"], POINTING_PROMPT])
        text_ids = PromptTokenizer(words, "ki", MAX_PROMPT).vocab_size
        vocabulary = -(-(text_ids + codec.vocab_size) // 64) * 64
        config = replace(config, vocab_size=vocabulary, action_horizon=horizon)
        contract = generic(
            data.meta["cameras"],
            state_dim=data.state.shape[1],
            action_dim=action_dim,
            action_horizon=horizon,
            model_action_dim=config.action_dim,
            image_size=(size, size),
            prompt_format="ki",
            max_token_len=MAX_PROMPT,
            default_prompt=data.meta["prompts"][0],
            control_hz=None if data.meta.get("control_hz") is None else float(data.meta["control_hz"]),
            action_names=tuple(data.meta["action_names"]),
            rtc_max_delay=rtc_max_delay or None,
            rtc_distribution="uniform" if rtc_max_delay else None,
            fast=FastContract(id_offset=vocabulary - 1, size=codec.vocab_size, max_tokens=MAX_POSTFIX),
        )
        return cls(config, contract, stats, words, codec)

    @property
    def tokenizer(self) -> PromptTokenizer:
        """The prompt tokenizer of the contract."""
        return PromptTokenizer(self.tokenizer_model, self.contract.prompt_format, self.contract.max_token_len)

    @property
    def fast_ids(self) -> FastIds:
        """The id mapping of the contract."""
        assert self.contract.fast is not None
        return FastIds(self.contract.fast.id_offset, self.contract.fast.size)

    def save_assets(self, folder: Path) -> None:
        """Write contract.json and assets/ into a checkpoint folder, each file whole.

        If the folder holds others, its weights are not of this run: they are removed first, so that there is never a
        checkpoint with the weights of one run and the statistics of another.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".assets-", dir=folder) as made:
            staging = Path(made)
            (staging / "assets").mkdir()
            write_file(staging / "assets" / "tokenizer.model", self.tokenizer_model, CheckpointError)
            write_norm_stats(staging / "assets" / "norm_stats.json", self.stats)
            self.codec.save(staging / "assets" / "fast")
            self.contract.save(staging / "contract.json")
            files = [path.relative_to(staging) for path in sorted(staging.rglob("*")) if path.is_file()]
            if any(not _same(staging / name, folder / name) for name in files):
                (folder / "model.safetensors").unlink(missing_ok=True)
            for name in files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                publish(staging / name, folder / name)


def publish(partial: Path, target: Path) -> None:
    """Let a finished file replace another at once, when it is on the disk: not even a power cut leaves half of it."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(target)


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


@dataclass(frozen=True)
class Tokens:
    """Token rows padded to one length: ids int64 [F,T] and validity bool [F,T]."""

    ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]

    @classmethod
    def pack(cls, rows: list[npt.NDArray[np.int32]], length: int | None = None) -> Tokens:
        """Left-align rows; `length` defaults to the longest."""
        counts = np.array([len(row) for row in rows])
        width = max(counts.max(), length or 0)
        mask = np.arange(width)[None] < counts[:, None]
        ids = np.zeros(mask.shape, np.int64)
        ids[mask] = np.concatenate(rows)
        return cls(ids, mask)


@dataclass(frozen=True)
class Examples:
    """Every frame of the demonstrations as the model trains on it. Rows of `point*` are for frames `pointable`."""

    images: npt.NDArray[np.uint8]
    actions: npt.NDArray[np.float32]  # [F,H,A], normalised, padded to the model's action dim
    prompt: Tokens
    postfix: Tokens  # "Action: " FAST ids "|" <eos>
    pointing_prompt: Tokens  # one row
    pointing: Tokens  # [F,...]: <loc y><loc x> of each camera, <eos>
    pointable: npt.NDArray[np.int64]  # indices of frames whose target is in every picture
    real: npt.NDArray[np.bool_] | None = None  # [F,H]: actions to learn from; None: all

    @classmethod
    def encode(cls, data: Demonstrations, recipe: Recipe) -> Examples:
        """Normalise and tokenise all frames once."""
        contract, tokenizer = recipe.contract, recipe.tokenizer
        epsilon, stats = contract.normalization_epsilon, recipe.stats
        state = normalize(data.state, stats["state"], contract.normalization_of("state"), epsilon)
        actions = normalize(data.actions, stats["actions"], contract.normalization_of("actions"), epsilon)
        prompts = [tokenizer.encode(data.meta["prompts"][i], row) for i, row in zip(data.prompt, state, strict=True)]
        fast = [recipe.fast_ids.postfix(recipe.codec.encode(chunk), tokenizer) for chunk in actions]
        padded = np.zeros((*actions.shape[:2], contract.model_action_dim), np.float32)
        padded[..., : contract.action_dim] = actions
        ask, answers, pointable = _pointing(data, recipe)
        return cls(data.images, padded, Tokens.pack(prompts), Tokens.pack(fast), ask, answers, pointable, data.real)


def _pointing(data: Demonstrations, recipe: Recipe) -> tuple[Tokens, Tokens, npt.NDArray[np.int64]]:
    """The co-training task of PaliGemma's kind: where is the target? Answer in <loc> tokens, y before x."""
    import sentencepiece

    words = sentencepiece.SentencePieceProcessor()
    words.LoadFromSerializedProto(recipe.tokenizer_model)
    ask = np.array([words.bos_id(), *words.encode(POINTING_PROMPT + "\n")], np.int32)
    if data.points is None:
        empty = Tokens(np.zeros((0, 1), np.int64), np.zeros((0, 1), np.bool_))
        return Tokens.pack([ask]), empty, np.zeros(0, np.int64)
    bins = np.clip(np.nan_to_num(data.points[..., ::-1]) * LOC_BINS, 0, LOC_BINS - 1).astype(np.int64)
    loc = np.array([words.piece_to_id(_loc(i)) for i in range(LOC_BINS)])
    answers = loc[bins].reshape(len(data), -1)
    ids = np.concatenate([answers, np.full((len(data), 1), words.eos_id())], axis=1)
    seen = (
        np.isfinite(data.points).all(axis=(1, 2))
        & (data.points >= 0).all(axis=(1, 2))
        & (data.points < 1).all(axis=(1, 2))
    )
    return Tokens.pack([ask]), Tokens(ids, np.ones_like(ids, np.bool_)), np.flatnonzero(seen)


def _loc(index: int) -> str:
    return f"<loc{index * (1024 // LOC_BINS):04d}>"


def train_tokenizer(prompts: list[str]) -> bytes:
    """A small SentencePiece model with PaliGemma's special ids: one piece for each state bin, word and <loc> token."""
    import sentencepiece

    sentences = [f"Task: {prompt}, State: 0 1 2;" for prompt in prompts] + ["Action: "] * 3
    symbols = ["\n", "|", *(f"▁{i}" for i in range(256)), "▁-1", *(_loc(i) for i in range(LOC_BINS))]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20),
        model_writer=out,
        model_type="bpe",
        vocab_size=800,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=symbols,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    return out.getvalue()
