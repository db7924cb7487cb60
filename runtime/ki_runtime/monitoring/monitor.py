"""All that watches a server, as one watcher, and the pages that it adds to the server's port."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ki_edge.policy.contract import PolicyContract

from .access import Access
from .device import device_memory
from .events import Handled, Page, Status
from .metrics import Memory, Metrics, Standing
from .pages import StatusPages, metrics_pages
from .pictures import Pictures
from .recent import Recent
from .request_log import JsonLog, PlainLog
from .request_recorder import RequestRecorder


class Monitor:
    """Give it to a server as a watcher, and the server its `pages`.

    `key`: the server's, with which pictures and clients are shown; without one they are on this machine only, where the
    server listens on `loopback`, or to all if `open_to_all`. `metrics`, `page`: whether there is /metrics, and / with
    /status.json and /picture. BackendError without prometheus-client if there are metrics.
    """

    def __init__(
        self,
        *,
        key: str | None = None,
        loopback: bool = True,
        open_to_all: bool = False,
        metrics: bool = True,
        page: bool = True,
        log: JsonLog | PlainLog | None = None,
        recorder: RequestRecorder | None = None,
        memory: Memory = device_memory,
    ) -> None:
        self._access = Access(key, loopback=loopback, open_to_all=open_to_all)
        self._metrics = Metrics() if metrics else None
        self._recent = Recent() if page else None
        self._pictures = Pictures() if page else None
        self._log, self._recorder, self._memory = log, recorder, memory
        self.failure: Exception | None = None  # a fault of ours, which must not become the server's

    def pages(self, status: Callable[[], Status]) -> dict[str, Page]:
        """Path -> what the server shows there. `status` may be called from any thread. Call it once."""
        found: dict[str, Page] = {}
        if self._metrics is not None:
            self._metrics.add(Standing(status, self._memory, self._counts(), self._gauges()))
            found |= metrics_pages(self._metrics)
        if self._recent is not None and self._pictures is not None:
            found |= StatusPages(status, self._recent, self._pictures, self._access, self._extras).pages()
        return found

    def loaded(self, contract: PolicyContract, policy: Mapping[str, Any]) -> None:
        if self._metrics is not None:
            self._safely(self._metrics.loaded)
        if self._pictures is not None:
            self._safely(self._pictures.loaded, contract)
        for watcher in self._writers():
            self._safely(watcher.loaded, contract, policy)

    def handled(self, request: Handled) -> None:
        if self._metrics is not None:
            self._safely(self._metrics.handled, request)
        if self._recent is not None:
            self._safely(self._recent.handled, request)
        observation = request.observation if self._access.possible and request.outcome == "answered" else None
        if self._pictures is not None and observation is not None:
            self._safely(self._pictures.keep, request.client, observation, request.received)
        for watcher in self._writers():
            self._safely(watcher.handled, request)

    def connected(self, client: str) -> None:
        if self._metrics is not None:
            self._safely(self._metrics.connected)
        for watcher in self._writers():
            self._safely(watcher.connected, client)

    def left(self, client: str, why: str) -> None:
        if self._pictures is not None:
            self._safely(self._pictures.left, client)
        for watcher in self._writers():
            self._safely(watcher.left, client, why)

    def close(self) -> None:
        """Finish recordings, then the log. With a recorder it may take its PATIENCE."""
        for watcher in self._writers():
            self._safely(watcher.close)

    def _writers(self) -> list[RequestRecorder | JsonLog | PlainLog]:
        return [watcher for watcher in (self._recorder, self._log) if watcher is not None]

    def _safely(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            self.failure = self.failure or error

    def _counts(self) -> dict[str, tuple[str, Callable[[], float]]]:
        log, recorder = self._log, self._recorder
        return {
            "log_dropped": ("Lines of the log that were lost.", lambda: log.dropped if log else 0),
            "recorded": ("Requests that were recorded.", lambda: recorder.frames if recorder else 0),
            "recorded_episodes": ("Episodes that are readable.", lambda: recorder.episodes if recorder else 0),
            "recording_dropped": ("Answered requests not recorded.", lambda: recorder.dropped if recorder else 0),
            "watching_failures": ("Faults of the monitoring itself.", lambda: float(self.failure is not None)),
        }

    def _gauges(self) -> dict[str, tuple[str, Callable[[], float]]]:
        recorder = self._recorder
        return {
            "recording": ("1 while requests are recorded.", lambda: float(bool(recorder and not recorder.stopped))),
            "recording_bytes": ("Bytes in the folder of recordings.", lambda: recorder.size if recorder else 0),
        }

    def _extras(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._recorder is not None:
            found["recording"] = self._recorder.describe()
        if self._log is not None:
            found["log_dropped"] = self._log.dropped
        return found
