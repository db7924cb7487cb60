"""A run's folder: checkpoints that appear whole, which of them stay, the last and the best one, one run at a time.

    OUT/.lock                   held (flock) while the run's main process lives
    OUT/step_000500/            a checkpoint, with its training state; made under a hidden name, synced, renamed
    OUT/last, OUT/best          relative links
    OUT/training/scores.json    what `best` is chosen by

All processes of a run must see the folder.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.files.publishing import publishing
from ki_edge.files.reading import read_object
from ki_edge.files.writing import write_file, writing

from .lock import LOCK, locked

if TYPE_CHECKING:
    from .processes import Processes

STEP = re.compile(r"step_(\d{6,12})", re.ASCII)
STATE = "training"  # of a step's folder: what only training needs
LAST, BEST = "last", "best"
SCORES = "scores.json"
OF_A_RUN = (
    SCORES,
    "track_id",
    "predictions.json",
    "log.jsonl",
    "evaluation.jsonl",
)  # what a fresh one does not go on with
REMOVED = ".removed-"
MOST = 10_000  # checkpoints that a run may be told to keep
KEEP = re.compile(r"(last|best):(\d{1,5})", re.ASCII)


@dataclass(frozen=True)
class Keep:
    """How many checkpoints stay: the newest, and those with the highest scores. What a link points to always stays."""

    last: int = 3
    best: int = 1

    @classmethod
    def parse(cls, text: str) -> Keep:
        """ "last:3,best:1", or one of them. ArgumentError for anything else."""
        found: dict[str, int] = {}
        for part in text.split(","):
            match = KEEP.fullmatch(part.strip())
            if match is None or match[1] in found or int(match[2]) > MOST:
                raise ArgumentError(f"keep {text!r:.80}: expected for example last:3,best:1")
            found[match[1]] = int(match[2])
        if found.get(LAST, 1) < 1:
            raise ArgumentError(f"keep {text!r:.80}: the last checkpoint always stays: expected at least last:1")
        return cls(found.get(LAST, 1), found.get(BEST, 0))


class RunFolder:
    """The folder of a run, locked until `close`. Only the main process of several changes it."""

    def __init__(self, out: str | Path, keep: Keep, processes: Processes) -> None:
        """ArgumentError if another process trains into it, CheckpointError if it cannot be made or read."""
        self.out, self.keep, self._processes = Path(out), keep, processes
        self._lock: int | None = None
        self._made: list[Path] = []  # of what a refused command leaves nothing: the lock, folders
        with processes.together():
            if processes.main:
                if self.out.exists() and not self.out.is_dir():
                    raise ArgumentError(f"{out} is a file: name a folder for the run")
                try:
                    self._take()
                except BaseException:
                    self.abandon()
                    raise

    def _take(self) -> None:
        """Make and lock the folder."""
        with writing(self.out, CheckpointError):
            self._made = [path for path in (self.out / LOCK, self.out, *self.out.parents) if not path.exists()]
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = locked(self.out)
        _refuse_links(self.out / STATE)
        _sweep(self.out)

    def steps(self) -> dict[int, Path]:
        """The checkpoints by step, the oldest first; what has such a name and no training state is somebody else's."""
        found = {int(match[1]): path for path in self.out.iterdir() if (match := STEP.fullmatch(path.name))}
        return {step: found[step] for step in sorted(found) if _is_checkpoint(found[step])}

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step is, or will be."""
        return self.out / f"step_{step:06d}"

    def publish(self, step: int, fill: Callable[[Path], None]) -> Path:
        """A checkpoint: `fill` writes into a folder, on all processes, and once it is whole it becomes `folder(step)`.

        What only the main process writes should come last in `fill`. Then `last` points to it, and what need not stay
        is removed. CheckpointError if it cannot be written: then everything is as it was.
        """
        target = self.folder(step)
        with self._processes.together():
            if self._processes.main:
                self._publish(target, fill)
            else:
                partial = self._processes.share("")
                if partial:  # else the main process says what is wrong
                    fill(Path(partial))
        self._main_only(lambda: self._point_at(target))
        return target

    def score(self, step: int, value: float) -> bool:
        """Note what a checkpoint is worth, higher is better; whether it is the best one now, to which `best` points.

        Of equal ones the newest is the best. NaN is worth nothing.
        """
        scores = self._scores() | {step: value}
        best = _ranked(scores)
        self._main_only(lambda: self._note(scores, best))
        return bool(best) and best[0] == step

    def latest(self) -> Path | None:
        """The checkpoint to go on with: the newest."""
        found = self.steps()
        return found[max(found)] if found else None

    @property
    def best(self) -> Path | None:
        """The checkpoint that `best` points to."""
        ranked = [step for step in _ranked(self._scores()) if step in self.steps()]
        return self.folder(ranked[0]) if ranked else None

    def clear(self) -> None:
        """Remove an earlier run: its checkpoints, links and scores. Each loses its name first."""
        self._main_only(self._clear)

    def _clear(self) -> None:
        for path in (self.out / LAST, self.out / BEST, *(self.out / STATE / name for name in OF_A_RUN)):
            if path.is_symlink() or path.is_file():
                path.unlink()
        for path in self.steps().values():
            _remove(path)

    def abandon(self) -> None:
        """Close a folder into which nothing was trained: what was made for this run alone is gone again."""
        lock = self.out / LOCK
        for path in self._made:
            with suppress(OSError):  # a folder that is not empty stays
                if path != lock:
                    path.rmdir()
                elif self._lock is not None:  # else it is another process's
                    path.unlink()
        self.close()

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _publish(self, target: Path, fill: Callable[[Path], None]) -> None:
        with ExitStack() as stack:
            try:
                partial = stack.enter_context(publishing(target, _check_replaceable, CheckpointError))
            except BaseException:
                self._processes.share("")
                raise
            self._processes.share(str(partial))
            fill(partial)

    def _main_only(self, change: Callable[[], object]) -> None:
        with self._processes.together():
            if self._processes.main:
                change()

    def _point_at(self, newest: Path) -> None:
        _link(self.out / LAST, newest.name)
        self._prune()

    def _note(self, scores: dict[int, float], best: list[int]) -> None:
        path = self.out / STATE / SCORES
        with writing(path, CheckpointError):
            path.parent.mkdir(exist_ok=True)
        content = {str(step): value for step, value in sorted(scores.items()) if math.isfinite(value)}
        write_file(path, json.dumps(content, indent=1) + "\n", CheckpointError)
        if best:
            _link(self.out / BEST, self.folder(best[0]).name)
        self._prune()

    def _scores(self) -> dict[int, float]:
        """Of the checkpoints that are there."""
        path = self.out / STATE / SCORES
        if not path.is_file():
            return {}
        known = {str(step): step for step in self.steps()}
        found = read_object(path, CheckpointError)
        return {
            known[name]: float(value) for name, value in found.items() if name in known and type(value) in (int, float)
        }

    def _prune(self) -> None:
        """Remove what need not stay: each first loses its name, so that none is ever there in part."""
        steps = self.steps()
        stay = {*sorted(steps)[-self.keep.last :], *_ranked(self._scores())[: self.keep.best]}
        linked = {os.path.realpath(self.out / name) for name in (LAST, BEST)}
        for step, path in steps.items():
            if step not in stay and os.path.realpath(path) not in linked:
                with suppress(OSError):  # what cannot be removed costs room, nothing else
                    _remove(path)


def _remove(path: Path) -> None:
    away = path.rename(path.with_name(f".{path.name}{REMOVED}{secrets.token_hex(4)}"))
    shutil.rmtree(away, ignore_errors=True)


def _ranked(scores: dict[int, float]) -> list[int]:
    """Steps, the best first."""
    return sorted((step for step, value in scores.items() if not math.isnan(value)), key=lambda s: (-scores[s], -s))


def _is_checkpoint(path: Path) -> bool:
    return not path.is_symlink() and (path / STATE).is_dir()


def _check_replaceable(path: Path) -> None:
    """CheckpointError for something at a checkpoint's place that is none of ours."""
    if not _is_checkpoint(path):
        raise CheckpointError(f"{path} is no checkpoint of a run: move it away, or choose another folder")


def _link(path: Path, name: str) -> None:
    """Let a link point to a folder beside it, from one moment to the next."""
    if path.exists() and not path.is_symlink():
        raise CheckpointError(f"{path} is no link: move it away, or choose another folder")
    made = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with writing(path, CheckpointError):
        try:
            made.symlink_to(name)
            made.replace(path)
        finally:
            made.unlink(missing_ok=True)


def _refuse_links(folder: Path) -> None:
    """ArgumentError if what a run writes to would be somewhere else."""
    inside = folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ()
    for path in (folder, *inside):
        if path.is_symlink():
            raise ArgumentError(f"{path} is a link, and a run writes into folders of its own: name another folder")


def _sweep(out: Path) -> None:
    """Remove what a kill left of checkpoints that were being removed; `publishing` sweeps what was being made."""
    for path in out.glob(f".step_*{REMOVED}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
