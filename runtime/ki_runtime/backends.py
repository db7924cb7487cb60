"""Which inference engines exist. A backend's module, and with it the engine, is imported only when it is opened."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError
from ki_edge.graphs import GraphSpec

from .session import Session


@dataclass(frozen=True)
class SessionOptions:
    """What every backend understands.

    `threads`: CPU threads of one graph; None leaves it to the engine. `prepack`: keep weights in memory in the engine's
    own form rather than in the mapped file; None decides by graph and precision (see `ort_session`).
    """

    threads: int | None = None
    prepack: bool | None = None


@dataclass(frozen=True)
class Backend:
    """`module` defines open_session(bundle, graph, options) -> Session and needs the package `requires`."""

    name: str
    module: str
    requires: str
    install: str

    @property
    def installed(self) -> bool:
        return find_spec(self.requires) is not None


# In the order in which "auto" prefers them.
BACKENDS = (Backend("ort", "ki_runtime.ort_session", "onnxruntime", "pip install 'ki-edge[ort]'"),)
NAMES = ("auto", *(backend.name for backend in BACKENDS))


def choose_backend(name: str = "auto") -> Backend:
    """The backend called `name`, or the first installed one for "auto".

    BackendError lists what exists and what is installed if there is no such backend or its package is missing.
    """
    wanted = [backend for backend in BACKENDS if name in ("auto", backend.name)]
    if not wanted:
        raise BackendError(f"no backend '{name}'; there are: {_inventory()}")
    for backend in wanted:
        if backend.installed:
            return backend
    cure = " or ".join(backend.install for backend in wanted)
    raise BackendError(f"backend '{name}' is not installed ({_inventory()}): {cure}")


def open_session(bundle: Bundle, graph: GraphSpec, backend: Backend, options: SessionOptions) -> Session:
    """Load one graph of a bundle.

    BackendError if the engine cannot be imported or refuses the graph, BundleError if the graph is not what graphs.py
    says.
    """
    try:
        session: Session = import_module(backend.module).open_session(bundle, graph, options)
    except ImportError as error:
        raise BackendError(f"backend '{backend.name}' cannot be imported: {error}; {backend.install}") from error
    return session


def _inventory() -> str:
    marks = (f"{b.name} ({'installed' if b.installed else 'not installed'})" for b in BACKENDS)
    return ", ".join(("auto", *marks))
