"""A FAST codec fitted on recorded chunks, of one robot or of several."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import count, numbers
from ki_edge.errors import ArgumentError

from .fast import MAX_CHUNK, MAX_SCALE, SURROGATES, FastCodec, Float64, quantized

MAX_TOKEN_LENGTH = 10_000
MIN_FREQUENCY = 2


def fit_codec(*sets: npt.ArrayLike, scale: float = 10.0, vocab_size: int = 1024, margin: int = 0) -> FastCodec:
    """Fit a codec on normalised chunks, each of `sets` float [N, T, A] with its own T and A; two fits of the same data
    are equal.

    The alphabet holds every coefficient from the data's smallest - `margin` to its largest + `margin`, so all of them
    can be spelled. The vocabulary may end up smaller than `vocab_size` if the data have too few repetitions.
    ArgumentError for chunks that are no such arrays, and for a vocabulary that is smaller than the alphabet.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if not isinstance(scale, int | float) or not 0 < scale <= MAX_SCALE:
        raise ArgumentError(f"scale {scale!r:.60}: expected a number above 0, up to {MAX_SCALE}")
    count(vocab_size, "vocab_size", 1 << 20)
    count(margin, "margin", SURROGATES, least=0)
    if not sets:
        raise ArgumentError("FAST is fitted on at least one set of chunks")
    each = [quantized(_chunks(chunks), scale) for chunks in sets]  # [N, T, A]
    least, most = min(int(q.min()) for q in each), max(int(q.max()) for q in each)
    min_token, span = least - margin, most - least + 2 * margin
    if span >= SURROGATES:
        raise ArgumentError(f"DCT coefficients {least}..{most} span too much: are the chunks normalised?")
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("".join(map(chr, range(span + 1))))
    alphabet = sorted({symbol for piece, _ in pieces for symbol in piece})
    if vocab_size < len(alphabet):
        raise ArgumentError(
            f"vocab_size {vocab_size} is below the {len(alphabet)} symbols of coefficients {least}..{most}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=MIN_FREQUENCY, show_progress=False, special_tokens=[],
        initial_alphabet=alphabet, max_token_length=MAX_TOKEN_LENGTH,
    )  # fmt: skip
    texts = ("".join(map(chr, row)) for q in each for row in (q - min_token).reshape(len(q), -1).tolist())
    tokenizer.train_from_iterator(texts, trainer=trainer, length=sum(map(len, each)))
    return FastCodec(tokenizer, scale, min_token)


def _chunks(given: npt.ArrayLike) -> Float64:
    x = numbers(given, "chunks")
    if x.ndim != 3 or x.size == 0 or max(x.shape[1:]) > MAX_CHUNK or not np.isfinite(x).all():
        raise ArgumentError(f"FAST is fitted on finite chunks of shape [n, horizon, action_dim], got {x.shape}")
    return x
