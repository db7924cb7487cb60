"""A bundle as a model: tensors in, tensors out, no robot and no tokenizer. `Policy` builds on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock, RLock, local

import numpy as np
import numpy.typing as npt

from ki_edge import flow, graphs
from ki_edge.bundle import Bundle
from ki_edge.commands import tell
from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError, BackendError
from ki_edge.graphs import GraphSpec
from ki_edge.overlap import Overlap
from ki_runtime.backends.backend import Backend, SessionOptions
from ki_runtime.backends.registry import Connection, check_name, connect
from ki_runtime.backends.session import Bucket, Loaded, Session

from .choosing import measure_once
from .decode import Choices, Chooser, check_decoding, check_words, choices_of
from .denoise import DenoiseStage
from .drawing import drawing
from .opening import detached, folder_of, sampling_of
from .prefix import PrefixInputs, PrefixStage, prepare_inputs, prepare_state
from .proof import Prover
from .room import Result, within_memory
from .sampler_arguments import check_finite, check_overlap, noise_of
from .stages import SequentialStages, Stages
from .trace import StageTimes, Trace
from .verdict import ACTIONS, FAST

F32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


class Sampler:
    """The graphs of a bundle over one backend. Calls from several threads wait for each other.

    `sequential`: one graph in memory at a time, loaded again for every inference.
    """

    def __init__(
        self,
        bundle: Bundle,
        open_graph: Callable[[GraphSpec], Session],
        backend: Backend | None = None,
        *,
        sequential: bool = False,
    ) -> None:
        self.bundle = bundle
        self.backend = backend  # what runs it, and why the backends before it were passed over; None: not by name
        self._times = local()
        self._lock = Lock()
        self._config = bundle.manifest.config
        convention, self._num_steps = sampling_of(bundle)
        self._stages = (SequentialStages if sequential else Stages)(bundle, open_graph, convention)
        self._unproven: Prover | None = None  # what proves FAST tokens before the first of them
        self._proving = RLock()
        self._choices: dict[bool, Choices] = {}

    @classmethod
    def open(
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
    ) -> Sampler:
        """Open a bundle folder, or take an opened one.

        `threads`: CPU threads of a graph; `verify`: check all hashes, and as text also that the bundle has this digest,
        the one that its export printed; `build`: build TensorRT engines that are missing, which takes minutes to tens
        of minutes; `trust_engines`: also load engines for the lean runtime that were not built here, which run code
        that they bring; `sequential`: keep one graph in memory at a time and load it again for every inference, which
        is told with the seconds that it takes; `say`: told which backend was taken and why, and how building and
        proving engines come along; None: to stderr, and the backend only if it is slow for this bundle, nothing proves
        it, or another that is installed was passed over.

        BundleError for a damaged bundle; BackendError for a backend that is missing, refuses a graph, does not
        reproduce the bundle's witness, or whose engines are missing and are not to be built: it says the command.
        """
        check_name(backend)
        opened = (
            bundle
            if isinstance(bundle, Bundle) and verify is False
            else Bundle.open(folder_of(bundle), verify=verify, say=say or tell)
        )
        options = SessionOptions(
            threads,
            record=False if sequential else None,  # a record dies with its session
            say=say or tell,
            verify=verify is not False,
            build=build,
            trust=trust_engines,
        )
        first = () if sequential else graphs.specs(opened.manifest.config)

        def proven(name: str) -> Sampler:
            return cls._proven(opened, connect(opened, name, options, first), options, sequential)

        # in turn, most of an inference is loading; with so many threads, others' starts would be decided by it
        if backend == "auto" and not sequential and threads is None:
            measure_once(opened, proven, options.say)
        sampler = proven(backend)
        if isinstance(sampler._stages, SequentialStages):
            options.say(sampler._stages.describe())
        chosen = sampler.backend
        precision = opened.manifest.precision
        if chosen is not None and (say is not None or chosen.surprising(precision)):
            options.say(chosen.describe(precision))
        opened.check_unchanged()  # at last: all that was opened belongs to the manifest that was read
        return sampler

    @classmethod
    def _proven(cls, bundle: Bundle, connection: Connection, options: SessionOptions, sequential: bool) -> Sampler:
        """The sampler of the first backend that reproduces the witness; FAST tokens are proven when they are wanted."""
        while True:
            sampler: Sampler | None = None
            try:
                sampler = cls(bundle, connection.open, connection.backend, sequential=sequential)
                prover = Prover(bundle, connection.backend, options)
                sampler.backend = replace(connection.backend, proof=prover.require(ACTIONS, sampler))
                sampler._unproven = prover
            except BackendError as error:
                refused, following = detached(error), connection.instead
            else:
                return sampler
            del sampler, connection  # their memory may be needed by the next
            connection = following(refused)

    @property
    def config(self) -> Pi05Config:
        """The model's geometry."""
        return self._config

    @property
    def timing(self) -> StageTimes:
        """Of this thread's last call: those of other threads never mix in."""
        times: StageTimes = getattr(self._times, "last", StageTimes())
        return times

    @property
    def prompt_bucket(self) -> Bucket:
        """The lengths that prompts are padded to."""
        return self._stages.prompt_bucket

    @property
    def num_steps(self) -> int:
        """Denoising steps when a call does not say."""
        return self._num_steps

    @property
    def sequential(self) -> bool:
        """Whether one graph is in memory at a time."""
        return self._stages.sequential

    def sample_actions(
        self,
        images: npt.ArrayLike,
        camera_mask: npt.ArrayLike,
        prompt_tokens: npt.ArrayLike,
        prompt_mask: npt.ArrayLike,
        *,
        state: npt.ArrayLike | None = None,
        noise: npt.ArrayLike | None = None,
        seed: int | None = None,
        num_steps: int | None = None,
        overlap: Overlap | None = None,
    ) -> F32:
        """Actions f32 [B, H, A] in the model's normalised space.

        images u8 [B, N, h, w, 3] RGB (f32 in [-1, 1] where `config.pictures` is float32), camera_mask bool [B, N],
        prompt_tokens integer [B, T], prompt_mask bool [B, T];
        state f32 [B, A], for a π0 alone: normalised, zeros past the robot's numbers;
        noise f32 [B, H, A] (x at t = 1), or drawn from `seed` (None: a fresh one);
        overlap: the chunks before, which these continue, for a bundle with real-time chunking (`config.rtc`).
        ArgumentError for what does not fit, BackendError for actions that are not finite.
        """
        inputs = prepare_inputs(images, camera_mask, prompt_tokens, prompt_mask, self._config)
        once = prepare_state(state, inputs.batch, self._config)
        steps = self._steps(num_steps)
        x = noise_of(noise, seed, inputs.batch, self._config)
        check_overlap(overlap, inputs.batch, self.bundle)

        def run() -> F32:
            start = time.perf_counter_ns()
            prefix = self._prefix.run(inputs)
            middle = time.perf_counter_ns()
            # K/V lie in the prefix stage's own memory: they are read before its next run, which the lock keeps away
            actions = self._denoise.run(prefix, x, steps, once, overlap)
            self._times.last = StageTimes(prefix=middle - start, denoise=time.perf_counter_ns() - middle)
            return actions

        actions = self._alone(run)  # arguments were checked before: a wrong call waits for nobody
        check_finite(actions, self.bundle.manifest.precision)
        return actions

    def sample_fast_tokens(
        self,
        images: npt.ArrayLike,
        camera_mask: npt.ArrayLike,
        prompt_tokens: npt.ArrayLike,
        prompt_mask: npt.ArrayLike,
        *,
        max_tokens: int,
        forced: Sequence[int] = (),
        constrained: bool = True,
        stop: Callable[[], bool] | None = None,
    ) -> Int64:
        """Greedy continuation of the prompt: ids i64 [B, n] of the model's vocabulary, n <= max_tokens.

        `forced` ids are fed first and are not returned. A row ends at EOS and is padded with it. `constrained` allows
        only the FAST ids, "|" and EOS. `stop` is asked before each stage and after each token, and ends all rows there.
        Inputs as in `sample_actions`; ArgumentError for what does not fit, and for a bundle without the FAST head.
        """
        self._check_fast()
        inputs = prepare_inputs(images, camera_mask, prompt_tokens, prompt_mask, self._config)
        forced = check_decoding(max_tokens, forced, self._config.vocab_size)
        if not isinstance(constrained, bool | np.bool_):
            raise ArgumentError(f"constrained {constrained!r:.60}: expected True or False")
        constrained = bool(constrained)
        return self._decode(inputs, lambda: self._choices_of(constrained), max_tokens, forced, stop)

    def sample_text_tokens(
        self,
        images: npt.ArrayLike,
        camera_mask: npt.ArrayLike,
        prompt_tokens: npt.ArrayLike,
        prompt_mask: npt.ArrayLike,
        *,
        allowed: Sequence[int] | Int64,
        eos_id: int,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Int64:
        """A text that continues the prompt: ids i64 [B, n], n <= max_tokens, all of them `allowed`.

        A row ends at `eos_id` and is padded with it. The most likely tokens, or with a `temperature` above 0 drawn ones
        (`seed` None: others each time). `stop` as in `sample_fast_tokens`, inputs as in `sample_actions`. ArgumentError
        for what does not fit, and for a bundle without the whole vocabulary.
        """
        check_words(self.bundle)
        inputs = prepare_inputs(images, camera_mask, prompt_tokens, prompt_mask, self._config)
        check_decoding(max_tokens, (), self._config.vocab_size)
        ids = np.unique(np.append(np.asarray(allowed, np.int64), eos_id))
        if ids[0] < 0:
            raise ArgumentError(f"allowed id {ids[0]} is not a token: expected 0 to {self._config.vocab_size - 1}")
        chooser = drawing(Choices.of(self.bundle.manifest.vocabulary.ids, eos_id, ids), temperature, seed)
        return self._decode(inputs, lambda: chooser, max_tokens, [], stop)

    def _decode(
        self,
        inputs: PrefixInputs,
        chooser: Callable[[], Chooser],
        max_tokens: int,
        forced: Sequence[int],
        stop: Callable[[], bool] | None,
    ) -> Int64:
        self._prove_fast()

        def run() -> Int64:
            choices = chooser()
            tokens: Int64 = np.empty((inputs.batch, 0), np.int64)
            start = middle = time.perf_counter_ns()
            if stop is None or not stop():
                prefix = self._prefix.run(inputs)
                middle = time.perf_counter_ns()
                if stop is None or not stop():
                    tokens = self._stages.fast.run(prefix, inputs, choices, max_tokens, forced, stop)
            self._times.last = StageTimes(prefix=middle - start, fast=time.perf_counter_ns() - middle)
            return tokens

        return self._alone(run)

    def prepare_fast(self) -> None:
        """Open the FAST graph now rather than at its first use. BackendError if it cannot be opened, ArgumentError if
        the bundle has none.
        """
        self._check_fast()
        with self._lock:
            assert self._stages.fast is not None

    def trace(
        self,
        images: npt.ArrayLike,
        camera_mask: npt.ArrayLike,
        prompt_tokens: npt.ArrayLike,
        prompt_mask: npt.ArrayLike,
        *,
        state: npt.ArrayLike | None = None,
        noise: npt.ArrayLike | None = None,
        seed: int | None = None,
        num_steps: int | None = None,
        overlap: Overlap | None = None,
    ) -> Trace:
        """What `sample_actions` computes with the same arguments, with its K/V and x after every step."""
        inputs = prepare_inputs(images, camera_mask, prompt_tokens, prompt_mask, self._config)
        once = prepare_state(state, inputs.batch, self._config)
        steps = self._steps(num_steps)
        x = noise_of(noise, seed, inputs.batch, self._config)
        check_overlap(overlap, inputs.batch, self.bundle)

        def run() -> Trace:
            prefix = self._prefix.run_eagerly(inputs)
            states = self._denoise.states(prefix, x, steps, once, overlap)
            kept = inputs.columns.size  # a padded prompt has masked tokens behind them
            k, v, mask = prefix.k.read(), prefix.v.read(), prefix.mask.read()
            return Trace(k[..., :kept, :], v[..., :kept, :], mask[:, :kept], inputs.columns, states)

        return self._alone(run)

    def _alone(self, run: Callable[[], Result]) -> Result:
        """One call at a time, within the device's memory; what the host's cannot hold is an error of the backend."""
        with self._lock:
            try:
                return within_memory(self._stages.loaded, run)
            except MemoryError as error:
                for stage in self._stages.loaded():
                    stage.forget()
                raise BackendError(f"the host's memory does not suffice for this call: {error}") from None

    def _steps(self, num_steps: int | None) -> int:
        steps = self._num_steps if num_steps is None else num_steps
        flow.check_steps(steps)
        return steps

    def _choices_of(self, constrained: bool) -> Choices:
        if constrained not in self._choices:
            self._choices[constrained] = choices_of(self.bundle, constrained)
        return self._choices[constrained]

    def _check_fast(self) -> None:
        if not self.bundle.manifest.has_fast:
            raise ArgumentError(
                f"{self.bundle.path} was exported without the FAST head: export its checkpoint with --fast-head"
            )

    def _prove_fast(self) -> None:
        """Before the first FAST token. Other threads wait for it; within it, decoding is the proof itself."""
        with self._proving:
            prover, self._unproven = self._unproven, None
            if prover is not None:
                try:
                    self.prepare_fast()  # an engine must exist to be proven
                    prover.require(FAST, self)
                except BaseException:
                    self._unproven = prover
                    raise

    def session(self, graph: str) -> Session | None:
        """The session of a graph; None while it is not open."""
        return self._stages.session(graph)

    def facts(self, graph: str) -> Loaded | None:
        """What a graph was made of when it was last loaded, where that is more than the bundle's own graph."""
        return self._stages.facts(graph)

    @property
    def _prefix(self) -> PrefixStage:
        return self._stages.prefix

    @property
    def _denoise(self) -> DenoiseStage:
        return self._stages.denoise
