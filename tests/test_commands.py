"""What commands print: nothing that a terminal obeys, on any terminal or none, and never a bare traceback."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ki_edge.commands import MOST_CHARACTERS, Parser, printable, run_command, show, show_json, tell
from ki_edge.errors import BundleError, ParityError

ROOT = Path(__file__).parents[1]


@given(st.text(st.characters(), max_size=300))
def test_whatever_the_text_one_line_of_visible_characters(text: str) -> None:
    line = printable(text)
    assert line.isprintable()
    line.encode("utf-8")  # no halves of characters


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("π0.5 → ×", "π0.5 → ×"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\x9b31mb", "a\\x9b31mb"),
        ("a\nb\r\tc\x7f", "a\\x0ab\\x0d\\x09c\\x7f"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_what_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_message_has_a_length() -> None:
    line = printable("first" + "x" * 10_000_000 + "last")
    assert len(line) <= MOST_CHARACTERS + 5
    assert line.startswith("first")
    assert line.endswith("last")
    assert " ... " in line


def raising(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (BundleError("a\x1b[2J\nb"), 2, "ki-x: error: a\\x1b[2J b\n"),
        (ParityError("no"), 1, "ki-x: error: no\n"),
        (OSError(28, "No space left on device", "/out/a\x1b"), 2, "No space left on device: '/out/a\\x1b'"),
        (MemoryError("of 9 GiB"), 2, "this machine's memory does not suffice (of 9 GiB)"),
        (KeyError("\x1b"), 2, "KeyError: '\\x1b'; this should have been a clear message: please report it with what"),
        (RecursionError("deep"), 2, "RecursionError: deep"),
        (KeyboardInterrupt(), 130, "ki-x: interrupted; nothing was published"),
    ],
)
def test_every_error_is_one_line(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KI_TRACEBACK", raising=False)
    assert run_command("ki-x", lambda: raising(error)) == status
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    assert printed[:-1].isprintable()


def test_a_fault_can_be_traced(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KI_TRACEBACK", "1")
    assert run_command("ki-x", lambda: raising(KeyError("a\x1b"))) == 2
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert "in raising" in printed
    assert "\x1b" not in printed


def test_wrong_arguments_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        Parser(prog="ki-x").parse_args(["--\x1b[2J\nb"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "ki-x: error: unrecognized arguments: --\\x1b[2J\\x0ab; see ki-x --help\n"


def test_json_is_ascii_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"a\x7f\x9b\u202e": "π\x1b" * 5000}
    show_json(value)
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert not {"\x7f", "\x1b"} & set(printed)
    assert json.loads(printed) == value


def test_lines_and_messages(capsys: pytest.CaptureFixture[str]) -> None:
    show(["a\x1b", "b\nc"])
    tell("d\x07")
    assert capsys.readouterr() == ("a\\x1b\nb\\x0ac\n", "d\\x07\n")


PRINTS = """
import sys
from ki_edge.commands import run_command, show, show_json, tell
def command():
    show(["π0.5 → robot"] * int(sys.argv[1]))
    return 0
status = run_command("ki-x", command)
tell(f"status {status} π")
sys.exit(status)
"""


@pytest.fixture
def prints(tmp_path: Path) -> str:
    (tmp_path / "prints.py").write_text(PRINTS, encoding="utf-8")
    return str(tmp_path / "prints.py")


def start(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, *arguments]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path)), **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_terminal_without_greek(prints: str, environment: dict[str, str]) -> None:
    out, err = start(prints, "1", **environment).communicate(timeout=60)
    assert out.endswith("robot\n")
    assert err.startswith("status 0 ")
    assert out.isascii()


def test_help_on_a_terminal_without_greek() -> None:
    process = start("-m", "ki_export.cli", "--help", PYTHONIOENCODING="ascii")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "usage: ki-export" in out


@pytest.mark.parametrize("arguments", [("prints", "100000"), ("prints", "1"), ("-m", "ki_export.cli", "-h")])
def test_nobody_reads_to_the_end(prints: str, arguments: tuple[str, ...]) -> None:
    """As in `ki-run ... | head -1`."""
    with start(*(prints if word == "prints" else word for word in arguments)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=120) == 141
    assert err in ("", "status 141 π\n")


def test_an_output_that_is_full(prints: str) -> None:
    command = f"'{sys.executable}' '{prints}' 1 > /dev/full"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    done = subprocess.run(command, shell=True, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "No space left on device: 'standard output'" in done.stderr
    assert "Traceback" not in done.stderr


def test_streams_that_are_closed_from_the_start(prints: str) -> None:
    command = f"'{sys.executable}' '{prints}' 1 >&- 2>&-"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    assert subprocess.run(command, shell=True, cwd=ROOT, env=environ, timeout=60).returncode == 0


def scripts() -> list[tuple[str, str]]:
    """(command, module) of every console script."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.scripts]\n")[2]
    return re.findall(r'^(ki-\w+) = "([\w.]+):main"$', text.split("\n\n")[0], re.MULTILINE)


@pytest.mark.parametrize(("command", "module"), scripts())
def test_every_command_tells_its_version_and_explains_itself(
    command: str, module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(module).main
    version = r"ki-edge \d+\.\d+\S* \(python 3\.\d+\.\d+\S*\)\n$"
    for flag, said in (("--version", version), ("--help", f"usage: {command} ")):
        with pytest.raises(SystemExit) as left:
            main([flag])
        assert left.value.code == 0
        assert re.match(said, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("module", "arguments", "package", "extra"),
    [
        ("ki_edge.train.cli", ["somewhere", "-o", "out"], "torch", "train"),
        ("ki_export.cli", ["somewhere", "-o", "out"], "onnx_ir", "export"),
    ],
)
def test_the_extra_of_a_command_is_named(tmp_path, module, arguments, package, extra):
    """As on a robot, whose wheel has the command but not what it needs; its help is there all the same."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"raise ModuleNotFoundError('No module', name={package!r})")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}

    def run(*given):
        command = [sys.executable, "-m", module, *given]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)

    refused = run(*arguments)
    last = refused.stderr.strip().splitlines()[-1]
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert last.endswith(f"error: the package {package} is not installed: pip install 'ki-edge[{extra}]'")
    assert run("--help").returncode == 0
