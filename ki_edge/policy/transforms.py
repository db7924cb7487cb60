"""Observations to model inputs, model outputs to robot actions.

    in     robot's keys -> state and images -> (training: delta actions) -> normalize -> resize, prompt, padding
    out    unnormalize -> absolute actions -> the robot's dimensions and conventions

Both directions equal openpi's transforms of DROID, LIBERO and ALOHA. Observations, by `contract.robot`:

    generic    {"images": {camera key: image}, "state": f[s], "prompt": str}
    aloha      the same; keys cam_high, cam_left_wrist, cam_right_wrist (cam_low may be sent and is not used)
    libero     {"observation/image": image, "observation/wrist_image": image, "observation/state": f[s], "prompt": str}
    droid      {"observation/exterior_image_1_left": image, "observation/wrist_image_left": image,
                "observation/joint_position": f[7], "observation/gripper_position": f[1] or f[], "prompt": str}

LeRobot's keys and openpi's flat ones are taken too, see `ki_edge.policy.keys`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import array_of, numbers
from ki_edge.errors import ArgumentError, ContractError, DatasetError, ObservationError, PromptError

from .contract import Feature, PolicyContract
from .images import METHODS, Float32, UInt8, fit_image, parse_image
from .keys import FLAT_ROBOTS, expected, state_key, under_contract_keys
from .normalize import LARGEST, Float64, NormStats, normalize, unnormalize
from .prompt import Int32, PromptTokenizer

MOST_NAMES, MOST_CHARACTERS = 20, 100  # in a message
# Cameras that a robot may send although no model uses them.
UNUSED_CAMERAS = frozenset({
    "cam_low",
    "observation/exterior_image_1_right",
    "observation/exterior_image_2_left",
    "observation/exterior_image_2_right",
    "observation/wrist_image_right",
})  # fmt: skip

# ALOHA (openpi, adapt_to_pi): signs of the joints, and the gripper's geometry in metres and radians.
ALOHA_SIGNS = np.array([1, -1, -1, 1, 1, 1, 1] * 2, dtype=np.float64)
ALOHA_GRIPPERS = (6, 13)
GRIPPER_OPEN_M, GRIPPER_CLOSED_M = 0.05800, 0.01844
GRIPPER_ARM_M, GRIPPER_HORN_M = 0.036, 0.022
GRIPPER_MIN_RAD, GRIPPER_MAX_RAD = 0.5476, 1.6296
LEADER_MIN_RAD, LEADER_MAX_RAD = -0.6213, 1.4910


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """One observation, ready for the model, without batch axis and without padding."""

    # [N, h, w, 3] RGB, uint8 or float32 in [-1, 1] by contract; all slots in order, black where there is no image
    images: UInt8 | Float32
    camera_mask: npt.NDArray[np.bool_]  # [N], False where there is no image
    prompt_tokens: Int32  # [T], bos first
    state: Float64  # [s], normalised
    raw_state: Float64  # [s], robot units (ALOHA: in the model's convention); what delta actions are relative to


@dataclass(frozen=True, eq=False)
class TrainingExample:
    """One observation and the chunk of actions that followed it."""

    inputs: ModelInputs
    actions: Float64  # [H, model_action_dim], normalised, zeros past the robot's dimensions: for the flow
    fast_actions: Float64  # [H, action_dim], normalised, not padded: for the FAST codec


class InputPipeline:
    """Observation dict -> ModelInputs for one contract.

    `stats`: "state" and, for training, "actions" (none are needed without normalisation). Raises ContractError if the
    statistics or the tokenizer do not fit the contract.
    """

    def __init__(self, contract: PolicyContract, stats: Mapping[str, NormStats], tokenizer: PromptTokenizer) -> None:
        asked, given = (contract.prompt_format, contract.max_token_len), (tokenizer.format, tokenizer.max_token_len)
        if asked != given:
            raise ContractError(f"the contract's prompt format and max_token_len are {asked}, the tokenizer's {given}")
        self.contract = contract
        self.tokenizer = tokenizer
        self._stats = stats
        self._state_stats = _stats(contract, stats, "state", contract.state_dim)

    def __call__(self, observation: Mapping[str, Any]) -> ModelInputs:
        """Model inputs of one observation. ObservationError names the key that is missing or wrong."""
        if not isinstance(observation, Mapping):
            raise ObservationError(f"an observation is a dict, got {type(observation).__name__}")
        contract = self.contract
        observation = under_contract_keys(contract, observation)
        raw_state = read_state(contract, observation)
        if contract.adapt_to_pi:
            raw_state = aloha_state_to_model(raw_state)
        kind = contract.normalization_of("state")
        with np.errstate(over="ignore"):  # LeRobot's arithmetic is float32
            state = normalize(raw_state, self._state_stats, kind, contract.normalization_epsilon)
        if (bad := np.flatnonzero(~(np.abs(state) <= LARGEST))).size:
            raise ObservationError(
                f"number {bad[0]} of the state is {raw_state[bad[0]]:.6g}, which normalised is too large for float32: "
                "are its units those of the training?"
            )
        tokens = self.tokenizer.encode(read_prompt(contract, observation), state_of_prompt(contract, state))
        images, camera_mask = read_images(contract, observation)
        return ModelInputs(images, camera_mask, tokens, state, raw_state)

    def example(self, observation: Mapping[str, Any], actions: npt.ArrayLike) -> TrainingExample:
        """An observation with its actions float [H, action_dim] in robot units. DatasetError if they do not fit."""
        contract = self.contract
        inputs = self(observation)
        target = numbers(actions, "actions", DatasetError)
        shape = (contract.action_horizon, contract.action_dim)
        if target.shape != shape or not np.isfinite(target).all():
            finite = "" if np.isfinite(target).all() else " with NaN or infinity"
            raise DatasetError(f"actions must be finite and of shape {shape}, got {target.shape}{finite}")
        target = actions_to_model(contract, action_stats(contract, self._stats), target, inputs.raw_state)
        return TrainingExample(inputs, pad_last(target, contract.model_action_dim), target)


class OutputPipeline:
    """Model actions -> robot actions for one contract; ContractError if the statistics do not fit."""

    def __init__(self, contract: PolicyContract, stats: Mapping[str, NormStats]) -> None:
        self.contract = contract
        self.stats = action_stats(contract, stats)

    def __call__(self, actions: npt.ArrayLike, raw_state: npt.ArrayLike) -> Float64:
        """Robot actions float64 [H, action_dim] in robot units.

        `actions` float [H, model_action_dim] of the flow, or [H, action_dim] as the FAST codec decodes them;
        `raw_state` [s] is `ModelInputs.raw_state` of the observation that they answer.
        """
        contract = self.contract
        given, state = numbers(actions, "actions"), numbers(raw_state, "raw_state")
        if given.ndim != 2 or given.shape[1] not in (contract.model_action_dim, contract.action_dim):
            widths = f"{contract.model_action_dim} or {contract.action_dim}"
            raise ArgumentError(f"model actions must be of shape [H, {widths}], got {given.shape}")
        if state.shape != (contract.state_dim,):
            raise ArgumentError(f"raw_state must be of shape ({contract.state_dim},), got {state.shape}")
        out = given[:, : contract.action_dim]
        out = unnormalize(out, self.stats, contract.normalization_of("actions"), contract.normalization_epsilon)
        if contract.delta_mask is not None:
            out += _reference(contract.delta_mask, state, out.shape[-1])
        return aloha_actions_to_robot(out) if contract.adapt_to_pi else out


def action_stats(contract: PolicyContract, stats: Mapping[str, NormStats]) -> NormStats:
    """The statistics by which a contract's actions are normalised; ContractError if they do not fit it."""
    return _stats(contract, stats, "actions", contract.action_dim)


