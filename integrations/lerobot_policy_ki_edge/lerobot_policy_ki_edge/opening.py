"""From the bundle of a configuration to a policy that infers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
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

    ArgumentError without a bundle; errors as of `ki_runtime.Policy.load`.
    """
    if not config.bundle:
        raise ArgumentError("--policy.bundle is missing: give the folder that ki-export wrote")
    if config.bundle.startswith(REMOTE):
        raise ArgumentError(
            f"--policy.bundle={config.bundle}: this version opens bundles on this machine alone; give a folder"
        )
    from ki_runtime import Policy

    policy = Policy.load(
        config.bundle,
        config.backend,
        threads=config.threads,
        verify=False if config.digest is None else config.digest,
        build=True,
        say=logger.info,
    )
    prepared = policy.warm_up(num_steps=config.num_steps)
    logger.info("%s: warmed up, an inference takes %.0f ms", config.bundle, prepared.inference_ms)
    return policy
