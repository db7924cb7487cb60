"""Which inference engines exist, and which of them runs a bundle on this machine.

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

from .choice import find_choice
from .session import Session, first_line
from .variant import Variant, read_variant, wished

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


# In the order in which "auto" prefers them, but those for a CPU: see `_preferred`.
BACKENDS = (
    Backend("trt", "ki_runtime.trt.session", ("tensorrt", "tensorrt_lean"), "pip install tensorrt cuda-python"),
    Backend("trt-rtx", "ki_runtime.trt.session", ("tensorrt_rtx",), "pip install tensorrt-rtx-cu13 cuda-python"),
    Backend("ort-cuda", "ki_runtime.gpu.ort_cuda", ("onnxruntime",), "pip install onnxruntime-gpu cuda-python"),
    Backend(
        *("openvino", "ki_runtime.openvino.session", ("openvino",), "pip install 'ki-edge[openvino]'"),
        device="CPU",
        variant=Variant(),
    ),
    Backend("ort", "ki_runtime.backends.ort", ("onnxruntime",), "pip install 'ki-edge[ort]'", device="CPU"),
)
NAMES = ("auto", *(backend.name for backend in BACKENDS))
HELP = f"{', '.join(NAMES)}; openvino:GPU, openvino:CPU:bf16 and the like; default: the fastest one that can"


@dataclass(frozen=True)
class Connection:
    """A backend and what opens a bundle's graphs on it. Sessions share buffers only within one connection.

    `instead(error)`: the connection to the next backend that can, this one passed over for the reason that the error
    gives; it raises the error if this one was named, as `connect` does.
    """

    backend: Backend
    open: GraphOpener
    instead: Callable[[BackendError], Connection]


def choose_backend(name: str = "auto", bundle: Bundle | None = None) -> Backend:
    """The backend called `name`, or for "auto" the first that can run the bundle here.

    BackendError for an unknown name, and with every reason if none can.
    """
    candidates, passed = _candidates(name, bundle)
    for backend in candidates:
        why = backend.obstacle(bundle)
        if why is None:
            return replace(backend, passed=tuple(passed))
        passed.append((backend.name, why))
    raise _none(name, passed)


def connect(
    bundle: Bundle, name: str = "auto", options: SessionOptions | None = None, first: Sequence[GraphSpec] = ()
) -> Connection:
    """Take a backend as `choose_backend` does and connect to it. A backend that is named is never replaced by another.

    `first`: graphs that are opened now, so that a backend which fails at them is passed over too; each is given out at
    its first `open`. BackendError as of `choose_backend`, and if a backend that was named cannot build or load engines.
    """
    return _connect(bundle, name, options or SessionOptions(), first, *_candidates(name, bundle))


def _connect(
    bundle: Bundle,
    name: str,
    options: SessionOptions,
    first: Sequence[GraphSpec],
    candidates: Iterator[Backend],
    passed: list[tuple[str, str]],
) -> Connection:
    """The first of `candidates` that can; those in `passed` were asked before."""

    def refuse(backend: Backend, error: BackendError) -> None:
        if name != "auto":
            raise error
        passed.append((backend.name, str(error)))

    for backend in candidates:
        why = backend.obstacle(bundle)
        if why is not None:
            passed.append((backend.name, why))
            continue
        chosen = replace(backend, passed=tuple(passed))
        try:
            opened = _opened(chosen.connect(bundle, options), first)
        except BackendError as error:
            refuse(backend, error)
            continue

        def instead(error: BackendError, refused: Backend = backend) -> Connection:
            refuse(refused, error)
            return _connect(bundle, name, options, first, candidates, passed)

        return Connection(chosen, opened, instead)
    raise _none(name, passed)


def _opened(open_graph: GraphOpener, first: Sequence[GraphSpec]) -> GraphOpener:
    """An opener that has opened the `first` graphs already."""
    ready = {spec.name: open_graph(spec) for spec in first}
    return lambda spec: ready.pop(spec.name, None) or open_graph(spec)


def open_session(bundle: Bundle, graph: GraphSpec, backend: Backend, options: SessionOptions) -> Session:
    """Load one graph of a bundle, alone; graphs that share buffers are opened through one `connect`.

    BackendError if the engine cannot be imported or refuses the graph, BundleError if the graph is not what graphs.py
    says.
    """
    return backend.connect(bundle, options)(graph)


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # ValueError: a module in sys.modules without a spec
        return False


def check_name(name: str) -> None:
    """BackendError unless there is a backend of this name."""
    if isinstance(name, str) and name not in NAMES and ":" in name:
        family, _, rest = name.partition(":")
        if any(backend.variant is not None and backend.name == family for backend in BACKENDS):
            read_variant(rest, name)
            return
    if not isinstance(name, str) or name not in NAMES:
        raise BackendError(f"no backend {name!r:.60}; there are: {', '.join(NAMES)}")


def _candidates(name: str, bundle: Bundle | None) -> tuple[Iterator[Backend], list[tuple[str, str]]]:
    """What may run, in order, and what is known to be slower here."""
    check_name(name)
    if name == "auto":
        return _preferred(bundle)
    return iter([_variant_of(backend, name, bundle) for backend in BACKENDS if _of_family(backend, name)]), []


def _of_family(backend: Backend, name: str) -> bool:
    return backend.name in (name, name.partition(":")[0])


def _variant_of(backend: Backend, name: str, bundle: Bundle | None) -> Backend:
    """The backend with the device and arithmetic that its name says, or the bundle asks for."""
    if backend.variant is None:
        return backend
    rest = name.partition(":")[2]
    variant = (read_variant(rest, name) if rest else backend.variant).of(bundle)
    device = variant.device.partition(".")[0]
    return replace(backend, name=name, device=device, variant=variant)


def _preferred(bundle: Bundle | None) -> tuple[Iterator[Backend], list[tuple[str, str]]]:
    """GPUs first. Of the engines for a CPU the one that was measured to be the fastest here, and while that was not
    done, ONNX Runtime; OpenVINO for a bundle that was exported for it.
    """
    every = [_variant_of(backend, backend.name, bundle) for backend in BACKENDS]
    front = [backend for backend in every if backend.device != "CPU"]
    rivals = [backend for backend in every if backend.device == "CPU"]
    if bundle is None or wished(bundle) is None:
        rivals.reverse()  # ONNX Runtime stands at the end of the list
        choice = find_choice(bundle, on_cpu()) if bundle is not None and len(rivals) > 1 else None
        if choice is not None:
            rivals.sort(key=lambda backend: choice.rank(backend.name))
            slower = [(backend.name, Slower(choice.against(backend.name))) for backend in rivals[1:]]
            return iter([*front, *rivals]), [(name, why) for name, why in slower if why]
    return iter([*front, *rivals]), []


def on_cpu() -> tuple[Backend, ...]:
    """The backends for a CPU that are installed."""
    return tuple(backend for backend in BACKENDS if backend.device == "CPU" and backend.package is not None)


def _none(name: str, passed: list[tuple[str, str]]) -> BackendError:
    asked = [backend for backend in BACKENDS if name == "auto" or _of_family(backend, name)]
    missing = [backend.install for backend in asked if backend.package is None]
    cure = f"; {missing[-1]}" if missing else ""
    if name != "auto":
        return BackendError(f"backend '{name}': {passed[0][1]}{cure}")
    return BackendError(f"no backend can run this: {'; '.join(f'{who}: {why}' for who, why in passed)}{cure}")
