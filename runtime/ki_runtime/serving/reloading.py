"""Another engine for the same clients: loaded beside the one that answers, and told from it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .engine import Engine

RELOAD_THREAD = "reload"
TOLD = ("rtc", "max_delay", "heads")  # of the metadata, what a client relies on besides the contract


def differences(old: Engine, new: Engine) -> str | None:
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
