"""ki-train: recorded episodes to checkpoint."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ki_edge.commands import Parser, run_command, show, tell
from ki_edge.errors import ArgumentError

from .flags import add_data, add_learning, add_machine, add_saving, given_settings
from .record import Origin

if TYPE_CHECKING:
    from .loop import Trainer

SHOWN = ("flow", "fast", "text", "held_out_flow", "robot_success")  # beside the progress bar


def build_parser() -> Parser:
    """The command line; what is not given comes from the recipe or TrainSettings, or from the run that is resumed."""
    parser = Parser(prog="ki-train", description="Train a π0.5 policy with knowledge insulation.")
    parser.add_argument(
        "datasets", nargs="*", metavar="DATASET[:WEIGHT]",
        help="a LeRobotDataset (folder or Hub id), .npz episodes, or a text set; several are a mixture",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--out", type=Path, required=True, help="folder of the run: step_N/, last, best, training/"
    )
    for add in (add_learning, add_data, add_machine, add_saving):
        add(parser)
    return parser


def train(arguments: argparse.Namespace) -> int:
    """Run what the command line asks for, with a progress bar."""
    from .run import Request, open_run

    if arguments.resume and arguments.fresh:
        raise ArgumentError("--resume goes on with a run, --fresh starts over: say one of them")
    request = Request(
        arguments.out, _origin(arguments), given_settings(arguments), recipe=arguments.recipe,
        resume=arguments.resume, fresh=arguments.fresh, accept_changes=arguments.accept_changes,
        strategy=arguments.strategy, threads=arguments.threads, workers=arguments.workers,
        cache=arguments.cache, cache_gb=arguments.cache_gb, trackers=tuple(arguments.track or ()),
    )  # fmt: skip
    ending = _Ending()
    try:
        with _on_sigterm(ending):  # nothing is learnt yet that could be saved
            trainer = open_run(request, _say)
    except Exception:
        if ending.asked:  # it met a library in the middle of something, such as an import
            raise _Terminated from None
        raise
    try:
        if ending.asked:  # a library kept it to itself
            trainer.stop()
        _run(trainer)
        _say_end(trainer, arguments.out)
    finally:
        trainer.close()
    return 0


def _say(line: str) -> None:
    """A line on stderr, above the progress bar if there is one."""
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        tell(line)


def _run(trainer: Trainer) -> None:
    from tqdm import tqdm

    quiet = not trainer.engine.main
    total = trainer.settings.steps
    finished = trainer.step >= total
    if finished and not quiet:
        tell(f"the run was finished already, after {trainer.step} steps")
    with _on_sigterm(trainer.stop), tqdm(total=total, initial=trainer.step, unit="step", smoothing=0.05,
                                            disable=True if quiet else None) as bar:  # fmt: skip
        shown: dict[str, str] = {}
        for row in trainer.run():
            bar.update(trainer.step - bar.n)
            shown |= {name: f"{row[name]:.3f}" for name in SHOWN if isinstance(row.get(name), float)}
            bar.set_postfix(shown)
            if bar.disable and not quiet:
                tell(_line(row, shown, total))


def _line(row: Mapping[str, Any], shown: Mapping[str, str], total: int) -> str:
    """A row where there is no bar, such as in the log file of a batch system."""
    parts = [
        f"step {row['step']} of {total}",
        *(f"{name} {shown[name]}" for name in SHOWN if name in row and name in shown),
    ]
    if speed := row.get("samples_per_s"):
        parts.append(f"{speed:g} samples/s")
    return ", ".join(parts)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came before there was anything to save."""

    signum = signal.SIGTERM


@contextmanager
def _on_sigterm(handler: Callable[..., object]) -> Iterator[None]:
    """A machine that is taken away sends SIGTERM: a run is saved after its step, and ends well."""
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Ending:
    """What SIGTERM does before the first step: it ends the command. `asked`: whether it came."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, *_: object) -> None:
        self.asked = True
        raise _Terminated


def _say_end(trainer: Trainer, out: Path) -> None:
    if not trainer.engine.main:
        return
    checkpoint = trainer.folder.latest()
    best = trainer.folder.best
    where = f"checkpoint {checkpoint} after {trainer.step} of {trainer.settings.steps} steps"
    lines = [where + (f", the best is {best}" if best is not None and best != checkpoint else "")]
    if trainer.owes:
        lines.append(f"stopped before this checkpoint was evaluated; go on with: ki-train --resume -o {_quoted(out)}")
    elif trainer.step < trainer.settings.steps:
        lines.append(f"stopped; go on with: ki-train --resume -o {_quoted(out)}")
    else:
        chosen = "best" if best is not None else "last"
        lines.append(f"next: ki-export {_quoted(out / chosen)} -o {_quoted(out / 'bundle')}")
    show([*lines, f"how it went: {out / 'training' / 'train.html'}"])


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _origin(arguments: argparse.Namespace) -> Origin:
    """What the run is started from; paths that are there become absolute, Hub ids stay."""
    values: dict[str, Any] = {"datasets": tuple(_absolute(text) for text in arguments.datasets)}
    for name in ("map", "tokenizer", "fast", "init", "contract", "base"):
        value = getattr(arguments, name)
        values[name] = "" if value is None else _absolute(str(value))
    for name in ("preset", "fast_placement", "lerobot_version", "eval_robot"):
        values[name] = getattr(arguments, name) or ""
    for name in ("horizon", "fast_vocabulary", "eval_episodes"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ArgumentError(f"--{name.replace('_', '-')} {value}: expected at least 1")
        values[name] = value or 0
    if values["init"] and values["preset"]:
        raise ArgumentError("--init has a geometry of its own: leave --preset out")
    return Origin(**values)


def _absolute(text: str) -> str:
    """A path that exists, with its weight if it has one, from anywhere."""
    if "\0" in text:
        raise ArgumentError(f"{text!r:.80}: no path has a NUL character")
    path, colon, weight = text.rpartition(":")
    if Path(text).exists():
        return str(Path(text).absolute())
    return f"{Path(path).absolute()}:{weight}" if colon and Path(path).exists() else text


def main(argv: list[str] | None = None) -> int:
    """Entry point of ki-train; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    warnings.simplefilter("ignore")  # of torch and its neighbours: none of them is for the user
    return run_command("ki-train", lambda: train(arguments), "--resume goes on from the last save", needs="train")


if __name__ == "__main__":
    sys.exit(main())
