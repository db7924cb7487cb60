"""Observations over which an export measures how large a model's tensors become: recorded ones, or varied made-up ones.

Recorded are episodes (`ki_edge.recordings.collection`, what `replay:` takes too), which pass through the policy's own
input pipeline, or a model's inputs as `ki-parity --inputs` reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.config import Pi05Config
from ki_edge.errors import DatasetError, KiEdgeError, PromptError
from ki_edge.files.npz import read_headers
from ki_edge.policy.images import LOWEST, METHODS, model_pictures
from ki_edge.policy.transforms import InputPipeline, ModelInputs, pad_last
from ki_edge.recordings.collection import EpisodeFiles, open_recordings
from ki_edge.recordings.episode_file import RecordedEpisode
from ki_edge.recordings.episodes import EpisodeView
from ki_edge.recordings.model_inputs import PROMPTS, read_arrays, recorded_pictures
from ki_export.policies import PolicyFiles

Array = npt.NDArray[Any]
RECORDED = 32  # observations taken of all that a recording holds, evenly
SYNTHETIC = 8
CAMERAS = 3  # of a model without a contract
PROMPT = 30  # tokens, there
KINDS = {"iu": "integers", "b": "bool", "u": "uint8", "f": "float", "uf": "uint8 or float"}  # of recorded arrays
INSTRUCTIONS = (
    "pick up the red block",
    "put the bowl on the plate and close the drawer",
    "fold the towel in half, then place it in the basket on the left of the table",
    "x",
)


@dataclass(frozen=True, eq=False)
class Observed:
    """One observation as the prefix graph takes it, batch of one: only what exists, no padding."""

    images: Array  # [1,N,h,w,3] of the type of the model's pictures
    prompt_tokens: Array  # i32 [1,T]
    noise: Array  # f32 [1,H,A]
    state: Array | None = None  # f32 [1,A] of a π0


@dataclass(frozen=True, eq=False)
class Calibration:
    """Observations and where they are from, as the manifest tells it."""

    source: str
    observations: tuple[Observed, ...]


def calibration(
    config: Pi05Config, files: PolicyFiles | None, recorded: Path | None, *, synthetic: int = SYNTHETIC
) -> Calibration:
    """Recorded observations of a file or folder, or built-in ones. DatasetError if a recording has none that fits."""
    if recorded is None:
        made = tuple(_synthetic(config, files, synthetic))
        return Calibration(f"built-in: {len(made)} synthetic observations", made)
    try:
        found, source = _recorded(recorded, config, files)
    except DatasetError as error:
        raise DatasetError(f"--calibrate: {error}") from None
    except KiEdgeError as error:
        raise DatasetError(f"--calibrate: {recorded}: no usable observation: {error}") from None
    if not found:
        raise DatasetError(f"--calibrate: {recorded}: no usable observation: it holds none")
    return Calibration(f"recorded: {len(found)} observations of {source} in {recorded.name}", tuple(found))


def _recorded(path: Path, config: Pi05Config, files: PolicyFiles | None) -> tuple[list[Observed], str]:
    """Observations of a file, or of all files or episodes of a folder, and how many of which there are."""
    recordings, rng = open_recordings(path), np.random.default_rng(0)
    count = len(recordings)
    share = max(1, RECORDED // count)
    chosen = np.unique(np.linspace(0, count - 1, min(count, RECORDED)).astype(int)).tolist()
    if isinstance(recordings, EpisodeFiles):
        lists = [_file(recordings, number, config, files, share, np.random.default_rng(0)) for number in chosen]
        return [observed for found in lists for observed in found], f"{count} files"
    episodes = [_episode(recordings.episode(number), config, files, share, rng) for number in chosen]
    return [observed for found in episodes for observed in found], f"{count} episodes"


def _file(
    recordings: EpisodeFiles,
    number: int,
    config: Pi05Config,
    files: PolicyFiles | None,
    count: int,
    rng: np.random.Generator,
) -> list[Observed]:
    """An .npz file holds an episode, or a model's inputs."""
    path = recordings.paths[number]
    if any(name.startswith("image/") for name in read_headers(path, DatasetError)):
        return list(_model_inputs(path, read_arrays(path), config, count, rng))
    return _episode(recordings.episode(number), config, files, count, rng)


def _episode(
    episode: RecordedEpisode, config: Pi05Config, files: PolicyFiles | None, count: int, rng: np.random.Generator
) -> list[Observed]:
    """Observations of a recorded episode, evenly over its steps, as the policy's own pipeline makes them."""
    if files is None:
        raise DatasetError(
            f"{episode.where}: an episode needs the policy's contract to become model inputs: "
            "calibrate a --model-only export with recorded model inputs, or without --calibrate"
        )
    pipeline, view = InputPipeline(files.contract, files.stats, files.tokenizer), EpisodeView(episode, files.contract)
    steps = np.unique(np.linspace(0, len(view) - 1, count).astype(int)).tolist()
    return [_observed(pipeline(view.observation(step)), config, rng) for step in steps]


