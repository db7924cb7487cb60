"""The last camera pictures of each client, for who asks for them."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ki_edge.errors import KiEdgeError
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.transforms import given_pictures

MOST_BYTES = 64 << 20  # of requests that are kept
WIDEST = 480  # pixels of a picture that is shown


class Pictures:
    """Keeps the last observation of each client, as it came: copying one would take the server's time.

    Of all clients together at most MOST_BYTES; beyond that, those who asked longest ago have none.
    """

    def __init__(self) -> None:
        self._lock, self._drawing = threading.Lock(), threading.Lock()
        self._seen: OrderedDict[str, tuple[Mapping[str, Any], int]] = OrderedDict()
        self._bytes = 0
        self._contract: PolicyContract | None = None

    def loaded(self, contract: PolicyContract) -> None:
        self._contract = contract

    def cameras(self) -> list[str]:
        """Those of the contract."""
        contract = self._contract
        return [] if contract is None else [camera.key for camera in contract.cameras if camera.key is not None]

    def keep(self, client: str, observation: Mapping[str, Any], size: int) -> None:
        """`size`: bytes that it holds on to."""
        with self._lock:
            self._drop(client)
            if size > MOST_BYTES:
                return
            self._seen[client] = (observation, size)
            self._bytes += size
            while self._bytes > MOST_BYTES:
                self._drop(next(iter(self._seen)))

    def left(self, client: str) -> None:
        with self._lock:
            self._drop(client)

    def show(self, client: str, camera: str) -> bytes | None:
        """A JPEG; None where there is no such picture. One at a time: many viewers cost no more than one core."""
        with self._lock:
            observation, _ = self._seen.get(client, (None, 0))
            contract = self._contract
        if observation is None or contract is None:
            return None
        with self._drawing:
            try:
                picture = given_pictures(contract, observation).get(camera)
            except KiEdgeError:
                return None
            if picture is None:
                return None
            every = -(-max(picture.shape[:2]) // WIDEST)
            out = io.BytesIO()
            Image.fromarray(picture[::every, ::every].copy()).save(out, "JPEG", quality=80)
            return out.getvalue()

    def _drop(self, client: str) -> None:
        _, size = self._seen.pop(client, (None, 0))
        self._bytes -= size
