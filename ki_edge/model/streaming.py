"""The model with the memory of a few layers: weights come from the checkpoint just before they are used.

The same modules compute with the same values, so results are those of the model that is loaded whole. Weights that were
used last stay, up to a budget: an action expert that fits is read once for all denoising steps, while the backbone's
layers pass through. Of the embedding table only the rows in use are read.
"""

from __future__ import annotations

import mmap
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ki_edge.checkpoints import Checkpoint, TensorSource
from ki_edge.checkpoints.layout.keys import EMBEDDING

from .build import build
from .pi import PiModel

BUDGET = 1_300_000_000  # bytes of float32 weights: π0.5's action expert but for its modulation, or 3 backbone layers
PART = 1 << 27  # bytes of embedding rows at a time
UNCALLED = "vision.embeddings.position_embedding"  # its weight is read, the module never runs
LAYER = re.compile(r".*\blayers\.\d+(?=\.)")
F32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


def streamed(
    checkpoint: Checkpoint, *, budget: int = BUDGET, on_layer: Callable[[str], object] = lambda name: None
) -> PiModel:
    """A checkpoint's model, float32, eval mode, that holds at most `budget` bytes of weights, or one matrix.

    `on_layer` is told the name of each transformer layer as it starts. CheckpointError, while it runs, if a file became
    shorter. The parameters lie on the meta device until they are used, so this model cannot be saved or trained.
    """
    with torch.device("meta"):
        model = build(checkpoint.config)
    model.backbone.register_module("embed_tokens", EmbeddingRows(checkpoint.source))
    shelf = _Shelf(checkpoint, budget)
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(_hook(shelf, name, on_layer))
    shelf.read(UNCALLED, model.get_submodule(UNCALLED))
    return model.eval().requires_grad_(False)


def _hook(shelf: _Shelf, name: str, on_layer: Callable[[str], object]) -> Callable[[nn.Module, Any], None]:
    found = LAYER.match(name)
    layer = found[0] if found else None

    def load(module: nn.Module, _: Any) -> None:
        if layer is not None and layer != shelf.layer:
            on_layer(layer)
        shelf.layer = layer
        shelf.load(name, module)

    return load


class _Shelf:
    """The weights in memory. `layer`: the transformer layer that ran last."""

    def __init__(self, checkpoint: Checkpoint, budget: int) -> None:
        self.layer: str | None = None
        self._checkpoint, self._budget = checkpoint, budget
        self._loaded: OrderedDict[str, nn.Module] = OrderedDict()  # the longest unused first
        self._bytes = 0

    def load(self, name: str, module: nn.Module) -> None:
        """Give a module its weights, if need be in the place of others."""
        if name not in self._loaded:
            size = _size(module)
            while self._loaded and self._bytes + size > self._budget:
                self._drop(*self._loaded.popitem(last=False))
            self.read(name, module)
            self._loaded[name] = module
            self._bytes += size
        self._loaded.move_to_end(name)

    def read(self, name: str, module: nn.Module) -> None:
        """Give a module its weights for good."""
        for own, _ in list(module.named_parameters(recurse=False)):
            values = _in_own_pages(self._checkpoint.read(f"{name}.{own}"))
            setattr(module, own, nn.Parameter(torch.from_numpy(values), requires_grad=False))

    def _drop(self, name: str, module: nn.Module) -> None:
        self._bytes -= _size(module)
        for own, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, own, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _in_own_pages(values: F32) -> F32:
    """A copy that goes back to the system when it is dropped: a heap keeps what lies between things still in use."""
    pages = mmap.mmap(-1, max(1, values.nbytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    copy = np.frombuffer(pages, np.float32, values.size).reshape(values.shape)
    np.copyto(copy, values)
    return copy


def _size(module: nn.Module) -> int:
    return sum(4 * parameter.numel() for parameter in module.parameters(recurse=False))


class EmbeddingRows(nn.Module):
    """Stands for the embedding table [V,W]: reads the rows that are asked for."""

    def __init__(self, source: TensorSource) -> None:
        super().__init__()
        self._source = source
        self.num_embeddings, self.embedding_dim = source.tensors[EMBEDDING].shape

    @property
    def weight(self) -> TableSlice:
        """All rows, none of them read yet."""
        return TableSlice(self._source, np.arange(self.num_embeddings))

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids int [...] -> f32 [...,W]."""
        ids, places = np.unique(tokens.numpy(), return_inverse=True)
        rows = read_rows(self._source, ids)[places.reshape(-1)]
        return torch.from_numpy(rows).reshape(*tokens.shape, self.embedding_dim)


class TableSlice(Sequence[Tensor]):
    """Some rows of the embedding table in order, as matrices f32 [n,W] of at most PART bytes, read when taken."""

    def __init__(self, source: TensorSource, ids: Int64) -> None:
        self._source, self._ids = source, ids
        self._step = max(1, PART // (4 * source.tensors[EMBEDDING].shape[1]))

    def __len__(self) -> int:
        return -(-len(self._ids) // self._step)

    @overload
    def __getitem__(self, which: int) -> Tensor: ...
    @overload
    def __getitem__(self, which: slice) -> Sequence[Tensor]: ...
    @overload
    def __getitem__(self, which: Tensor) -> TableSlice: ...
    def __getitem__(self, which: Any) -> Any:
        """The matrix at an integer place; or the rows of an integer tensor, as indexing a table would give them."""
        if isinstance(which, Tensor):
            return TableSlice(self._source, self._ids[which.numpy()])
        if isinstance(which, slice):
            return [self[at] for at in range(*which.indices(len(self)))]
        if not -len(self) <= which < len(self):
            raise IndexError(which)
        start = which % len(self) * self._step
        return torch.from_numpy(read_rows(self._source, self._ids[start : start + self._step]))


def read_rows(source: TensorSource, ids: Int64) -> F32:
    """TableSlice of the embedding table f32 [n,W], each run of consecutive ids at once."""
    out = np.empty((len(ids), source.tensors[EMBEDDING].shape[1]), np.float32)
    for start, stop in _runs(ids):
        out[start:stop] = source.rows(EMBEDDING, int(ids[start]), int(ids[stop - 1]) + 1)
    return out


def _runs(ids: Int64) -> Iterator[tuple[int, int]]:
    """(start, stop) of each stretch of ids that rise by one."""
    cuts = [0, *(np.flatnonzero(np.diff(ids) != 1) + 1).tolist(), len(ids)]
    yield from ((start, stop) for start, stop in pairwise(cuts) if stop > start)
