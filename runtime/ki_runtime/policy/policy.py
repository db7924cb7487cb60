"""A bundle as a policy: an observation of the robot in, a chunk of robot actions out."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import array_of
from ki_edge.bundle import Bundle
from ki_edge.commands import tell
from ki_edge.errors import ArgumentError, BundleError, KiEdgeError
from ki_edge.policy.answers import Answers
from ki_edge.policy.chunking import Guiding, PreviousChunk, Way, overlap_of
from ki_edge.policy.contract import FastContract
from ki_edge.policy.fast import FastCodec, FastIds
from ki_edge.policy.transforms import InputPipeline, ModelInputs, OutputPipeline

from .answering import Answering
from .assets import PolicyAssets, read_assets
from .decode import check_words
from .guard import finite_actions
from .rows import Question, Row, run_rows
from .sampler import Sampler
from .sampler_arguments import WITHOUT_RTC, noise_of
from .training_range import TrainingRange
from .warming import Prepared, warm_up

Float64 = npt.NDArray[np.float64]


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
        sequential: bool = False,
        say: Callable[[str], object] | None = None,
    ) -> Policy:
        """Open a bundle as a policy. Arguments and errors as of `Sampler.open`.

        BundleError names what is missing if the bundle holds the model alone.
        """
        sampler = Sampler.open(
            bundle,
            backend,
            threads=threads,
            verify=verify,
            build=build,
            trust_engines=trust_engines,
            sequential=sequential,
            say=say,
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
        row = self._row(Question(observation, noise, seed, num_steps, previous, way, guiding))
        clock = _Stopwatch()
        actions = run_rows(self.sampler, [row])[0]
        clock.lap("model_ms")
        return self._answer(row, actions, clock)

    def infer_many(self, questions: Sequence[Question]) -> list[dict[str, Any] | KiEdgeError]:
        """Answers to several questions, as of `infer` each, or the error that it would have raised.

        Those of one kind (`Row.kind`) run as one batch: an answer differs from that of a question alone by float32
        rounding, 1e-5 at most in the model's space. Where a batch fails its questions are asked one by one. The time of
        the model is the batch's, "batch" how many were in it.
        """
        found: list[dict[str, Any] | KiEdgeError] = [ArgumentError("not asked")] * len(questions)
        kinds: dict[Hashable, list[tuple[int, Row]]] = {}
        for place, question in enumerate(questions):
            try:
                row = self._row(question)
            except KiEdgeError as error:
                found[place] = error
            else:
                kinds.setdefault(row.kind, []).append((place, row))
        for together in kinds.values():
            for (place, _), answer in zip(together, self._answers([row for _, row in together]), strict=True):
                found[place] = answer
        return found

    def _answers(self, rows: Sequence[Row]) -> list[dict[str, Any] | KiEdgeError]:
        """Of rows of one kind."""
        clock = _Stopwatch()
        try:
            actions = run_rows(self.sampler, rows)
        except KiEdgeError as error:
            return [error] if len(rows) == 1 else [answer for row in rows for answer in self._answers([row])]
        clock.lap("model_ms")
        answers: list[dict[str, Any] | KiEdgeError] = []
        for row, own in zip(rows, actions, strict=True):
            try:
                answer = self._answer(row, own, clock.copy())
                answer["timing"]["batch"] = len(rows)
                answers.append(answer)
            except KiEdgeError as error:
                answers.append(error)
        return answers

    def _row(self, question: Question) -> Row:
        """A question, ready for the model. ObservationError, ArgumentError."""
        clock = _Stopwatch()
        previous = question.previous
        way = None if previous is None else self._way(question.way)
        inputs = self._read(question.observation)
        overlap = None
        if previous is not None and way is not None:
            stats, raw = self._outputs.stats, inputs.raw_state
            overlap = overlap_of(previous, self.contract, stats, raw, way=way, guiding=question.guiding)
        noise = question.noise
        if noise is not None:
            noise = array_of(noise, "noise")
            noise = noise[None] if noise.ndim == 2 else noise
        drawn = noise_of(noise, question.seed, 1, self.sampler.config)
        clock.lap("preprocess_ms")
        return Row(inputs, drawn, question.num_steps, overlap, clock.laps["preprocess_ms"])

    def _answer(self, row: Row, actions: npt.NDArray[np.float32], clock: _Stopwatch) -> dict[str, Any]:
        """What a row's actions are for the robot. BackendError if one is not finite in float32."""
        robot_actions = self._outputs(actions, row.inputs.raw_state)
        finite_actions(robot_actions, self.contract.action_names)
        clock.lap("postprocess_ms")
        clock.laps["preprocess_ms"] = row.preprocess_ms
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


def _batch(inputs: ModelInputs) -> tuple[npt.NDArray[Any], ...]:
    """The four prefix inputs with a batch axis of one."""
    mask = np.ones(inputs.prompt_tokens.shape, np.bool_)
    return inputs.images[None], inputs.camera_mask[None], inputs.prompt_tokens[None], mask[None]


class _Stopwatch:
    """Milliseconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter_ns()

    def copy(self) -> _Stopwatch:
        """Goes on from here by itself."""
        other = _Stopwatch()
        other.laps = dict(self.laps)
        return other

    def lap(self, name: str) -> None:
        now = time.perf_counter_ns()
        self.laps[name] = (now - self._last) / 1e6
        self._last = now
