"""The witness run because somebody asks for it: `ki-parity BUNDLE --backend NAME`, or a server that loads it again."""

from __future__ import annotations

from collections.abc import Callable

from ki_edge import graphs
from ki_edge.bundle import Bundle
from ki_edge.bundle.witness import has_witness, read_witness
from ki_edge.errors import BackendError
from ki_runtime.backends.backend import SessionOptions
from ki_runtime.backends.registry import connect

from .proof import Prover, refusal
from .sampler import Sampler
from .verdict import ACTIONS, FAST, Verdict


def repeat_proof(bundle: Bundle, backend: str, say: Callable[[str], object]) -> list[Verdict]:
    """Run the witness on a backend ("auto": the first that can), whatever was found before.

    Actions first, then FAST tokens where the policy has them. The verdicts are written down and hold from then on.
    BundleError if the bundle has no witness, BackendError if the backend cannot run it; an engine that is wrong is a
    verdict.
    """
    read_witness(bundle)
    options = SessionOptions(say=say)
    connection = connect(bundle, backend, options, graphs.specs(bundle.manifest.config))
    sampler = Sampler(bundle, connection.open, connection.backend)
    prover = Prover(bundle, connection.backend, options)
    found = [prover.repeat(ACTIONS, sampler)]
    if bundle.manifest.decodes_fast:
        try:
            sampler.prepare_fast()
        except BackendError as error:
            say(f"FAST tokens are not proven: {error}")
        else:
            found.append(prover.repeat(FAST, sampler))
    return found


def prove_opened(sampler: Sampler, say: Callable[[str], object]) -> Verdict | None:
    """The proof of a sampler's actions whatever was written down before; None for a bundle without a witness.

    BackendError with the figures if it does not reproduce it.
    """
    if sampler.backend is None or not has_witness(sampler.bundle.manifest):
        return None
    options = SessionOptions(record=False if sampler.sequential else None, say=say)
    verdict = Prover(sampler.bundle, sampler.backend, options).repeat(ACTIONS, sampler)
    if not verdict.passed:
        raise BackendError(refusal(sampler.backend.name, verdict, sampler.bundle))
    return verdict
