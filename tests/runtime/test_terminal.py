"""What a run shows while it goes on: a table on a terminal, lines elsewhere, never written by the control thread."""

import os
import pty
import re
import sys
import threading
from pathlib import Path

import pytest

from ki_runtime.control import terminal
from ki_runtime.control.loop import ControlLoop
from ki_runtime.control.options import LoopOptions
from ki_runtime.control.terminal import Status, TerminalView

from .recorded_runs import STEPS, Filmed, Plan

ROOT = Path(__file__).parents[2]


def test_the_figures(capsys):
    status = Status(3)
    ControlLoop(Plan(), Filmed(), LoopOptions(episodes=3), [status]).run()
    rows = dict(status.rows())
    assert rows["episode"] == "3 of 3, filmed" and rows["success"] == "2 of 3" and rows["guards"] == "position 6"
    assert re.fullmatch(rf"[\d.]+ Hz of 20, {3 * STEPS} commands", rows["rate"])
    assert re.fullmatch(r"2, row 0, observed \d+ ms ago", rows["chunk"]) and rows["delay"] == "0 actions"
    assert rows["total"] == "1.0 ms, p95 1.0" and "inference 1 ms" in status.line()
    assert capsys.readouterr() == ("", "")


def test_before_the_first_command_there_is_little_to_say():
    assert dict(Status(1).rows()) == {"episode": "1 of 1, ", "rate": "0 commands", "guards": "none"}


class Patient(Filmed):
    """Its episode goes on until something was told twice."""

    def __init__(self, told):
        super().__init__()
        self.told = told

    def act(self, action):
        super().act(action)
        if self.steps == STEPS - 1:
            assert self.told.wait(60)


@pytest.fixture
def lines(monkeypatch):
    """What is told, with the name of the thread; `event` is set at the second line."""
    found, event = [], threading.Event()

    def tell(line):
        found.append((threading.current_thread().name, line))
        if len(found) == 2:
            event.set()

    monkeypatch.setattr(terminal, "tell", tell)
    monkeypatch.setattr(terminal, "DRAWN_EVERY", 0.01)
    monkeypatch.setattr(terminal, "TOLD_EVERY", 0.02)
    return found, event


def test_lines_where_there_is_no_terminal(lines, monkeypatch):
    found, event = lines
    monkeypatch.setattr(sys, "stderr", None)
    view = TerminalView(1)
    ControlLoop(Plan(), Patient(event), LoopOptions(), [view], say=view.say).run()
    assert {name for name, _ in found} == {"terminal"}
    assert re.match(r"ki-run: episode 1 of 1, filmed; rate .*; guards none", found[0][1])


def test_what_the_loop_says_is_written_by_the_view(lines):
    found, _ = lines
    view = TerminalView(1)
    view.say("before")
    view.run_started(Plan.contract, 20.0)
    view.say("during")
    view.close()
    view.say("after")
    told = [line for _, line in found if not line.startswith("ki-run")]
    assert told == ["before", "during", "after"]


RUN = """
import sys
from ki_runtime.control import terminal
from ki_runtime.control.loop import ControlLoop
from ki_runtime.control.options import LoopOptions
from tests.runtime.recorded_runs import Filmed, Plan
Filmed.name = "filmed\\x1b[31m"
view = terminal.TerminalView(4)
if len(sys.argv) > 1:
    view.say = lambda line: None
    Filmed.act = lambda *_: (_ for _ in ()).throw(RuntimeError("motor"))
ControlLoop(Plan(), Filmed(), LoopOptions(episodes=4), [view], say=view.say).run()
"""


def on_a_terminal(*arguments):
    """What the run of a program writes to a terminal, without the terminal's own commands; its exit status."""
    child, terminal_end = pty.fork()
    if child == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", RUN, *arguments])
    out = b""
    while True:
        try:
            piece = os.read(terminal_end, 1 << 16)
        except OSError:  # its other end is closed
            break
        if not piece:
            break
        out += piece
    os.close(terminal_end)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return out.decode(), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.decode()), status


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pty.fork in a process with threads
def test_a_table_on_a_terminal():
    pytest.importorskip("rich", reason="pip install 'ki-edge[view]'")
    raw, text, status = on_a_terminal()
    assert status == 0 and "\x1b[" in raw and "\x1b[31m" not in raw
    last = text[text.rindex("episode ") :]
    rows = [re.split(r"\s{2,}", line.strip()) for line in last.splitlines() if line.strip()]
    found = {row[0]: row[1] for row in rows}
    assert found["episode"] == "4 of 4, filmed\\x1b[31m" and found["success"] == "2 of 4"
    assert found["guards"] == "position 8" and found["total"] == "1.0 ms, p95 1.0"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_terminal_is_left_as_it_was_after_an_error():
    raw, text, status = on_a_terminal("fail")
    assert status == 1 and "RuntimeError: motor" in text
    assert raw.rfind("\x1b[?25h") >= raw.rfind("\x1b[?25l")  # the cursor is shown again


def test_a_terminal_that_is_gone_does_not_stop_the_robot(monkeypatch):
    pytest.importorskip("rich", reason="pip install 'ki-edge[view]'")

    class Gone:
        encoding = "utf-8"

        def isatty(self):
            return True

        def write(self, _):
            raise OSError(5, "Input/output error")

        flush = fileno = write

    monkeypatch.setattr(sys, "stderr", Gone())
    view = TerminalView(2)
    report = ControlLoop(Plan(), Filmed(), LoopOptions(episodes=2), [view], say=lambda _: None).run()
    assert len(report.episodes) == 2


def test_without_rich_there_are_lines(lines, monkeypatch):
    found, event = lines
    monkeypatch.setattr(terminal, "find_spec", lambda name: None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    view = TerminalView(1)
    ControlLoop(Plan(), Patient(event), LoopOptions(), [view], say=view.say).run()
    assert len(found) >= 2
