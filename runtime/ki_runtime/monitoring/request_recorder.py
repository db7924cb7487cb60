"""Keeps requests and their answers as LeRobotDatasets: an episode for each client, or each of its resets.

DIR/20261126-103147/      what one start of the server recorded: a LeRobotDataset v3.0
DIR/20261126-103147-2/    after a reload, or of clients whose cameras have other sizes

An episode is in the dataset once it is over; those before stay readable whatever ends the server.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ki_edge.commands import tell
from ki_edge.errors import KiEdgeError, RobotError
from ki_edge.files.writing import writing
from ki_edge.policy.contract import PolicyContract
from ki_runtime.recording.dataset import DatasetWriter, check_packages
from ki_runtime.recording.episode import Episode

from .background import Background
from .events import Handled
from .request_frames import Exchange, RequestFeatures, features_of
from .room import EPISODE, GB, RESERVE, Room

WAITING, WAITING_BYTES = 500, 256 << 20  # requests that wait for the disk, and their bytes
MOST_OPEN = 16  # clients that are recorded at the same time: each camera of one has an encoder
MOST_FRAMES = 3000  # of an episode: what is not over is lost with the process
MOST_DATASETS = 16  # of one start
IDLE = 60.0  # seconds without a request after which an episode is over
LIMIT = 20 * GB
PATIENCE = 10.0  # seconds at the end for episodes to be finished


@dataclass(frozen=True)
class _Left:
    client: str


@dataclass(frozen=True)
class _Loaded:
    contract: PolicyContract
    policy: Mapping[str, Any]


@dataclass
class _Open:
    """A client's present episode. `began`, `last`: seconds of the server's clock, of its requests."""

    writer: DatasetWriter
    features: RequestFeatures
    episode: Episode
    began: float
    last: float
    seen: float  # time.monotonic(), of its last frame


class RequestRecorder:
    """Records into `folder` until `limit` bytes are there, or the disk is full: then one line is said, and no more.

    RobotError if the packages for it are missing or the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        limit: int = LIMIT,
        reserve: int = RESERVE,
        say: Callable[[str], object] = tell,
    ) -> None:
        check_packages()
        with writing(folder, RobotError):
            folder.mkdir(parents=True, exist_ok=True)
            _try_out(folder)
        self.folder, self._say = folder, say
        self.episodes = self.frames = self.unfit = 0
        self.stopped = ""  # why nothing is recorded any more
        self._room = Room(folder, limit, reserve)
        self._started = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        self._contract: PolicyContract | None = None
        self._name = ""
        self._writers: list[tuple[DatasetWriter, RequestFeatures]] = []  # of the present policy
        self._datasets = 0
        self._open: dict[str, _Open] = {}
        self._clients: set[str] = set()  # that sent something to be recorded; of the server's thread
        self._missed: Counter[str] = Counter()  # requests by client that its present episode lacks
        if shortage := self._room.shortage(0):
            self._stop(shortage)
        self._work: Background[Handled | _Left | _Loaded] = Background(
            "recording", self._do, most=WAITING, most_bytes=WAITING_BYTES, idle=self._finish_idle
        )

    @property
    def dropped(self) -> int:
        """Requests that were answered and not recorded."""
        return self._work.dropped + self.unfit

    @property
    def size(self) -> int:
        """Bytes under the folder, about."""
        return self._room.used

    def describe(self) -> str:
        """How it stands, in one line."""
        size = f"{self.episodes} episodes, {self.frames} requests, {self.size / GB:.2f} GB in {self.folder}"
        lost = f"; {self.dropped} requests were not recorded" if self.dropped else ""
        return size + lost + (f"; stopped: {self.stopped}" if self.stopped else "")

    def loaded(self, contract: PolicyContract, policy: Mapping[str, Any]) -> None:
        self._work.put(_Loaded(contract, policy), needed=True)

    def connected(self, client: str) -> None:
        """Its episode begins with its first request."""

    def left(self, client: str, why: str) -> None:
        if client in self._clients:
            self._clients.discard(client)
            self._work.put(_Left(client), needed=True)

    def handled(self, request: Handled) -> None:
        if self.stopped or request.outcome != "answered" or request.observation is None or request.answer is None:
            return
        self._clients.add(request.client)
        if not self._work.put(request, request.received + request.sent):
            self._missed[request.client] += 1

    def close(self) -> None:
        """Finish the episodes that are open; of what takes longer than PATIENCE is not waited for."""
        self._work.put(_Left(""), needed=True)
        if not self._work.close(PATIENCE):
            self._say(f"recording: the disk of {self.folder} is slow, up to {len(self._open)} episodes are lost")

    def _do(self, item: Handled | _Left | _Loaded) -> None:
        if self.stopped:
            return
        try:
            if isinstance(item, Handled):
                self._record(item)
            elif isinstance(item, _Left):
                self._finish(item.client) if item.client else self._finish_all()
            else:
                self._finish_all()
                self._contract, self._name, self._writers = item.contract, str(item.policy.get("name", "")), []
        except Exception as error:  # whatever it was, the server goes on
            self._stop(" ".join(str(error).split())[:300] or type(error).__name__)

    def _record(self, request: Handled) -> None:
        exchange = self._read(request)
        if exchange is None:
            self.unfit += 1
            return
        present = self._open.get(request.client)
        if present is not None and self._is_over(present, request, exchange):
            self._finish(request.client)
            present = None
        more = sum(other.episode.size() + EPISODE for other in self._open.values()) + request.received
        if shortage := self._room.shortage(more + (EPISODE if present is None else 0)):
            self._stop(shortage)
            return
        if present is None and (present := self._begin(request, exchange)) is None:
            self.unfit += 1
            return
        frame = exchange.frame(
            present.features, present.episode.count, max(0.0, request.began - present.began), request.total / 1e3
        )
        try:
            present.writer.append(present.episode, frame)
        except BaseException:  # half of a frame may be there
            del self._open[request.client]
            present.episode.discard()
            raise
        present.last, present.seen = request.began, time.monotonic()
        self.frames += 1

    def _read(self, request: Handled) -> Exchange | None:
        if self._contract is None or request.observation is None or request.answer is None:
            return None
        try:
            return Exchange.read(self._contract, request.observation, request.answer, request.reported)
        except (KiEdgeError, TypeError, ValueError):  # of a policy before a reload
            return None

    def _is_over(self, present: _Open, request: Handled, exchange: Exchange) -> bool:
        return request.begins or present.episode.count >= MOST_FRAMES or not present.features.fits(exchange.pictures)

    def _begin(self, request: Handled, exchange: Exchange) -> _Open | None:
        """None where too many clients are recorded, or have cameras of too many sizes."""
        if len(self._open) >= MOST_OPEN or (found := self._writer(exchange)) is None:
            return None
        writer, features = found
        present = _Open(writer, features, writer.open(), request.began, request.began, time.monotonic())
        self._open[request.client] = present
        return present

    def _writer(self, exchange: Exchange) -> tuple[DatasetWriter, RequestFeatures] | None:
        """The dataset that has the request's cameras."""
        for found in self._writers:
            if found[1].fits(exchange.pictures):
                return found
        if self._datasets >= MOST_DATASETS:
            return None
        assert self._contract is not None
        features = features_of(self._contract, self._name, exchange.pictures)
        made = (DatasetWriter(self._new_folder(), features), features)
        self._writers.append(made)
        return made

    def _new_folder(self) -> Path:
        """Not there before: another server may record into the same folder."""
        while True:
            self._datasets += 1
            path = self.folder / (self._started + (f"-{self._datasets}" if self._datasets > 1 else ""))
            try:
                with writing(path, RobotError):
                    path.mkdir()
                return path
            except RobotError as error:
                if not isinstance(error.__cause__, FileExistsError):
                    raise

    def _finish(self, client: str) -> None:
        """Commit a client's episode. RobotError if it cannot be written; then nothing is left of it."""
        present = self._open.pop(client, None)
        if present is None:
            return
        said = {"ki.inferences": present.episode.count, "ki.seconds": max(0.0, present.last - present.began)}
        present.writer.commit(present.episode, said | {"ki.dropped": self._missed.pop(client, 0)})
        self.episodes += 1
        self._room.used += present.episode.published

    def _finish_all(self) -> None:
        for client in list(self._open):
            self._finish(client)

    def _finish_idle(self) -> None:
        for client, present in list(self._open.items()):
            if time.monotonic() - present.seen > IDLE:
                self._do(_Left(client))

    def _stop(self, why: str) -> None:
        """No more is recorded. What is open is kept, as far as there is room for it."""
        self.stopped = why
        for client in list(self._open):
            try:
                self._finish(client)
            except (KiEdgeError, OSError):
                continue
        self._say(f"recording stopped, the server goes on: {why}")


def _try_out(folder: Path) -> None:
    """OSError unless folders can be made there."""
    trial = folder / f".trial.{time.time_ns()}"
    trial.mkdir()
    trial.rmdir()
