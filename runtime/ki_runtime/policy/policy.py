"""A bundle as a policy: an observation of the robot in, a chunk of robot actions out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import array_of
from ki_edge.bundle import Bundle
from ki_edge.commands import tell
from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError, BundleError
from ki_edge.policy.answers import Answers
from ki_edge.policy.chunking import Guiding, PreviousChunk, Way, overlap_of
from ki_edge.policy.contract import FastContract, PolicyContract
from ki_edge.policy.fast import FastCodec, FastIds
from ki_edge.policy.normalize import NormStats, read_norm_stats
from ki_edge.policy.prompt import PromptTokenizer
from ki_edge.policy.transforms import InputPipeline, ModelInputs, OutputPipeline, pad_last

from .answering import Answering
from .decode import TOKENIZERS, check_words, read_tokenizer
from .guard import finite_actions
from .sampler import Sampler
from .sampler_arguments import WITHOUT_RTC
from .training_range import TrainingRange
from .warming import Prepared, warm_up

NORM_STATS = "assets/norm_stats.json"
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PolicyAssets:
    """What a policy needs besides its model."""

    contract: PolicyContract
    tokenizer: PromptTokenizer
    stats: Mapping[str, NormStats]  # "state", "actions"; empty without normalisation
    fast_folder: Path | None  # of the FAST codec, read at the first use


class Policy:
    """Observation -> actions. The form of observations is the contract's, see `ki_edge.policy.transforms`.

    `say` is told once if a state is far outside the training range, or a camera of the policy is absent.
    """

    def __init__(self, sampler: Sampler, assets: PolicyAssets, say: Callable[[str], object] = tell) -> None:
        self.sampler = sampler
        self.contract = assets.contract
        self.tokenizer = assets.tokenizer
        self._fast_folder = assets.fast_folder
        self._inputs = InputPipeline(assets.contract, assets.stats, assets.tokenizer)
        self._outputs = OutputPipeline(assets.contract, assets.stats)
        self.stats = assets.stats
        self._range = TrainingRange(assets.contract, assets.stats, say)
        self._say = say
        self._absent: set[str] = set()  # cameras of which it was said

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle,
        backend: str = "auto",
        *,
        threads: int | None = None,
        verify: bool | str = False,
        build: bool = False,
        trust_engines: bool = False,
        say: Callable[[str], object] | None = None,
    ) -> Policy:
        """Open a bundle as a policy. Arguments and errors as of `Sampler.open`.

        BundleError names what is missing if the bundle holds the model alone.
        """
        sampler = Sampler.open(
            bundle, backend, threads=threads, verify=verify, build=build, trust_engines=trust_engines, say=say
        )
        return cls(sampler, read_assets(sampler.bundle), say or tell)

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        noise: npt.ArrayLike | None = None,
        seed: int | None = None,
        num_steps: int | None = None,
        previous: PreviousChunk | None = None,
        way: Way | None = None,
        guiding: Guiding | None = None,
    ) -> dict[str, Any]:
        """{"actions": float64 [H, action_dim] in robot units, "timing": milliseconds by stage}.

        `noise` f32 [H, A] or [1, H, A], or drawn from `seed`. `previous`: the chunk that the robot executes meanwhile,
        which this one is to continue; `way`: how, None: as `rtc` says; `guiding`: how strongly the guided way pulls.
        ObservationError for an observation that does not fit the contract, ArgumentError for other arguments,
        BackendError if an action is not finite in float32.
        """
        chosen = None if previous is None else self._way(way)
        clock = _Stopwatch()
        inputs = self._read(observation)
        overlap = None
        if previous is not None and chosen is not None:
            stats, raw = self._outputs.stats, inputs.raw_state
            overlap = overlap_of(previous, self.contract, stats, raw, way=chosen, guiding=guiding)
        clock.lap("preprocess_ms")
        if noise is not None:
            noise = array_of(noise, "noise")
            noise = noise[None] if noise.ndim == 2 else noise
        state = _state(inputs, self.sampler.config)
        actions = self.sampler.sample_actions(
            *_batch(inputs), state=state, noise=noise, seed=seed, num_steps=num_steps, overlap=overlap
        )[0]
        clock.lap("model_ms")
        robot_actions = self._outputs(actions, inputs.raw_state)
        finite_actions(robot_actions, self.contract.action_names)
        clock.lap("postprocess_ms")
        return {"actions": robot_actions, "timing": self._timing(clock, "denoise")}

    @property
    def rtc(self) -> Way | None:
        """How `infer` continues a previous chunk: "trained" or "guided"; None: its bundle was exported without."""
        found = self.sampler.config.rtc
        return None if found == "none" else found

    @property
    def max_delay(self) -> int | None:
        """The largest delay of a previous chunk that the trained way takes; None: any up to its rows."""
        return self.contract.rtc_max_delay if self.rtc == "trained" else None

    def _way(self, wanted: Way | None) -> Way:
        """ArgumentError for a way that the bundle has not."""
        if self.rtc is None:
            raise ArgumentError(f"{self.sampler.bundle.path} {WITHOUT_RTC}")
        if wanted not in (None, "guided", self.rtc):
            known = "guided" if self.rtc == "guided" else "guided or trained"
            raise ArgumentError(f"way {wanted!r:.40}: this policy's chunks can be {known}")
        return wanted or self.rtc

    def infer_fast(self, observation: Mapping[str, Any], *, stop: Callable[[], bool] | None = None) -> dict[str, Any]:
        """Actions decoded from FAST tokens, to compare with the flow's: slower and coarser than `infer`.

        {"actions": float64 [H, action_dim] in robot units or None, "tokens": i64 [n] as sampled, "problem": why there
        are no actions or None, "timing": milliseconds by stage}. `stop`: asked after every token; True ends decoding
        there. ArgumentError for a policy without FAST.
        """
        contract = self._fast_contract()
        clock = _Stopwatch()
        inputs = self._read(observation)
        clock.lap("preprocess_ms")
        forced = self.tokenizer.action_ids
        limit = contract.room(len(forced))
        tokens = self.sampler.sample_fast_tokens(*_batch(inputs), max_tokens=limit, forced=forced, stop=stop)[0]
        clock.lap("model_ms")
        actions, problem = self._decode(tokens, FastIds(contract.id_offset, contract.size))
        if actions is not None:
            actions = self._outputs(actions, inputs.raw_state)
            finite_actions(actions, self.contract.action_names)
        clock.lap("postprocess_ms")
        return {"actions": actions, "tokens": tokens, "problem": problem, "timing": self._timing(clock, "fast")}

    def infer_text(
        self,
        observation: Mapping[str, Any],
        *,
        prompt: str | None = None,
        max_tokens: int = 32,
        temperature: float = 0.0,
        seed: int | None = None,
        allow_loc: bool = False,
        stop: Callable[[], bool] | None = None,
    ) -> dict[str, Any]:
        """What the policy says to the pictures of an observation and a question, in PaliGemma's form.

        `prompt`: the question, None: the observation's own prompt; it goes in as it is, without the state. The most
        likely text, or with a `temperature` above 0 a drawn one (`seed` None: another each time). Only text may come;
        `allow_loc`: also `<loc>` tokens, with which a policy points. `stop`: as of `infer_fast`.
        {"text": without `<loc>`, "tokens": i64 [n] before the end, "points": f64 [k, 2], (x, y) from 0 to 1 in the
        square picture that the model sees, "finished": whether the end came within `max_tokens`, "timing": ...}.
        ArgumentError for a bundle without the whole vocabulary (`check_text` tells before), and other arguments;
        ObservationError for pictures that do not fit.
        """
        self.check_text()
        clock = _Stopwatch()
        inputs = self._answering.inputs(observation, prompt)
        clock.lap("preprocess_ms")
        tokens = self._answering.ask(inputs, max_tokens, temperature, seed, locs=allow_loc, stop=stop)
        clock.lap("model_ms")
        found = self._answering.read(tokens)
        clock.lap("postprocess_ms")
        return {**found, "timing": self._timing(clock, "fast")}

    def check_text(self) -> None:
        """ArgumentError for a bundle that was exported without the tokens that `infer_text` needs."""
        check_words(self.sampler.bundle)

    @cached_property
    def _answering(self) -> Answering:
        return Answering(self.sampler, self.contract, self.tokenizer, Answers.of(self.contract, self.tokenizer))

    def warm_up(self, *, prompt: str | None = None, num_steps: int | None = None, fast: bool = False) -> Prepared:
        """Prepare what the contract makes likely, so that the first `infer` allocates, compiles and records nothing.

        That is the cameras that must and those that may be there, prompts as long as `prompt` (None: the contract's
        default prompt, or lengths around a usual one) with its state, and `num_steps` (None: the bundle's). `fast`:
        `infer_fast` too. Gives what was prepared. Errors as of `infer`; ArgumentError for `fast` without FAST.
        """
        if fast:
            self._fast_contract()
        return warm_up(self.sampler, self.contract, self.tokenizer, prompt=prompt, num_steps=num_steps, fast=fast)

    def _fast_contract(self) -> FastContract:
        """ArgumentError for a policy without FAST."""
        if self.contract.fast is None:
            raise ArgumentError(
                "this policy has no FAST head: it was exported without 'fast' in its contract. Use infer, or, if the "
                "checkpoint was trained with FAST, export it with --fast-codec DIR, the folder of its codec"
            )
        return self.contract.fast

    @cached_property
    def codec(self) -> FastCodec:
        """The FAST codec of the bundle."""
        if self._fast_folder is None:
            raise BundleError("this bundle has no FAST codec in its assets: export the checkpoint again")
        return FastCodec.load(self._fast_folder)

    def _read(self, observation: Mapping[str, Any]) -> ModelInputs:
        """Model inputs. What may be a fault of the robot is told once: a state far outside the training range, a camera
        that is not there and need not be.
        """
        inputs = self._inputs(observation)
        self._range.look(inputs.raw_state)
        for camera, present in zip(self.contract.cameras, inputs.camera_mask, strict=True):
            if camera.key is not None and not present and camera.key not in self._absent:
                self._absent.add(camera.key)
                self._say(f"camera {camera.key} is not in the observation: the policy acts without it")
        return inputs

    def _decode(self, tokens: npt.NDArray[np.int64], ids: FastIds) -> tuple[Float64 | None, str | None]:
        """(normalised actions [H, action_dim], None), or (None, the problem)."""
        parsed = ids.parse(tokens, self.tokenizer)
        if parsed.problem is not None:
            return None, parsed.problem
        if not parsed.terminated:
            return None, f'no "|" and no end within {len(tokens)} tokens'
        decoded = self.codec.decode(parsed.fast_ids, self.contract.action_horizon, self.contract.action_dim)
        return decoded.actions, decoded.problem

    def _timing(self, clock: _Stopwatch, stage: str) -> dict[str, float]:
        laps, times = clock.laps, self.sampler.timing
        return {
            "preprocess_ms": laps["preprocess_ms"],
            "prefix_ms": times.prefix / 1e6,
            f"{stage}_ms": getattr(times, stage) / 1e6,
            "postprocess_ms": laps["postprocess_ms"],
            "total_ms": sum(laps.values()),
        }


def read_assets(bundle: Bundle) -> PolicyAssets:
    """Contract, tokenizer and statistics of a bundle; BundleError names what is missing or contradicts the model."""
    manifest = bundle.manifest
    contract = None if manifest.contract is None else PolicyContract.from_json(manifest.contract)
    wanted = {"contract": contract is not None, "tokenizer": any(name in manifest.files for name in TOKENIZERS)}
    if contract is None or contract.needs_stats:
        wanted["norm_stats"] = NORM_STATS in manifest.files
    missing = [name for name, there in wanted.items() if not there]
    if missing or contract is None:
        raise BundleError(
            f"{bundle.path} holds a model, not a policy: it has no {', no '.join(missing)}. "
            "Open it as a Sampler, or export it again with them"
        )
    _check_contract(bundle, contract)
    fast = contract.fast
    has_codec = fast is not None and f"assets/{fast.folder}/tokenizer.json" in manifest.files
    return PolicyAssets(
        contract,
        read_tokenizer(bundle, contract),
        read_norm_stats(bundle.file(NORM_STATS)) if "norm_stats" in wanted else {},
        bundle.path / "assets" / fast.folder if fast is not None and has_codec else None,
    )


def _check_contract(bundle: Bundle, contract: PolicyContract) -> None:
    config = bundle.manifest.config
    size = config.vision.image_size
    pairs = {
        "model_action_dim": (contract.model_action_dim, config.action_dim),
        "action_horizon": (contract.action_horizon, config.action_horizon),
        "image_size": (contract.image_size, (size, size)),
        f"pictures ({contract.resize})": (contract.pictures, config.pictures),
    }
    for name, (said, is_) in pairs.items():
        if said != is_:
            raise BundleError(f"{bundle.path}: the contract's {name} is {said}, the model's {is_}: export it again")
    if config.rtc == "trained" and contract.rtc_max_delay is None:
        raise BundleError(
            f"{bundle.path}: the model's rtc is trained, and the contract has no rtc_max_delay: export it again"
        )
    if config.has_state and contract.state_dim > config.state_size:
        raise BundleError(
            f"{bundle.path}: the contract's state has {contract.state_dim} numbers, the model takes at most "
            f"{config.state_size}: export it again"
        )


def _batch(inputs: ModelInputs) -> tuple[npt.NDArray[Any], ...]:
    """The four prefix inputs with a batch axis of one."""
    mask = np.ones(inputs.prompt_tokens.shape, np.bool_)
    return inputs.images[None], inputs.camera_mask[None], inputs.prompt_tokens[None], mask[None]


def _state(inputs: ModelInputs, config: Pi05Config) -> npt.NDArray[np.float32] | None:
    """The state as a tensor f32 [1, Z] for a π0; a π0.5 has it in its prompt."""
    return pad_last(inputs.state, config.state_size).astype(np.float32)[None] if config.has_state else None


class _Stopwatch:
    """Milliseconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter_ns()

    def lap(self, name: str) -> None:
        now = time.perf_counter_ns()
        self.laps[name] = (now - self._last) / 1e6
        self._last = now
