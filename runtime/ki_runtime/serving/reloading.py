"""Another engine for the same clients: loaded beside the one that answers, and told from it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ki_edge.bundle import Bundle
from ki_edge.errors import ArgumentError
from ki_edge.policy.contract import PolicyContract
from ki_runtime.policy.assets import read_assets
from ki_runtime.policy.decode import check_words

from .engine import Engine

RELOAD_THREAD = "reload"
TOLD = ("rtc", "max_delay", "heads")  # of the metadata, what a client relies on besides the contract


@dataclass(frozen=True)
class Promise:
    """What clients will be told of a bundle that nothing has loaded: of an engine's metadata, `TOLD`."""

    contract: PolicyContract
    metadata: Mapping[str, Any]

    @classmethod
    def of(cls, bundle: Bundle) -> Promise:
        """As `described` tells it of the policy. BundleError for a bundle that holds none."""
        contract, way = read_assets(bundle).contract, bundle.manifest.config.rtc
        heads = ["flow"] if contract.fast is None else ["flow", "fast"]
        with suppress(ArgumentError):
            check_words(bundle)
            heads.append("text")
        delay = contract.rtc_max_delay if way == "trained" else None
        return cls(contract, {"rtc": None if way == "none" else way, "max_delay": delay, "heads": heads})


def differences(old: Engine, new: Engine | Promise) -> str | None:
    """In what two policies differ that clients were told when they connected; None if in nothing."""
    before, after = old.contract.to_json(), new.contract.to_json()
    names = [f"contract ({name})" for name in {**before, **after} if before.get(name) != after.get(name)]
    names += [name for name in TOLD if old.metadata.get(name) != new.metadata.get(name)]
    return ", ".join(names) or None


async def beside(load: Callable[[], Engine]) -> Engine:
    """What `load` gives, in a thread of its own: a server that ends does not wait for a model to be loaded."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[Engine] = loop.create_future()

    def settle(settled: Callable[[Any], None], value: Any) -> None:
        if not found.done():
            settled(value)

    def work() -> None:
        try:
            settled, value = found.set_result, load()
        except Exception as error:
            settled, value = found.set_exception, error  # type: ignore[assignment]
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, settled, value)

    threading.Thread(target=work, name=RELOAD_THREAD, daemon=True).start()
    return await found
