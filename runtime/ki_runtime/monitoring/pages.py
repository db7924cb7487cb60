"""What the server's port shows beside the websocket: /metrics, the page at / with its files, /status.json, /picture."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .access import Access
from .events import Page, Status
from .metrics import Metrics
from .pictures import Pictures
from .recent import Recent

FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
WEB = Path(__file__).with_name("web")
MOST_CLIENTS = 200  # that are listed
LONGEST = 200  # characters of what the policy is called
Reply = tuple[int, str, bytes]


def metrics_pages(metrics: Metrics) -> dict[str, Page]:
    """/metrics. It has no addresses, and needs no key."""

    def show(query: Mapping[str, str], headers: Mapping[str, str]) -> Reply:
        kind, text = metrics.to_text()
        return 200, kind, text

    return {"/metrics": show}


class StatusPages:
    """/ , /status.json and /picture?client=ADDRESS&camera=NAME. Who may not see clients is shown sums only."""

    def __init__(
        self,
        status: Callable[[], Status],
        recent: Recent,
        pictures: Pictures,
        access: Access,
        extras: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._status, self._recent, self._pictures = status, recent, pictures
        self._access, self._extras = access, extras

    def pages(self) -> dict[str, Page]:
        files = {path: _file(*file) for path, file in FILES.items()}
        return {**files, "/status.json": self.status, "/picture": self.picture}

    def status(self, query: Mapping[str, str], headers: Mapping[str, str]) -> Reply:
        """How things stand, as JSON; the names are described in docs/monitoring.md."""
        now, status, recent = time.monotonic(), self._status(), self._recent.to_json()
        shown = self._access.allows(headers)
        clients = [
            {
                "address": client.address,
                "connected_s": round(now - client.since, 1),
                "answered": client.answered,
                "refused": client.refused,
                "last_ms": None if client.last_ms is None else round(client.last_ms, 2),
            }
            for client in status.clients[:MOST_CLIENTS]
        ]
        facts = {
            "accepting": status.accepting,
            "uptime_s": round(now - status.started, 1),
            "policy": {str(name): _words(value) for name, value in status.policy.items() if _short(value)},
            "queue": {"waiting": status.waiting, "running": status.running},
            **recent,
            "connected": len(status.clients),
            **self._extras(),
            "details": {"shown": shown, "needs_key": self._access.needs_key},
        }
        if shown:
            facts |= {"clients": clients, "cameras": self._pictures.cameras()}
        else:
            facts |= {"last_error": None}
            facts["details"]["why"] = self._access.refusal()
        return 200, "application/json", json.dumps(facts).encode()

    def picture(self, query: Mapping[str, str], headers: Mapping[str, str]) -> Reply:
        if not self._access.allows(headers):
            status = 401 if self._access.needs_key else 403
            return status, "text/plain", f"pictures: {self._access.refusal()}\n".encode()
        found = self._pictures.show(query.get("client", ""), query.get("camera", ""))
        if found is None:
            return 404, "text/plain", b"no such picture: give client and camera as /status.json has them\n"
        return 200, "image/jpeg", found


def _file(name: str, kind: str) -> Page:
    content = (WEB / name).read_bytes()
    return lambda query, headers: (200, kind, content)


def _short(value: object) -> bool:
    """Whether it is a fact that the page can show: a text, a number, a few of them."""
    if isinstance(value, Mapping):
        return all(isinstance(v, str | int | float) or v is None for v in value.values()) and len(value) <= 20
    if isinstance(value, list | tuple):
        return all(isinstance(v, str | int | float) for v in value) and len(value) <= 20
    return isinstance(value, str | int | float)


def _words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items())[:LONGEST]
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))[:LONGEST]
    return str(value)[:LONGEST]
