"""How many weights each part of a model has, and who reads them: the count behind every estimate of memory and time."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from math import prod

from ki_edge.config import Pi05Config

from .keys import BACKBONE, EMBEDDING, EXPERT, parameter_shapes

ACTIONS = (EXPERT, "action_in", "action_out", "action_time", "state_")
HOISTED = re.compile(r"time_|action_time_mlp_in|.*\.dense\.")  # the runtime's own, once for all steps, on the host


@dataclass(frozen=True)
class Count:
    """Numbers in matrices, which a precision rounds, and in vectors, which stay float32."""

    matrices: int = 0
    vectors: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.matrices + other.matrices, self.vectors + other.vectors)

    def nbytes(self, low: float) -> int:
        """With matrices at `low` bytes a number."""
        return math.ceil(low * self.matrices) + 4 * self.vectors


@dataclass(frozen=True)
class Counts:
    """`vision` with its projector; `backbone` up to the K and V of its last layer, all that acting reads of it, and
    the `rest` of it, for FAST decoding; `embedding`: the table; `expert` with the projections of actions and state."""

    vision: Count
    embedding: Count
    backbone: Count
    rest: Count
    expert: Count


def count_weights(config: Pi05Config) -> Counts:
    """Of a model's geometry."""
    last = f"{BACKBONE}layers.{config.backbone.depth - 1}."
    unread = (BACKBONE + "norm", *(last + name for name in ("self_attn.q", "self_attn.o", "mlp.", "post_attention")))
    found = dict.fromkeys(Counts.__dataclass_fields__, Count())
    for key, shape in parameter_shapes(config).items():
        if HOISTED.match(key):
            continue
        if key == EMBEDDING:
            part = "embedding"
        elif key.startswith(ACTIONS):
            part = "expert"
        elif key.startswith(BACKBONE):
            part = "rest" if key.startswith(unread) else "backbone"
        else:
            part = "vision"
        size = prod(shape)
        found[part] += Count(size, 0) if len(shape) > 1 else Count(0, size)
    return Counts(**found)


def graph_bytes(
    config: Pi05Config, decode_rows: int, low: float, base: int | None = None, decode: float | None = None
) -> dict[str, int]:
    """Of each graph's weights, matrices at `low` bytes a number. `decode_rows`: columns of FAST logits, 0 without.
    Without the embedding table where it stays in the host's memory; the rows that give logits stay in the graph.

    `base`: bytes of a number in what no precision of 8 or 4 bits takes, the embedding table and the rows that give
    logits; `decode`: in the products of the FAST graph; None: as of `low`, and of `base`.
    """
    base = int(low) if base is None else base
    decode = base if decode is None else decode
    count = count_weights(config)
    rows = decode_rows if decode_rows < config.vocab_size else 0  # all of them are the embedding itself
    table = Count() if config.embeddings == "host" else count.embedding
    logits = count.embedding if decode_rows and not rows else table + Count(rows * config.backbone.width)
    decoding = (count.backbone + count.rest).nbytes(decode) + logits.nbytes(base)
    return {
        "prefix": (count.vision + count.backbone).nbytes(low) + table.nbytes(base),
        "denoise": count.expert.nbytes(low),
        **({"fast_decode": decoding} if decode_rows else {}),
    }
