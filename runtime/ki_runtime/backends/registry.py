"""Which inference engines exist, and which of them runs a bundle on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError
from ki_edge.graphs import GraphSpec

from .backend import Backend, GraphOpener, SessionOptions, Slower
from .choice import find_choice
from .session import Session
from .variant import Variant, read_variant, wished

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
