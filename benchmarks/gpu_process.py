"""Time limits of the GPU benchmark: steps within a budget, commands that end, and processes that are asked."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ki_edge.errors import KiEdgeError

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT), str(ROOT / "export"), str(ROOT / "runtime")]
WORKER = Path(__file__).with_name("gpu_worker.py")


class Failed(Exception):
    """A step of the benchmark did not work; the message is one line for the report."""


@dataclass
class Record:
    """What happened to a step. `state`: "done", "failed", "skipped"; `note`: why."""

    name: str
    state: str
    seconds: float
    note: str = ""


@dataclass
class Budget:
    """`results` is what the steps return, by name; it is written to `file` after each of them."""

    seconds: float
    file: Path
    results: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until the end of the budget."""
        return self.seconds - (time.monotonic() - self.start)

    def step(self, name: str, least: float, run: Callable[[], Any], needs: tuple[str, ...] = ()) -> Any:
        """Run a step if `least` seconds are left and the steps that it `needs` are done; its result, or None."""
        missing = [need for need in needs if need not in self.results]
        if missing:
            return self._note(Record(name, "skipped", 0.0, f"without {', '.join(missing)}"))
        if self.left < least:
            return self._note(
                Record(name, "skipped", 0.0, f"needs {least:.0f} s, {max(0.0, self.left):.0f} s are left")
            )
        sys.stderr.write(f"{self.seconds - self.left:5.0f} s  {name}\n")
        begun = time.monotonic()
        try:
            result = run()
        except (Failed, KiEdgeError, OSError, ImportError) as error:
            note = " ".join(str(error).split()) or type(error).__name__
            return self._note(Record(name, "failed", time.monotonic() - begun, note))
        self.results[name] = result
        self._note(Record(name, "done", time.monotonic() - begun))
        return result

    def _note(self, record: Record) -> None:
        self.records.append(record)
        if record.state != "done":
            sys.stderr.write(f"{self.seconds - self.left:5.0f} s  {record.name}: {record.state}: {record.note}\n")
        content = {"steps": [asdict(each) for each in self.records], "results": self.results}
        self.file.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def environment(site: Path | None) -> dict[str, str]:
    """Variables of every process: the working tree, and packages that were brought along, first."""
    paths = [*([str(site)] if site else []), *PATHS, os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), "PYTHONUNBUFFERED": "1"}


class Command:
    """Python with these arguments, begun at once; what it prints goes into `log`."""

    def __init__(self, arguments: Sequence[str], log: Path, site: Path | None) -> None:
        self._log = log
        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                [sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment(site)
            )

    def finish(self, limit_s: float) -> None:
        """Wait for its end. Failed tells its last line, or that it took too long, which ends it."""
        try:
            status = self._process.wait(max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            self.close()
            raise Failed(f"not done within {limit_s:.0f} s; see {self._log.name}") from None
        if status:
            raise Failed(f"exit status {status}: {last_line(self._log)}; see {self._log.name}")

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def last_line(log: Path) -> str:
    """What a process said last."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no message"


class Contender:
    """A worker process with one contender; `memory`: MB of GPU memory that it took, None where unknown."""

    def __init__(self, name: str, facts: Mapping[str, Any], log: Path, site: Path | None) -> None:
        self.name, self.facts, self.memory = name, dict(facts), None
        self._log = log
        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment(site),
            )
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def open(self, limit_s: float) -> float:
        """Load it; seconds. Failed if it cannot be."""
        return float(self.ask({"do": "open", "contender": self.facts}, limit_s)["seconds"])

    def ask(self, request: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        """One request and its answer. A contender that does not answer in time is ended."""
        assert self._process.stdin is not None
        limit_s = max(1.0, limit_s)
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=limit_s)
        except queue.Empty:
            self.close()
            raise Failed(f"no answer within {limit_s:.0f} s") from None
        except OSError:
            line = None
        if line is None:
            raise Failed(f"its process ended: {last_line(self._log)}")
        answer: dict[str, Any] = json.loads(line)
        if not answer.pop("ok"):
            raise Failed(answer["error"])
        return answer

    def close(self) -> None:
        """End its process."""
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # a request that nobody read
                    pipe.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)


def gpu_memory_mb() -> float | None:
    """Memory of the first GPU that is in use, in MB; None where nvidia-smi cannot tell."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return 1.048576 * float(done.stdout.strip())
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def environment_facts(site: Path | None) -> dict[str, Any]:
    """GPU, driver and versions, from a process that sees the packages that were brought along."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", FACTS],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
            env=environment(site),
        )
    except subprocess.SubprocessError as error:
        raise Failed(f"environment: {getattr(error, 'stderr', None) or error}") from None
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


FACTS = """
import json
from importlib.metadata import PackageNotFoundError, version
from ki_export.bench.machine import describe
from ki_runtime.doctor.gpu import check_gpu
from ki_runtime.doctor.host import Host

facts, (gpu, _) = describe(), check_gpu(Host())
facts.pop("ki-edge")
if gpu is not None:
    facts.update(gpu=gpu.name, sm=gpu.sm, gpu_memory=f"{gpu.memory / 1e9:.0f} GB", driver=gpu.driver, cuda=gpu.cuda)
for name in ("onnxruntime-gpu", "tensorrt", "tensorrt_cu13", "tensorrt_rtx_cu13", "cuda-bindings", "triton", "onnx"):
    try:
        facts[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(facts))
"""
