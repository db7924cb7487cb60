"""Asks a policy where its target is while it drives the simulated arm, and compares the answer with the truth.

    ki-export examples/fetch/checkpoint -o build/words --full-vocabulary
    python examples/fetch/pointing.py build/words --scenes 100 --film build/pointing --picture build/pointing.png

The policy was trained to answer "point to the target" in PaliGemma's <loc> tokens, for the picture of each camera. Each
scene is asked about twice: before the arm moves, and when it has arrived and the gripper hides a part of the target.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_edge.errors import KiEdgeError
from ki_runtime import Policy
from ki_runtime.recording.film import Film, open_film
from ki_runtime.robots.fetch import FetchScene

QUESTION, TASK = "point to the target", "reach the red target"
SIZE, SCALE = 96, 2  # pixels of a picture; of the film for each of them
CHUNK, STEPS, FILMED, FILM_HZ = 4, 40, 3, 12.5
MOMENTS = ("before it moves", "when it arrived")
UInt8 = NDArray[np.uint8]


@dataclass
class Answers:
    """What was answered: the distance to the truth in pixels, by moment; NaN where it was not a point a camera."""

    errors: list[list[float]] = field(default_factory=lambda: [[], []])
    frames: list[UInt8] = field(default_factory=list)  # of the first scenes at both moments

    def lines(self) -> list[str]:
        """A table."""
        lines = [f"{'':16} {'answered':>9} {'median':>8} {'p95':>8} {'largest':>8}   pixels of {SIZE}"]
        for name, errors in zip(MOMENTS, self.errors, strict=True):
            known = [error for error in errors if np.isfinite(error)]
            figures = np.percentile(known, [50, 95, 100]) if known else [np.nan] * 3
            counts = f"{len(known)}/{len(errors)}"
            lines.append(f"{name:16} {counts:>9} " + " ".join(f"{value:8.2f}" for value in figures))
        return lines


def observe(scene: FetchScene) -> dict[str, Any]:
    """The observation of a scene."""
    return {"images": scene.pictures(), "state": scene.state, "prompt": TASK}


def drawn(observation: dict[str, Any], points: NDArray[np.float64], truth: NDArray[np.float32]) -> UInt8:
    """The cameras' pictures side by side: a circle where the policy points, a cross where the target is."""
    from PIL import Image, ImageDraw

    frames, side = [], SIZE * SCALE
    for at, picture in enumerate(observation["images"].values()):
        image = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        if at < len(points):
            x, y = points[at] * side
            draw.ellipse((x - 12, y - 12, x + 12, y + 12), outline=(20, 90, 255), width=2)
        x, y = truth[at] * side
        draw.line((x - 5, y, x + 5, y), fill=(0, 0, 0))
        draw.line((x, y - 5, x, y + 5), fill=(0, 0, 0))
        frames.append(np.asarray(image))
    return np.concatenate(frames, axis=1)


def drive(policy: Policy, scene: FetchScene, seed: int, answers: Answers, film: Film | None) -> None:
    """One scene: the policy acts, and is asked at its beginning and its end; for a film with every chunk."""
    scene.reset(seed)
    for step in range(0, STEPS + 1, CHUNK):
        observation, truth = observe(scene), scene.target_points()
        moment = {0: 0, STEPS: 1}.get(step)
        if moment is not None or film is not None:
            points = policy.infer_text(observation, prompt=QUESTION, allow_loc=True, max_tokens=8)["points"]
        if moment is not None:
            same = points.shape == truth.shape
            answers.errors[moment].append(
                float(np.linalg.norm((points - truth) * SIZE, axis=1).max()) if same else np.nan
            )
            if len(answers.frames) < 2 * FILMED:
                answers.frames.append(drawn(observation, points, truth))
        if step < STEPS:
            for action in policy.infer(observation, seed=seed)["actions"][:CHUNK]:
                if film is not None:
                    film.add(drawn(observe(scene), points, scene.target_points()))
                scene.step(action.astype(np.float32))


def ask(options: argparse.Namespace) -> Answers:
    """In all scenes."""
    policy = Policy.load(options.bundle)
    policy.check_text()
    scene, answers = FetchScene(), Answers()
    film = None if options.film is None else open_film(options.film, FILM_HZ)
    try:
        for index in range(options.scenes):
            drive(policy, scene, options.seed + index, answers, film if index < FILMED else None)
    finally:
        scene.close()
        if film is not None:
            film.close()
    return answers


def main() -> int:
    """Ask, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="folder written by ki-export --full-vocabulary")
    parser.add_argument("--scenes", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=1000, metavar="S", help="of the first scene; no training saw these")
    parser.add_argument("--film", type=Path, metavar="STEM", help=f"film of the first {FILMED} scenes, without .mp4")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="the same scenes at both moments")
    options = parser.parse_args()
    try:
        answers = ask(options)
    except KiEdgeError as error:
        print(f"pointing.py: {error}", file=sys.stderr)
        return 2
    if options.picture is not None:
        from PIL import Image

        rows = [np.concatenate(answers.frames[at : at + 2], axis=1) for at in range(0, len(answers.frames), 2)]
        Image.fromarray(np.concatenate(rows)).save(options.picture)
    print("\n".join(answers.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
