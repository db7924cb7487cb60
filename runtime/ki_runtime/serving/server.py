"""The server: a websocket for every robot, one policy behind them, and whoever watches.

The event loop moves frames and nothing else; inference runs in the engine's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ki_edge.commands import tell
from ki_edge.errors import BackendError, KiEdgeError
from ki_runtime.monitoring.events import Handled, Page, Status, Watcher
from ki_runtime.remote.abilities import OWN
from ki_runtime.remote.packing import pack

from .client import Client
from .dispatcher import Dispatcher
from .engine import Engine, LocalEngine
from .http import Doorkeeper
from .listening import listen
from .options import ServerOptions
from .question import NAMES
from .reloading import beside, differences
from .request import ENDING
from .waiting import WaitingRoom

GOODBYE = 0.8  # seconds for the last answers to be taken, and connections to be closed
EXTRA_CONNECTIONS = 64  # beside those of clients: health checks, pages, connections that say nothing


class Server:
    """A policy (or any `Engine`) behind openpi's websocket protocol. It listens from `open` or `start` on.

    `watchers`: told what happens; `pages`: served beside the websocket, by path; `load`: makes the engine that `reload`
    changes to, None: there is nothing to load again; `say`: told what its operator should know. ArgumentError,
    BackendError for options that do not work here, an address that is taken, a key that cannot be read.
    """

    def __init__(
        self,
        policy: Any,
        options: ServerOptions | None = None,
        *,
        watchers: Iterable[Watcher] = (),
        pages: Mapping[str, Page] | None = None,
        load: Callable[[], Engine] | None = None,
        say: Callable[[str], object] = tell,
    ) -> None:
        self.options = options or ServerOptions()
        engine: Engine = policy if hasattr(policy, "answer") else LocalEngine(policy)
        self._watchers, self.pages, self._say, self._load = list(watchers), dict(pages or {}), say, load
        self._room = WaitingRoom(self.options.most_waiting, self.options.longest_wait)
        self._dispatcher = Dispatcher(engine, self._room, debug=self.options.debug, lost=self._device_lost)
        self._clients: set[Client] = set()
        self._listener: Any = None
        self._accepting = False
        self._reloading = False
        self._ended: asyncio.Event | None = None
        self.failure: BackendError | None = None
        self.started = time.monotonic()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._complained: set[int] = set()

    @property
    def engine(self) -> Engine:
        """What answers now."""
        return self._dispatcher.engine

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client is told when it connects."""
        engine = self.engine
        told = {"largest_batch": engine.largest_batch, "request": list(NAMES), **engine.metadata}
        return {OWN: {**told, "most_frame_bytes": self.options.most_frame_mib << 20}}

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.port)

    @property
    def uri(self) -> str:
        """Its address, for clients on this machine."""
        host = self.options.host
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
        scheme = "ws" if self.options.certificate is None else "wss"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def status(self) -> Status:
        """How it stands now; from any thread."""
        clients = tuple(client.status() for client in tuple(self._clients))
        return Status(
            clients, len(self._room), self._dispatcher.running, self._accepting, self.engine.metadata, self.started
        )

    def watch(self, *watchers: Watcher) -> None:
        """More of those who are told what happens; before it listens."""
        self._watchers.extend(watchers)

    async def open(self) -> None:
        """Listen, in the running event loop."""
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        options = self.options
        door = Doorkeeper(
            options.api_key,
            self.pages,
            accepting=lambda: self._accepting,
            full=lambda: len(self._clients) >= options.most_clients,
            reload=None if self._load is None else self.reload,
        )
        self._listener = await listen(self._serve, options, door, options.most_clients + EXTRA_CONNECTIONS)
        self._dispatcher.start()
        self._accepting = True
        self._tell_loaded()

    async def ended(self) -> None:
        """Wait until `stop`, or the loss of the device, ends it; then end it: no new work, what runs is answered."""
        assert self._ended is not None
        await self._ended.wait()
        self._accepting = False
        self._listener.shut()
        self._room.close(ENDING)
        await self._dispatcher.finish()
        deadline = time.monotonic() + GOODBYE
        await _within(deadline, *(client.finish() for client in tuple(self._clients)))
        await _within(deadline, self._listener.close())
        self._listener.abort()
        await asyncio.sleep(0)
        self.engine.close()
        await asyncio.gather(*(asyncio.to_thread(watcher.close) for watcher in self._watchers), return_exceptions=True)

    def stop(self) -> None:
        """End it, from any thread: what runs is answered, what waits is told."""
        if self._ended is not None:
            self._in_loop(self._ended.set)

    def abort(self) -> None:
        """End it, from any thread, without waiting for what runs."""
        self.stop()
        self._in_loop(self._dispatcher.cancel)

    def _in_loop(self, call: Callable[[], object]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(call)

    async def reload(self) -> tuple[bool, str]:
        """Load the bundle again, prove it, and let it answer from then on: whether it does, and a line about it.

        Whatever is wrong with it, the old one goes on.
        """
        if self._load is None or self._reloading:
            return False, "not reloaded: " + ("it is being loaded already" if self._reloading else "nothing to load")
        self._reloading = True
        try:
            engine = await beside(self._load)
            if (told := differences(self.engine, engine)) is not None:
                engine.close()
                raise BackendError(f"it has another {told}, and clients know the old one: start a server for it")
        except Exception as error:
            name = "" if isinstance(error, KiEdgeError) else f"{type(error).__name__}: "
            line = f"not reloaded, the policy that was there goes on: {name}{' '.join(str(error).split())[:1000]}"
            self._say(f"ki-serve: {line}")
            return False, line
        finally:
            self._reloading = False
        old, self._dispatcher.engine = self.engine, engine
        self._tell_loaded()
        await asyncio.to_thread(old.close)  # what it runs is answered
        line = f"reloaded: {engine.metadata.get('name')} answers"
        self._say(f"ki-serve: {line}")
        return True, line

    def start(self) -> Server:
        """Serve in a thread of its own, until `stop` or `close`; returns once it listens."""
        begun, errors = threading.Event(), []

        async def main() -> None:
            try:
                await self.open()
            except BaseException as error:
                errors.append(error)
                raise
            finally:
                begun.set()
            await self.ended()

        def work() -> None:
            with contextlib.suppress(BaseException):  # what concerns `start` is in `errors`, the rest is `failure`
                asyncio.run(main())

        self._thread = threading.Thread(target=work, name="server", daemon=True)
        self._thread.start()
        begun.wait()
        if errors:
            raise errors[0]
        return self

    def close(self) -> None:
        """`stop`, and wait for the end of a server that `start` started."""
        self.stop()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _serve(self, connection: Any) -> None:
        if len(self._clients) >= self.options.most_clients:  # those who came in at the same moment
            await connection.close(1013, "as many clients are connected as may be (--max-clients)")
            return
        client = Client(connection, self._room, self.options, self._over)
        self._clients.add(client)
        self._each(lambda watcher: watcher.connected(client.address))
        why = "its connection broke"
        try:
            why = await client.run(pack(self.metadata))
        except asyncio.TimeoutError:
            connection.transport.abort()
        finally:
            self._clients.discard(client)
            self._each(lambda watcher: watcher.left(client.address, why))

    def _over(self, handled: Handled) -> None:
        self._each(lambda watcher: watcher.handled(handled))

    def _tell_loaded(self) -> None:
        self._each(lambda watcher: watcher.loaded(self.engine.contract, self.engine.metadata))

    def _each(self, told: Callable[[Watcher], object]) -> None:
        """A watcher that fails is told of once, and never ends anything."""
        for watcher in self._watchers:
            try:
                told(watcher)
            except Exception as error:
                if id(watcher) not in self._complained:
                    self._complained.add(id(watcher))
                    self._say(f"ki-serve: {type(watcher).__name__} failed: {type(error).__name__}: {error}")

    def _device_lost(self, error: BackendError) -> None:
        """Nothing can be answered any more: whoever started it may start it again."""
        self.failure = self.failure or error
        if self._ended is not None:
            self._ended.set()


async def _within(deadline: float, *tasks: Any) -> None:
    """Wait for all of them, until then at most."""
    if tasks:
        waiting = asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(waiting, max(0.01, deadline - time.monotonic()))
