"""Demonstrations of the Fetch arm reaching a red target: pictures, proprioception and the expert's next actions.

    python examples/fetch/demonstrations.py OUT --scenes 30000 --seed 0 --workers 2

OUT is a folder of memory-mapped arrays, one frame per scene (F frames, H = horizon), and meta.json:

    images.npy   u8  [F, 2, 96, 96, 3]   RGB, cameras in the order of meta.json
    state.npy    f32 [F, 5]              gripper position (m), fingers (m)
    actions.npy  f32 [F, H, 4]           the expert's next set-points: gripper position (m), opening
    prompt.npy   i32 [F]                 index into meta.json's prompts
    points.npy   f32 [F, 2, 2]           the target in each picture: x, y as fractions; NaN outside, hidden or not

An interrupted run continues where it stopped: shards are written to OUT.partial, which becomes OUT when all are done.
"""

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ki_runtime.robots.fetch import ACTION_NAMES, CAMERAS, PICTURE_SIZE, PLAN_STEP, STATE_NAMES, FetchScene, GymRobot
from ki_runtime.robots.replay import record_episode

PROMPTS = (
    "reach the red target",
    "move the gripper to the red ball",
    "go to the red ball",
    "touch the red sphere",
    "bring the hand to the red target",
    "reach for the red ball",
)
SHARD = 250  # scenes rendered from one random stream, whichever worker renders them
FRESH_START = 0.12  # share of scenes that begin at the initial pose, the target anywhere in the cube
JOG = 0.3  # share of scenes before which the arm moves at random; it covers the cube and a little beyond
APPROACH = 0.2  # share of scenes seen while the arm is already on its way to the target
NEARBY = 0.5  # share of targets close to the gripper
NEARBY_SPREAD = 0.04  # m, per axis


