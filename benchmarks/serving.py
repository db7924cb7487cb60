"""A policy server under load: answers, fairness, health checks and memory with 1, 2, 8 and 50 robots.

    python benchmarks/serving.py BUNDLE --seconds 60
    python benchmarks/serving.py BUNDLE --openpi websocket_policy_server.py --openpi-python venv/bin/python

Starts ki-serve, and asks from a process of its own as fast as it answers; another process asks for its health. With
--openpi the same load goes to openpi's own server, whose file is given: in front of the same policy, in an environment
that has openpi-client (PYTHON). A part of the answers' time is the clients' own, since all share this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ki_edge.proc import sizes

HERE = Path(__file__).parent
ROOT = HERE.parent
START = 300.0  # seconds for a server to listen
PEER = """
import importlib.util, sys
sys.path[:0] = {paths!r}
spec = importlib.util.spec_from_file_location("openpi_server", {server!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from ki_runtime import Policy
policy = Policy.load({bundle!r}, {backend!r})
policy.warm_up()
class Theirs:
    def infer(self, observation):
        return {{"actions": policy.infer(observation)["actions"]}}
print("listens at ws://127.0.0.1:{port}", file=sys.stderr, flush=True)
module.WebsocketPolicyServer(Theirs(), host="127.0.0.1", port={port}).serve_forever()
"""


def main() -> int:
    """Exit status 0, or that of what failed."""
    parser = argparse.ArgumentParser(description="A policy server under load.")
    parser.add_argument("bundle")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 8, 50])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further flags of ki-serve")
    parser.add_argument("--openpi", metavar="FILE", help="openpi's websocket_policy_server.py")
    parser.add_argument("--openpi-python", metavar="PYTHON", default=sys.executable, help="an interpreter for it")
    parser.add_argument("--openpi-port", type=int, default=8765)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    servers = {"ki-serve": own_command(given)}
    if given.openpi:
        servers["openpi's server"] = openpi_command(given)
    rows = []
    for name, command in servers.items():
        with served(command) as (uri, pid):
            rows += [
                {"server": name, "clients": clients, **measure(given, uri, pid, clients)} for clients in given.clients
            ]
    print(json.dumps(rows, indent=1) if given.json else table(rows))
    return 0


def own_command(given: argparse.Namespace) -> list[str]:
    """ki-serve on a free port."""
    command = [sys.executable, "-m", "ki_runtime.serving.cli", given.bundle, "--port", "0", "--backend", given.backend]
    return [*command, *given.serve]


def openpi_command(given: argparse.Namespace) -> list[str]:
    """openpi's server before the same policy."""
    facts = {"server": str(Path(given.openpi).resolve()), "bundle": given.bundle, "backend": given.backend}
    paths = [str(ROOT), str(ROOT / "runtime")]
    return [given.openpi_python, "-c", PEER.format(**facts, paths=paths, port=given.openpi_port)]


@contextmanager
def served(command: list[str]) -> Iterator[tuple[str, int]]:
    """(address, process) of a server that listens; it is ended afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w", encoding="utf-8") as words:
            server = subprocess.Popen(command, stderr=words)
        try:
            yield address_of(server, log), server.pid
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def address_of(server: subprocess.Popen[bytes], log: Path) -> str:
    """Where the server says that it listens; SystemExit with its last line if it ends before."""
    until = time.monotonic() + START
    while time.monotonic() < until and server.poll() is None:
        if (place := re.search(r"wss?://\S+", log.read_text(encoding="utf-8"))) is not None:
            time.sleep(1.0)
            return place.group()
        time.sleep(0.1)
    raise SystemExit(f"the server does not listen: {log.read_text(encoding='utf-8').strip().splitlines()[-1:]}")


def measure(given: argparse.Namespace, uri: str, pid: int, clients: int) -> dict[str, object]:
    """One load for so many seconds."""
    script = str(HERE / "serving_clients.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "runtime")])}
    before = resident(pid)
    load = [sys.executable, script, uri, given.bundle, "--clients", str(clients), "--seconds", str(given.seconds)]
    look = [sys.executable, script, uri, "--health", "--seconds", str(given.seconds)]
    asking = subprocess.Popen(load, stdout=subprocess.PIPE, text=True, env=environment)
    looking = subprocess.Popen(look, stdout=subprocess.PIPE, text=True, env=environment)
    answers, health = (json.loads(process.communicate()[0] or "{}") for process in (asking, looking))
    if asking.returncode or looking.returncode:
        raise SystemExit(f"nothing was answered at {uri} with {clients} robots")
    return {**answers, "health": health, "mib_before": before, "mib_after": resident(pid)}


def resident(pid: int) -> float:
    """MiB of a process in memory."""
    return sizes(f"/proc/{pid}/status").get("VmRSS", 0) / 2**20


def table(rows: list[dict[str, object]]) -> str:
    """Markdown."""
    load = os.getloadavg()[0]
    heads = ["server", "robots", "answers a second", "ms p50 / p99", "max / min answers", "errors"]
    heads += ["/healthz ms p50 / p99 / max", "failed", "MiB before, after"]
    lines = [f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, load at the end {load:.1f}", ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        health = row["health"]
        assert isinstance(health, dict)
        cells = [row["server"], row["clients"], f"{row['per_second']:.1f}", f"{row['p50']:.1f} / {row['p99']:.1f}"]
        cells += [
            f"{row['fairness']:.2f}",
            row["errors"],
            " / ".join(f"{health[k]:.1f}" for k in ("p50", "p99", "max")),
        ]
        cells += [health["errors"], f"{row['mib_before']:.0f}, {row['mib_after']:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