def actions_to_model(contract: PolicyContract, stats: NormStats, actions: Float64, raw_state: npt.ArrayLike) -> Float64:
    """Robot actions float64 [..., action_dim], normalised as the model knows them: the inverse of `OutputPipeline`.

    Delta actions become relative to `raw_state` [s], `ModelInputs.raw_state` of the observation that they follow.
    `stats` as `action_stats` gives them.
    """
    if contract.adapt_to_pi:
        actions = aloha_actions_to_model(actions)
    if contract.delta_mask is not None:
        state = numbers(raw_state, "raw_state")
        actions = actions - _reference(contract.delta_mask, state, actions.shape[-1])
    return normalize(actions, stats, contract.normalization_of("actions"), contract.normalization_epsilon)


def read_state(contract: PolicyContract, observation: Mapping[str, Any]) -> Float64:
    """The robot's state float64 [s], in the robot's units and convention; finite."""
    if contract.robot == "droid":
        joints = _numbers(contract, observation, state_key(contract), (contract.state_dim - 1,))
        gripper = np.atleast_1d(_numbers(contract, observation, "observation/gripper_position", (1,), ()))
        return np.concatenate([joints, gripper])
    return _numbers(contract, observation, state_key(contract), (contract.state_dim,))


def state_of_prompt(contract: PolicyContract, state: Float64) -> Float64:
    """The normalised state [s] as the prompt holds it: padded with zeros where the contract says so; never cut."""
    if not contract.pad_state_first:
        return state
    return pad_last(state, max(contract.prompt_state_dim or contract.model_action_dim, contract.state_dim))


