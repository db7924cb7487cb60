"""Demonstrations of the Fetch arm reaching a red target, and pictures that ask where it is.

    python examples/fetch/demonstrations.py OUT --points POINTS --scenes 6000 --seed 0 --workers 2

OUT is a LeRobotDataset v3.0, written by the recorder that `ki-run --record` uses: an episode for each scene, in which
the arm goes from where it is to the target. Pictures are stored as PNG: a film has half as many pixels of colour along
each side, and the red ball is five pixels wide. `action` is what the scripted expert commands from where the arm is;
noise drives it off its way, so that the frames of a scene differ.

POINTS is a text set (docs/training.md): of each scene two frames, with the question "point to the target" and the
answer in PaliGemma's <loc> tokens, y before x, for each camera.
"""

import argparse
import json
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ki_runtime.recording.dataset import DatasetWriter
from ki_runtime.recording.features import Features
from ki_runtime.recording.features import Frame as Recorded
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
QUESTION = "point to the target"
CONTROL_HZ = 25.0
SHARD = 50  # scenes rendered from one random stream, whichever worker renders them
FRESH_START = 0.12  # share of scenes that begin at the initial pose, the target anywhere in the cube
JOG = 0.3  # share of scenes before which the arm moves at random; it covers the cube and a little beyond
NEARBY = 0.3  # share of targets close to the gripper
NEARBY_SPREAD = 0.04  # m, per axis
PUSH = 0.05  # m, standard deviation of what is added to a set-point while it is followed, per axis


