"""What accompanies the weights of a run: tokenizer, FAST codec, and a contract with statistics for each robot."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError, CheckpointError, ContractError, DatasetError
from ki_edge.files.writing import write_file, writing
from ki_edge.policy.contract import Camera, FastContract, Feature, PolicyContract, generic
from ki_edge.policy.fast import FastCodec, FastIds
from ki_edge.policy.fast_fitting import fit_codec
from ki_edge.policy.normalize import NormStats, norm_stats_json, normalize, unnormalize
from ki_edge.policy.prompt import Int32, PromptTokenizer
from ki_edge.policy.words import is_json
from ki_export.policies.codecs import find_codec

from .encoding import TokenEncoder
from .names import is_plain
from .start import FAST_POSTFIX, PI05_PROMPT, Start
from .vocabulary import PALIGEMMA_IDS, Placement, check_answers, fit_vocabulary, place_fast, whole

Float32 = npt.NDArray[np.float32]
ROBOTS = "robots"  # folder of a checkpoint: what the other robots of a mixture need
LEAST = 64  # tokens that a prompt and a postfix may have at least
SMALL_CHUNK, SMALL_CODEC, LARGE_CODEC = 64, 256, 1024  # numbers of a chunk; FAST ids that are fitted for it, or more
MARGIN = 8  # steps of DCT coefficients beyond those that were seen


@dataclass(frozen=True, eq=False)
class Robot:
    """One dataset of a mixture: what it tells of its robot, and frames of it to fit on and to measure.

    `name` is a folder's. `cameras`: the model's slots in order, with the dataset's keys. `stats`: of "state" and
    "actions". `tasks`: all instructions. Frames, evenly drawn, robot units: `frame_tasks` i64 [N] into `tasks`, `state`
    f32 [N,s], `chunks` f32 [N,H,a]. `held_chunks` f32 [M,H,a]: of frames that are evaluated on.
    """

    name: str
    cameras: tuple[Camera, ...]
    stats: dict[str, NormStats]
    tasks: tuple[str, ...]
    frame_tasks: npt.NDArray[np.int64]
    state: Float32
    chunks: Float32
    control_hz: float | None = None
    action_names: tuple[str, ...] | None = None
    delta_mask: tuple[bool, ...] | None = None  # of actions that `chunks` and `stats` have relative to the state
    held_chunks: Float32 | None = None


@dataclass(frozen=True, eq=False)
class Choice:
    """What a run may say of its tokens.

    `fast`: a codec's folder; "fit": fitted on the data even where the checkpoint has one; "": the checkpoint's, or
    fitted. `vocabulary`: ids of a fitted one at most, 0: as many as chunks ask for. `placement`: "": the checkpoint's,
    or PaliGemma's as openpi has it, or the top of a small vocabulary.
    """

    fast: str = ""
    vocabulary: int = 0
    placement: Placement | str = ""
    rtc_max_delay: int = 0


@dataclass(frozen=True, eq=False)
class Recipe:
    """All that accompanies the weights. `contracts`, `stats`, `names`: by dataset; `encoder`: the model's tokens."""

    config: Pi05Config
    names: tuple[str, ...]
    contracts: tuple[PolicyContract, ...]
    stats: tuple[dict[str, NormStats], ...]
    encoder: TokenEncoder
    notes: tuple[str, ...] = field(default=())  # a line each, for the user

    @classmethod
    def fit(
        cls, start: Start, robots: Sequence[Robot], texts: Sequence[tuple[str, str]] = (), choice: Choice | None = None
    ) -> Recipe:
        """One model for all robots. `texts`: questions and answers of the text sets.

        The same data give the same recipe. DatasetError, ArgumentError, CheckpointError: what does not fit together.
        """
        choice = choice or Choice()
        _check(start, robots, choice)
        chunks = [_normalized(start, robot, "actions", robot.chunks) for robot in robots]
        states = [_normalized(start, robot, "state", robot.state) for robot in robots]
        content = start.tokenizer
        if content is None:
            said = (text for question, answer in texts for text in (f"{question}\n", answer))
            content = fit_vocabulary([task for robot in robots for task in robot.tasks], said)
        words = PromptTokenizer(content, start.prompt_format, 1 << 16)
        codec = _codec(start, chunks, choice)
        ids = _place(start, words, codec, choice)
        config = _config(start, words, ids, robots)
        padded = 0
        if (start.fields or {}).get("pad_state_first"):
            padded = (start.fields or {}).get("prompt_state_dim") or config.action_dim
        unbounded = TokenEncoder(content, start.prompt_format, 1 << 16, codec, ids, 1 << 16, padded)
        limits = _limits(start, _longest(unbounded, robots, states, chunks), _longest_text(unbounded, texts))
        encoder = replace(unbounded, max_prompt=limits[0], max_postfix=limits[1])
        for question, answer in dict.fromkeys(texts):
            encoder.encode_text(question, answer)  # one that does not fit is told now, not after hours
        fast = FastContract(ids.offset, ids.size, limits[1])
        contracts = tuple(_contract(start, robot, config, fast, limits[0], choice) for robot in robots)
        check_answers(ids, words, (answer for _, answer in texts))
        notes = _unknown_words(words, robots)
        stats = tuple(robot.stats for robot in robots)
        return cls(config, tuple(robot.name for robot in robots), contracts, stats, encoder, notes)

    @property
    def tokenizer(self) -> PromptTokenizer:
        """The prompt tokenizer of the contracts."""
        return self.encoder.tokenizer

    @property
    def codec(self) -> FastCodec:
        """The one FAST codec."""
        return self.encoder.codec

    def encode_actions(self, task: str, state: npt.ArrayLike, chunk: npt.ArrayLike) -> tuple[Int32, Int32]:
        """See `TokenEncoder.encode_actions`; `normalize_state` and `normalize_actions` give `state` and `chunk`."""
        return self.encoder.encode_actions(task, state, chunk)

    def encode_text(self, question: str, answer: str) -> tuple[Int32, Int32]:
        """See `TokenEncoder.encode_text`."""
        return self.encoder.encode_text(question, answer)

    def normalize_state(self, source: int, state: npt.ArrayLike) -> Float32:
        """f32 [..., s] in the model's units, of the `source`-th dataset."""
        return self._normalize(source, "state", state)

    def normalize_actions(self, source: int, actions: npt.ArrayLike) -> Float32:
        """f32 [..., a] in the model's units, of the `source`-th dataset; not padded."""
        return self._normalize(source, "actions", actions)

    def unnormalize_actions(self, source: int, actions: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """f64 [..., a] in robot units."""
        contract = self.contracts[source]
        kind = contract.normalization_of("actions")
        return unnormalize(actions, self.stats[source]["actions"], kind, contract.normalization_epsilon)

    def _normalize(self, source: int, feature: Feature, values: npt.ArrayLike) -> Float32:
        contract = self.contracts[source]
        kind = contract.normalization_of(feature)
        found = normalize(values, self.stats[source][feature], kind, contract.normalization_epsilon)
        return found.astype(np.float32)

    def facts(self) -> dict[str, Any]:
        """What decides the tokens and numbers of every sample, as flat JSON values."""
        codec = f"{self.codec.scale} {self.codec.min_token} {self.codec.tokenizer.to_str()}"
        found: dict[str, Any] = {
            "recipe.tokenizer": hashlib.sha256(self.encoder.tokenizer_model).hexdigest(),
            "recipe.codec": hashlib.sha256(codec.encode()).hexdigest(),
        }
        for name, contract, stats in zip(self.names, self.contracts, self.stats, strict=True):
            text = json.dumps(contract.to_json(), sort_keys=True) + norm_stats_json(stats)
            found[f"recipe.robot.{name}"] = hashlib.sha256(text.encode()).hexdigest()
        return found

    def save_assets(self, folder: Path) -> None:
        """Write contract.json and assets/ of the first dataset's robot, robots/NAME/ of the others, into a folder that
        is being made. CheckpointError names the file that cannot be written."""
        assets = folder / "assets"
        name = "tokenizer.json" if is_json(self.encoder.tokenizer_model) else "tokenizer.model"
        with writing(assets, CheckpointError):
            assets.mkdir(parents=True, exist_ok=True)
        write_file(assets / name, self.encoder.tokenizer_model, CheckpointError)
        self.codec.save(assets / "fast")
        for at, (robot, contract, stats) in enumerate(zip(self.names, self.contracts, self.stats, strict=True)):
            place = folder if at == 0 else folder / ROBOTS / robot
            with writing(place, CheckpointError):
                place.mkdir(parents=True, exist_ok=True)
            write_file((assets if at == 0 else place) / "norm_stats.json", norm_stats_json(stats), CheckpointError)
            contract.save(place / "contract.json")


def _check(start: Start, robots: Sequence[Robot], choice: Choice) -> None:
    names = [robot.name for robot in robots]
    if not robots or len(set(names)) != len(names) or not all(map(is_plain, names)):
        raise ArgumentError(f"the datasets' names {names!r:.200}: expected one or more, plain and different")
    horizon, width = robots[0].chunks.shape[1], start.config.action_dim
    for robot in robots:
        shape = robot.chunks.shape
        if shape[1] != horizon:
            raise DatasetError(f"{robot.name}: chunks of {shape[1]} actions, and {names[0]} has {horizon}")
        if shape[2] > width:
            raise DatasetError(
                f"{robot.name}: {shape[2]} numbers in an action, the model has {width}: choose another --preset or "
                "--init"
            )
    if choice.rtc_max_delay >= horizon:
        raise ArgumentError(
            f"rtc_max_delay {choice.rtc_max_delay}: chunks have {horizon} actions, at least one of which must be left "
            "to learn"
        )


def _normalized(start: Start, robot: Robot, feature: Feature, values: Float32) -> npt.NDArray[np.float64]:
    fields = start.fields or {}
    kind = fields.get("normalization", "quantile")
    if feature == "actions":
        kind = fields.get("action_normalization") or kind
    return normalize(values, robot.stats[feature], kind, fields.get("normalization_epsilon", "openpi"))


def _codec(start: Start, chunks: Sequence[npt.NDArray[np.float64]], choice: Choice) -> FastCodec:
    if choice.fast not in ("", "fit"):
        try:
            return FastCodec.load(find_codec(Path(choice.fast)))
        except (ArgumentError, ContractError) as error:
            raise type(error)(str(error).replace("--fast-codec", "--fast")) from None
    if choice.fast == "" and start.codec is not None:
        return start.codec
    numbers = max(chunk.shape[1] * chunk.shape[2] for chunk in chunks)
    size = choice.vocabulary or (SMALL_CODEC if numbers <= SMALL_CHUNK else LARGE_CODEC)
    if start.fast is not None and not choice.placement:  # it takes the place that the checkpoint has for it
        size = min(size, start.fast.size)
    return fit_codec(*chunks, vocab_size=size, margin=MARGIN)


def _place(start: Start, words: PromptTokenizer, codec: FastCodec, choice: Choice) -> FastIds:
    if not choice.placement and start.fast is not None:
        if codec.vocab_size > start.fast.size:
            raise ArgumentError(
                f"the FAST codec has {codec.vocab_size} ids, the checkpoint has room for {start.fast.size}: "
                f"--fast-vocabulary {start.fast.size}, or another --fast-placement"
            )
        return FastIds(start.fast.id_offset, codec.vocab_size)
    like_paligemma = words.vocab_size >= PALIGEMMA_IDS // 2
    placement: Any = choice.placement or ("openpi" if like_paligemma else "top")
    ids = place_fast(words, codec.vocab_size, placement)
    fixed = start.checkpoint is not None or start.config.vocab_size == PALIGEMMA_IDS
    if fixed and ids.offset >= start.config.vocab_size:
        raise ArgumentError(
            f"--fast-placement {placement}: FAST ids up to {ids.offset}, the model's embedding has "
            f"{start.config.vocab_size} rows: a checkpoint's vocabulary does not grow"
        )
    return ids


def _config(start: Start, words: PromptTokenizer, ids: FastIds, robots: Sequence[Robot]) -> Pi05Config:
    """The geometry with this data's horizon; a model that starts from nothing has as many words as it needs."""
    config = replace(start.config, action_horizon=robots[0].chunks.shape[1])
    if start.checkpoint is not None or config.vocab_size == PALIGEMMA_IDS:
        return config
    return replace(config, vocab_size=whole(max(words.vocab_size, ids.offset + 1)))


def _longest(
    encoder: TokenEncoder, robots: Sequence[Robot], states: Sequence[Any], chunks: Sequence[Any]
) -> tuple[int, int]:
    """The most tokens of a prompt, and of a postfix, of the frames that are fitted on."""
    prompt = postfix = 0
    for robot, state, chunk in zip(robots, states, chunks, strict=True):
        for task, numbers, actions in zip(robot.frame_tasks, state, chunk, strict=True):
            found = encoder.measure(robot.tasks[task], numbers, actions)
            prompt, postfix = max(prompt, found[0]), max(postfix, found[1])
    return prompt, postfix


def _longest_text(encoder: TokenEncoder, texts: Sequence[tuple[str, str]]) -> tuple[int, int]:
    found = [encoder.encode_text(question, answer) for question, answer in dict.fromkeys(texts)]
    return max((len(ask) for ask, _ in found), default=0), max((len(answer) for _, answer in found), default=0)


def _limits(start: Start, frames: tuple[int, int], texts: tuple[int, int]) -> tuple[int, int]:
    """The most tokens of a prompt and of a postfix: as the checkpoint has it, or with an eighth to spare."""
    counts = [max(pair) for pair in zip(frames, texts, strict=True)]
    spare = [max(LEAST, -(-(count + count // 8) // 16) * 16) for count in counts]
    prompt = start.max_prompt or min(spare[0], PI05_PROMPT)
    return prompt, start.fast.max_tokens if start.fast is not None else min(spare[1], FAST_POSTFIX)


def _contract(
    start: Start, robot: Robot, config: Pi05Config, fast: FastContract, max_prompt: int, choice: Choice
) -> PolicyContract:
    size = config.vision.image_size
    return generic(
        robot.cameras,
        state_dim=robot.state.shape[1],
        action_dim=robot.chunks.shape[2],
        action_horizon=config.action_horizon,
        model_action_dim=config.action_dim,
        image_size=(size, size),
        prompt_format=start.prompt_format,
        max_token_len=max_prompt,
        default_prompt=robot.tasks[0],
        control_hz=robot.control_hz,
        delta_mask=robot.delta_mask,
        action_names=robot.action_names,
        rtc_max_delay=choice.rtc_max_delay or None,
        rtc_distribution="uniform" if choice.rtc_max_delay else None,
        fast=fast,
        **(start.fields or {}),
    )


def _unknown_words(words: PromptTokenizer, robots: Sequence[Robot]) -> tuple[str, ...]:
    """A line where instructions have letters that the tokenizer lacks."""
    tasks = [task for robot in robots for task in robot.tasks]
    said = {task: task.lower() if words.format == "ki" else task for task in tasks}
    lacking = [task for task in said if words.decode(words.encode_alone(said[task])).strip() != said[task].strip()]
    if not lacking:
        return ()
    return (
        f"the checkpoint's tokenizer cannot spell {len(lacking)} of the instructions, such as {lacking[0]!r:.60}: the "
        "policy will not tell them apart by those words",
    )