def read_prompt(contract: PolicyContract, observation: Mapping[str, Any]) -> str:
    """The instruction; the contract's default if the observation has none. Bytes are UTF-8."""
    prompt = observation.get("prompt")
    if isinstance(prompt, np.ndarray) and prompt.ndim == 0:
        prompt = prompt.item()
    if prompt is None:
        prompt = contract.default_prompt
    if prompt is None:
        raise PromptError(f'"prompt" is missing ({_names(observation)} given), and the contract has no default_prompt')
    if not isinstance(prompt, (str, bytes)):
        raise PromptError(f'"prompt" must be text, got {type(prompt).__name__}')
    return prompt.decode("utf-8", errors="replace") if isinstance(prompt, bytes) else str(prompt)


def read_images(
    contract: PolicyContract, observation: Mapping[str, Any]
) -> tuple[UInt8 | Float32, npt.NDArray[np.bool_]]:
    """(images [N, h, w, 3], camera_mask bool [N]) of the contract's slots, resized; images are `contract.pictures`."""
    given = _given_images(contract, observation)
    known = [camera.key for camera in contract.cameras if camera.key is not None]
    unknown = given.keys() - set(known) - UNUSED_CAMERAS
    if unknown:
        raise ObservationError(
            f"unknown camera {_names(unknown)}; the contract has {', '.join(known)}; {expected(contract)}"
        )
    height, width = contract.image_size
    method = METHODS[contract.resize]
    images = np.full((len(contract.cameras), height, width, 3), method.absent, method.pictures)
    mask = np.zeros(len(contract.cameras), dtype=np.bool_)
    for slot, camera in enumerate(contract.cameras):
        image = None if camera.key is None else given.get(camera.key)
        if image is not None:
            images[slot] = fit_image(image, height, width, contract.resize, f"camera {camera.key}")
            mask[slot] = True
        elif camera.key is not None and camera.required:
            raise ObservationError(
                f"camera {camera.key} is missing; the observation has {_names(given)}; {expected(contract)}"
            )
    if not mask.any():
        names = ", ".join(known)
        raise ObservationError(
            f"no camera is there: expected at least one of {names}; the observation has {_names(given)}"
        )
    return images, mask


def given_pictures(contract: PolicyContract, observation: Mapping[str, Any]) -> dict[str, UInt8]:
    """The pictures of an observation by the contract's camera keys, RGB uint8 [h, w, 3], as large as they were given.

    ObservationError where one is no picture.
    """
    given = _given_images(contract, under_contract_keys(contract, observation))
    keys = [camera.key for camera in contract.cameras if camera.key is not None]
    return {key: parse_image(given[key], f"camera {key}") for key in keys if given.get(key) is not None}


