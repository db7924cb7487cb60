"""The policy contract: all that a runtime must know to turn an observation into model inputs and actions into commands.

It is stored in the bundle's manifest, and beside a trained checkpoint. Every key must be there, no other may;
only those of LATER may be left out, which an older version did not have.
"""

import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ki_edge.config import Pictures
from ki_edge.errors import ContractError
from ki_edge.files.reading import read_json
from ki_edge.files.writing import write_file

from .contract_fields import check_fields
from .images import METHODS, Resize
from .normalize import EpsilonStyle, NormalizationKind
from .prompt import STATE_FORMATS, PromptFormat

RobotKind = Literal["generic", "droid", "libero", "aloha"]
TimeConvention = Literal["openpi", "lerobot"]
Feature = Literal["state", "actions"]
Delays = Literal["uniform"]
MODEL_ACTION_DIM = 32
ALOHA_DIM = 14
# written only where they are not null, so that older versions read the rest
LATER = frozenset({"prompt_state_dim", "rtc_max_delay", "rtc_distribution"})
DROID_DIM = 8
# What all π0 policies of openpi share: the state is no part of the prompt.
PI0 = {"prompt_format": "pi0", "max_token_len": 48, "normalization": "zscore"}


@dataclass(frozen=True)
class Camera:
    """A camera slot of the model. `key`: where the observation has its image; None for a slot that is always empty.

    A slot without an image (always empty, or absent and not `required`) is black with its mask False.
    """

    slot: str
    key: str | None
    required: bool = True


@dataclass(frozen=True)
class FastContract:
    """The FAST head: model id = id_offset - k for k in [0, size); `folder` is the codec's name in the assets.

    `max_tokens` limits a decoded postfix, from "Action: " to eos.
    """

    id_offset: int = 257023
    size: int = 2048
    max_tokens: int = 256
    folder: str = "fast"

    def room(self, forced: int) -> int:
        """How many tokens are sampled at most behind so many that are given."""
        return max(1, self.max_tokens - forced)


