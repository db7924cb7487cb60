"""Work that must not hold up the server: done one by one by a thread of its own, from a queue that is bounded."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Calls `work(item)` for what is `put`, in order, in a daemon thread; `idle()` about every `every` seconds.

    At most `most` items of `most_bytes` together wait; what comes on top is dropped and counted. What `work` raises is
    kept in `failure`, and the thread goes on.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[T], None],
        *,
        most: int,
        most_bytes: int = 1 << 62,
        idle: Callable[[], None] = lambda: None,
        every: float = 1.0,
    ) -> None:
        self.dropped = 0
        self.failure: Exception | None = None
        self._work, self._idle, self._every = work, idle, every
        self._most, self._most_bytes = most, most_bytes
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: T, size: int = 0, *, needed: bool = False) -> bool:
        """Whether there was room. `needed`: it is taken anyway; its caller sees to it that there are few of them."""
        with self._changed:
            full = len(self._items) >= self._most or self._bytes + size > self._most_bytes
            if self._closed or (full and not needed):
                self.dropped += 1
                return False
            self._items.append((item, size))
            self._bytes += size
            self._changed.notify()
            return True

    def close(self, patience: float) -> bool:
        """Take nothing more and wait for what is there, at most `patience` seconds. Whether all was done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(patience)
        return not self._thread.is_alive()

    def _run(self) -> None:
        next_idle = time.monotonic() + self._every
        while True:
            with self._changed:
                if not self._items and not self._closed:
                    self._changed.wait(max(0.0, next_idle - time.monotonic()))
                if not self._items and self._closed:
                    return
                found = self._items.popleft() if self._items else None
                if found is not None:
                    self._bytes -= found[1]
            if found is not None:
                self._safely(lambda item=found[0]: self._work(item))  # type: ignore[misc]
                found = None  # its arrays go now, not with the next one
            if time.monotonic() >= next_idle:
                self._safely(self._idle)
                next_idle = time.monotonic() + self._every

    def _safely(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self.failure = error
