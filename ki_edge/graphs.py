"""THE CONTRACT between exporter and runtime: the graphs' tensors, their names, types and symbolic dimensions.

Every other place (export wrappers, TensorRT profiles, manifest, runtime checks, test feeds) derives from this file.

    B batch                 N cameras present        P patches a camera (constant)    T prompt tokens
    S = N*P + T prefix      L layers (constant)      K kv heads (constant)            D head dim (constant)
    H horizon (constant)    A action dim (constant)  W expert width (constant)   C cache length   Q new tokens
    E backbone width (constant)
    F decode vocabulary (constant)    h, w image size (constant)    Z width of π0's state (constant)
    M, R modulation (constant): M = 2L+1 modulated norms, R = 3W numbers each; π0's one embedding of the time is 1, W

The denoise graph of a π0 has one input more than a π0.5's, the robot's state. With real-time chunking (`config.rtc`) it
also takes the chunk before; with zeros there and nothing committed it is the same step, bit for bit. The prefix graph
takes pictures as bytes, or as float32 in [-1, 1] where the policy's makers resized in float. Where the embedding table
is kept in the host's memory (`config.embeddings`), prefix and fast_decode take its rows in the place of tokens.
Policies without a FAST head have no fast_decode.
`specs` gives the graphs of a policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .config import Pi05Config, Pictures, RealTime

Dim = str | int


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output. `dims` are symbols of the table above (or an integer), `dtype` a numpy name."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]

    def resolve(self, sizes: Mapping[str, int]) -> tuple[Dim, ...]:
        """Dims with every symbol in `sizes` replaced by its value."""
        return tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in self.dims)


@dataclass(frozen=True)
class GraphSpec:
    """One graph: inputs and outputs in their order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def tensor(self, name: str) -> TensorSpec:
        """The input or output called `name`; KeyError if there is none."""
        return {tensor.name: tensor for tensor in (*self.inputs, *self.outputs)}[name]


KV = ("L", "B", "K", "S", "D")
CACHE = ("L", "B", "K", "C", "D")


def prefix(pictures: Pictures) -> GraphSpec:
    """The prefix graph of a policy whose pictures come in as "uint8" 0..255 or as "float32" in [-1, 1]; both RGB."""
    return GraphSpec(
        "prefix",
        inputs=(
            TensorSpec("images", pictures, ("B", "N", "h", "w", 3)),
            TensorSpec("camera_mask", "bool", ("B", "N")),
            TensorSpec("prompt_tokens", "int32", ("B", "T")),
            TensorSpec("prompt_mask", "bool", ("B", "T")),
        ),
        outputs=(
            TensorSpec("prefix_k", "float32", KV),
            TensorSpec("prefix_v", "float32", KV),
            TensorSpec("prefix_mask", "bool", ("B", "S")),
        ),
    )


PREFIX = prefix("uint8")

DENOISE = GraphSpec(
    "denoise",
    inputs=(
        TensorSpec("x_t", "float32", ("B", "H", "A")),
        TensorSpec("modulation", "float32", ("M", "R")),
        TensorSpec("dt", "float32", ()),
        TensorSpec("prefix_k", "float32", KV),
        TensorSpec("prefix_v", "float32", KV),
        TensorSpec("prefix_mask", "bool", ("B", "S")),
    ),
    outputs=(TensorSpec("x_next", "float32", ("B", "H", "A")),),
)

# π0: the state as the policy normalises it, zeros past the robot's dimensions
STATE = TensorSpec("state", "float32", ("B", "Z"))
DENOISE_WITH_STATE = GraphSpec("denoise", inputs=(*DENOISE.inputs, STATE), outputs=DENOISE.outputs)

# Real-time chunking: the chunk before in model space, how much each of its actions counts, how strongly this step pulls
# towards them, and the step's flow time
GUIDED = (
    TensorSpec("previous", "float32", ("B", "H", "A")),
    TensorSpec("previous_weights", "float32", ("B", "H")),
    TensorSpec("guidance", "float32", ()),
    TensorSpec("time", "float32", ()),
)
# of policies that are trained for it: which of the actions before will have been executed, and the modulation at time 0
TRAINED = (
    TensorSpec("committed", "bool", ("B", "H")),
    TensorSpec("committed_modulation", "float32", ("M", "R")),
)
REAL_TIME: dict[RealTime, tuple[TensorSpec, ...]] = {"none": (), "guided": GUIDED, "trained": (*GUIDED, *TRAINED)}

FAST_DECODE = GraphSpec(
    "fast_decode",
    inputs=(
        TensorSpec("tokens", "int32", ("B", "Q")),
        TensorSpec("positions", "int32", ("B", "Q")),
        TensorSpec("cache_k", "float32", CACHE),
        TensorSpec("cache_v", "float32", CACHE),
        TensorSpec("cache_mask", "bool", ("B", "C")),
    ),
    outputs=(
        TensorSpec("logits", "float32", ("B", "F")),
        TensorSpec("new_k", "float32", ("L", "B", "K", "Q", "D")),
        TensorSpec("new_v", "float32", ("L", "B", "K", "Q", "D")),
    ),
)

GRAPHS = (PREFIX, DENOISE, FAST_DECODE)

# Rows of the embedding table, as they are stored but for their type, in the place of the tokens that they are of
EMBEDDED = {
    "prompt_tokens": TensorSpec("prompt_embeddings", "float32", ("B", "T", "E")),
    "tokens": TensorSpec("token_embeddings", "float32", ("B", "Q", "E")),
}
EMBEDDINGS = tuple(tensor.name for tensor in EMBEDDED.values())

# Symbols that stay free in the exported graphs; all others are constants of a policy.
DYNAMIC = ("B", "N", "T", "S", "C", "Q")


def specs(config: Pi05Config, *, fast: bool = False) -> tuple[GraphSpec, ...]:
    """The prefix and denoise graphs of one policy, with `fast` also fast_decode, in this order."""
    acting = _embedded(prefix(config.pictures), config), denoise(config)
    return (*acting, fast_decode(config)) if fast else acting


def fast_decode(config: Pi05Config) -> GraphSpec:
    """The graph of one policy that decodes FAST tokens."""
    return _embedded(FAST_DECODE, config)


def _embedded(spec: GraphSpec, config: Pi05Config) -> GraphSpec:
    """The graph with embeddings in the place of tokens, where they are gathered in the host's memory."""
    if config.embeddings == "graph":
        return spec
    return replace(spec, inputs=tuple(EMBEDDED.get(tensor.name, tensor) for tensor in spec.inputs))


def denoise(config: Pi05Config) -> GraphSpec:
    """The denoise graph of one policy."""
    plain = DENOISE_WITH_STATE if config.has_state else DENOISE
    return GraphSpec(plain.name, inputs=(*plain.inputs, *REAL_TIME[config.rtc]), outputs=plain.outputs)


def sizes(config: Pi05Config, decode_vocabulary: int) -> dict[str, int]:
    """Values of the constant symbols for one policy. `decode_vocabulary` is F."""
    rows, row_length = config.modulation_shape
    return {
        "h": config.vision.image_size,
        "w": config.vision.image_size,
        "P": config.vision.patches,
        "L": config.backbone.depth,
        "K": config.backbone.num_kv_heads,
        "D": config.backbone.head_dim,
        "E": config.backbone.width,
        "H": config.action_horizon,
        "A": config.action_dim,
        "Z": config.state_size,
        "M": rows,
        "R": row_length,
        "F": decode_vocabulary,
    }
