"""Where a run's policy comes from: a bundle that is opened here, or a server that is asked."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ki_edge.commands import tell
from ki_edge.errors import ArgumentError
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.normalize import NormStats

# Options of a bundle and its engine, with what they are where nobody gives them: a server decides them by itself.
OF_BUNDLES: Mapping[str, Any] = {
    "backend": "auto",
    "threads": None,
    "verify": False,
    "digest": None,
    "trust_engines": False,
    "sequential": False,
    "self_check": None,
}
SERVERS = ("ws://", "wss://")


def check_source(options: argparse.Namespace) -> None:
    """ArgumentError unless there is one policy, with options of its own kind. A server's address may also stand in the
    bundle's place.
    """
    if options.bundle is None and options.rerun is not None and Path(options.rerun).is_dir():
        raise ArgumentError(f"--rerun took {options.rerun} for its file: write the bundle first, and --rerun last")
    if options.bundle is not None and options.bundle.startswith(SERVERS) and options.policy is None:
        options.bundle, options.policy = None, options.bundle
    if (options.bundle is None) == (options.policy is None):
        given = "both are given" if options.policy is not None else "neither is given"
        raise ArgumentError(f"the policy is a BUNDLE or --policy ws://HOST:PORT; {given}")
    if options.policy is None:
        if options.contract is not None:
            raise ArgumentError("--contract is for --policy: a bundle has its contract")
        return
    for name, usual in OF_BUNDLES.items():
        if getattr(options, name) != usual:
            raise ArgumentError(f"--{name.replace('_', '-')} is for a bundle: not with --policy, whose server decides")


@contextmanager
def opened_policy(options: argparse.Namespace) -> Iterator[Any]:
    """The policy that `check_source` let through: a `Policy`, or a `RemotePolicy` that is closed afterwards."""
    if options.policy is None:
        yield _load(options)
        return
    with closing(_connect(options)) as policy:
        yield policy


def _load(options: argparse.Namespace) -> Any:
    from ki_runtime.policy.policy import Policy

    return Policy.load(
        options.bundle,
        options.backend,
        threads=options.threads,
        verify=options.verify if options.digest is None else options.digest,
        build=True,
        trust_engines=options.trust_engines,
        sequential=options.sequential,
        say=tell,
    )


def contract_of(options: argparse.Namespace) -> tuple[PolicyContract, Mapping[str, NormStats]]:
    """Contract and statistics of the policy, whose model is not opened; a server tells no statistics."""
    if options.policy is not None:
        policy = _connect(options)
        policy.close()
        return policy.contract, {}
    from ki_edge.bundle import Bundle
    from ki_runtime.policy.assets import read_assets

    assets = read_assets(Bundle.open(options.bundle))
    return assets.contract, assets.stats


def _connect(options: argparse.Namespace) -> Any:
    from ki_runtime.remote.abilities import read_contract
    from ki_runtime.remote.policy import RemotePolicy

    contract = None if options.contract is None else read_contract(options.contract)
    return RemotePolicy(options.policy, contract, say=tell)
