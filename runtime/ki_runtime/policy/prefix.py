"""Images and prompt to K/V: the checks, the dropping of what nobody attends to, and the prefix graph.

A camera that is absent, or a prompt column that is padding, in every row of the batch never influences a valid token
(SPEC: masked tokens are invisible and take no position), so it is dropped before the graph runs. With a batch of one
nothing but what exists is computed, except where an engine wants few shapes: there the kept prompt is padded, masked,
to the session's `prompt_bucket`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.arguments import array_of
from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError
from ki_edge.graphs import EMBEDDED
from ki_edge.policy.images import HIGHEST, LOWEST
from ki_runtime.backends.session import Binding, Bucket, Buffer, Session, Storage

from .embeddings import EmbeddingTable
from .room import clean

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
MAX_PLANS = 32
EMBEDDINGS = EMBEDDED["prompt_tokens"].name
# What one call may ask for: far above every policy, so that a slip does not take all memory.
MAX_BATCH, MAX_CAMERAS, MAX_PROMPT = 1024, 64, 4096


@dataclass(frozen=True, eq=False)
class PrefixInputs:
    """One batch of observations: checked, and holding only the columns that some row uses.

    `columns`: the place of each kept token in the untrimmed prefix of N*P + T tokens, i64 [S].
    """

    images: npt.NDArray[np.uint8 | np.float32]  # [B, N, h, w, 3] RGB, of the type that the model's pictures have
    camera_mask: Bool  # [B, N]
    prompt_tokens: Int32  # [B, T]
    prompt_mask: Bool  # [B, T], True first
    columns: npt.NDArray[np.int64]  # [S]

    @property
    def batch(self) -> int:
        return self.camera_mask.shape[0]

    def mask(self, patches: int) -> Bool:
        """Which prefix tokens are valid, bool [B, S]; what the graph gives as `prefix_mask`."""
        return np.concatenate([np.repeat(self.camera_mask, patches, axis=1), self.prompt_mask], axis=1)


def prepare_inputs(
    images: npt.ArrayLike,
    camera_mask: npt.ArrayLike,
    prompt_tokens: npt.ArrayLike,
    prompt_mask: npt.ArrayLike,
    config: Pi05Config,
) -> PrefixInputs:
    """Check and trim. images u8 [B, N, h, w, 3], masks bool [B, N] and [B, T], prompt_tokens integer [B, T].

    Where `config.pictures` is float32, images are f32 in [-1, 1], -3 in a margin of LeRobot 0.4; of absent cameras too.
    ArgumentError says what does not fit. A batch whose cameras are all absent keeps its first one, masked.
    """
    images, camera_mask = array_of(images, "images"), array_of(camera_mask, "camera_mask")
    tokens, prompt_mask = array_of(prompt_tokens, "prompt_tokens"), array_of(prompt_mask, "prompt_mask")
    _check_images(images, camera_mask, config)
    _check_prompt(tokens, prompt_mask, images.shape[0], config.vocab_size)
    cameras = np.asarray(camera_mask.any(axis=0))
    cameras[0] |= not cameras.any()
    length = int(prompt_mask.sum(axis=1).max())
    patches = config.vision.patches
    return PrefixInputs(
        images=images[:, cameras],
        camera_mask=camera_mask[:, cameras],
        prompt_tokens=np.where(prompt_mask, tokens, 0)[:, :length].astype(np.int32),
        prompt_mask=prompt_mask[:, :length],
        columns=np.flatnonzero(np.concatenate([np.repeat(cameras, patches), np.ones(length, np.bool_)])),
    )


def prepare_state(state: npt.ArrayLike | None, batch: int, config: Pi05Config) -> dict[str, npt.NDArray[np.float32]]:
    """The denoise graph's inputs that an observation holds: {"state": f32 [B, Z]} for a π0, else nothing. Checked.

    ArgumentError if the state is missing, unwanted, not finite, or of another shape or type.
    """
    if not config.has_state:
        if state is not None:
            raise ArgumentError("state: this model is a π0.5, which reads the state in its prompt; leave it out")
        return {}
    shape = (batch, config.state_size)
    if state is None:
        raise ArgumentError(f"state: missing; this model is a π0, which takes it as float32 {list(shape)}, normalised")
    given = array_of(state, "state")
    if given.shape != shape or given.dtype != np.float32:
        raise ArgumentError(f"state: expected float32 {list(shape)}, got {_describe(given)}")
    if not np.isfinite(given).all():
        raise ArgumentError("state holds NaN or infinity")
    return {"state": given}


def _check_images(images: npt.NDArray[Any], camera_mask: npt.NDArray[Any], config: Pi05Config) -> None:
    size, pictures = config.vision.image_size, config.pictures
    if images.dtype != pictures or images.ndim != 5 or images.shape[2:] != (size, size, 3) or 0 in images.shape:
        how = "; ki_edge.policy.images.model_pictures makes them of bytes" if pictures == "float32" else ""
        raise ArgumentError(f"images: expected {pictures} [B, N, {size}, {size}, 3], got {_describe(images)}{how}")
    if images.shape[0] > MAX_BATCH or images.shape[1] > MAX_CAMERAS:
        raise ArgumentError(
            f"images: {_describe(images)} has {images.shape[0]} observations of {images.shape[1]} cameras, at most "
            f"{MAX_BATCH} of {MAX_CAMERAS} in one call"
        )
    if pictures == "float32" and not (images.min() >= LOWEST and images.max() <= HIGHEST):  # NaN fails too
        found = f"{images.min():.3g}..{images.max():.3g}"
        raise ArgumentError(
            f"images: expected numbers in [-1, 1], {LOWEST:.0f} in a margin of LeRobot 0.4, got {found}"
        )
    if camera_mask.dtype != np.bool_ or camera_mask.shape != images.shape[:2]:
        raise ArgumentError(f"camera_mask: expected bool {list(images.shape[:2])}, got {_describe(camera_mask)}")


def _check_prompt(tokens: npt.NDArray[Any], mask: npt.NDArray[Any], batch: int, vocab_size: int) -> None:
    if tokens.dtype.kind not in "iu" or tokens.ndim != 2 or tokens.shape[0] != batch or tokens.shape[1] == 0:
        raise ArgumentError(f"prompt_tokens: expected integers [{batch}, T], got {_describe(tokens)}")
    if tokens.shape[1] > MAX_PROMPT:
        raise ArgumentError(f"prompt_tokens: {tokens.shape[1]} tokens a prompt, at most {MAX_PROMPT}")
    if mask.dtype != np.bool_ or mask.shape != tokens.shape:
        raise ArgumentError(f"prompt_mask: expected bool {list(tokens.shape)}, got {_describe(mask)}")
    if not mask[:, 0].all():
        row = int(np.flatnonzero(~mask[:, 0])[0])
        raise ArgumentError(f"prompt_mask: row {row} does not start with a token; prompts are left-aligned, not empty")
    if (mask[:, 1:] > mask[:, :-1]).any():
        row = int(np.flatnonzero((mask[:, 1:] > mask[:, :-1]).any(axis=1))[0])
        raise ArgumentError(f"prompt_mask: row {row} has a gap; padding belongs behind the prompt")
    bad = tokens[mask & ((tokens < 0) | (tokens >= vocab_size))]
    if bad.size:
        raise ArgumentError(f"prompt_tokens: id {int(bad[0])} is outside the model's vocabulary 0..{vocab_size - 1}")


def _describe(array: npt.NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"


@dataclass(frozen=True, eq=False)
class Prefix:
    """What the prefix graph left on the device. Valid until the next run of the stage that made it.

    S is what the graph ran with: the tokens of `PrefixInputs`, and masked ones behind them if the prompt was padded.
    """

    k: Buffer  # f32 [L, B, K, S, D], after RoPE
    v: Buffer  # f32 [L, B, K, S, D]
    mask: Buffer  # bool [B, S]

    @property
    def batch(self) -> int:
        return self.mask.shape[0]


@dataclass(frozen=True, eq=False)
class _Plan:
    inputs: dict[str, Buffer]
    prefix: Prefix
    once: Binding
    sequence: Binding  # the same, which a backend may record and replay


class PrefixStage:
    """The prefix graph with its memory. Bindings are kept per shape; all shapes share one memory.

    `table`: the embeddings, for a graph that takes their rows in the place of tokens.
    """

    def __init__(self, session: Session, table: EmbeddingTable | None = None) -> None:
        self._session, self._table = session, table
        self.forget()

    @property
    def prompt_bucket(self) -> Bucket:
        """The lengths that prompts are padded to."""
        return self._session.prompt_bucket

    def run(self, inputs: PrefixInputs) -> Prefix:
        """Write the inputs, run the graph; the result stays on the device."""
        return self._run(inputs, lambda plan: plan.sequence)

    def run_eagerly(self, inputs: PrefixInputs) -> Prefix:
        """The same, never from a record."""
        return self._run(inputs, lambda plan: plan.once)

    def _run(self, inputs: PrefixInputs, choose: Callable[[_Plan], Binding]) -> Prefix:
        with clean(self):
            plan = self._plan(inputs)
            for name, buffer in plan.inputs.items():
                if self._table is not None and name == EMBEDDINGS:
                    buffer.write(self._table.rows(_padded(inputs.prompt_tokens, buffer.shape[:2])))
                else:
                    buffer.write(_padded(getattr(inputs, name), buffer.shape))
            choose(plan).run()
        return plan.prefix

    def wait(self) -> None:
        """Until the last run is done, where a device only queued it."""
        if self._plans:
            next(reversed(self._plans.values())).prefix.mask.read()

    def drop_oldest(self) -> bool:
        """Let go of the plan that was not used for longest, and with it of what others bound to its K/V."""
        if len(self._plans) < 2:
            return False
        self._plans.popitem(last=False)
        return True

    def forget(self) -> None:
        """Let go of all memory: nothing of a failed run is left for later ones."""
        self._storage = Storage(self._session)
        self._plans: OrderedDict[tuple[int, int, int], _Plan] = OrderedDict()

    def _plan(self, inputs: PrefixInputs) -> _Plan:
        length = self._session.prompt_bucket.fit(inputs.prompt_tokens.shape[1])
        key = (inputs.batch, inputs.images.shape[1], length)
        plan = self._plans.get(key)
        if plan is None:
            growths = self._storage.growths
            plan = self._bind(*key)
            if self._storage.growths != growths:  # older plans hold the memory that was just replaced
                self._plans.clear()
            self._plans[key] = plan
        self._plans.move_to_end(key)
        if len(self._plans) > MAX_PLANS:
            self._plans.popitem(last=False)
        return plan

    def _bind(self, batch: int, cameras: int, length: int) -> _Plan:
        sizes = self._session.sizes
        symbols = {**sizes, "B": batch, "N": cameras, "T": length, "S": cameras * sizes["P"] + length}
        spec = self._session.spec
        buffers = {tensor.name: self._storage.take(tensor, symbols) for tensor in (*spec.inputs, *spec.outputs)}
        once = self._session.bind(buffers)
        return _Plan(
            inputs={tensor.name: buffers[tensor.name] for tensor in spec.inputs},
            prefix=Prefix(buffers["prefix_k"], buffers["prefix_v"], buffers["prefix_mask"]),
            once=once,
            sequence=self._session.sequence((once,)),
        )


def _padded(array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """`array` with zeros behind its second axis up to `shape`: token 0, masked."""
    if array.shape == shape:
        return array
    padded = np.zeros(shape, array.dtype)
    padded[:, : array.shape[1]] = array
    return padded
