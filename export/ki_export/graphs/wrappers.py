"""The graphs as PyTorch modules: each forwards its contract's inputs to one method of the model.

Nothing here computes. Inputs, their order, types and free dimensions come from `ki_edge.graphs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ki_edge import graphs
from ki_edge.bundle import DecodeVocabulary
from ki_edge.config import Pi05Config
from ki_edge.graphs import GraphSpec
from ki_edge.model import PiModel, build

# Any sizes will do while tracing, as long as they differ from each other and from 1, which the tracer would bake in.
TRACED_SIZES = {"B": 2, "N": 3, "T": 5, "S": 29, "C": 31, "Q": 7}
STACKS = {"vision": "vision.encoder.layers.", "backbone": "backbone.layers.", "expert": "expert.layers."}
UNEMBEDDING = "unembedding."  # prefix of the names of the rows that can be predicted
Outputs = tuple[Tensor, ...]
FreeDims = dict[int, torch.export.Dim]


class ModelModule(nn.Module):
    """Holds the model, so that its weights have the same names in every graph."""

    def __init__(self, model: PiModel) -> None:
        super().__init__()
        self.model = model


class PrefixModule(ModelModule):
    """Graph 1: pictures and prompt to K/V."""

    def forward(self, images: Tensor, camera_mask: Tensor, prompt_tokens: Tensor, prompt_mask: Tensor) -> Outputs:
        return self.model.prefix_forward(images, camera_mask, prompt_tokens, prompt_mask)


class DenoiseModule(ModelModule):
    """Graph 2: one Euler step. `more`: the state of a π0, the chunk before."""

    def forward(
        self,
        x_t: Tensor,
        modulation: Tensor,
        dt: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        prefix_mask: Tensor,
        *more: Tensor,
    ) -> Outputs:
        return (self.model.denoise_step(x_t, modulation, dt, prefix_k, prefix_v, prefix_mask, *more),)


class FastDecodeModule(ModelModule):
    """Graph 3: new tokens over a cache to logits of the decode vocabulary.

    `unembedding` stands for rows of the embedding table, one parameter a contiguous run of ids (see `runs`); it has no
    values of its own. It is empty if all rows are wanted.
    """

    def __init__(self, model: PiModel, vocabulary: DecodeVocabulary) -> None:
        super().__init__(model)
        width, whole = model.config.backbone.width, len(vocabulary.ids) == model.config.vocab_size
        parts = [] if whole else [torch.empty(count, width, device="meta") for _, count in runs(vocabulary)]
        self.unembedding = nn.ParameterList(parts)

    def forward(
        self, tokens: Tensor, positions: Tensor, cache_k: Tensor, cache_v: Tensor, cache_mask: Tensor
    ) -> Outputs:
        rows = list(self.unembedding) or None
        return self.model.fast_decode_step(tokens, positions, cache_k, cache_v, cache_mask, rows)


@dataclass(frozen=True)
class Traceable:
    """What the tracer needs for one graph.

    `depths`: stacks with fewer layers in the module than the graph is to have, the prefix of their weights -> how many.
    """

    spec: GraphSpec
    module: nn.Module
    inputs: tuple[Tensor, ...]
    dynamic_shapes: tuple[FreeDims | tuple[FreeDims, ...], ...]  # by parameter; the last of DenoiseModule takes several
    depths: Mapping[str, int]


def runs(vocabulary: DecodeVocabulary) -> list[tuple[int, int]]:
    """(first id, count) of each run of rows in the order of the logits' columns."""
    return [(vocabulary.first, vocabulary.count), *((token, 1) for token in vocabulary.extra)]


def traceables(config: Pi05Config, vocabulary: DecodeVocabulary, layers: int | None = None) -> list[Traceable]:
    """The graphs of a model without weights, on the meta device; fast_decode if there is a vocabulary.

    The modules have at most `layers` layers a stack, but take inputs of the whole model's sizes.
    """
    wanted = {"vision": config.vision.depth, "backbone": config.backbone.depth, "expert": config.expert.depth}
    depths = {STACKS[name]: depth for name, depth in wanted.items() if layers is not None and depth > layers}
    shallow = replace(
        config,
        vision=replace(config.vision, depth=min(config.vision.depth, layers or config.vision.depth)),
        backbone=replace(config.backbone, depth=min(config.backbone.depth, layers or config.backbone.depth)),
        expert=replace(config.expert, depth=min(config.expert.depth, layers or config.expert.depth)),
    )
    with torch.device("meta"):
        model = build(shallow).eval().requires_grad_(False)
    modules: list[nn.Module] = [PrefixModule(model), DenoiseModule(model)]
    modules += [FastDecodeModule(model, vocabulary)] if vocabulary.ids else []
    sizes = {**graphs.sizes(config, len(vocabulary.ids)), **TRACED_SIZES}
    specs = graphs.specs(config, fast=bool(vocabulary.ids))
    return [_traceable(spec, module.eval(), sizes, depths) for spec, module in zip(specs, modules, strict=True)]


def _traceable(spec: GraphSpec, module: nn.Module, sizes: Mapping[str, int], depths: Mapping[str, int]) -> Traceable:
    inputs: list[Tensor] = []
    shapes: list[FreeDims] = []
    free = {symbol: torch.export.Dim(symbol) for symbol in graphs.DYNAMIC}
    for tensor in spec.inputs:
        shape = [int(dim) for dim in tensor.resolve(sizes)]
        inputs.append(torch.empty(shape, dtype=getattr(torch, tensor.dtype), device="meta"))
        shapes.append({axis: free[str(dim)] for axis, dim in enumerate(tensor.dims) if dim in free})
    return Traceable(spec, module, tuple(inputs), _by_parameter(module, shapes), depths)


def _by_parameter(module: nn.Module, shapes: list[FreeDims]) -> tuple[FreeDims | tuple[FreeDims, ...], ...]:
    count = len(graphs.DENOISE.inputs) if isinstance(module, DenoiseModule) else len(shapes)
    return (*shapes[:count], tuple(shapes[count:])) if shapes[count:] else tuple(shapes)
