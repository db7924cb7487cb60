"""How a server listens, and what it bounds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ki_edge.arguments import count
from ki_edge.errors import ArgumentError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MOST_FRAME_MIB = 1024


@dataclass(frozen=True)
class ServerOptions:
    """`port` 0: one that is free. `api_key`: what clients must send as `Authorization: Api-Key KEY`; None: nothing.

    `most_clients`: connections at once; `most_waiting`: requests that wait, over all clients; `longest_wait`: seconds
    that one may wait; `largest_batch`: requests that run at once at most, where that is faster, 1: one after the
    other; `most_frame_mib`: of a frame that comes in; `most_steps`: denoising steps that a client may ask for. `debug`:
    errors go to the client with their traceback. ArgumentError for what is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    certificate: str | Path | None = None  # PEM files, both or neither
    private_key: str | Path | None = None
    most_clients: int = 64
    most_waiting: int = 64
    longest_wait: float = 10.0
    largest_batch: int = 8
    most_frame_mib: int = 32
    most_steps: int = 100
    debug: bool = False

    def __post_init__(self) -> None:
        count(self.port, "port", 65535, least=0)
        count(self.most_clients, "most_clients", 100_000)
        count(self.most_waiting, "most_waiting", 100_000)
        count(self.largest_batch, "largest_batch", 1024)
        count(self.most_frame_mib, "most_frame_mib", MOST_FRAME_MIB)
        count(self.most_steps, "most_steps", 1000)
        if not 0 < self.longest_wait <= 3600:
            raise ArgumentError(f"longest_wait {self.longest_wait!r:.40}: expected seconds, above 0 and at most 3600")
        if (self.certificate is None) != (self.private_key is None):
            raise ArgumentError("TLS needs a certificate and its private key: give both files")

    @property
    def exposed(self) -> bool:
        """Whether other machines can reach it, and nothing keeps them out or hides what is sent."""
        return self.host not in LOOPBACK and (self.api_key is None or self.certificate is None)