@dataclass(frozen=True)
class Settings:
    """What decides the content of the data, besides this file."""

    scenes: int
    seed: int
    frames: int

    def shards(self) -> range:
        """Numbers of the shards; shard i holds the scenes from i * SHARD."""
        return range(-(-self.scenes // SHARD))


@dataclass(frozen=True)
class Scene:
    """The frames of one scene, T of them."""

    prompt: str
    images: NDArray[np.uint8]  # [T, 2, 96, 96, 3]
    state: NDArray[np.float32]  # [T, 5]
    actions: NDArray[np.float32]  # [T, 4], the expert's set-points
    points: NDArray[np.float32]  # [T, 2, 2], the target in each picture: x, y as fractions; NaN outside of it
    asked: int  # a frame, beside the first, that is asked about


def draw_target(scene: FetchScene, rng: np.random.Generator, near: bool) -> NDArray[np.float64]:
    """A target [3] (m) in FetchReach's own cube: anywhere, or close to the gripper."""
    low, high = scene.home - scene.reach, scene.home + scene.reach
    if near:
        return np.clip(scene.gripper + rng.normal(0.0, NEARBY_SPREAD, 3), low, high)
    return rng.uniform(low, high)


def arrange(scene: FetchScene, rng: np.random.Generator, fresh: bool) -> None:
    """Bring arm and target into the situation of the next scene."""
    if fresh:
        scene.reset()
        scene.move_target(draw_target(scene, rng, near=False))
        return
    if rng.random() < JOG:
        offset = rng.uniform(-PLAN_STEP, PLAN_STEP, 3)
        for _ in range(rng.integers(1, 5)):
            scene.step(np.append(scene.gripper + offset, 0.0))
    scene.move_target(draw_target(scene, rng, near=rng.random() < NEARBY))


def film_scene(scene: FetchScene, rng: np.random.Generator, frames: int) -> Scene:
    """The expert's way to the target, pushed off it at random; the arm stays where that leads."""
    images, states, actions, points = [], [], [], []
    for _ in range(frames):
        pictures = scene.pictures()
        images.append(np.stack([pictures[camera.name] for camera in CAMERAS]))
        states.append(scene.state)
        points.append(scene.target_points())
        actions.append(scene.plan(1)[0])
        push = np.append(rng.normal(0.0, PUSH, 3), 0.0).astype(np.float32)
        scene.step(actions[-1] + push)
    prompt, asked = PROMPTS[rng.integers(len(PROMPTS))], int(rng.integers(1, max(2, frames)))
    return Scene(prompt, np.stack(images), np.stack(states), np.stack(actions), np.stack(points), asked)


_scene: FetchScene | None = None  # one scene per worker process, opened at its first shard


def film_shard(settings: Settings, index: int) -> list[Scene]:
    """All scenes of shard `index`."""
    global _scene
    _scene = _scene or FetchScene()
    rng = np.random.default_rng([settings.seed, index])
    scenes = []
    for number in range(index * SHARD, min((index + 1) * SHARD, settings.scenes)):
        arrange(_scene, rng, fresh=number == index * SHARD or bool(rng.random() < FRESH_START))
        scenes.append(film_scene(_scene, rng, settings.frames))
    return scenes


def filmed(settings: Settings, workers: int) -> Iterator[Scene]:
    """All scenes in their order, rendered by so many processes."""
    if workers == 1:
        for index in settings.shards():
            yield from film_shard(settings, index)
        return
    # spawn: a GL context does not survive a fork
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        running: deque[Future[list[Scene]]] = deque()
        for index in settings.shards():
            running.append(pool.submit(film_shard, settings, index))
            if len(running) > 2 * workers:  # no more than that wait in memory
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()


def write_episode(writer: DatasetWriter, scene: Scene) -> None:
    """A scene as an episode of the dataset."""
    writer.begin()
    for step, action in enumerate(scene.actions):
        pictures = {camera.name: scene.images[step, at] for at, camera in enumerate(CAMERAS)}
        writer.add(Recorded(
            tick=step, time=step / CONTROL_HZ, state=scene.state[step], action=action, planned=action, guards=(),
            pictures=pictures, picture_age=0.0, chunk=None, row=None, age=None, seam=False, task=scene.prompt,
        ))  # fmt: skip
    writer.finish({"ki.stopped": False})


def point_samples(folder: Path, number: int, scene: Scene) -> Iterator[dict[str, object]]:
    """Two frames of a scene as lines of a text set, if the target is in every picture; writes their pictures."""
    for step in dict.fromkeys((0, min(scene.asked, len(scene.points) - 1))):
        points = scene.points[step]
        if not ((points >= 0) & (points < 1)).all():  # NaN is neither
            continue
        image = {}
        for at, camera in enumerate(CAMERAS):
            image[camera.name] = f"pictures/{number // 1000:03d}/{number:06d}_{step:02d}_{camera.name}.png"
            (folder / image[camera.name]).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene.images[step, at]).save(folder / image[camera.name], compress_level=1)
        places = (int(value * 1024) for point in points for value in point[::-1])
        yield {"image": image, "question": QUESTION, "answer": "".join(f"<loc{place:04d}>" for place in places)}


def make(out: Path, points: Path | None, settings: Settings, workers: int) -> None:
    """Render the demonstrations to `out` and the text set to `points`, which appear when they are complete."""
    finals = [out] if points is None else [out, points]
    partials = [path.with_name(path.name + ".partial") for path in finals]
    for path in (*finals, *partials):
        if path.exists():
            raise SystemExit(f"{path} exists already: remove it, or choose another folder")
    cameras = {camera.name: (PICTURE_SIZE, PICTURE_SIZE) for camera in CAMERAS}
    features = Features(
        CONTROL_HZ, GymRobot.name, len(STATE_NAMES), ACTION_NAMES, cameras, guards=("position",), stored="image"
    )
    writer = DatasetWriter(partials[0], features)
    scenes = tqdm(filmed(settings, workers), total=settings.scenes, unit="scene")
    write_all(writer, None if points is None else partials[1], scenes)
    for partial, final in zip(partials, finals, strict=True):
        partial.replace(final)


def write_all(writer: DatasetWriter, points: Path | None, scenes: Iterable[Scene]) -> None:
    """Every scene into the dataset and, if there is a folder for it, the text set."""
    lines = []
    for number, scene in enumerate(scenes):
        write_episode(writer, scene)
        if points is not None:
            lines += [json.dumps(line) + "\n" for line in point_samples(points, number, scene)]
    if points is not None:
        points.mkdir(exist_ok=True)
        (points / "samples.jsonl").write_text("".join(lines), encoding="utf-8")


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
    parser.add_argument("out", type=Path, metavar="OUT", help="LeRobotDataset to write")
    parser.add_argument("--points", type=Path, metavar="FOLDER", help="text set to write: where is the target?")
    parser.add_argument("--scenes", type=int, default=6000, help="episodes")
    parser.add_argument("--frames", type=int, default=8, help="of an episode; at least the actions of a chunk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="write one expert episode for replay:FILE as well")
    options = parser.parse_args(arguments)
    if min(options.scenes, options.workers, options.frames) < 1 or options.seed < 0:
        parser.error("--scenes, --workers and --frames must be 1 or more, --seed 0 or more")
    if options.replay is not None:
        record_expert(options.replay, options.seed)
    make(options.out, options.points, Settings(options.scenes, options.seed, options.frames), options.workers)


if __name__ == "__main__":
    main()