def _model_inputs(
    path: Path, arrays: dict[str, Array], config: Pi05Config, count: int, rng: np.random.Generator
) -> Iterator[Observed]:
    """Rows of a recorded batch, without absent cameras and padding."""
    cameras = [name.removeprefix("image/") for name in arrays if name.startswith("image/")]
    names = next((pair for pair in PROMPTS if set(pair) <= set(arrays)), PROMPTS[-1])
    if reason := _unfit(arrays, cameras, names, config):
        raise DatasetError(f"{path}: no usable observation: {reason}")
    tokens, mask = (arrays[name] for name in names)
    for row in range(min(count, len(tokens))):
        present = [camera for camera in cameras if arrays[f"image_mask/{camera}"][row]] or cameras[:1]
        yield Observed(
            images=recorded_pictures(np.stack([arrays[f"image/{camera}"][row] for camera in present])[None], config),
            prompt_tokens=tokens[row][mask[row]][None].astype(np.int32),
            noise=_noise(config, rng),
            state=arrays["state"][row : row + 1].astype(np.float32) if config.has_state else None,
        )


def _unfit(arrays: dict[str, Array], cameras: Sequence[str], prompt: tuple[str, str], config: Pi05Config) -> str:
    """What is wrong with recorded model inputs; "" if nothing is."""
    size, tokens = config.vision.image_size, arrays.get(prompt[0], np.zeros((0, 0)))
    rows, length = tokens.shape if tokens.ndim == 2 else (len(tokens), 0)
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    wanted[prompt[0]], wanted[prompt[1]] = ("iu", (rows, length)), ("b", (rows, length))
    kind = "uf" if config.pictures == "float32" else "u"
    for camera in cameras:
        wanted |= {f"image/{camera}": (kind, (rows, size, size, 3)), f"image_mask/{camera}": ("b", (rows,))}
    if config.has_state:
        wanted["state"] = ("f", (rows, config.state_size))
    for name, (kinds, shape) in wanted.items():
        if name not in arrays:
            return f"'{name}' is missing"
        if arrays[name].dtype.kind not in kinds or arrays[name].shape != shape:
            return f"'{name}' is {arrays[name].dtype}{list(arrays[name].shape)}, expected {KINDS[kinds]}{list(shape)}"
    if not rows or not length:
        return "it holds none"
    if int(tokens.min()) < 0 or int(tokens.max()) >= config.vocab_size:
        return f"'{prompt[0]}' holds ids outside the vocabulary of {config.vocab_size}"
    return "" if arrays[prompt[1]].any(axis=1).all() else f"'{prompt[1]}' has a row without a token"


def _observed(inputs: ModelInputs, config: Pi05Config, rng: np.random.Generator) -> Observed:
    present = inputs.camera_mask if inputs.camera_mask.any() else np.ones_like(inputs.camera_mask)
    state = pad_last(inputs.state, config.state_size).astype(np.float32)[None] if config.has_state else None
    tokens = np.asarray(inputs.prompt_tokens, np.int32)[None]
    return Observed(inputs.images[present][None], tokens, _noise(config, rng), state)


def _synthetic(config: Pi05Config, files: PolicyFiles | None, count: int) -> Iterator[Observed]:
    """Pictures from flat black to pure noise; instructions of every length, or random tokens without a tokenizer."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        cameras = CAMERAS if files is None else len(files.contract.cameras)
        present = max(1, cameras - seed % max(2, cameras))  # all, and each number of absent ones in turn
        images = np.stack([_picture(rng, seed + at, config.vision.image_size) for at in range(present)])[None]
        images = model_pictures(images, config.pictures)
        if config.pictures == "float32" and seed % 2:  # every other observation as a wide camera's pictures arrive
            band = config.vision.image_size // 8
            images[:, :, :band] = images[:, :, -band:] = (
                LOWEST if files is None else METHODS[files.contract.resize].margin
            )
        tokens = _prompt(rng, seed, config, files)
        state = rng.standard_normal((1, config.state_size), np.float32) if config.has_state else None
        yield Observed(images, tokens, _noise(config, rng), state)


def _prompt(rng: np.random.Generator, seed: int, config: Pi05Config, files: PolicyFiles | None) -> Array:
    if files is None:
        length = PROMPT if seed % 2 == 0 else 1 + 7 * seed % PROMPT
        return rng.integers(2, config.vocab_size, (1, length), np.int32)
    state = rng.uniform(-1.0, 1.0, files.contract.state_dim).astype(np.float32)
    try:
        tokens = files.tokenizer.encode(INSTRUCTIONS[seed % len(INSTRUCTIONS)], state)
    except PromptError:  # longer than this policy's prompts
        tokens = rng.integers(2, config.vocab_size, files.contract.max_token_len, np.int32)
    return np.asarray(tokens, np.int32)[None]


def _picture(rng: np.random.Generator, kind: int, size: int) -> Array:
    """u8 [size,size,3]: noise, blocks, a gradient, stripes, white or black, in turn."""
    y, x = np.mgrid[0:size, 0:size] / max(1, size - 1)
    pictures: Sequence[Array] = (
        rng.integers(0, 256, (size, size, 3)),
        rng.integers(0, 256, (4, 4, 3)).repeat(-(-size // 4), 0).repeat(-(-size // 4), 1)[:size, :size],
        np.stack([x, y, 1 - x], axis=-1) * 255,
        np.repeat(((x * 16).astype(int) % 2 * 255)[..., None], 3, axis=-1),
        np.full((size, size, 3), 255),
        np.zeros((size, size, 3)),
    )
    return np.asarray(pictures[kind % len(pictures)]).astype(np.uint8)


def _noise(config: Pi05Config, rng: np.random.Generator) -> Array:
    return rng.standard_normal((1, config.action_horizon, config.action_dim), np.float32)