def pad_last(x: Float64, size: int) -> Float64:
    """[..., d] with zeros appended to [..., size]."""
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


def aloha_state_to_model(state: Float64) -> Float64:
    """ALOHA's state [14] (joints in rad, grippers 0 closed .. 1 open) in the model's convention."""
    out = ALOHA_SIGNS * state
    for at in ALOHA_GRIPPERS:
        opening = out[at] * (GRIPPER_OPEN_M - GRIPPER_CLOSED_M) + GRIPPER_CLOSED_M  # metres
        sine = (GRIPPER_HORN_M**2 + opening**2 - GRIPPER_ARM_M**2) / (2 * GRIPPER_HORN_M * opening)
        out[at] = (np.arcsin(np.clip(sine, -1.0, 1.0)) - GRIPPER_MIN_RAD) / (GRIPPER_MAX_RAD - GRIPPER_MIN_RAD)
    return out


def aloha_actions_to_robot(actions: Float64) -> Float64:
    """The model's actions [..., 14] in ALOHA's convention."""
    out = ALOHA_SIGNS * actions
    for at in ALOHA_GRIPPERS:
        out[..., at] = (out[..., at] + GRIPPER_MIN_RAD - LEADER_MIN_RAD) / (LEADER_MAX_RAD - LEADER_MIN_RAD)
    return out


def aloha_actions_to_model(actions: Float64) -> Float64:
    """Inverse of `aloha_actions_to_robot`, for training."""
    out = ALOHA_SIGNS * actions
    for at in ALOHA_GRIPPERS:
        out[..., at] = out[..., at] * (LEADER_MAX_RAD - LEADER_MIN_RAD) + LEADER_MIN_RAD - GRIPPER_MIN_RAD
    return out


def _reference(mask: tuple[bool, ...], state: Float64, size: int) -> Float64:
    """What delta actions are relative to, [size]: the current state where `mask`, else 0; the same for all steps."""
    d = len(mask)
    return pad_last(np.where(mask, state[:d], 0.0), size)


def _stats(contract: PolicyContract, stats: Mapping[str, NormStats], name: Feature, size: int) -> NormStats:
    kind = contract.normalization_of(name)
    if kind == "none":
        return NormStats()
    if name not in stats:
        raise ContractError(f'norm stats have no "{name}", which {kind} normalization needs')
    normalize(np.zeros(size), stats[name], kind, contract.normalization_epsilon)  # raises if unfit
    return stats[name]


def _given_images(contract: PolicyContract, observation: Mapping[str, Any]) -> Mapping[str, Any]:
    if contract.robot in FLAT_ROBOTS:
        return {key: value for key, value in observation.items() if isinstance(key, str) and "image" in key}
    images = observation.get("images")
    if not isinstance(images, Mapping):
        raise ObservationError(
            f'"images" must map camera names to images; the observation has {_names(observation)}; {expected(contract)}'
        )
    return images


def _numbers(contract: PolicyContract, observation: Mapping[str, Any], key: str, *shapes: tuple[int, ...]) -> Float64:
    if observation.get(key) is None:
        raise ObservationError(f"{key} is missing; the observation has {_names(observation)}; {expected(contract)}")
    given = array_of(observation[key], key, ObservationError)
    if given.shape not in shapes:
        raise ObservationError(
            f"{key} of the observation has shape {given.shape}, the policy's contract has "
            f"{' or '.join(map(str, shapes))}"
        )
    array = numbers(given, key, ObservationError)
    if not np.isfinite(array).all():
        raise ObservationError(f"{key} holds NaN or infinity: {array.tolist()!s:.200}")
    if (np.abs(array) > LARGEST).any():
        raise ObservationError(f"{key} holds numbers that are too large for float32: {array.tolist()!s:.200}")
    return array


def _names(mapping: Iterable[Any]) -> str:
    names = sorted(str(name)[:MOST_CHARACTERS] for name in mapping)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return (", ".join(names[:MOST_NAMES]) or "nothing") + more
