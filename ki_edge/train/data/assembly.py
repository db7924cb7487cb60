"""Rows of a step as a Batch: frames and text samples fetched, fitted to the model's size, encoded, and drawn for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ki_edge.errors import DatasetError, KiEdgeError
from ki_edge.model import Observation
from ki_edge.planning.settings import TrainSettings
from ki_edge.policy.images import fit_image
from ki_edge.train.step.batch import ACTIONS, TEXT, Batch

from .augmentation import augment
from .cache import FrameCache
from .draws import AUGMENTATION, DRAWS, HELD_DRAWS, Draws, draw
from .mapping import is_wrist
from .mixture import Mixture
from .recipe import Recipe
from .source import ActionSource, picture_of, relative
from .texts import TextSet

PLACE = re.compile(r"<(loc|seg)\d+>")
UInt8 = npt.NDArray[np.uint8]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Row:
    """One sample, encoded. `images` u8 [N,h,w,3], `mask` bool [N], `actions` f32 [H,A], `real` bool [H]."""

    images: UInt8
    mask: npt.NDArray[np.bool_]
    prompt: Int32
    postfix: Int32
    actions: npt.NDArray[np.float32]
    real: npt.NDArray[np.bool_]
    dims: int
    draws: Draws
    kind: int
    source: int
    task: int
    number: int


@dataclass(frozen=True, eq=False)
class TextSource:
    """A text set in a mixture. `slots`: the number of the slot that takes a picture, by its name; `trained`, `held`:
    which of its samples are trained on and which held out, i64."""

    name: str
    texts: TextSet
    slots: dict[str, int]
    trained: npt.NDArray[np.int64]
    held: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Assembler:
    """Makes batches in any process. Sources are numbered: those of actions first, then those of texts.

    `tasks`: of each source, the numbers of its tasks among all of the mixture; a text set is one task.
    """

    actions: tuple[ActionSource, ...]
    texts: tuple[TextSource, ...]
    tasks: tuple[tuple[int, ...], ...]
    recipe: Recipe
    settings: TrainSettings
    mixture: Mixture
    caches: tuple[FrameCache | None, ...]

    def batch(self, step: int, first: int, last: int) -> Batch:
        """The rows from `first` to `last` (exclusive) of a step's batch."""
        plan, seed, rows = self.mixture.plan(step), self.settings.seed, []
        for row in range(first, last):
            source, sample, epoch = (int(part[row]) for part in (plan.source, plan.sample, plan.epoch))
            rows.append(
                self._row(source, sample, (seed, DRAWS, step, row), (seed, AUGMENTATION, source, epoch, sample))
            )
        return _collate(rows, tokens=self.settings.fast_loss)

    def held_out(self, samples: Sequence[tuple[int, int]]) -> Batch:
        """Samples (source, number among its held out ones), each with draws of its own that are always the same."""
        seed = self.settings.seed
        rows = [
            self._row(source, number, (seed, HELD_DRAWS, source, number), None, held=True) for source, number in samples
        ]
        return _collate(rows, tokens=self.settings.fast_loss)

    def _row(
        self, source: int, sample: int, drawn: tuple[int, ...], augmented: tuple[int, ...] | None, held: bool = False
    ) -> Row:
        augmentation = augmented if self.settings.augment else None
        if source < len(self.actions):
            return self._frame(source, self.actions[source].row(sample, held), drawn, augmentation)
        spoken = self.texts[source - len(self.actions)]
        return self._text(source, int((spoken.held if held else spoken.trained)[sample]), drawn, augmentation)

    def _frame(self, number: int, row: int, drawn: tuple[int, ...], augmented: tuple[int, ...] | None) -> Row:
        source, recipe = self.actions[number], self.recipe
        state = source.arrays["state"][row]
        chunk, real = source.chunk(row, recipe.config.action_horizon)
        chunk = relative(chunk[None], state[None], source.delta_mask)[0]
        actions = np.zeros((len(chunk), recipe.config.action_dim), np.float32)
        actions[:, : source.action_dim] = recipe.normalize_actions(number, chunk)
        try:
            prompt, postfix = recipe.encode_actions(
                source.task(row), recipe.normalize_state(number, state), actions[:, : source.action_dim]
            )
        except KiEdgeError as error:
            raise DatasetError(f"{source.told(row)}: {error}") from None
        if not self.settings.fast_loss:
            postfix = postfix[:0]
        images, mask = self._pictures(number, row)
        images = self._augmented(images, mask, self._wrists(number), augmented)
        draws = draw(self.settings, drawn, actions, source.action_dim)
        task = self.tasks[number][int(source.arrays["task"][row])]
        return Row(
            images, mask, prompt, postfix, actions, real, source.action_dim, draws, ACTIONS, number, task, row
        )  # fmt: skip

    def _text(self, number: int, index: int, drawn: tuple[int, ...], augmented: tuple[int, ...] | None) -> Row:
        source, recipe = self.texts[number - len(self.actions)], self.recipe
        sample = source.texts.sample(index)
        images, mask = self._empty()
        for name, picture in sample.pictures.items():
            slot = source.slots[name]
            images[slot], mask[slot] = self._fit(picture, f"{source.texts.where(index)}, {name}"), True
        moves = PLACE.search(sample.answer) is None  # an answer's places are those of the pictures as they are
        images = self._augmented(images, mask, self._wrists(0) if moves else [True] * len(mask), augmented)
        try:
            prompt, postfix = recipe.encode_text(sample.question, sample.answer)
        except KiEdgeError as error:
            raise DatasetError(f"{source.texts.where(index)}: {error}") from None
        nothing = np.zeros((recipe.config.action_horizon, recipe.config.action_dim), np.float32)
        draws = draw(self.settings, drawn, nothing, 0)
        real = np.zeros(len(nothing), np.bool_)
        return Row(
            images, mask, prompt, postfix, nothing, real, 0, draws, TEXT, number, self.tasks[number][0], index
        )  # fmt: skip

    def _empty(self) -> tuple[UInt8, npt.NDArray[np.bool_]]:
        size, slots = self.recipe.config.vision.image_size, len(self.recipe.contracts[0].cameras)
        return np.zeros((slots, size, size, 3), np.uint8), np.zeros(slots, np.bool_)

    def _pictures(self, number: int, row: int) -> tuple[UInt8, npt.NDArray[np.bool_]]:
        source, cache = self.actions[number], self.caches[number]
        images, mask = self._empty()
        taken = [slot for slot, camera in enumerate(source.cameras) if camera.key is not None]
        mask[taken] = True
        kept = None if cache is None else cache.get(row)
        if kept is None:
            fitted = [
                self._fit(picture_of(source, row, at), source.features[at]) for at in range(len(source.features))
            ]  # fmt: skip
            kept = np.stack(fitted)
            if cache is not None:
                cache.put(row, kept)
        images[taken] = kept
        return images, mask

    def _fit(self, picture: UInt8, name: str) -> UInt8:
        """A picture at the model's size. What LeRobot's resizing gives as numbers is rounded to bytes."""
        size, resize = self.recipe.config.vision.image_size, self.recipe.contracts[0].resize
        fitted = fit_image(picture, size, size, resize, name)
        if fitted.dtype == np.uint8:
            return np.asarray(fitted, np.uint8)
        rounded: UInt8 = np.rint((np.clip(fitted, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
        return rounded

    def _wrists(self, number: int) -> list[bool]:
        return [is_wrist(camera.slot, camera.key) for camera in self.recipe.contracts[number].cameras]

    def _augmented(
        self, images: UInt8, mask: npt.NDArray[np.bool_], wrist: Sequence[bool], key: tuple[int, ...] | None
    ) -> UInt8:
        if key is None:
            return images
        present = np.flatnonzero(mask)
        changed = augment(images[present], [wrist[at] for at in present], np.random.default_rng(key))
        found = images.copy()
        found[present] = changed
        return found


def _collate(rows: Sequence[Row], *, tokens: bool) -> Batch:
    """Rows as tensors, tokens padded to the longest; `tokens`: whether the run has postfixes at all."""
    prompt, prompt_mask = _padded([row.prompt for row in rows])
    # also where no row has one: every process and every step computes the same loss, of the same parameters
    postfix, postfix_mask = _padded([row.postfix for row in rows])
    width = rows[0].actions.shape[1]
    delay = [row.draws.delay for row in rows if row.draws.delay is not None]
    given = [row.draws.given for row in rows if row.draws.given is not None]
    return Batch(
        observation=Observation(
            images=torch.from_numpy(np.stack([row.images for row in rows])),
            camera_mask=torch.from_numpy(np.stack([row.mask for row in rows])),
            prompt_tokens=prompt,
            prompt_mask=prompt_mask,
            fast_tokens=postfix if tokens else None,
            fast_mask=postfix_mask if tokens else None,
        ),
        actions=torch.from_numpy(np.stack([row.actions for row in rows])),
        real=torch.from_numpy(np.stack([row.real for row in rows])),
        dims=torch.from_numpy(np.arange(width) < np.array([row.dims for row in rows])[:, None]),
        noise=_by_draw([row.draws.noise for row in rows]),
        time=_by_draw([row.draws.time for row in rows]),
        delay=_by_draw(delay) if delay else None,
        given=_by_draw(given) if given else None,
        **{name: torch.tensor([getattr(row, field) for row in rows]) for name, field in NUMBERS},
    )


NUMBERS = (("kind", "kind"), ("source", "source"), ("task", "task"), ("row", "number"))


def _by_draw(rows: Sequence[npt.NDArray[Any]]) -> torch.Tensor:
    """[R,...] of B rows -> [R*B,...], draw by draw."""
    stacked = np.stack(rows, axis=1)
    return torch.from_numpy(np.ascontiguousarray(stacked.reshape(-1, *stacked.shape[2:])))


def _padded(rows: Sequence[Int32]) -> tuple[torch.Tensor, torch.Tensor]:
    counts = np.array([len(row) for row in rows])
    mask = np.arange(max(1, counts.max()))[None] < counts[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = np.concatenate(rows)
    return torch.from_numpy(ids), torch.from_numpy(mask)
