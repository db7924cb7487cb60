"""One graph to one engine: parse, profiles, progress, the builder's log, and an interruption that ends the build."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ki_edge.errors import BackendError, KiEdgeError
from ki_edge.files.reading import read_file
from ki_edge.files.writing import reason, write_file, writing
from ki_runtime.backends.session import first_line
from ki_runtime.gpu.device import Capability

from .api import Api
from .profiles import Profile

MAX_TIMINGS = 1 << 28  # bytes of a timing cache


@dataclass(frozen=True)
class Settings:
    """What the compiler is told. `workspace`: bytes for one layer; `targets`: compute capabilities (RTX)."""

    workspace: int
    targets: tuple[Capability, ...]
    lean: bool = False
    timings: Path | None = None  # file of the timing cache


@dataclass(frozen=True)
class Compiled:
    """Size in bytes and sha256 of the engine written, and the seconds that it took."""

    size: int
    sha256: str
    seconds: float


def compile_graph(
    api: Api, graph: Path, profiles: Sequence[Profile], engine: Path, log: Path, settings: Settings
) -> Compiled:
    """Compile an ONNX file into `engine`, with the builder's log beside it.

    BackendError in one line: the node that cannot be imported, or what the builder says. KeyboardInterrupt once the
    builder has stopped after Ctrl-C. Whatever was written is then the caller's to remove.
    """
    try:
        return _compile(api, graph, profiles, engine, log, settings)
    except (KiEdgeError, OSError):
        raise
    except Exception as error:  # of the builder's bindings: no GPU, no memory, a missing library
        raise BackendError(
            f"{api.title} cannot compile graph {graph.stem}: {type(error).__name__}: {first_line(error)}"
        ) from error


def _compile(
    api: Api, graph: Path, profiles: Sequence[Profile], engine: Path, log: Path, settings: Settings
) -> Compiled:
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as lines:
        notes = _Notes(lines)
        logger = api.logger(notes.add)
        builder = api.module.Builder(logger)
        network = api.network(builder)
        _parse(api, api.module.OnnxParser(network, logger), graph)
        config = api.config(builder, settings.workspace, settings.targets, lean=settings.lean)
        for profile in profiles:
            _add_profile(builder, config, profile, graph.stem)
        _load_timings(api, config, settings.timings)
        with writing(engine, BackendError), engine.open("wb") as file, Progress(graph.stem) as progress:
            out = _Output(file)
            config.progress_monitor = api.monitor(progress.started, progress.stepped, progress.finished)
            done = _interruptible(lambda: api.serialize(builder, network, config, out.write), progress)
        if notes.failure is not None:
            raise BackendError(f"cannot write {log}: {reason(notes.failure)}") from notes.failure
        if not done:
            why = notes.errors[0] if notes.errors else f"no reason given; see the verbose log of {api.title}"
            cure = "; export with --attention decomposed" if "Attention" in why else ""
            raise BackendError(f"{api.title} cannot compile graph {graph.stem}: {_one_line(why)}{cure}")
        _save_timings(api, config, settings.timings)
    return Compiled(out.size, out.digest.hexdigest(), time.perf_counter() - start)


def _parse(api: Api, parser: Any, graph: Path) -> None:
    if parser.parse_from_file(str(graph)):
        return
    found = [parser.get_error(at) for at in range(parser.num_errors)]
    if not found:
        raise BackendError(f"{api.title} cannot read graph {graph}")
    first = found[0]
    node = f"node {first.node_name() or '(unnamed)'} ({first.node_operator() or 'unknown operator'})"
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    raise BackendError(f"{api.title} cannot import graph {graph.stem}: {node}: {_one_line(first.desc())}{more}")


def _add_profile(builder: Any, config: Any, profile: Profile, graph: str) -> None:
    made = builder.create_optimization_profile()
    for name in profile:
        made.set_shape(name, *profile[name])
    if config.add_optimization_profile(made) < 0:
        raise BackendError(f"graph {graph} does not take the shapes {profile.to_json()}: export the checkpoint again")


def _load_timings(api: Api, config: Any, path: Path | None) -> None:
    if path is not None and api.keeps_timings:
        known = config.create_timing_cache(read_file(path, MAX_TIMINGS, BackendError) if path.is_file() else b"")
        config.set_timing_cache(known or config.create_timing_cache(b""), False)


def _save_timings(api: Api, config: Any, path: Path | None) -> None:
    if path is None or not api.keeps_timings:
        return
    write_file(path, bytes(config.get_timing_cache().serialize()), BackendError)


def _one_line(text: str) -> str:
    return " ".join(text.split())


class _Notes:
    """The builder's log, its errors, and what kept the log from being written. The builder must not see exceptions."""

    def __init__(self, lines: IO[str]) -> None:
        self.errors: list[str] = []
        self.failure: OSError | None = None
        self._lines = lines

    def add(self, severity: str, message: str) -> None:
        if severity == "error":
            self.errors.append(message)
        if self.failure is None and not self._lines.closed:  # the builder's objects may outlive its log
            try:
                self._lines.write(f"[{severity}] {message}\n")
            except OSError as error:
                self.failure = error


class _Output:
    """A file being written, with its size and hash so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self.size, self.digest = 0, hashlib.sha256()
        self._file = file

    def write(self, data: Any) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)


def _interruptible(work: Callable[[], bool], progress: Progress) -> bool:
    """Run a build in a thread of its own, so that Ctrl-C reaches this one and ends the build at its next step.

    The builder calls back from C++, where no exception may arise.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            return future.result()
        except KeyboardInterrupt:
            progress.cancelled = True
            raise


class Progress:
    """The phases of a build as a bar on a terminal. Set `cancelled` to end the build."""

    def __init__(self, name: str) -> None:
        self.cancelled = False
        self._phases: dict[str, _Phase] = {}
        self._bar = tqdm(total=100, desc=f"compiling {name}", unit="%", leave=False, disable=None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def started(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of `steps` steps begins, within a step of the phase `parent`."""
        phase = self._phases[name] = _Phase(max(1, steps))
        if parent in self._phases:
            self._phases[parent].inside = phase

    def stepped(self, name: str, step: int) -> bool:
        """Step number `step` is done; False ends the build."""
        phase = self._phases.get(name)
        if phase is not None:
            phase.done, phase.inside = step + 1, None
            with suppress(OSError):  # a terminal that is gone
                self._bar.update(max(0, self.percent - self._bar.n))
        return not self.cancelled

    def finished(self, name: str) -> None:
        """A phase is over."""
        self._phases.pop(name, None)

    @property
    def percent(self) -> int:
        """Of the outermost phase, steps of equal weight."""
        outermost = next(iter(self._phases.values()), None)
        return 100 if outermost is None else int(100 * outermost.fraction)


class _Phase:
    """A phase of a build, and the one that runs inside of its present step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.done = 0
        self.inside: _Phase | None = None

    @property
    def fraction(self) -> float:
        partly = self.inside.fraction if self.inside is not None else 0.0
        return min(1.0, (self.done + partly) / self.steps)
