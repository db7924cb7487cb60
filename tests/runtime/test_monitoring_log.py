"""The log: JSON lines for programs, lines for people; nothing of it holds up or breaks the server."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ki_runtime.monitoring.background import Background
from ki_runtime.monitoring.request_log import PER_SECOND, WAITING, JsonLog, PlainLog

from .monitored import CONTRACT, POLICY, ROBOT, answered, refused

ROOT = Path(__file__).parents[2]
EVIL = '\x1b[2J\u202e\n{"event": "forged"}\x07'


def lines(*tell):
    """What a log writes of these calls."""
    found = []
    log = JsonLog(found.append, clock=lambda: 1_795_689_107.125)
    for call in tell:
        call(log)
    log.close()
    return found


def test_a_line_for_every_request():
    request = answered(7, reported={"deadline_misses": 1})
    told = [
        lambda log: log.loaded(CONTRACT, {**POLICY, "secret": "x"}),
        lambda log: log.connected(ROBOT),
        lambda log: log.handled(request),
        lambda log: log.handled(refused(id="r8")),
        lambda log: log.left(ROBOT, "closed"),
    ]
    loaded, connected, one, two, left = lines(*told)
    assert loaded == {
        "time": "2026-11-26T10:31:47.125Z", "event": "loaded", "policy": {"name": "fetch", "backend": "ort"},
    }  # fmt: skip
    assert (connected["event"], connected["client"], left["event"], left["why"]) == (
        "connected",
        ROBOT,
        "left",
        "closed",
    )
    assert {name: one[name] for name in ("event", "id", "client", "outcome", "batch", "received", "sent")} == {
        "event": "request", "id": "r7", "client": ROBOT, "outcome": "answered", "batch": 2, "received": 10_000,
        "sent": 500,
    }  # fmt: skip
    assert one["total_ms"] == 49.0 and one["stages"]["model"] == 35.0 and one["reported"] == {"deadline_misses": 1.0}
    assert "error" not in one and "observation" not in one and "answer" not in one
    assert two["outcome"] == "observation" and two["error"] == "state has shape (2,)" and two["batch"] == 0


def test_stdout_has_one_json_object_a_line(capsys):
    log = JsonLog()
    log.handled(refused(error=EVIL, id=EVIL, client=EVIL))
    log.handled(answered(total=float("nan"), stages={"wait": float("inf"), "model": 1.23456}))
    log.close()
    out = capsys.readouterr().out
    assert out.isascii() and not set(out) & set("\x1b\x07\x7f") and len(out.splitlines()) == 2
    first, second = (json.loads(line) for line in out.splitlines())
    assert first["event"] == "request" and first["error"] == EVIL
    assert second["total_ms"] is None and second["stages"] == {"wait": None, "model": 1.235}
    assert log.dropped == 0


def test_long_errors_are_cut():
    (line,) = lines(lambda log: log.handled(refused(error="x" * 100_000)))
    assert len(line["error"]) == 500


@pytest.mark.parametrize("problem", [BrokenPipeError(32, "gone"), OSError(28, "full"), ValueError("closed file")])
def test_whoever_does_not_read_costs_lines_only(problem):
    def write(_):
        raise problem

    log = JsonLog(write)
    for number in range(3):
        log.handled(answered(number))
    log.close()
    assert log.dropped == 3


def test_a_reader_that_hangs_holds_nobody_up():
    hang = threading.Event()
    log = JsonLog(lambda _: hang.wait(60))
    for number in range(WAITING + 500):
        log.handled(answered(number))
    assert 499 <= log.dropped <= 500 and len(log._lines._items) <= WAITING
    hang.set()


CLOSED = """
from ki_runtime.monitoring.request_log import JsonLog
from tests.runtime.monitored import answered
import sys
log = JsonLog()
sys.stdin.readline()
for number in range(5):
    log.handled(answered(number))
log.close()
print("the server goes on", log.dropped, file=sys.stderr)
"""


def test_a_closed_pipe_ends_neither_the_server_nor_its_exit_status():
    read, write = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", CLOSED], stdin=subprocess.PIPE, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as run:
        os.close(write)
        os.close(read)
        _, err = run.communicate("go\n", timeout=120)
    assert run.returncode == 0 and err.startswith("the server goes on") and "Traceback" not in err


def test_people_are_told_of_clients_and_errors():
    said, second = [], [10.0]
    log = PlainLog(said.append, clock=lambda: second[0])
    log.loaded(CONTRACT, POLICY)
    log.connected(ROBOT)
    log.handled(answered())
    log.handled(refused())
    log.handled(refused("replaced", None))
    log.left(ROBOT, "")
    log.handled(refused(error=EVIL))
    log.close()
    assert said[:3] == [f"{ROBOT}: connected", f"{ROBOT}: state has shape (2,) (request r0)", f"{ROBOT}: left"]
    assert said[3].isprintable() and "\\x1b[2J" in said[3]


def test_an_error_that_repeats_is_counted():
    said, second = [], [10.0]
    log = PlainLog(said.append, clock=lambda: second[0])
    for number in range(PER_SECOND + 30):
        log.handled(refused(id=f"r{number}"))
    second[0] = 11.0
    log.left(ROBOT, "closed")
    log.close()
    assert len(said) == PER_SECOND + 2 and said[-2:] == ["30 lines more were left out", f"{ROBOT}: left, closed"]


def test_work_in_the_background_survives_its_faults():
    done, idle = [], threading.Event()

    def work(item):
        if item == 1:
            raise ZeroDivisionError
        done.append(item)

    lane = Background("test", work, most=10, idle=idle.set, every=0.01)
    for item in range(4):
        assert lane.put(item)
    assert idle.wait(60) and lane.close(60)
    assert done == [0, 2, 3] and isinstance(lane.failure, ZeroDivisionError)
    assert not lane.put(5) and lane.dropped == 1


def test_what_waits_is_bounded_in_bytes():
    hang, begun = threading.Event(), threading.Event()

    def work(item):
        begun.set()
        hang.wait(60)

    lane = Background("test", work, most=100, most_bytes=1000)
    assert lane.put("first", 900) and begun.wait(60)
    assert lane.put("a", 600) and not lane.put("b", 500) and lane.put("c", 400)
    assert lane.put("needed", 10_000, needed=True) and lane.dropped == 1
    hang.set()
    assert lane.close(60)
