"""The embedding table in the host's memory: rows read from the bundle's weights file, for graphs that do not hold it.

At full size it is 257152 x 2048, 1 GB in 16 bits, of which an observation needs two hundred rows. Only their pages of
the mapped file are read; the system takes them back when memory is short. Rows of 16 bits are widened, which is exact,
so results are those of a graph that gathers by itself, bit for bit; the model's factor of them is in the graph.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.dtypes import FLOATS
from ki_edge.errors import ArgumentError, BundleError
from ki_edge.graphs import TensorSpec

F32 = npt.NDArray[np.float32]
TAKEN = {row.name: token for token, row in graphs.EMBEDDED.items()}  # a graph's input -> the tokens that it is of


class EmbeddingTable:
    """The table of a bundle whose graphs take its rows. Safe to use from several threads."""

    def __init__(self, bundle: Bundle) -> None:
        """BundleError if the manifest does not say where the table lies, or if another tensor lies there."""
        index, config = bundle.weights(), bundle.manifest.config
        name = str(bundle.manifest.weights.get("embeddings"))
        if name not in index:
            raise BundleError(f"{bundle.path}: no embedding table '{name}' in its weights: export the checkpoint again")
        entry, shape = index.entries[name], (config.vocab_size, config.backbone.width)
        if entry.shape != shape or entry.dtype not in FLOATS:
            raise BundleError(
                f"{index.path}: the embedding table '{name}' is {entry.dtype} {list(entry.shape)}, expected "
                f"{list(shape)} in {', '.join(FLOATS)}: export the checkpoint again"
            )
        self.shape = shape
        self.nbytes = entry.nbytes
        self._type = entry.dtype
        try:
            with index.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), entry.offset + entry.nbytes, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: the file has become shorter
            raise BundleError(f"{index.path} cannot be mapped ({error}): copy the bundle again") from None
        if hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)  # rows lie far apart: nothing is read ahead
        raw = np.frombuffer(mapped, np.uint8, entry.nbytes, entry.offset)
        self._rows = raw.reshape(shape[0], -1)

    def rows(self, tokens: npt.NDArray[Any]) -> F32:
        """Rows f32 [..., E] of tokens, integers [...]. ArgumentError for one that the table does not have."""
        most = self.shape[0] - 1
        if tokens.size and not (tokens.min() >= 0 and tokens.max() <= most):
            bad = tokens[(tokens < 0) | (tokens > most)]
            raise ArgumentError(f"token {int(bad.reshape(-1)[0])} is outside the embedding table's 0..{most}")
        found: npt.NDArray[Any] = self._rows[tokens.reshape(-1)].view(FLOATS[self._type].numpy)
        if self._type == "BF16":
            found = (found.astype(np.uint32) << 16).view(np.float32)
        rows: F32 = found.astype(np.float32, copy=False)
        return rows.reshape(*tokens.shape, self.shape[1])


def table_of(bundle: Bundle) -> EmbeddingTable | None:
    """The table that the runtime gathers from; None for a bundle whose graphs hold it."""
    return EmbeddingTable(bundle) if bundle.manifest.config.embeddings == "host" else None


def token_input(spec: Sequence[TensorSpec]) -> TensorSpec:
    """The input of a graph that stands for tokens: themselves, or their embeddings."""
    return next(tensor for tensor in spec if tensor.name in TAKEN or tensor.name in graphs.EMBEDDED)
