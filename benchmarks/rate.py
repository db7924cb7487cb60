"""Whether the loop keeps its rate on the real clock: the simulated arm beside a busy neighbour.

    python benchmarks/rate.py BUNDLE --minutes 10 --mode async

Runs ki-run as a process of its own with the bundle, and a neighbour that never rests on each core that is asked for
(--hogs). Prints what was asked and achieved as a Markdown row, and the whole report as JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

HOG = "import math\nwhile True: math.sqrt(2.0)"
FOREVER = 1_000_000  # episodes


def main() -> int:
    """Exit status of ki-run."""
    parser = argparse.ArgumentParser(description="Rate and jitter of ki-run beside busy neighbours.")
    parser.add_argument("bundle")
    parser.add_argument("--robot", default="gym:FetchReach-v4")
    parser.add_argument("--mode", default="async", choices=["sync", "async", "rtc"])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--hogs", type=int, default=1, help="busy neighbours")
    parser.add_argument("--rate", type=float, help="commands a second; default: the contract's")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    command = [sys.executable, "-m", "ki_runtime.control.cli", given.bundle, "--robot", given.robot, "--json"]
    command += ["--mode", given.mode, "--episodes", str(FOREVER), "--max-seconds", str(60 * given.minutes)]
    command += [] if given.rate is None else ["--rate", str(given.rate)]
    hogs = [subprocess.Popen([sys.executable, "-c", HOG]) for _ in range(given.hogs)]
    before = os.getloadavg()[0]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    if done.returncode:
        return done.returncode
    report = json.loads(done.stdout)
    if given.json:
        print(json.dumps(report, indent=1))
        return 0
    rate, jitter, delay = report["rate"], report["rate"]["jitter_ms"], report["delay"]["real"] or {}
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, load before {before:.1f}, {given.hogs} busy neighbours"
    )
    heads = ["mode", "Hz asked", "achieved", "ticks", "missed", "starved", "late ms p50 / p99 / max", "delay p50 / p95"]
    print("| " + " | ".join([*heads, "success"]) + " |")
    print("|---|---|---|---|---|---|---|---|---|")
    late = " / ".join(f"{jitter[k]:.2f}" for k in ("p50", "p99", "max"))
    steps = " / ".join(f"{delay[k]:g}" for k in delay)
    success = "" if report["success_rate"] is None else f"{100 * report['success_rate']:.1f} %"
    cells = [report["mode"], f"{rate['asked_hz']:g}", f"{rate['achieved_hz']:.2f}", rate["ticks"], rate["missed"]]
    print("| " + " | ".join(map(str, [*cells, rate["starved"], late, steps, success])) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
