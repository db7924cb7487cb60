"""Decoding of FAST tokens and text over the K/V that the prefix graph left.

The first query is the last prompt token once more, at its own position and with its cached K/V masked out, followed by
the forced tokens; so the prefix graph needs no logits. Every later query is the token just chosen. The cache holds the
prefix and room for all new tokens, masked where nothing was written yet. New K/V are appended to it where they are, on
the device; only the logits come to the host. Caches and bindings are kept from one call to the next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import count, integers
from ki_edge.bundle import Bundle
from ki_edge.errors import ArgumentError, BackendError
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.prompt import PromptTokenizer
from ki_runtime.backends.session import Binding, Buffer, Session, Storage

from .embeddings import EmbeddingTable, token_input
from .prefix import Bool, Int32, Prefix, PrefixInputs
from .room import clean

Int64 = npt.NDArray[np.int64]
TOKENIZERS = ("assets/tokenizer.model", "assets/tokenizer.json")  # a bundle has one of them
EOS_ID = 1  # PaliGemma's, for a bundle without a tokenizer
MAX_CACHES = 8
MAX_TOKENS = 4096  # of one continuation


@dataclass(frozen=True, eq=False)
class Choices:
    """The tokens that may be sampled: `ids` i64 [n] of the vocabulary, and their columns i64 [n] in the logits."""

    ids: Int64
    columns: Int64
    eos_id: int

    @classmethod
    def of(cls, column_ids: Sequence[int], eos_id: int, allowed: Sequence[int] | None = None) -> Choices:
        """All columns of the decode vocabulary, or only those of `allowed` ids."""
        ids = np.asarray(column_ids, np.int64)
        columns = np.arange(ids.size) if allowed is None else np.flatnonzero(np.isin(ids, allowed))
        return cls(ids[columns], columns, eos_id)

    def best(self, logits: npt.NDArray[np.float32]) -> Int64:
        """The most likely token of each row, i64 [B], of logits f32 [B, F]; the first one if two are equal."""
        return np.asarray(self.ids[np.argmax(self.scores(logits), axis=1)])

    def scores(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The logits f32 [B, n] of these choices. BackendError if they are not finite."""
        logits = logits[:, self.columns]
        if not np.isfinite(logits).all():
            raise BackendError("fast_decode gave logits that are not finite: this precision or backend is unsafe here")
        return logits


class Chooser(Protocol):
    """What picks the next tokens: `Choices`, or what draws among them."""

    @property
    def eos_id(self) -> int:
        """The token that ends a row."""

    def best(self, logits: npt.NDArray[np.float32]) -> Int64:
        """A token for each row, i64 [B], of logits f32 [B, F]."""


class FastStage:
    """The fast_decode graph with its cache. `table` as of `PrefixStage`."""

    def __init__(self, session: Session, table: EmbeddingTable | None = None) -> None:
        self._session, self._table = session, table
        self.forget()

    def run(
        self,
        prefix: Prefix,
        inputs: PrefixInputs,
        choices: Chooser,
        max_tokens: int,
        forced: Sequence[int],
        stop: Callable[[], bool] | None = None,
    ) -> Int64:
        """Token ids i64 [B, n], n <= max_tokens; rows end at EOS and are padded with it, all where `stop` says so."""
        with clean(self):
            # fed: the last prompt token, the forced ones and all sampled ones but the last
            capacity = prefix.mask.shape[1] + len(forced) + max_tokens
            cache = self._cache(inputs.batch, self._session.cache_bucket.fit(capacity))
            text = _Text(cache, prefix, inputs, self._table)
            opening = np.empty((inputs.batch, 1 + len(forced)), np.int32)
            opening[:, 0] = text.last_tokens
            opening[:, 1:] = forced
            token = choices.best(text.append(opening))
            chosen, done = [token], token == choices.eos_id
            while len(chosen) < max_tokens and not done.all() and not (stop is not None and stop()):
                token = np.where(done, choices.eos_id, choices.best(text.append(token[:, None].astype(np.int32))))
                chosen.append(token)
                done = done | (token == choices.eos_id)
            return np.stack(chosen, axis=1)

    def drop_oldest(self) -> bool:
        """Let go of the cache that was not used for longest."""
        if len(self._caches) < 2:
            return False
        self._caches.popitem(last=False)
        return True

    def forget(self) -> None:
        """Let go of all memory: NaN left in a cache by a failed run would reach later ones through 0 * NaN."""
        self._storage = Storage(self._session)
        self._caches: OrderedDict[tuple[int, int], _Cache] = OrderedDict()

    def _cache(self, batch: int, capacity: int) -> _Cache:
        cache = self._caches.get((batch, capacity))
        if cache is None:
            growths = self._storage.growths
            cache = _Cache(self._session, self._storage, batch, capacity)
            if self._storage.growths != growths:  # older caches hold the memory that was just replaced
                self._caches.clear()
            self._caches[batch, capacity] = cache
        self._caches.move_to_end((batch, capacity))
        if len(self._caches) > MAX_CACHES:
            self._caches.popitem(last=False)
        return cache


@dataclass(frozen=True, eq=False)
class _Feed:
    """What one run with so many tokens reads and writes besides the cache."""

    tokens: Buffer  # i32 [B, Q], or their embeddings f32 [B, Q, E]
    positions: Buffer  # i32 [B, Q]
    logits: Buffer  # f32 [B, F]
    new_k: Buffer  # f32 [L, B, K, Q, D]
    new_v: Buffer  # f32 [L, B, K, Q, D]
    binding: Binding


