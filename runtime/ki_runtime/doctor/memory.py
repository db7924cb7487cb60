"""What the graphs need on the device while they run, from shapes alone: weights, K/V, activations.

An estimate for planning. Weights are exact but for the few products that stay in float32 whatever the precision; for
activations the largest tensors of one layer are counted as if all lived at once. CUDA's context, the engines' own
kernels and what TensorRT keeps besides are not in it. What building takes: `ki_runtime.trt.memory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ki_edge.checkpoints.layout.counts import graph_bytes
from ki_edge.config import GemmaConfig, Pi05Config
from ki_edge.dtypes import BY_NAME

CAMERAS, PROMPT, FAST_TOKENS = 3, 200, 256  # the largest case that is counted
F32 = 4
BASE = "float16"  # of what is in neither 8 nor 4 bits, in a precision of WEIGHTS
# Bytes that a weight takes with its scales; those of 8 bits have one an output channel, those of 4 one for 16.
WEIGHTS: Mapping[str, float] = {"int8_static": 1.0, "float8": 1.0, "nvfp4": 0.5625}


@dataclass(frozen=True)
class GraphMemory:
    """Bytes on the device while a graph runs; `kv`: its K/V, which the graphs share."""

    weights: int
    activations: int
    kv: int


@dataclass(frozen=True)
class Needs:
    """Bytes that a policy needs, by graph."""

    graphs: Mapping[str, GraphMemory]

    @property
    def acting(self) -> int:
        """prefix and denoise resident, K/V once."""
        prefix, denoise = self.graphs["prefix"], self.graphs["denoise"]
        return prefix.weights + denoise.weights + max(prefix.activations, denoise.activations) + prefix.kv

    @property
    def with_fast(self) -> int:
        """All resident; the FAST engine, if the bundle has the graph, has weights of its own and a longer cache."""
        fast = self.graphs.get("fast_decode", GraphMemory(0, 0, 0))
        return self.acting + fast.weights + fast.kv

    @property
    def sequential(self) -> int:
        """One graph at a time: the larger of those that act, K/V stay."""
        acting = (self.graphs["prefix"], self.graphs["denoise"])
        return max(graph.weights + graph.activations for graph in acting) + self.graphs["prefix"].kv

    @property
    def sequential_with_fast(self) -> int:
        """The same with FAST, whose longer cache is there while it decodes."""
        fast = self.graphs.get("fast_decode", GraphMemory(0, 0, 0))
        return max(self.sequential, fast.weights + fast.activations + fast.kv + self.graphs["prefix"].kv)


def needs(config: Pi05Config, decode_rows: int, precision: str) -> Needs:
    """Of a policy in a precision of the manifest. `decode_rows`: columns of the FAST logits, 0 without FAST."""
    base = BY_NAME[{"int8": "float32"}.get(precision, BASE if precision in WEIGHTS else precision)].nbytes
    low = base  # of activations: those of a low product are widened behind it
    if precision == "int8":  # the CPU's: 8 bits in every graph, the rest in float32
        sizes = graph_bytes(config, decode_rows, 1, base, decode=1)
    else:
        sizes = graph_bytes(config, decode_rows, WEIGHTS.get(precision, base), base)
    tokens = CAMERAS * config.vision.patches + PROMPT
    horizon = config.action_horizon + config.has_state
    cache = 2 * config.backbone.depth * config.backbone.num_kv_heads * config.backbone.head_dim * F32
    vision = _vision(config, low)
    layers = {
        "prefix": (max(vision, _layer(config.backbone, tokens, tokens, low)), tokens),
        "denoise": (_layer(config.expert, horizon, tokens + horizon, low), tokens),
        "fast_decode": (_layer(config.backbone, 4, tokens + FAST_TOKENS, low), tokens + FAST_TOKENS),
    }
    return Needs({name: GraphMemory(size, layers[name][0], cache * layers[name][1]) for name, size in sizes.items()})


def _layer(config: GemmaConfig, tokens: int, keys: int, low: int) -> int:
    """Residual before and after, Q and K/V, scores and their softmax, gate, up and product of one layer."""
    residual = 2 * tokens * config.width * F32
    heads = (config.num_heads + 2 * config.num_kv_heads) * tokens * config.head_dim * low
    scores = config.num_heads * tokens * keys * (F32 + low)
    return residual + heads + scores + tokens * config.mlp_dim * (2 * low + F32)


def _vision(config: Pi05Config, low: int) -> int:
    """The same of the vision tower, all cameras at once."""
    vision, tokens = config.vision, CAMERAS * config.vision.patches
    scores = vision.num_heads * tokens * vision.patches * (F32 + low)
    return 2 * tokens * vision.width * F32 + scores + tokens * (3 * vision.width * low + vision.mlp_dim * (low + F32))