@dataclass(frozen=True)
class PolicyContract:
    """One policy's contract. Construction checks that the fields agree with each other (ContractError)."""

    robot: RobotKind
    cameras: tuple[Camera, ...]  # the model's slots, in order
    state_dim: int  # numbers of the robot's state; only a π0's must fit its model's state tensor
    action_dim: int  # numbers of one robot action, at most model_action_dim
    action_horizon: int  # actions of one chunk
    execute: int  # actions that a simple loop executes before the next inference, 1..action_horizon
    model_action_dim: int = MODEL_ACTION_DIM
    image_size: tuple[int, int] = (224, 224)  # height, width in pixels
    resize: Resize = "pil_pad"
    prompt_format: PromptFormat = "pi05"
    max_token_len: int = 200
    default_prompt: str | None = None  # used when an observation has none
    normalization: NormalizationKind = "quantile"
    action_normalization: NormalizationKind | None = None  # of actions, where it is not the state's
    normalization_epsilon: EpsilonStyle = "openpi"
    delta_mask: tuple[bool, ...] | None = None  # True: this action dimension is relative to the current state
    adapt_to_pi: bool = False  # ALOHA only: joint signs and gripper of the model's own ALOHA convention
    pad_state_first: bool = False  # LeRobot before 2026: the prompt holds the state padded
    prompt_state_dim: int | None = None  # to so many numbers; None: to model_action_dim
    fast: FastContract | None = None
    time_convention: TimeConvention = "openpi"  # openpi: times accumulated in f32; lerobot: f32(1 + step * dt)
    num_steps: int = 10  # of the sampler
    control_hz: float | None = None  # rate at which actions were recorded
    action_names: tuple[str, ...] | None = None  # what each dimension commands; other robots are refused
    rtc_max_delay: int | None = None  # trained to take up to so many first actions of a chunk as settled; None: not
    rtc_distribution: Delays | None = None  # of how many they were in training, from 0 on

    @property
    def state_in_prompt(self) -> bool:
        """Whether the prompt holds the digitised state."""
        return self.prompt_format in STATE_FORMATS

    def normalization_of(self, feature: Feature) -> NormalizationKind:
        """How "state" or "actions" are normalised."""
        if feature == "actions" and self.action_normalization is not None:
            return self.action_normalization
        return self.normalization

    @property
    def pictures(self) -> Pictures:
        """How pictures go into the model: as bytes, or as the floats that its makers' resizing gave."""
        return METHODS[self.resize].pictures

    @property
    def needs_stats(self) -> bool:
        """Whether anything is normalised."""
        return (self.normalization_of("state"), self.normalization_of("actions")) != ("none", "none")

    def __post_init__(self) -> None:
        check_fields(self)
        dims = ("state_dim", "action_dim", "model_action_dim")
        for name in (*dims, "action_horizon", "execute", "max_token_len", "num_steps"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        size = self.image_size
        _require(len(size) == 2 and min(size) >= 1, f"image_size is (height, width) in pixels, got {size}")
        _require(bool(self.cameras), "cameras: at least one slot is needed")
        for name in ("slot", "key"):
            names = [value for camera in self.cameras if (value := getattr(camera, name)) is not None]
            _require(len(set(names)) == len(names), f"cameras: the same {name} twice in {names}")
        _require(any(camera.key for camera in self.cameras), "cameras: every slot is empty")
        limit = self.model_action_dim
        _require(self.action_dim <= limit, f"action_dim {self.action_dim} exceeds model_action_dim {limit}")
        horizon = self.action_horizon
        _require(self.execute <= horizon, f"execute must be at most {horizon}, the action_horizon; got {self.execute}")
        if self.delta_mask is not None:
            given, limit = len(self.delta_mask), min(self.action_dim, self.state_dim)
            _require(given <= limit, f"delta_mask has {given} entries, at most {limit} fit state and action")
        _require(not self.adapt_to_pi or self.robot == "aloha", "adapt_to_pi is for the robot aloha only")
        dim = {"droid": DROID_DIM, "aloha": ALOHA_DIM}.get(self.robot)
        _require(dim in (None, self.state_dim), f"state_dim of {self.robot} is {dim}, got {self.state_dim}")
        _require(not self.adapt_to_pi or self.action_dim == ALOHA_DIM, f"adapt_to_pi needs action_dim {ALOHA_DIM}")
        _require(self.control_hz is None or self.control_hz > 0, f"control_hz must be positive, got {self.control_hz}")
        padded = self.prompt_state_dim
        _require(padded is None or padded >= 1, f"prompt_state_dim must be at least 1, got {padded}")
        _require(padded is None or self.pad_state_first, "prompt_state_dim is for pad_state_first only")
        called, count = self.action_names, self.action_dim
        _require(called is None or len(called) == count, f"action_names {called}: expected {count} names")
        most, drawn = self.rtc_max_delay, self.rtc_distribution
        _require((most is None) == (drawn is None), "rtc_max_delay and rtc_distribution: give both or neither")
        _require(most is None or 1 <= most < horizon, f"rtc_max_delay must be 1 to {horizon - 1}, got {most}")
        if self.fast is not None:
            _require(self.fast.size >= 1 and self.fast.max_tokens >= 1, f"fast: size and max_tokens, got {self.fast}")
            _require(self.fast.id_offset - self.fast.size + 1 >= 0, f"fast: {self.fast} gives ids below 0")
            folder = self.fast.folder
            plain = folder not in ("", ".", "..") and not set(folder) & set("/\\")
            _require(plain, f"fast: folder {folder!r} is not a plain name")

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; `from_json` gives back an equal contract."""
        values = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in values.items() if value is not None or name not in LATER}

    @classmethod
    def from_json(cls, content: object) -> "PolicyContract":
        """The contract of a parsed JSON object. ContractError names the field that is unknown, missing or mistyped."""
        contract: PolicyContract = _read_dataclass(cls, content, "contract")
        return contract

    def save(self, path: str | Path) -> None:
        """Write the contract to a JSON file, whole or not at all. ContractError if it cannot be written."""
        write_file(Path(path), json.dumps(self.to_json(), indent=2) + "\n", ContractError)

    @classmethod
    def load(cls, path: str | Path) -> "PolicyContract":
        """Read a file that `save` wrote. Raises ContractError."""
        return cls.from_json(read_json(Path(path), ContractError))


def make_mask(*runs: int) -> tuple[bool, ...]:
    """(6, -1) -> six True, one False: +n for n dimensions relative to the state, -n for n absolute ones."""
    return tuple(run > 0 for run in runs for _ in range(abs(run)))


def droid(**changes: Any) -> PolicyContract:
    """pi05_droid: joint velocities and gripper position, horizon 15, 15 Hz."""
    cameras = (
        Camera("base_0_rgb", "observation/exterior_image_1_left"),
        Camera("left_wrist_0_rgb", "observation/wrist_image_left"),
        Camera("right_wrist_0_rgb", None, required=False),
    )
    base = {"robot": "droid", "cameras": cameras, "state_dim": 8, "action_dim": 8, "action_horizon": 15}
    return _preset({**base, "control_hz": 15.0}, changes)


def droid_joint_position(**changes: Any) -> PolicyContract:
    """openpi's full DROID finetune: joint positions, given relative to the current ones, horizon 16."""
    return droid(**{"action_horizon": 16, "delta_mask": make_mask(7, -1), **changes})


def libero(**changes: Any) -> PolicyContract:
    """pi05_libero: end-effector deltas and gripper, horizon 10; the prompt is pi0's, without the state."""
    cameras = (
        Camera("base_0_rgb", "observation/image"),
        Camera("left_wrist_0_rgb", "observation/wrist_image"),
        Camera("right_wrist_0_rgb", None, required=False),
    )
    base = {"robot": "libero", "cameras": cameras, "state_dim": 8, "action_dim": 7, "action_horizon": 10}
    return _preset({**base, "prompt_format": "pi0"}, changes)


def aloha(**changes: Any) -> PolicyContract:
    """pi05_aloha: two arms of six joints and a gripper, joint positions relative to the current ones, 50 Hz."""
    cameras = (
        Camera("base_0_rgb", "cam_high"),
        Camera("left_wrist_0_rgb", "cam_left_wrist", required=False),
        Camera("right_wrist_0_rgb", "cam_right_wrist", required=False),
    )
    base = {"robot": "aloha", "cameras": cameras, "state_dim": 14, "action_dim": 14, "action_horizon": 50}
    mask = make_mask(6, -1, 6, -1)
    return _preset({**base, "adapt_to_pi": True, "delta_mask": mask, "control_hz": 50.0}, changes)


def pi0_droid(**changes: Any) -> PolicyContract:
    """openpi's pi0_droid: as `droid`, for π0, horizon 10."""
    return droid(**{"action_horizon": 10, **PI0, **changes})


def pi0_libero(**changes: Any) -> PolicyContract:
    """openpi's pi0_libero: as `libero`, for π0; its actions were made relative to the state once more, horizon 50."""
    return libero(**{"action_horizon": 50, "delta_mask": make_mask(6, -1), **PI0, **changes})


def pi0_aloha(**changes: Any) -> PolicyContract:
    """openpi's pi0_aloha: as `aloha`, for π0."""
    return aloha(**{**PI0, **changes})


def generic(
    cameras: Sequence[str | Camera], *, state_dim: int, action_dim: int, action_horizon: int, **changes: Any
) -> PolicyContract:
    """Any robot: `cameras` in the model's order; a plain name is a required camera whose slot and key are that name."""
    if isinstance(cameras, str) or not isinstance(cameras, Sequence):
        raise ContractError(f"policy contract: cameras: expected a list of cameras, got {cameras!r:.60}")
    slots = tuple(camera if isinstance(camera, Camera) else Camera(camera, camera) for camera in cameras)
    base = {"state_dim": state_dim, "action_dim": action_dim, "action_horizon": action_horizon}
    return _preset({"robot": "generic", "cameras": slots, **base}, changes)


def _preset(base: Mapping[str, Any], changes: Mapping[str, Any]) -> PolicyContract:
    values = {**base, **changes}
    known = {field.name for field in fields(PolicyContract)}
    _require(values.keys() <= known, f"unknown contract fields {sorted(values.keys() - known)}")
    horizon = values["action_horizon"]
    half = max(1, horizon // 2) if type(horizon) is int else 1  # construction says what is wrong with it
    return PolicyContract(**{"execute": half, **values})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ContractError(f"policy contract: {message}")


def _read(kind: Any, value: object, where: str) -> object:
    """`value` of parsed JSON as the annotated type `kind`: dataclass, tuple, Literal, union or plain type."""
    origin, choices = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if origin in (Union, types.UnionType):
        inner = next(choice for choice in choices if choice is not type(None))
        return None if value is None else _read(inner, value, where)
    if origin is Literal:
        known = isinstance(value, str) and value in choices
        _require(known, f"{where}: expected one of {', '.join(choices)}, got {value!r:.60}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ContractError(f"policy contract: {where}: expected a list, got {value!r:.60}")
        kinds = choices[:1] * len(value) if choices[-1] is Ellipsis else choices
        _require(len(kinds) == len(value), f"{where}: expected {len(kinds)} values, got {value!r:.60}")
        items = enumerate(zip(kinds, value, strict=True))
        return tuple(_read(inner, item, f"{where}[{at}]") for at, (inner, item) in items)
    if kind is float and type(value) is int:
        value = float(value)
    _require(type(value) is kind, f"{where}: expected {kind.__name__}, got {value!r:.60}")
    return value


def _read_dataclass(kind: Any, value: object, where: str) -> Any:
    if not isinstance(value, dict):
        raise ContractError(f"policy contract: {where}: expected an object, got {value!r:.60}")
    kinds = get_type_hints(kind)
    unknown, missing = sorted(value.keys() - kinds.keys()), sorted(kinds.keys() - value.keys() - LATER)
    _require(not unknown, f"{where}: unknown key {', '.join(unknown)[:200]}; was it written by a newer version?")
    _require(not missing, f"{where}: missing key {', '.join(missing)}")
    return kind(
        **{name: _read(inner, value[name], f"{where}.{name}") for name, inner in kinds.items() if name in value}
    )