class _Cache:
    """K/V f32 [L, B, K, C, D] and their mask bool [B, C] on the device, and the graph bound to them."""

    def __init__(self, session: Session, storage: Storage, batch: int, capacity: int) -> None:
        self._session, self._storage = session, storage
        self.patches = session.sizes["P"]
        self._symbols = {**session.sizes, "B": batch, "C": capacity}
        self.k, self.v, self.mask = (self._take(name) for name in ("cache_k", "cache_v", "cache_mask"))
        self._feeds: dict[int, _Feed] = {}

    def feed(self, count: int) -> _Feed:
        """The graph bound for `count` tokens."""
        if count not in self._feeds:
            self._symbols["Q"] = count
            buffers = {name: self._take(name) for name in ("positions", "logits", "new_k", "new_v")}
            given = token_input(self._session.inputs).name
            tokens = self._take(given)
            cache = {given: tokens, "cache_k": self.k, "cache_v": self.v, "cache_mask": self.mask}
            binding = self._session.sequence((self._session.bind({**buffers, **cache}),))
            self._feeds[count] = _Feed(tokens=tokens, **buffers, binding=binding)
        return self._feeds[count]

    def _take(self, name: str) -> Buffer:
        return self._storage.take(self._session.spec.tensor(name), self._symbols)


class _Text:
    """A prefix and every token fed since, in a cache."""

    def __init__(
        self, cache: _Cache, prefix: Prefix, inputs: PrefixInputs, table: EmbeddingTable | None = None
    ) -> None:
        self._cache, self._table = cache, table
        cache.k.place(prefix.k, 0)
        cache.v.place(prefix.v, 0)
        valid = inputs.mask(cache.patches)  # [B, tokens of the inputs], which a padded prefix exceeds
        rows, prompt = np.arange(inputs.batch), inputs.prompt_mask.sum(axis=1)  # [B]
        last = valid.shape[1] - inputs.prompt_mask.shape[1] + prompt - 1
        self.last_tokens = inputs.prompt_tokens[rows, prompt - 1]
        self._mask: Bool = np.zeros(cache.mask.shape, np.bool_)
        self._mask[:, : valid.shape[1]] = valid
        self._mask[rows, last] = False  # fed again, so it would be seen twice
        self._next = (valid.sum(axis=1) - 1).astype(np.int32)  # [B] position of the next token fed
        self._filled = prefix.mask.shape[1]

    def append(self, tokens: Int32) -> npt.NDArray[np.float32]:
        """Feed tokens i32 [B, Q] and keep their K/V; gives the logits f32 [B, F] of what follows them."""
        count = tokens.shape[1]
        feed = self._cache.feed(count)
        feed.tokens.write(tokens if self._table is None else self._table.rows(tokens))
        feed.positions.write(self._next[:, None] + np.arange(count, dtype=np.int32))
        self._cache.mask.write(self._mask)
        feed.binding.run()
        self._next += np.int32(count)
        self._cache.k.place(feed.new_k, self._filled)
        self._cache.v.place(feed.new_v, self._filled)
        self._mask[:, self._filled : self._filled + count] = True
        self._filled += count
        return feed.logits.read()


def check_words(bundle: Bundle) -> None:
    """ArgumentError for a bundle that cannot answer in words, and how one can."""
    manifest = bundle.manifest
    if not manifest.has_fast or manifest.vocabulary.count != manifest.config.vocab_size:
        raise ArgumentError(
            f"{bundle.path} was exported without the whole vocabulary, so it cannot answer in words: export its "
            "checkpoint with --full-vocabulary"
        )


def choices_of(bundle: Bundle, constrained: bool) -> Choices:
    """What may be sampled with this bundle; the ids come from its decode vocabulary, its contract and its tokenizer.

    ArgumentError if the bundle cannot decode that way, and how it can.
    """
    manifest = bundle.manifest
    ids = manifest.vocabulary.ids
    full = manifest.vocabulary.count == manifest.config.vocab_size
    if not constrained and not full:
        raise ArgumentError(
            f"constrained=False needs all {manifest.config.vocab_size} tokens, but {bundle.path} was exported with the "
            f"{len(ids)} of FAST: export with --full-vocabulary"
        )
    contract = None if manifest.contract is None else PolicyContract.from_json(manifest.contract)
    if constrained and full and (contract is None or contract.fast is None):
        raise ArgumentError(
            f"{bundle.path} has no FAST ids to constrain decoding to (no contract with 'fast'): pass constrained=False"
        )
    if contract is None:
        return Choices.of(ids, EOS_ID)
    tokenizer = read_tokenizer(bundle, contract)
    if not (constrained and full) or contract.fast is None:
        return Choices.of(ids, tokenizer.eos_id)
    fast = range(contract.fast.id_offset - contract.fast.size + 1, contract.fast.id_offset + 1)
    return Choices.of(ids, tokenizer.eos_id, (*fast, *tokenizer.end_ids, tokenizer.eos_id))


def read_tokenizer(bundle: Bundle, contract: PolicyContract) -> PromptTokenizer:
    """The tokenizer of a bundle that has one. BundleError if it has none, ContractError if it cannot be read."""
    name = next((name for name in TOKENIZERS if name in bundle.manifest.files), TOKENIZERS[0])
    return PromptTokenizer(bundle.file(name), contract.prompt_format, contract.max_token_len)


def check_decoding(max_tokens: Any, forced: Any, vocab_size: int) -> list[int]:
    """The forced ids; ArgumentError unless they are in the vocabulary and max_tokens is a positive integer."""
    count(max_tokens, "max_tokens", MAX_TOKENS)
    ids = integers(forced, "forced", MAX_TOKENS)
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ArgumentError(f"forced id {token!r} is not a token: expected integers from 0 to {vocab_size - 1}")
    return ids
