"""From the bundle of a configuration to a policy that infers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Protocol

from ki_edge.errors import ArgumentError
from ki_edge.policy.chunking import Guiding, PreviousChunk, Way
from ki_edge.policy.contract import PolicyContract

from .configuration_ki_edge import KiEdgeConfig

REMOTE = ("ws://", "wss://")
logger = logging.getLogger(__name__)


class Runtime(Protocol):
    """What is needed of a policy: `ki_runtime.Policy` has it."""

    contract: PolicyContract

    @property
    def rtc(self) -> Way | None: ...

    @property
    def max_delay(self) -> int | None: ...

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        noise: Any = None,
        num_steps: int | None = None,
        previous: PreviousChunk | None = None,
        way: Way | None = None,
        guiding: Guiding | None = None,
    ) -> dict[str, Any]: ...


def open_policy(config: KiEdgeConfig) -> Runtime:
    """The policy, with its first inference done, which is slower than the others.

    ArgumentError without a bundle; errors as of `ki_runtime.Policy.load`, or of `ki_runtime.remote.RemotePolicy`.
    """
    if not config.bundle:
        raise ArgumentError("--policy.bundle is missing: give the folder that ki-export wrote")
    if config.bundle.startswith(REMOTE):
        return _warmed(_connect(config), config)
    if config.contract is not None:
        raise ArgumentError(f"--policy.contract={config.contract}: a bundle has its own; it is for ws://HOST:PORT")
    from ki_runtime import Policy

    policy = Policy.load(
        config.bundle,
        config.backend,
        threads=config.threads,
        verify=False if config.digest is None else config.digest,
        build=True,
        say=logger.info,
    )
    return _warmed(policy, config)


def _connect(config: KiEdgeConfig) -> Any:
    """The policy of a server. ArgumentError for options of an engine, which is on the server's side."""
    if find_spec("ki_runtime.remote") is None:
        raise ArgumentError(
            f"--policy.bundle={config.bundle}: this ki_edge opens bundles on this machine: give a folder"
        )
    from ki_runtime.remote.abilities import read_contract
    from ki_runtime.remote.policy import RemotePolicy

    engine = {"backend": "auto", "threads": None, "digest": None, "num_steps": None}
    given = [f"--policy.{name}" for name, usual in engine.items() if getattr(config, name) != usual]
    if given:
        raise ArgumentError(f"{', '.join(given)}: the server at {config.bundle} decides that; leave it out")
    contract = None if config.contract is None else read_contract(config.contract)
    return RemotePolicy(config.bundle, contract, say=logger.info)


def _warmed(policy: Any, config: KiEdgeConfig) -> Runtime:
    prepared = policy.warm_up(num_steps=config.num_steps)
    logger.info("%s: warmed up, an inference takes %.0f ms", config.bundle, prepared.inference_ms)
    opened: Runtime = policy
    return opened