@dataclass(frozen=True)
class Settings:
    """What decides the content of the data, besides this file."""

    scenes: int
    seed: int
    horizon: int

    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """File name -> dtype and shape."""
        f, c = self.scenes, len(CAMERAS)
        return {
            "images": ("u1", (f, c, PICTURE_SIZE, PICTURE_SIZE, 3)),
            "state": ("f4", (f, len(STATE_NAMES))),
            "actions": ("f4", (f, self.horizon, len(ACTION_NAMES))),
            "prompt": ("i4", (f,)),
            "points": ("f4", (f, c, 2)),
        }

    def shards(self) -> range:
        """Numbers of the shards; shard i holds the scenes from i * SHARD."""
        return range(-(-self.scenes // SHARD))


Frame = dict[str, NDArray[np.generic]]


def draw_target(scene: FetchScene, rng: np.random.Generator, near: bool) -> NDArray[np.float64]:
    """A target [3] (m) in FetchReach's own cube: anywhere, or close to the gripper."""
    low, high = scene.home - scene.reach, scene.home + scene.reach
    if near:
        return np.clip(scene.gripper + rng.normal(0.0, NEARBY_SPREAD, 3), low, high)
    return rng.uniform(low, high)


def arrange(scene: FetchScene, rng: np.random.Generator, fresh: bool) -> None:
    """Bring arm and target into the situation of the next frame."""
    if fresh:
        scene.reset()
        scene.move_target(draw_target(scene, rng, near=False))
        return
    if rng.random() < JOG:
        offset = rng.uniform(-PLAN_STEP, PLAN_STEP, 3)
        for _ in range(rng.integers(1, 5)):
            scene.step(np.append(scene.gripper + offset, 0.0))
    scene.move_target(draw_target(scene, rng, near=rng.random() < NEARBY))
    if rng.random() < APPROACH:
        for _ in range(rng.integers(1, 7)):
            scene.step(scene.plan(1)[0])


def film_scene(scene: FetchScene, rng: np.random.Generator, horizon: int) -> Frame:
    """One frame, then the expert's next `horizon` actions; the arm stays where they lead."""
    pictures, state, points = scene.pictures(), scene.state, scene.target_points()
    actions = scene.plan(horizon)
    for setpoint in actions:
        scene.step(setpoint)
    return {
        "images": np.stack([pictures[camera.name] for camera in CAMERAS]),
        "state": state,
        "actions": actions,
        "prompt": np.array(rng.integers(len(PROMPTS)), np.int32),
        "points": points,
    }


open_memmap: Any = np.lib.format.open_memmap  # carries no types in numpy 1
_scene: FetchScene | None = None  # one scene per worker process, opened at its first shard


def write_shard(job: tuple[Path, Settings, int]) -> int:
    """Render shard `index` into the arrays in `folder`; returns the index."""
    global _scene
    folder, settings, index = job
    _scene = _scene or FetchScene()
    rng = np.random.default_rng([settings.seed, index])
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in settings.arrays()}
    first = index * SHARD
    for row in range(first, min(first + SHARD, settings.scenes)):
        arrange(_scene, rng, fresh=row == first or bool(rng.random() < FRESH_START))
        for name, value in film_scene(_scene, rng, settings.horizon).items():
            arrays[name][row] = value
    for array in arrays.values():
        array.flush()
    return index


def write_json(path: Path, value: object) -> None:
    """Write JSON in one step: a reader sees the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def prepare(folder: Path, settings: Settings) -> set[int]:
    """Create the empty arrays, or find those of an interrupted run; returns the shards that are done."""
    progress = folder / "progress.json"
    if progress.exists():
        found = json.loads(progress.read_text(encoding="utf-8"))
        if found["settings"] != asdict(settings):
            raise SystemExit(f"{folder} belongs to a run with {found['settings']}: remove it, or repeat those settings")
        return set(found["done"])
    folder.mkdir(parents=True, exist_ok=True)
    for name, (dtype, shape) in settings.arrays().items():
        open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape).flush()
    write_json(progress, {"settings": asdict(settings), "done": []})
    return set()


def rendered(jobs: list[tuple[Path, Settings, int]], workers: int) -> Iterator[int]:
    """Render the shards and yield their numbers as they are done."""
    if workers == 1:
        yield from map(write_shard, jobs)
        return
    # spawn: a GL context does not survive a fork
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(write_shard, jobs)


def make(out: Path, settings: Settings, workers: int) -> None:
    """Render the demonstrations to the folder `out`, which appears when it is complete."""
    if out.exists():
        raise SystemExit(f"{out} exists already: remove it, or choose another folder")
    folder = out.with_name(out.name + ".partial")
    done = prepare(folder, settings)
    jobs = [(folder, settings, index) for index in settings.shards() if index not in done]
    with tqdm(total=settings.scenes, initial=min(len(done) * SHARD, settings.scenes), unit="scene") as bar:
        for index in rendered(jobs, workers):
            done.add(index)
            write_json(folder / "progress.json", {"settings": asdict(settings), "done": sorted(done)})
            bar.update(min(SHARD, settings.scenes - index * SHARD))
    write_json(folder / "meta.json", describe(settings))
    (folder / "progress.json").unlink()
    folder.replace(out)


def describe(settings: Settings) -> dict[str, object]:
    """The content of meta.json."""
    return {
        "version": 1,
        "robot": GymRobot.name,
        "cameras": [camera.name for camera in CAMERAS],
        "control_hz": 25,
        "state_names": list(STATE_NAMES),
        "action_names": list(ACTION_NAMES),
        "horizon": settings.horizon,
        "frames": settings.scenes,
        "prompts": list(PROMPTS),
        "seed": settings.seed,
    }


def record_expert(path: Path, seed: int) -> None:
    """Write one expert episode from the initial pose as a replay file."""
    scene = FetchScene()
    scene.reset(seed)
    pictures, states, actions = [], [], []
    for _ in range(scene.step_limit):
        pictures.append(scene.pictures())
        states.append(scene.state)
        actions.append(scene.plan(1)[0])
        scene.step(actions[-1])
    images = {camera.name: np.stack([picture[camera.name] for picture in pictures]) for camera in CAMERAS}
    record_episode(path, images=images, state=np.stack(states), actions=np.stack(actions), prompt=PROMPTS[0])
    scene.close()


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, render, and record."""
    parser = argparse.ArgumentParser(description="Render demonstrations of FetchReach-v4.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--scenes", type=int, default=30000, help="frames to render")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--horizon", type=int, default=8, help="actions per frame")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="write one expert episode for replay:FILE as well")
    options = parser.parse_args(arguments)
    if min(options.scenes, options.workers, options.horizon) < 1 or options.seed < 0:
        parser.error("--scenes, --workers and --horizon must be 1 or more, --seed 0 or more")
    if options.replay is not None:
        record_expert(options.replay, options.seed)
    make(options.out, Settings(options.scenes, options.seed, options.horizon), options.workers)


if __name__ == "__main__":
    main()
