"""What all commands share: what they print, errors as one line on stderr, and their exit status.

Names and texts come from files that anybody may have written, so nothing reaches a terminal but through `printable`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TextIO

from .errors import KiEdgeError, ParityError

OUTPUT_CLOSED = 128 + signal.SIGPIPE  # as if SIGPIPE had ended it: nobody reads any more
MOST_CHARACTERS = 2000  # of a line
TRACEBACK = "KI_TRACEBACK"  # variable: where an error came from is printed too


class OutputClosed(Exception):
    """Whoever read standard output is gone, such as `head`."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument as one line on stderr, like every other error; knows --version."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.add_argument("--version", action=_Version, nargs=0, help="print the version of ki-edge and of Python")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)}; see {self.prog} --help\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Help too is printed where π cannot be, or where nobody reads it to the end."""
        if file is None or file is sys.stderr:
            _write(sys.stderr, message)
            return
        try:
            show(message.rstrip("\n").split("\n"))
        except OutputClosed:
            self.exit(OUTPUT_CLOSED)


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version  # at the start of every command they would be felt

        try:
            found = version("ki-edge")
        except PackageNotFoundError:
            found = "of a source tree that is not installed"
        show([f"ki-edge {found} (python {platform.python_version()})"])
        parser.exit()


def run_command(
    name: str, command: Callable[[], int], interrupted: str = "nothing was published", *, needs: str | None = None
) -> int:
    """Run a command; its exit status is 0, 1 for a ParityError, 2 for any other error, 128 + n if signal n stopped it.

    Standard output that nobody reads any more ends it quietly, as SIGPIPE would. An error that nobody raised on purpose
    is one line too; with KI_TRACEBACK=1 every error is told with its traceback. `needs`: the extra of this project that
    has what the command imports.
    """
    try:
        status = command()
        _flush()
        return status
    except KeyboardInterrupt as stop:
        tell(f"{name}: interrupted; {interrupted}")
        return 128 + int(getattr(stop, "signum", signal.SIGINT))
    except OutputClosed:
        return OUTPUT_CLOSED
    except (KiEdgeError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _output_is_gone():
            return OUTPUT_CLOSED
        _trace()
        tell(f"{name}: error: {_one_line(error)}")
        return 1 if isinstance(error, ParityError) else 2
    except MemoryError as error:
        _trace()
        tell(f"{name}: error: this machine's memory does not suffice ({_one_line(error) or 'no size given'})")
        return 2
    except Exception as error:
        _trace()
        if needs is not None and isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("ki_"):
            tell(f"{name}: error: the package {error.name} is not installed: pip install 'ki-edge[{needs}]'")
            return 2
        tell(
            f"{name}: error: {type(error).__name__}: {_one_line(error)}; this should have been a clear message: "
            f"please report it with what {TRACEBACK}=1 {name} ... prints"
        )
        return 2


def printable(text: object, most: int = MOST_CHARACTERS) -> str:
    r"""One line for a terminal: what is no visible character as an escape, and at most `most` characters.

    Control characters (also of 8 bits), line ends, marks that turn the writing direction, and halves of characters
    become \x1b, \u202e and so on; of a longer text the middle is left out.
    """
    line = str(text)
    if len(line) > most:
        line = f"{line[: most * 2 // 3]} ... {line[-(most // 3) :]}"
    return "".join(char if char.isprintable() else _escaped(char) for char in line)


def tell(line: str) -> None:
    """A line on stderr, at once."""
    _write(sys.stderr, printable(line) + "\n")


def show(lines: Iterable[str]) -> None:
    """Lines on stdout, at once. OutputClosed if nobody reads them, OSError if they cannot be written."""
    _write_out("".join(printable(line) + "\n" for line in lines))


def show_json(value: Any) -> None:
    """A JSON value on stdout, all of it ASCII, of any length; errors as of `show`."""
    _write_out(json.dumps(value, indent=1).replace("\x7f", "\\u007f") + "\n")


def show_json_line(value: Any) -> None:
    """A JSON value on one line of stdout, all of it ASCII, of any length; errors as of `show`."""
    _write_out(json.dumps(value, default=str).replace("\x7f", "\\u007f") + "\n")


def _write_out(text: str) -> None:
    stream = sys.stdout
    if stream is None:  # it was closed before the start
        return
    try:
        stream.write(_encodable(stream, text))
        stream.flush()
    except OSError as error:
        _drop_output(stream)
        if isinstance(error, BrokenPipeError):
            raise OutputClosed from None
        raise OSError(error.errno, error.strerror, "standard output") from None


def _write(stream: TextIO, text: str) -> None:
    """To stderr, which may be closed as well: then there is nobody to tell."""
    try:
        stream.write(_encodable(stream, text))
        stream.flush()
    except (OSError, AttributeError):
        return


def _encodable(stream: TextIO, text: str) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _drop_output(stream: TextIO) -> None:
    """What is still buffered goes nowhere, so that the interpreter's last flush does not fail once more."""
    try:
        _discard(stream.fileno())
    except (OSError, ValueError):
        return


def _discard(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _trace() -> None:
    if os.environ.get(TRACEBACK, "") not in ("", "0"):
        for line in traceback.format_exc().splitlines():
            tell(line)


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _output_is_gone() -> bool:
    """Whether nobody reads standard output any more; the interpreter then flushes what is left to nowhere."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # no output at all, or one of a test
        return False
    watch = select.poll()
    watch.register(descriptor, select.POLLOUT)
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in watch.poll(0)):
        return False
    _discard(descriptor)
    return True
