"""The architecture of a π0.5 or π0 model: what tensors' shapes say, and what they cannot.

Sizes follow openpi's variants `gemma_2b`, `gemma_300m` and SigLIP so400m/14 at 224 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

from .errors import CheckpointError

T = TypeVar("T")
# The largest sizes that are believed: far above every known model, and small enough that nothing huge is computed.
LIMITS = {
    "width": 1 << 16, "depth": 1024, "mlp_dim": 1 << 20, "num_heads": 1024, "num_kv_heads": 1024, "head_dim": 4096,
    "patch_size": 1024, "image_size": 4096, "vocab_size": 1 << 24, "action_dim": 4096, "action_horizon": 4096,
}  # fmt: skip
MAX_PATCHES = 1 << 16  # tokens of a picture
Variant = Literal["pi05", "pi0"]
Pictures = Literal["uint8", "float32"]  # numpy type of the pictures that a policy's prefix graph takes
RealTime = Literal["none", "guided", "trained"]  # how a chunk can be made to continue the one before it
Embeddings = Literal["graph", "host"]  # where rows of the embedding table are taken: in the graphs, or before them


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP tower: `image_size` pixels square, cut into patches of `patch_size`."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int
    image_size: int

    def __post_init__(self) -> None:
        _check_sizes(self, "vision")
        if self.image_size % self.patch_size:
            raise CheckpointError(
                f"vision: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.num_heads < 1 or self.width % self.num_heads:
            raise CheckpointError(f"vision: width {self.width} cannot be split into {self.num_heads} heads")
        if self.patches > MAX_PATCHES:
            raise CheckpointError(f"vision: {self.patches} patches of a picture, at most {MAX_PATCHES} are possible")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def patches(self) -> int:
        """Tokens of one camera image (P)."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class GemmaConfig:
    """One Gemma transformer: the backbone or the action expert."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        _check_sizes(self, "gemma")
        if self.num_kv_heads < 1 or self.num_heads < 1 or self.num_heads % self.num_kv_heads:
            raise CheckpointError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} K/V heads")

    @property
    def modulated_norms(self) -> int:
        """Norms of the action expert that the flow time modulates (M = 2 a layer and the final one)."""
        return 2 * self.depth + 1


@dataclass(frozen=True)
class Pi05Config:
    """Geometry of the whole policy. `action_dim` is the model's (32 in the released checkpoints), not the robot's.

    `variant`: in "pi05" the flow time modulates the expert's norms and the state is words of the prompt; in "pi0" the
    flow time is mixed into the action tokens and the state is a token of the expert. `state_width`: numbers of that
    state, where they are not `action_dim` (LeRobot's max_state_dim and max_action_dim may differ).

    `pictures`: how pictures come in, as bytes, or as numbers in [-1, 1] where the policy's makers resized them in float
    (their margin may be -3). `rtc`: what the denoise graph can be told of the chunk before, so that a new one continues
    it (docs/real-time-chunking.md): nothing, where it is to be pulled ("guided"), or also which of its actions are
    settled, which a policy must be trained for ("trained"). `embeddings`: whether graphs hold the table of embeddings
    and take tokens, or take its rows, which the runtime reads from the weights file ("host"). No weight depends on
    these three, so geometries that differ in them alone are equal.
    """

    vision: VisionConfig
    backbone: GemmaConfig
    expert: GemmaConfig
    vocab_size: int
    action_dim: int
    action_horizon: int
    variant: Variant = "pi05"
    state_width: int | None = None
    pictures: Pictures = field(default="uint8", compare=False)
    rtc: RealTime = field(default="none", compare=False)
    embeddings: Embeddings = field(default="graph", compare=False)

    def __post_init__(self) -> None:
        _check_sizes(self, "model")
        closed = {
            "variant": get_args(Variant),
            "pictures": get_args(Pictures),
            "rtc": get_args(RealTime),
            "embeddings": get_args(Embeddings),
        }
        for name, choices in closed.items():
            if getattr(self, name) not in choices:
                known, given = ", ".join(choices), getattr(self, name)
                raise CheckpointError(f"geometry 'model.{name}': expected one of {known}, not {given!r:.40}")
        if self.state_width is not None:
            _check_size(self.state_width, "model.state_width", LIMITS["action_dim"])
            if self.variant != "pi0":
                raise CheckpointError(
                    f"geometry 'model.state_width': {self.state_width}, but a {self.variant} has no state"
                )
        if self.rtc == "trained" and self.variant == "pi0":
            raise CheckpointError(
                "geometry 'model.rtc': trained, but a pi0 has one time for all actions of a chunk: export it guided"
            )
        for name in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            ours, theirs = getattr(self.backbone, name), getattr(self.expert, name)
            if ours != theirs:
                raise CheckpointError(f"backbone and action expert share K/V, but their {name} is {ours} and {theirs}")

    @property
    def has_state(self) -> bool:
        """Whether the denoise graph takes the robot's state as a tensor."""
        return self.variant == "pi0"

    @property
    def state_size(self) -> int:
        """Numbers of the state tensor (Z) of a π0."""
        return self.state_width or self.action_dim

    @property
    def modulation_shape(self) -> tuple[int, int]:
        """(M, R) of what a denoise step is told about its time: all adaRMS rows, or π0's one embedding of the time."""
        if self.variant == "pi0":
            return 1, self.expert.width
        return self.expert.modulated_norms, 3 * self.expert.width

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` reads it back. `rtc` and `embeddings` are in it where they are not the default:
        older versions read the rest.
        """
        values = asdict(self)
        for name, default in (("rtc", "none"), ("embeddings", "graph")):
            if values[name] == default:
                del values[name]
        return values

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Pi05Config:
        """Read `to_dict`'s form; CheckpointError names a missing or unknown field.

        Without `variant` it is a π0.5, without `pictures` it takes bytes, without `rtc` nothing of the chunk before,
        without `embeddings` tokens.
        """
        parts = {"vision": VisionConfig, "backbone": GemmaConfig, "expert": GemmaConfig}
        built = {name: _build(part, data.get(name), name) for name, part in parts.items()}
        return _build(cls, {**data, **built}, "model")


def _build(cls: type[T], data: object, where: str) -> T:
    if not isinstance(data, Mapping):
        raise CheckpointError(f"geometry: '{where}' must be an object, not {type(data).__name__}")
    expected = {f.name: f.type for f in fields(cls)}  # type: ignore[arg-type]
    required = {f.name for f in fields(cls) if f.default is MISSING}  # type: ignore[arg-type]
    missing, unknown = sorted(required - set(data)), sorted(set(data) - set(expected))
    if missing or unknown:
        raise CheckpointError(f"geometry '{where}': missing {missing}, unknown {unknown!r:.200}")
    for name in LIMITS.keys() & expected.keys():
        _check_size(data[name], f"{where}.{name}", LIMITS[name])
    return cls(**data)


def _check_sizes(config: VisionConfig | GemmaConfig | Pi05Config, where: str) -> None:
    for name in LIMITS.keys() & vars(config).keys():
        value = getattr(config, name)
        if value != 0 or not name.endswith("_heads"):  # the classes say what no heads mean
            _check_size(value, f"{where}.{name}", LIMITS[name])


def _check_size(value: object, where: str, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"geometry '{where}': expected a positive integer, not {value!r:.40}")
    if value > most:
        raise CheckpointError(f"geometry '{where}': {value} is more than any model has ({most})")


PI05 = Pi05Config(
    vision=VisionConfig(width=1152, depth=27, mlp_dim=4304, num_heads=16, patch_size=14, image_size=224),
    backbone=GemmaConfig(width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256),
    expert=GemmaConfig(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256),
    vocab_size=257152,
    action_dim=32,
    action_horizon=50,
)

TINY = Pi05Config(
    vision=VisionConfig(width=128, depth=3, mlp_dim=384, num_heads=4, patch_size=16, image_size=96),
    backbone=GemmaConfig(width=128, depth=4, mlp_dim=384, num_heads=4, num_kv_heads=1, head_dim=32),
    expert=GemmaConfig(width=96, depth=4, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=32),
    vocab_size=1024,
    action_dim=8,
    action_horizon=8,
)

SMALL = Pi05Config(
    vision=VisionConfig(width=256, depth=6, mlp_dim=1024, num_heads=4, patch_size=16, image_size=128),
    backbone=GemmaConfig(width=384, depth=8, mlp_dim=1280, num_heads=6, num_kv_heads=1, head_dim=64),
    expert=GemmaConfig(width=256, depth=8, mlp_dim=768, num_heads=6, num_kv_heads=1, head_dim=64),
    vocab_size=1024,
    action_dim=16,
    action_horizon=16,
)

BASE = Pi05Config(
    vision=VisionConfig(width=768, depth=12, mlp_dim=3072, num_heads=12, patch_size=16, image_size=224),
    backbone=GemmaConfig(width=1024, depth=12, mlp_dim=3072, num_heads=8, num_kv_heads=1, head_dim=128),
    expert=GemmaConfig(width=512, depth=12, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=128),
    vocab_size=1024,
    action_dim=32,
    action_horizon=32,
)

# What `ki-train --preset` knows. But for the last they start from nothing, with a vocabulary of their data's own.
PRESETS = {"tiny": TINY, "small": SMALL, "base": BASE, "pi05": PI05}
