"""What the loop calls: a judge that measures checkpoints, and watchers that keep page and trackers up to date.

Nothing here ends a run: what fails is told in a line, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ki_edge.errors import CheckpointError
from ki_edge.train.step.training_data import TrainingData

from .evaluation import PREFIX, Engine, Evaluation, evaluate
from .page import write_page
from .predictions import save_predictions
from .robot import Stopped, Trial, evaluate_robot
from .trackers import Tracking

Row = dict[str, Any]
Tell = Callable[[str], None]
TIE = 1e-4  # what the held-out error is worth among checkpoints of equal success: less than one episode of 1,000


class Examiner:
    """Measures a run's checkpoints: on the held-out episodes, and on a robot where there is a `trial`.

    `folder`: OUT/training.
    """

    def __init__(self, folder: Path, trial: Trial | None = None, *, tell: Tell, num_steps: int = 10) -> None:
        self._folder, self._trial, self._tell, self._num_steps = folder, trial, tell, num_steps
        self._found = Evaluation({})
        self._stopping = False

    def stop(self) -> None:
        """A robot's evaluation that is under way ends, without a result."""
        self._stopping = True

    def evaluate(self, engine: Engine, data: TrainingData) -> Row:
        """See `ki_edge.train.watching.evaluation.evaluate`."""
        self._found = evaluate(engine, data, num_steps=self._num_steps)
        return dict(self._found.values)

    def try_out(self, checkpoint: Path, step: int) -> Row | None:
        """See `evaluate_robot`; also keeps the predictions of the evaluation before. None if it was stopped."""
        try:
            if self._found.predictions:
                save_predictions(self._folder, step, self._found.predictions)
            if self._trial is None:
                return {}
            self._tell(f"step {step}: exporting it for {self._trial.episodes} episodes on {self._trial.robot} ...")
            folder = self._folder / "eval" / f"step_{step:06d}"
            found = evaluate_robot(checkpoint, self._trial, folder, lambda: self._stopping)
        except Stopped:
            self._tell(f"step {step}: its evaluation on the robot was stopped; --resume makes it up")
            return None
        except CheckpointError as error:
            found = {"robot_error": str(error)}
        if "robot_error" in found:
            self._tell(f"step {step}: no success was measured: {found['robot_error']}")
        else:
            self._tell(
                f"step {step}: success in {100 * found['robot_success']:.0f} % of {found['robot_episodes']} episodes "
                f"({found['robot_seconds']:.0f} s with the export)"
            )
        return found

    def score(self, row: Mapping[str, Any]) -> float | None:
        """More is better: success on the robot, and among equals the lower held-out error; without a robot that alone.

        None where nothing was measured, or not on the robot that decides.
        """
        error = row.get(PREFIX + "action_error_normalised", row.get(PREFIX + "flow"))
        if self._trial is None:
            return None if error is None else -float(error)
        success = row.get("robot_success")
        if not isinstance(success, int | float):
            return None
        return float(success) + (0.0 if error is None else TIE / (1.0 + float(error)))


class PageWatcher:
    """Writes train.html whenever a checkpoint is saved or measured."""

    def __init__(self, folder: Path, *, tell: Tell) -> None:
        self._folder, self._tell = folder, tell

    def logged(self, row: Mapping[str, Any]) -> None:
        """A row comes with the next page."""

    def evaluated(self, row: Mapping[str, Any]) -> None:
        self._write()

    def saved(self, step: int, folder: Path) -> None:
        self._write()

    def _write(self) -> None:
        try:
            write_page(self._folder)
        except CheckpointError as error:
            self._tell(str(error))


class TrackingWatcher:
    """Hands rows to trackers."""

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking

    def logged(self, row: Mapping[str, Any]) -> None:
        self._tracking.log(row)

    def evaluated(self, row: Mapping[str, Any]) -> None:
        self._tracking.log(row)

    def saved(self, step: int, folder: Path) -> None:
        """Trackers are not told."""
