"""Folders of one's own beside a target: whose they are, and what becomes of those whose process died."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ki_edge.files.staging import MARK, identity, staging, sweep

TOKEN = "0123456789abcdef"
HOLD = """
import os, sys, time
from pathlib import Path
from ki_edge.files.staging import staging
os.getpid = lambda: 7  # as two containers have
with staging(Path(sys.argv[1])) as own:
    (own.folder / "half").write_bytes(b"x")
    print(own.folder.name, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold():
    """hold(target) -> (process that holds a staging folder of that target, name of the folder)."""
    started = []

    def make(target):
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(target)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, process.stdout.readline().strip()

    yield make
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def names(folder):
    return {path.name for path in folder.iterdir()}


def left_behind(folder, boot="unknown", name="bundle"):
    """What a process that was killed left: a folder with half a file, and its lock file."""
    stale = folder / f".{name}.partial-{TOKEN}"
    stale.mkdir()
    (stale / "half").write_bytes(b"x")
    lock = stale.with_name(f"{stale.name}.lock")
    lock.write_bytes(MARK + f"boot {boot}\nremove {identity(stale)[1]}\n".encode())
    return stale, lock


def test_a_folder_vanishes_with_its_lock(tmp_path):
    with staging(tmp_path / "bundle") as own:
        assert names(tmp_path) == {own.folder.name, f"{own.folder.name}.lock"}
        assert own.folder.name.startswith(".bundle.partial-")
        assert own.folder.stat().st_mode & 0o777 == 0o777 & ~umask()  # not private, as tempfile makes them
        (own.folder / "file").write_bytes(b"x")
    assert names(tmp_path) == set()
    with pytest.raises(KeyboardInterrupt), staging(tmp_path / "bundle"):
        raise KeyboardInterrupt
    assert names(tmp_path) == set()


def umask():
    present = os.umask(0)
    os.umask(present)
    return present


def test_the_living_keep_theirs_and_the_dead_lose_theirs(tmp_path, hold):
    """Also if all of them have the same process id."""
    (first, one), (second, two) = hold(tmp_path / "bundle"), hold(tmp_path / "bundle")
    assert one != two
    sweep(tmp_path)
    assert names(tmp_path) == {one, two, f"{one}.lock", f"{two}.lock"}
    first.send_signal(signal.SIGKILL)
    first.wait()
    sweep(tmp_path)
    assert names(tmp_path) == {two, f"{two}.lock"}
    second.kill()
    second.wait()
    sweep(tmp_path)
    assert names(tmp_path) == set()


def test_only_what_carries_our_mark_is_swept(tmp_path):
    foreign = [".bundle.old", f".bundle.partial-{TOKEN}", ".bundle.partial-77", f".x.partial-{TOKEN}", "bundle"]
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("x")
    files = {f".bundle.partial-{TOKEN}.lock": "mine", ".a.partial-b.lock": MARK.decode(), ".bundle.partial-9.lock": ""}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / f".fifo.partial-{TOKEN}.lock").parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / f".fifo.partial-{TOKEN}.lock")
    (tmp_path / f".link.partial-{TOKEN}.lock").symlink_to(tmp_path / f".bundle.partial-{TOKEN}.lock")
    before = names(tmp_path)
    sweep(tmp_path)
    assert names(tmp_path) == before
    assert all((tmp_path / name / "precious").read_text() == "x" for name in foreign)


def test_a_folder_that_the_notes_do_not_name_stays(tmp_path):
    """Such as one that was put at the target between the check and a kill, and exchanged."""
    stale, lock = left_behind(tmp_path, boot=here())
    lock.write_bytes(MARK + f"boot {here()}\nremove 1\nremove nonsense\nremove\n\xff\n".encode("latin-1"))
    sweep(tmp_path)
    assert (stale / "half").read_bytes() == b"x" and lock.exists()


def here():
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.parametrize(("boot", "age", "swept"), [("here", 0, True), ("other", 3600, False), ("other", 90_000, True)])
def test_what_another_machine_left_waits_a_day(tmp_path, boot, age, swept):
    """A lock on a shared disk may not be seen by other machines."""
    stale, lock = left_behind(tmp_path, boot=here() if boot == "here" else "0000-1111")
    os.utime(lock, (time.time() - age,) * 2)
    sweep(tmp_path)
    assert stale.exists() is lock.exists() is (not swept)


def test_a_process_killed_between_lock_and_folder(tmp_path):
    (tmp_path / f".bundle.partial-{TOKEN}.lock").write_bytes(b"")
    (tmp_path / f".other.partial-{TOKEN}.lock").write_bytes(MARK + f"boot {here()}\n".encode())
    (tmp_path / f".other.partial-{TOKEN}").mkdir()  # not noted yet, and empty
    sweep(tmp_path)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("taken", [None, "empty folder", "folder"])
def test_a_process_killed_between_two_renames(tmp_path, taken):
    """Where folders cannot be exchanged: the old one gets its name back, or keeps one if that is taken."""
    stale, lock = left_behind(tmp_path, boot=here())
    old = stale.with_name(f"{stale.name}-old")
    old.mkdir()
    (old / "precious").write_text("x")
    with lock.open("a") as file:
        file.write(f"remove {identity(old)[1]}\n")
    if taken:
        (tmp_path / "bundle").mkdir()
    if taken == "folder":
        (tmp_path / "bundle" / "other").write_text("y")
    sweep(tmp_path)
    if taken == "folder":
        kept = next(path for path in tmp_path.iterdir() if path.name.startswith("bundle.old-"))
        assert (kept / "precious").exists() and (tmp_path / "bundle" / "other").exists()
        assert names(tmp_path) == {"bundle", kept.name}
    else:
        assert names(tmp_path) == {"bundle"} and (tmp_path / "bundle" / "precious").read_text() == "x"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_nothing_is_swept(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    stale, lock = left_behind(tmp_path, boot=here())
    monkeypatch.setattr(fcntl, "flock", refuse)
    sweep(tmp_path)
    assert stale.exists() and lock.exists()
    with staging(tmp_path / "other") as own:
        assert own.folder.is_dir()
    assert names(tmp_path) == {stale.name, lock.name}
