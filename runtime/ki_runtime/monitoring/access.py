"""Who may see what clients sent: pictures, addresses, error lines."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from hashlib import sha256

SCHEMES = ("api-key ", "bearer ")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Access:
    """With a key: who sends it, as `Authorization: Api-Key KEY`. Without one: everybody if `open_to_all`, and else
    whoever sits at this machine: the server listens on loopback only, and was asked for under one of its names (a page
    of the web whose name was made to point at 127.0.0.1 is asked for under its own).
    """

    def __init__(self, key: str | None, *, loopback: bool, open_to_all: bool = False) -> None:
        self._key, self._loopback, self._open = key, loopback, open_to_all

    @property
    def needs_key(self) -> bool:
        return self._key is not None

    @property
    def possible(self) -> bool:
        """Whether anybody at all may see it."""
        return self._key is not None or self._open or self._loopback

    def allows(self, headers: Mapping[str, str]) -> bool:
        """Whether these headers, names in lower case, may see it."""
        if self._key is not None:
            return same(given(headers), self._key)
        return self._open or (self._loopback and _host(headers.get("host", "")) in LOOPBACK)

    def refusal(self) -> str:
        """What to do, for who may not."""
        if self._key is not None:
            return "needs the server's key: Authorization: Api-Key KEY"
        return "shown on this machine only, or with a key: start the server with --api-key-file, or with --show-clients"


def given(headers: Mapping[str, str]) -> str:
    """The key that headers hold; "" without one."""
    value = headers.get("authorization", "")
    scheme = next((scheme for scheme in SCHEMES if value.lower().startswith(scheme)), None)
    return "" if scheme is None else value[len(scheme) :].strip()


def same(given: str, key: str) -> bool:
    """Whether two keys are equal, in a time that tells nothing of where they differ, nor of the key's length."""
    one, two = (sha256(text.encode("utf-8", "surrogatepass")).digest() for text in (given, key))
    return hmac.compare_digest(one, two)


def _host(header: str) -> str:
    """The name without its port."""
    name, colon, port = header.strip().lower().rpartition(":")
    return name if colon and port.isdigit() else header.strip().lower()
