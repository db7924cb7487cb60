"""What an inference engine is to the rest: named, looked for, asked whether it can, connected to, described.

A backend's module, and with it the engine, is imported only when it is asked for. Each module defines

    obstacle(bundle | None, package) -> str | None           why it cannot run that bundle here; opens nothing
    connect(bundle, package, options) -> GraphOpener         what opens the bundle's graphs, all on one device
    setting(bundle, package, graphs) -> Setting              what computes these graphs here, for the record of a proof

or, where a name may carry device and arithmetic, `engine_of(variant)`, which gives an object with these three.
Engines of `setting` exist: it is asked after `connect`. It raises BackendError where they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ki_edge.arguments import count
from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError, KiEdgeError
from ki_edge.graphs import GraphSpec

from .session import Session, first_line
from .variant import Variant

MAX_THREADS = 4096
GraphOpener = Callable[[GraphSpec], Session]


def silent(line: str) -> None:
    """Says nothing."""


class NotInstalled(str):
    """Why a backend was passed over, where nobody installed it: nothing that calls for attention."""


class Slower(NotInstalled):
    """Why a backend was passed over that was measured: another is faster. Nothing that calls for attention."""


class Unproven(str):
    """What is known of a backend's proof, where that is nothing: it calls for attention."""


@dataclass(frozen=True)
class Setting:
    """What computes a bundle's graphs: `environment`: all that its results depend on, versions, hashes, devices by
    name.

    `folder`: where verdicts on it lie, which may not exist yet. `rounding` of its products, where that is coarser than
    the graphs say.
    """

    environment: Mapping[str, str]
    folder: Path
    rounding: str = "float32"


@dataclass(frozen=True)
class SessionOptions:
    """What every backend understands.

    `threads`: CPU threads of one graph; None leaves it to the engine. `prepack`: keep weights in memory in the engine's
    own form rather than in the mapped file; None decides by graph and precision (see `ort_session`). `record`: record
    runs as CUDA graphs and replay them; None leaves it to the backend. `say`: told what takes long or went wrong.
    `verify`: check the hashes of what a backend keeps beside the bundle's own files. `build`: build engines that are
    missing, which takes minutes; else they are an error that says how. `trust`: load engines with code of the host's
    that were not built on this machine.
    """

    threads: int | None = None
    prepack: bool | None = None
    record: bool | None = None
    say: Callable[[str], object] = silent
    verify: bool = False
    build: bool = False
    trust: bool = False

    def __post_init__(self) -> None:
        if self.threads is not None:
            count(self.threads, "threads", MAX_THREADS)


@dataclass(frozen=True)
class Backend:
    """An engine on a device. It needs one of `packages`, the first installed one is used.

    `passed`: the backends that would have been preferred, and why each was passed over. `proof`: what is known of it
    here, empty where nobody asked. `variant`: device and arithmetic, of a backend whose name may carry them.
    """

    name: str
    module: str
    packages: tuple[str, ...]
    install: str
    device: str = "GPU"
    passed: tuple[tuple[str, str], ...] = ()
    proof: str = ""
    variant: Variant | None = None

    @property
    def package(self) -> str | None:
        """The package that it uses; None if none is installed."""
        return next(filter(_installed, self.packages), None)

    def obstacle(self, bundle: Bundle | None) -> str | None:
        """Why it cannot run this bundle (or, for None, any) on this machine; None if it can."""
        if self.package is None:
            return NotInstalled(f"no {' or '.join(self.packages)} package")
        try:
            found: str | None = self._engine().obstacle(bundle, self.package)
        except KiEdgeError:
            raise
        except ImportError as error:
            return f"cannot be imported ({first_line(error)})"
        except Exception as error:  # an engine's own: no reason not to take another
            return f"failed ({type(error).__name__}: {first_line(error)})"
        return found

    def connect(self, bundle: Bundle, options: SessionOptions) -> GraphOpener:
        """What opens a bundle's graphs; whatever the engine raises is then a BackendError of one line."""
        with self._failing():
            opened: GraphOpener = self._engine().connect(bundle, self.package, options)

        def open_graph(graph: GraphSpec) -> Session:
            with self._failing():
                return opened(graph)

        return open_graph

    def setting(self, bundle: Bundle, names: Sequence[str]) -> Setting:
        """What computes the graphs of these names here. BackendError if their engines do not exist."""
        with self._failing():
            found: Setting = self._engine().setting(bundle, self.package, names)
        return replace(found, environment={"backend": self.family, **found.environment})

    @property
    def family(self) -> str:
        """Its name without device and arithmetic."""
        return self.name.partition(":")[0]

    def _engine(self) -> Any:
        module = import_module(self.module)
        return module if self.variant is None else module.engine_of(self.variant)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except KiEdgeError:
            raise
        except ImportError as error:
            raise BackendError(
                f"backend '{self.name}' cannot be imported: {first_line(error)}; {self.install}"
            ) from error
        except Exception as error:
            raise BackendError(f"backend '{self.name}': {type(error).__name__}: {first_line(error)}") from error

    def describe(self, precision: str) -> str:
        """One line: what runs, why nothing faster does, and whether the bundle is slow there."""
        passed = "; ".join(f"{name}: {why}" for name, why in self.passed)
        where = self.device if self.variant is None else str(self.variant)
        line = f"backend: {self.name} ({where})" + (f": {passed}" if passed else "")
        line += f"; {self.proof}" if self.proof else ""
        if self._slow(precision):
            line += (
                ". SLOW: a float16 bundle is made for a GPU; on a CPU every product is widened to float32. "
                "Export with --precision fp32 or int8 for this machine"
            )
        return line

    def surprising(self, precision: str) -> bool:
        """Whether `describe` has something to say to people who did not ask: slow, or not what they installed."""
        passed = any(not isinstance(why, NotInstalled) for _, why in self.passed)
        return self._slow(precision) or isinstance(self.proof, Unproven) or passed

    def _slow(self, precision: str) -> bool:
        return self.device == "CPU" and precision == "float16"


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # ValueError: a module in sys.modules without a spec
        return False
