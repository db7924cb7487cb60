"""Memory of a training step on one device: what stays, what a step adds. An estimate, of what PyTorch keeps.

States are exact. Activations are counted by the tensors that the layers keep for the backward pass, products in `low`
bytes a number and residuals, norms and softmax in 4. The rest of the process is `BASE`, and is not in a `Need`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ki_edge.config import GemmaConfig, Pi05Config
from ki_edge.errors import ArgumentError

from .weights import GROUPS, Weights, count

F32 = 4
STRATEGIES = ("single", "ddp", "fsdp2")
OPTIMIZERS = {"adamw": 8.0, "adamw8bit": 2.03}  # bytes of a parameter's two moments; 8 bits with a scale for each 256
BASE = {"gpu": 1.5e9, "cpu": 0.4e9}  # bytes of a process beside the model: CUDA's context, NCCL, libraries, fragments
BACKBONE_SIDE = tuple(group for group in GROUPS if group != "expert")


@dataclass(frozen=True)
class Samples:
    """What a device computes at once: `batch` samples of `cameras` pictures, tokens of `prompt` and `postfix` (0: no
    token loss), `draws` of the flow for each."""

    batch: int = 1
    cameras: int = 3
    prompt: int = 200
    postfix: int = 64
    draws: int = 1

    def __post_init__(self) -> None:
        least = {"batch": 1, "cameras": 1, "prompt": 1, "postfix": 0, "draws": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ArgumentError(f"{name} {getattr(self, name)}: expected at least {low}")


@dataclass(frozen=True)
class Setup:
    """How a model is trained: over `devices` with a strategy, in which types, which of it."""

    strategy: str = "single"
    devices: int = 1
    bfloat16: bool = True
    optimizer: str = "adamw"
    average: bool = True
    checkpointing: bool = False
    insulated: bool = True
    freeze: tuple[str, ...] = ()
    lora: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ArgumentError(f"strategy {self.strategy!r:.40}: expected one of {', '.join(STRATEGIES)}")
        if self.optimizer not in OPTIMIZERS:
            raise ArgumentError(f"optimizer {self.optimizer!r:.40}: expected one of {', '.join(OPTIMIZERS)}")
        if self.devices < 1 or (self.strategy == "single") != (self.devices == 1):
            raise ArgumentError(
                f"{self.devices} devices with strategy {self.strategy}: single is 1, ddp and fsdp2 2 or more"
            )

    @property
    def shards(self) -> int:
        """Over how many devices states are spread."""
        return self.devices if self.strategy == "fsdp2" else 1


@dataclass(frozen=True)
class Need:
    """Bytes on one device. `gathered`: of weights that are whole for a while, with their gradients; `copies`: of those
    in bfloat16, for products; `logits`: of the token loss."""

    weights: float
    gradients: float
    moments: float
    average: float
    gathered: float
    copies: float
    activations: float
    logits: float
    parameters: Weights = field(repr=False)

    @property
    def states(self) -> float:
        """What stays from step to step."""
        return self.weights + self.moments + self.average

    @property
    def total(self) -> float:
        """At the most: gradients are there before the last activations go."""
        return self.states + self.gradients + self.gathered + self.copies + self.activations + self.logits


def need(config: Pi05Config, samples: Samples, setup: Setup) -> Need:
    """Of a geometry, per device. ArgumentError for an unknown group to freeze or to adapt."""
    freeze = setup.freeze
    if setup.insulated and not samples.postfix:  # no loss reaches the backbone
        freeze = tuple(dict.fromkeys((*freeze, *BACKBONE_SIDE)))
    weights = count(config, freeze, dict(setup.lora))
    shards, low = setup.shards, 2 if setup.bfloat16 else F32
    gathered = copies = 0.0
    if (
        setup.strategy == "fsdp2"
    ):  # the root's weights and gradients; two layers ahead, and one's gradient in both types
        gathered = F32 * (weights.outside + weights.outside_learning) + weights.largest * (3 * low + F32)
    if setup.bfloat16:  # autocast keeps a copy of each matrix until the end of the forward pass, and products keep it
        copies = 2.0 * (weights.matrices if setup.strategy != "fsdp2" else weights.outside_learning)
    return Need(
        weights=F32 * weights.total / shards,
        gradients=F32 * weights.learning / shards,
        moments=OPTIMIZERS[setup.optimizer] * weights.learning / shards,
        average=F32 * weights.learning / shards if setup.average else 0.0,
        gathered=gathered,
        copies=copies,
        activations=float(_activations(config, samples, setup, freeze, low)),
        logits=float(_logits(config, samples, setup, low)),
        parameters=weights,
    )


def _activations(config: Pi05Config, samples: Samples, setup: Setup, freeze: tuple[str, ...], low: int) -> int:
    vision, backbone, expert = config.vision, config.backbone, config.expert
    pictures, draws = samples.batch * samples.cameras, samples.batch * samples.draws
    prefix = samples.cameras * vision.patches + samples.prompt
    tokens, horizon = prefix + samples.postfix, config.action_horizon + config.has_state
    kv = 2 * expert.num_kv_heads * expert.head_dim * low
    read = kv * (prefix + horizon + (prefix if samples.draws > 1 else 0))  # K and V for each draw, repeated and joined
    # of each stack: depth, what a layer keeps for its backward pass, its input alone
    stacks = {
        "vision": (vision.depth, pictures * _vision_layer(config, low), pictures * vision.patches * vision.width * low),
        "backbone": (
            backbone.depth - 1,
            samples.batch * _layer(backbone, tokens, tokens, low),
            samples.batch * tokens * _inputs(backbone, low),
        ),
        "last of backbone": (
            1,
            samples.batch * _last_layer(backbone, tokens, samples.postfix, low),
            samples.batch * tokens * _inputs(backbone, low),
        ),
        "expert": (
            expert.depth,
            draws * (_layer(expert, horizon, prefix + horizon, low, gated=True) + read),
            draws * (horizon * _inputs(expert, low) + (read if samples.draws > 1 else 0)),
        ),
    }
    adapted = {group for group, _ in setup.lora}
    still = {group for group in freeze if group not in adapted}
    learnt = [stacks["expert"]]
    learnt += [] if still >= set(BACKBONE_SIDE) else [stacks["backbone"], stacks["last of backbone"]]
    learnt += [] if "vision" in still else [stacks["vision"]]
    if setup.checkpointing:  # all inputs, and one layer at a time
        return sum(depth * inputs for depth, _, inputs in learnt) + max(whole for _, whole, _ in stacks.values())
    return sum(depth * whole for depth, whole, _ in learnt)


def _inputs(config: GemmaConfig, low: int) -> int:
    """Bytes of a token between layers: the residual, and K and V."""
    return config.width * F32 + 2 * config.num_kv_heads * config.head_dim * low


def _layer(config: GemmaConfig, tokens: int, keys: int, low: int, *, gated: bool = False) -> int:
    """Bytes that a layer keeps: residuals and norms in float32, their casts, Q, K, V, softmax, the MLP's four."""
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norms = config.width * (2 * (F32 + F32) + 2 * low) + (config.width * 2 * (F32 + low) if gated else 0)
    rows = tokens * (norms + low * (2 * heads + 2 * kv + 4 * config.mlp_dim))
    return rows + tokens * keys * config.num_heads * (F32 + (low if low != F32 else 0))


def _last_layer(config: GemmaConfig, tokens: int, queries: int, low: int) -> int:
    """The same of the backbone's last layer: of all tokens norm, K and V, everything else of those that predict one."""
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norm = config.width * (F32 + F32 + low)
    rows = tokens * (norm + low * 2 * kv) + queries * (norm + low * (config.width + 2 * heads + 4 * config.mlp_dim))
    return rows + queries * tokens * config.num_heads * (F32 + (low if low != F32 else 0))


def _vision_layer(config: Pi05Config, low: int) -> int:
    """The same of one picture in a layer of the vision tower, whose MLP keeps two."""
    vision = config.vision
    rows = vision.patches * (vision.width * (2 * F32 + 2 * low + 5 * low) + 2 * low * vision.mlp_dim)
    return rows + vision.patches**2 * vision.num_heads * (F32 + (low if low != F32 else 0))


def _logits(config: Pi05Config, samples: Samples, setup: Setup, low: int) -> int:
    """Of the whole vocabulary for each token of a postfix: in the products' type, and in float32 the logits, their
    softmax, and the gradient."""
    return samples.batch * samples.postfix * config.vocab_size * (3 * F32 + (low if low != F32 else 0))
