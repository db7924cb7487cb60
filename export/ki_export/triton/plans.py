"""Which engines of a bundle Triton's TensorRT backend can take: one file for each compute capability."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ki_edge.bundle import Bundle
from ki_edge.errors import BackendError
from ki_runtime.trt.engines import Engines
from ki_runtime.trt.selection import folders_in

FLAVOUR = "tensorrt"  # TensorRT-RTX and the lean runtime have no backend in Triton


def plans_of(bundle: Bundle, graph: str, say: Callable[[str], object]) -> dict[str, Path]:
    """{compute capability such as "8.9": engine} of one graph, of the bundle's own weights and undamaged.

    BackendError if there is none, with the reasons why those on disk do not do. Of two for one capability the younger
    is taken, which `say` is told.
    """
    chosen: dict[str, Engines] = {}
    reasons: list[str] = []
    for folder, engines in sorted(folders_in(bundle), key=lambda item: item[0].stat().st_mtime):
        if isinstance(engines, str):
            reasons.append(engines)
        elif graph in engines.files:
            if why := _unfit(engines, graph, bundle):
                reasons.append(f"{folder.name} {why}")
                continue
            for major, minor in engines.identity.capabilities:
                capability = f"{major}.{minor}"
                if capability in chosen:
                    say(f"{graph} has two engines for compute capability {capability}: {folder.name} is taken")
                chosen[capability] = engines
    if not chosen:
        found = f" ({'; '.join(reasons)})" if reasons else ""
        raise BackendError(
            f"{bundle.path} has no engine of {graph} for Triton's TensorRT{found}: build it on that GPU, with Triton's "
            f"own version of TensorRT: ki-build {bundle.path}"
        )
    return {capability: engines.path(graph) for capability, engines in sorted(chosen.items())}


def _unfit(engines: Engines, graph: str, bundle: Bundle) -> str | None:
    identity = engines.identity
    files = bundle.manifest.files
    if identity.flavour != FLAVOUR or identity.lean:
        return f"is of {'the lean runtime' if identity.lean else identity.flavour}"
    weights = files[str(bundle.manifest.weights["file"])].get("sha256")
    if (identity.weights, identity.graphs[graph]) != (weights, files[bundle.graph(graph).name].get("sha256")):
        return "was built of another export"
    return "; ".join(engines.damage(verify=True, graphs=(graph,))) or None
