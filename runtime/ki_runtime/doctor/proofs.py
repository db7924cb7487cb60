"""Whether the backends of this machine reproduce a bundle's witness, as was written down when they ran it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ki_edge.bundle import Bundle
from ki_edge.bundle.witness import has_witness
from ki_edge.errors import KiEdgeError
from ki_runtime.policy.proof import Standing

from .finding import Finding
from .host import Host

NAME = "proof"


def standings(host: Host, bundle: Bundle, backends: Sequence[str]) -> dict[str, Standing]:
    """What is known of each backend that can run; nothing of a bundle without a witness."""
    found = {}
    for backend in backends if has_witness(bundle.manifest) else ():
        try:
            found[backend] = host.standing(backend, bundle)
        except KiEdgeError as error:
            found[backend] = Standing(None, f"not yet proven here ({error})")
    return found


def proofs(bundle: Bundle, found: Mapping[str, Standing]) -> Iterator[Finding]:
    """A line a backend, with the command that proves it."""
    for backend, standing in found.items():
        command = f"ki-parity {bundle.path} --backend {backend}"
        if standing.proven:
            yield Finding("ok", NAME, f"{backend}: {standing.text}")
        elif standing.proven is None:
            yield Finding("warning", NAME, f"{backend}: {standing.text}", f"{command} (the first run does it as well)")
        else:
            fix = f"update its packages or the driver, then {command}; or take another --backend"
            yield Finding("problem", NAME, f"{backend}: {standing.text}", fix)
