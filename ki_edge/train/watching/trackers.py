"""A run in TensorBoard, trackio or wandb, beside its own log: what is logged goes there too; no failure ends it."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ki_edge.commands import printable
from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.files.reading import read_file
from ki_edge.files.writing import write_file

PROJECT = "ki-train"
IDENTITY = "track_id"  # file of OUT/training: the run's name at a service, so that a resumed run goes on there
Numbers = dict[str, float]


class Tracker(Protocol):
    """Where numbers of a run go."""

    def log(self, step: int, numbers: Numbers) -> None:
        """Numbers of a step, all finite."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoard:
    """Event files in OUT/training/tensorboard; `tensorboard --logdir OUT` shows them."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in config.items()), step)

    def log(self, step: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A local trackio project; `trackio show` shows it."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], step: int) -> None:
        self._trackio: Any = import_module("trackio")
        self._trackio.init(project=PROJECT, name=_identity(folder, name), config=dict(config), resume="allow")

    def log(self, step: int, numbers: Numbers) -> None:
        self._trackio.log(numbers, step=step)

    def close(self) -> None:
        self._trackio.finish()


class Wandb:
    """A run of wandb, to which its own settings and environment variables apply (WANDB_MODE=offline)."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], step: int) -> None:
        self._run: Any = import_module("wandb").init(
            project=PROJECT, name=name, id=_identity(folder, name), config=dict(config), dir=str(folder), resume="allow"
        )

    def log(self, step: int, numbers: Numbers) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


OPENERS: Mapping[str, Callable[[Path, str, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb,
}  # fmt: skip


class Tracking:
    """The trackers of a run, named by --track. In the main process alone; without names it does nothing.

    `folder`: OUT/training. `step`: from which the run goes on. `tell`: takes one line where a tracker failed; that
    tracker gets nothing more, and the run goes on. ArgumentError for a name that there is not, and for a package that
    is missing: before anything is trained.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        config: Mapping[str, Any],
        *,
        step: int = 0,
        tell: Callable[[str], None],
    ) -> None:
        check_trackers(names)
        self._tell, self._open = tell, dict[str, Tracker]()
        for name in dict.fromkeys(names):
            self._open[name] = _opened(name, folder, config, step)

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of the log: its numbers, at its step."""
        numbers = {
            name: float(value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        self._each(lambda tracker: tracker.log(int(row["step"]), numbers))

    def close(self) -> None:
        """End all trackers."""
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                act(tracker)
            except Exception as error:
                del self._open[name]
                self._tell(f"{name} failed and gets nothing more ({type(error).__name__}: {printable(error, 200)})")


def check_trackers(names: Sequence[str]) -> None:
    """ArgumentError for a name that is no tracker's."""
    for name in names:
        if name not in OPENERS:
            raise ArgumentError(f"--track {name!r:.60}: expected one of {', '.join(OPENERS)}")


def _opened(name: str, folder: Path, config: Mapping[str, Any], step: int) -> Tracker:
    try:
        return OPENERS[name](folder, folder.resolve().parent.name, config, step)
    except ModuleNotFoundError as error:
        raise ArgumentError(
            f"--track {name}: the package {error.name or name} is not installed: pip install --upgrade {name}"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:
        raise ArgumentError(
            f"--track {name}: it does not start ({type(error).__name__}: {printable(error, 200)}); leave it out, or "
            f"pip install --upgrade {name}"
        ) from None


def _identity(folder: Path, name: str) -> str:
    """A name of the run that no other has, the same after a resume."""
    place = folder / IDENTITY
    with suppress(CheckpointError):
        known = read_file(place, 200, CheckpointError).decode("ascii", "replace").strip()
        if known.replace("-", "").isalnum():
            return known
    plain = "".join(char if char.isascii() and char.isalnum() else "-" for char in name)[:40].strip("-") or "run"
    identity = f"{plain}-{secrets.token_hex(4)}"
    write_file(place, identity + "\n", CheckpointError)
    return identity
