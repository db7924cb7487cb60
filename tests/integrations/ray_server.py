"""ki-serve --ray in Ray's own environment, its processes, and robots that ask it."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from websockets.sync.client import connect

from ki_runtime import Policy
from ki_runtime.remote.packing import pack, unpack

ROOT = Path(__file__).parents[2]
SEEDS = 6
REPLICA = "ServeReplica"
PATIENCE = 240.0  # seconds for anything to happen: a shared machine may take long


def environment(alone: bool = True) -> dict[str, str]:
    """Of a process in which Ray finds this checkout, and if it is to be `alone` no cluster but its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "runtime")))
    own = {"RAY_ADDRESS": "local"} if alone else {}
    return {**kept, **own, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


class Served:
    """A server that runs, with what it said on stderr."""

    def __init__(self, python: Path, bundle: Path, *arguments: object, alone: bool = True) -> None:
        command = [python, "-m", "ki_runtime.serving.cli", bundle, "--ray", "--port", 0, "--backend", "ort", *arguments]
        self.process = subprocess.Popen(
            [*map(str, command)], stderr=subprocess.PIPE, text=True, env=environment(alone), cwd=bundle.parent
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.uri = self.wait_for(r"answers at (ws://\S+)")[1]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def wait_for(self, pattern: str, after: int = 0) -> re.Match[str]:
        """The first line like this, from the `after`-th on."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for line in self.lines[after:]:
                if (found := re.search(pattern, line)) is not None:
                    return found
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r} in\n{''.join(self.lines)}")

    def replicas(self) -> set[int]:
        """Process ids of the replicas of this server's cluster."""
        return {pid for pid, name in descendants(self.process.pid) if REPLICA in name}

    def close(self) -> int:
        """End it with SIGTERM; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self._reader.join(60)
            assert self.process.stderr is not None
            self.process.stderr.close()


def descendants(root: int) -> list[tuple[int, str]]:
    """(process id, command line) of all that a process started, and those started."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[pid] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    found, new = [], [root]
    while new:
        new = [pid for pid, parent in parents.items() if parent in new]
        found += [(pid, names[pid]) for pid in new if pid in names]
    return found


def observation() -> dict[str, object]:
    random = np.random.default_rng(0)
    pictures = {name: random.integers(0, 256, (96, 96, 3), np.uint8) for name in ("front_left", "front_right")}
    return {"images": pictures, "state": np.float32([1.3, 0.7, 0.5, 0.0, 0.0]), "prompt": "reach the red target"}


def expected(bundle: Path) -> list[np.ndarray]:
    """The actions of each seed, which differ from each other by far more than two engines."""
    policy = Policy.load(bundle, "ort", threads=1)
    return [policy.infer(observation(), seed=seed)["actions"] for seed in range(SEEDS)]


class Robots:
    """Clients that ask without end, each in a thread; `answers` counts the right ones, `wrong` says what was not."""

    def __init__(self, uri: str, wanted: list[np.ndarray], count: int) -> None:
        self._uri, self._wanted, self._ended = uri, wanted, threading.Event()
        self.answers, self.wrong = [0] * count, []
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(count)]

    def _ask(self, mine: int) -> None:
        try:
            with connect(self._uri, max_size=None, compression=None) as connection:
                unpack(connection.recv(), "server")
                while not self._ended.is_set():
                    seed = (mine + self.answers[mine]) % SEEDS
                    connection.send(pack({**observation(), "ki_edge": {"seed": seed}}))
                    frame = connection.recv(timeout=PATIENCE)
                    if isinstance(frame, str):
                        self.wrong.append(frame)
                        return
                    error = np.abs(unpack(frame, "server")["actions"] - self._wanted[seed]).max()
                    if not error < 1e-5:
                        self.wrong.append(f"seed {seed}: {error} apart")
                    self.answers[mine] += 1
        except Exception as error:
            self.wrong.append(f"{type(error).__name__}: {error}")

    def more(self, each: int) -> None:
        """Wait until every robot got so many more answers."""
        goal, deadline = [done + each for done in self.answers], time.monotonic() + PATIENCE
        while any(done < wanted for done, wanted in zip(self.answers, goal, strict=True)):
            assert not self.wrong, self.wrong
            assert time.monotonic() < deadline, self.answers
            time.sleep(0.02)


@contextmanager
def robots(uri: str, wanted: list[np.ndarray], count: int) -> Iterator[Robots]:
    found = Robots(uri, wanted, count)
    for thread in found._threads:
        thread.start()
    try:
        yield found
    finally:
        found._ended.set()
        for thread in found._threads:
            thread.join(PATIENCE)


def until(what: str, condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
