"""A dataset of actions as a source of samples: its frames in the parts of a policy, and which are trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import DatasetError
from ki_edge.policy.contract import Camera

from .frames import Frames
from .mapping import FeatureMap
from .pictures import Pictures
from .shared import SharedArrays
from .statistics import BLOCK, Measured, measure

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
MOST_HELD = 256  # samples of each dataset that are evaluated on
HELD, TAKEN = 21, 22  # tell the random numbers of one purpose from another's


@dataclass(frozen=True, eq=False)
class ActionSource:
    """F frames of E episodes. It can be given to a process that is being started: numbers are mapped, not copied.

    `cameras`: the model's slots in order; key None and not required where this dataset has none. `trained`, `held`:
    numbers of episodes by their place in the dataset. `stats`: of the frames that are trained on.
    """

    name: str
    where: str
    cameras: tuple[Camera, ...]
    features: tuple[str, ...]  # of the slots that have one, in order
    sizes: tuple[tuple[int, int], ...]  # of their pictures, (h, w)
    tasks: tuple[str, ...]
    state_dim: int
    action_dim: int
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    control_hz: float | None
    delta_mask: tuple[bool, ...] | None
    prompt: str | None
    pictures: Pictures
    arrays: SharedArrays  # state, action, timestamp, task, starts, numbers, trained, held, ends
    digests: Mapping[str, str]

    @property
    def frames(self) -> int:
        """All of them, held out or not."""
        return int(self.arrays["starts"][-1])

    @property
    def samples(self) -> int:
        """Frames that are trained on."""
        return int(self.arrays["ends"][-1])

    def row(self, sample: int, held: bool = False) -> int:
        """The frame of a sample, counted over the episodes that are trained on (or those that are held out)."""
        ends = self.arrays["held_ends" if held else "ends"]
        at = int(np.searchsorted(ends, sample, "right"))
        before = int(ends[at - 1]) if at else 0
        return int(self.arrays["starts"][self.arrays["held" if held else "trained"][at]]) + sample - before

    @property
    def held_samples(self) -> int:
        """Frames of the episodes that are held out."""
        ends = self.arrays["held_ends"]
        return int(ends[-1]) if len(ends) else 0

    def held_chunks(self, horizon: int) -> Float32:
        """Of the held-out frames that are evaluated on, f32 [n,H,a], as `sample` has them."""
        rows = [self.row(number, held=True) for number in evaluated(self.held_samples)]
        chunks = [self.chunk(row, horizon)[0] for row in rows] or [np.zeros((horizon, self.action_dim), np.float32)]
        return relative(np.stack(chunks), self.arrays["state"][rows or [0]], self.delta_mask)[: len(rows)]

    def episode(self, row: int) -> tuple[int, int]:
        """The place of a frame's episode in the dataset, and the frame's number in it."""
        at = int(np.searchsorted(self.arrays["starts"], row, "right")) - 1
        return at, row - int(self.arrays["starts"][at])

    def told(self, row: int) -> str:
        """The frame's dataset, episode and number, for messages."""
        return f"{self.where}, {self.place(row)}"

    def place(self, row: int) -> str:
        """The frame's episode and number."""
        at, step = self.episode(row)
        return f"episode {self.arrays['numbers'][at]}, frame {step}"

    def task(self, row: int) -> str:
        """The frame's instruction."""
        return self.tasks[int(self.arrays["task"][row])]

    def chunk(self, row: int, horizon: int) -> tuple[Float32, npt.NDArray[np.bool_]]:
        """The actions from a frame on, f32 [H,a], robot units, held at the episode's end; which were recorded, [H]."""
        at, _ = self.episode(row)
        place = row + np.arange(horizon)
        last = int(self.arrays["starts"][at + 1]) - 1
        return self.arrays["action"][np.minimum(place, last)], place <= last

    def sample(self, count: int, seed: int, horizon: int) -> tuple[list[str], Float32, Float32]:
        """Of at most so many frames that are trained on: tasks [n], states [n,s], chunks [n,H,a] in robot units.

        Where `delta_mask` says so the actions are already relative to the frame's state.
        """
        order = np.random.default_rng((seed, TAKEN)).choice(self.samples, min(count, self.samples), replace=False)
        rows = [self.row(int(number)) for number in np.sort(order)]
        chunks = np.stack([self.chunk(row, horizon)[0] for row in rows])
        states = self.arrays["state"][rows]
        return [self.task(row) for row in rows], states, relative(chunks, states, self.delta_mask)

    def measured(self, horizon: int) -> dict[str, Measured]:
        """Statistics of "state" and "actions" over the frames that are trained on: each recorded action once, or where
        actions are relative each of every chunk, as they are learnt.
        """
        state = measure(lambda: self._blocks("state"), f"{self.name}: state", self.state_names)
        blocks = (lambda: self._blocks("action")) if self.delta_mask is None else (lambda: self._chunks(horizon))
        return {"state": state, "actions": measure(blocks, f"{self.name}: action", self.action_names)}

    def _blocks(self, name: str) -> Iterable[Float32]:
        starts, array = self.arrays["starts"], self.arrays[name]
        for first, last in _runs(starts, self.arrays["trained"]):
            for at in range(first, last, BLOCK):
                yield array[at : min(last, at + BLOCK)]

    def _chunks(self, horizon: int) -> Iterable[Float32]:
        """The real actions of each frame's chunk, relative to its state, f32 [n,a]."""
        starts, action, state = self.arrays["starts"], self.arrays["action"], self.arrays["state"]
        each = max(1, BLOCK // horizon)
        for episode in self.arrays["trained"]:
            first, last = int(starts[episode]), int(starts[episode + 1])
            for at in range(first, last, each):
                rows = np.arange(at, min(last, at + each))
                place = rows[:, None] + np.arange(horizon)
                chunks = relative(action[np.minimum(place, last - 1)], state[rows], self.delta_mask)
                yield chunks[place < last]


def make_source(
    frames: Frames, name: str, features: FeatureMap, *, held_out: float, seed: int, number: int
) -> ActionSource:
    """Read the numbers of a dataset. `number`: of the source in its mixture. DatasetError as of `Frames.read`, and for
    frames without a task.
    """
    wanted = list(dict.fromkeys((*features.state, *features.action)))
    numbers = frames.read(wanted)
    parts = {"state": features.state, "action": features.action}
    columns = {part: np.concatenate([numbers.columns[n] for n in names], axis=1) for part, names in parts.items()}
    tasks, task = numbers.tasks, numbers.task
    if features.prompt is not None:
        tasks, task = (features.prompt,), np.zeros(len(task), np.int32)
    elif (none := np.flatnonzero((task < 0) | np.isin(task, [i for i, t in enumerate(tasks) if not t.strip()]))).size:
        at = int(np.searchsorted(numbers.starts, none[0], "right")) - 1
        raise DatasetError(
            f"{frames.path}, episode {frames.episodes[at]}: no task says what is done in it, and a policy is told: "
            'give "prompt" in --map FILE'
        )
    trained, held = split(len(frames.episodes), held_out, seed, number)
    lengths = np.diff(numbers.starts)
    arrays = {
        **columns,
        "timestamp": numbers.timestamp,
        "task": task,
        "starts": numbers.starts,
        "numbers": np.asarray(frames.episodes, np.int64),
        "trained": trained,
        "ends": np.cumsum(lengths[trained]),
        "held": held,
        "held_ends": np.cumsum(lengths[held]),
    }
    found = hashlib.sha256()
    for part in ("state", "action", "task", "starts"):
        found.update(np.ascontiguousarray(arrays[part]).tobytes())
    found.update("\0".join(tasks).encode())
    return ActionSource(
        name=name,
        where=str(frames.path),
        cameras=features.contract_cameras(),
        features=tuple(features.features),
        sizes=tuple(frames.cameras[feature] for feature in features.features),
        tasks=tasks,
        state_dim=columns["state"].shape[1],
        action_dim=columns["action"].shape[1],
        state_names=_names(frames, features.state, "state"),
        action_names=_names(frames, features.action, "action"),
        control_hz=frames.fps,
        delta_mask=features.delta,
        prompt=features.prompt,
        pictures=frames.pictures(features.features, numbers),
        arrays=SharedArrays(arrays),
        digests={"files": frames.digest(), "numbers": found.hexdigest()},
    )


def split(count: int, share: float, seed: int, number: int) -> tuple[Int64, Int64]:
    """Which episodes, or text samples, are trained on, and which held out: at least one of several, never all.

    `number`: of the source in its mixture.
    """
    held = min(count - 1, max(1, round(share * count))) if share > 0 else 0
    order = np.random.default_rng((seed, HELD, number)).permutation(count)
    return np.sort(order[held:]).astype(np.int64), np.sort(order[:held]).astype(np.int64)


def evaluated(count: int) -> list[int]:
    """Which of so many held-out samples are evaluated on: at most MOST_HELD, evenly over them."""
    return [int(one) for one in np.unique(np.linspace(0, count - 1, min(count, MOST_HELD)).round())] if count else []


def _names(frames: Frames, features: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """What the numbers are called: the dataset's names where all have one and none is there twice."""
    found: list[str] = []
    for feature in features:
        vector = frames.vectors[feature]
        found += vector.names or [""] * vector.size
    plain = all(found) and len(set(found)) == len(found)
    return tuple(found) if plain else tuple(f"{kind} {at}" for at in range(len(found)))


def _runs(starts: Int64, episodes: Int64) -> Iterable[tuple[int, int]]:
    """First and last row of episodes that follow each other, so that short ones do not make short blocks."""
    breaks = np.flatnonzero(np.diff(episodes) != 1) + 1
    for run in np.split(episodes, breaks):
        if len(run):
            yield int(starts[run[0]]), int(starts[run[-1] + 1])


def relative(chunks: Float32, states: Float32, mask: tuple[bool, ...] | None) -> Float32:
    """[n,H,a] with the numbers of `mask` relative to their state [n,s]."""
    if mask is None:
        return chunks
    found = chunks.copy()
    d = len(mask)
    found[..., :d] -= np.where(mask, states[:, :d], np.float32(0))[:, None]
    return found


def picture_of(source: ActionSource, row: int, camera: int) -> Any:
    """A frame's picture u8 [h,w,3] of the `camera`-th feature. DatasetError names the frame that cannot be read."""
    at, step = source.episode(row)
    try:
        return source.pictures.at(at, step, float(source.arrays["timestamp"][row]), camera)
    except DatasetError as error:
        raise DatasetError(f"{error} (episode {source.arrays['numbers'][at]}, frame {step})") from None
