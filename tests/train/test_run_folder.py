"""A run's folder: whole checkpoints, those that stay, links, one run at a time, a full disk, a kill at any moment."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.train.parallel.checkpoints import Keep, RunFolder
from ki_edge.train.parallel.processes import Processes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    opened = []

    def make(keep="last:3,best:1", out=tmp_path / "out"):
        opened.append(RunFolder(out, Keep.parse(keep), Processes()))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def fill(partial: Path) -> None:
    (partial / "training").mkdir()
    (partial / "model.safetensors").write_bytes(b"x" * 1000)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if not path.name.startswith("."))


def test_a_checkpoint_appears_whole_and_last_points_to_it(folder, tmp_path):
    run = folder()

    def look(partial: Path) -> None:
        fill(partial)
        assert names(run.out) == []

    assert run.publish(500, look) == tmp_path / "out" / "step_000500"
    assert names(run.out) == ["last", "step_000500"]
    assert str((run.out / "last").readlink()) == "step_000500"  # relative: the folder may be moved
    assert run.latest() == run.folder(500) and (run.out / "last" / "model.safetensors").stat().st_size == 1000


def test_what_stays(folder):
    run = folder("last:2,best:1")
    for step, worth in ((100, 0.5), (200, 0.9), (300, 0.7), (400, float("nan")), (500, 0.9)):
        run.publish(step, fill)
        assert run.score(step, worth) is (step in (100, 200, 500))  # of equal ones the newest
    assert names(run.out) == ["best", "last", "step_000400", "step_000500", "training"]
    assert str((run.out / "best").readlink()) == "step_000500" == str((run.out / "last").readlink())
    run.publish(600, fill)
    run.publish(700, fill)
    assert [*run.steps()] == [500, 600, 700]  # the best one although it is old


def test_a_link_protects_what_the_settings_would_not_keep(folder):
    run = folder("last:1,best:0")
    run.publish(100, fill)
    run.score(100, 1.0)
    for step in (200, 300):
        run.publish(step, fill)
    assert [*run.steps()] == [100, 300] and str((run.out / "best").readlink()) == "step_000100"


def test_what_was_refused_leaves_nothing(folder, tmp_path):
    run = folder(out=tmp_path / "some" / "where" / "out")
    run.abandon()
    assert not (tmp_path / "some").exists()
    (tmp_path / "mine").mkdir()
    folder(out=tmp_path / "mine").abandon()
    assert list((tmp_path / "mine").iterdir()) == []
    run = folder(out=tmp_path / "run")
    run.publish(100, fill)
    run.close()
    folder(out=tmp_path / "run").abandon()
    assert (tmp_path / "run" / ".lock").exists() and names(tmp_path / "run") == ["last", "step_000100"]


def test_a_lock_that_was_taken_away_holds_nothing(folder, tmp_path, monkeypatch):
    """Between opening and locking the file another run may be refused, and takes its lock along."""
    import fcntl

    flock, path = fcntl.flock, tmp_path / "out" / ".lock"

    def late(descriptor, how):
        if path.exists() and not taken:
            taken.append(path.unlink())
        return flock(descriptor, how)

    taken = []
    monkeypatch.setattr(fcntl, "flock", late)
    folder()
    assert path.exists() and "process" in path.read_text()
    with pytest.raises(ArgumentError, match="another process trains into"):
        folder()
    assert path.exists()  # it is the other one's


@pytest.mark.parametrize("name", ["training", "training/log.jsonl", "training/eval"])
def test_no_link_is_written_through(folder, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArgumentError, match=f"{name} is a link"):
        folder()
    assert not (tmp_path / "out" / ".lock").exists() and list((tmp_path / "elsewhere").iterdir()) == []


def test_nothing_else_is_ever_removed(folder):
    run = folder("last:1")
    (run.out / "step_000001").mkdir(parents=True)
    (run.out / "step_000002").symlink_to("/")
    (run.out / "notes").write_text("mine")
    for step in (100, 200):
        run.publish(step, fill)
    assert names(run.out) == ["last", "notes", "step_000001", "step_000002", "step_000200"]
    assert (run.out / "step_000001").is_dir() and Path("/usr").is_dir()
    with pytest.raises(CheckpointError, match=r"step_000002 is no checkpoint of a run"):
        run.publish(2, fill)


def test_a_step_that_is_there_already_is_replaced(folder):
    run = folder()
    run.publish(100, fill)

    def other(partial: Path) -> None:
        (partial / "training").mkdir()

    run.publish(100, other)
    assert not (run.folder(100) / "model.safetensors").exists() and [*run.steps()] == [100]


@pytest.mark.parametrize(
    "text",
    ["", "last", "last:0", "last:-1", "best:1,", "last:3,last:4", "all:3", "last:3;best:1", "last:99999999", "last:٣"],
)
def test_what_to_keep_that_makes_no_sense(text):
    with pytest.raises(ArgumentError, match=r"keep .*: .*expected"):
        Keep.parse(text)


def test_what_to_keep():
    assert (
        Keep.parse("last:3,best:1") == Keep()
        and Keep.parse("best:2") == Keep(1, 2)
        and Keep.parse("last:5") == Keep(5, 0)
    )


def test_a_second_process_is_refused_until_the_first_is_dead(folder, tmp_path):
    code = (
        "import sys, time\nfrom ki_edge.train.parallel.checkpoints import *\n"
        "from ki_edge.train.parallel.processes import Processes\n"
        "run = RunFolder(sys.argv[1], Keep(), Processes())\nprint('open', flush=True)\ntime.sleep(600)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "out"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(
            ArgumentError, match=rf"another process trains into .*out \(process {other.pid} on .*\): wait"
        ):
            folder()
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    folder().publish(100, fill)


def test_a_full_disk_leaves_what_was_there(folder, largest_file):
    run = folder("last:1")
    run.publish(100, fill)
    with largest_file(500), pytest.raises(CheckpointError, match=r"step_000200 could not be written: File too large"):
        run.publish(200, fill)
    assert names(run.out) == ["last", "step_000100"] and run.latest() == run.folder(100)
    assert not [path for path in run.out.iterdir() if "partial" in path.name]
    run.publish(300, fill)
    assert [*run.steps()] == [300]


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "other").write_text("of somebody else")
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "other")
    with pytest.raises(CheckpointError, match="out"):
        RunFolder(tmp_path / "out", Keep(), Processes())
    assert (tmp_path / "other").read_text() == "of somebody else"


def test_a_folder_that_cannot_be_one(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match=r"file is a file: name a folder"):
        folder(out=tmp_path / "file")
    run = folder()
    (run.out / "last").mkdir()
    with pytest.raises(CheckpointError, match=r"last is no link"):
        run.publish(100, fill)


KILLED = """
import os, signal, sys
from pathlib import Path
from ki_edge.train.parallel import checkpoints
from ki_edge.train.parallel.processes import Processes

out, limit, lines = sys.argv[1], int(sys.argv[2]), 0

def fill(partial):
    (partial / "training").mkdir()
    (partial / "weights").write_text("whole")

def trace(frame, event, _):
    global lines
    if frame.f_code.co_filename != checkpoints.__file__:
        return None
    if event == "line":
        lines += 1
        if lines == limit:
            os.kill(os.getpid(), signal.SIGKILL)
    return trace

run = checkpoints.RunFolder(out, checkpoints.Keep(1, 1), Processes())
known = max(run.steps(), default=0)
sys.settrace(trace)
run.publish(known + 100, fill)
run.score(known + 100, 1.0)
sys.settrace(None)
print(lines)
"""


def test_a_kill_at_any_line_leaves_a_checkpoint_to_go_on_with(tmp_path):
    """Every fourth line: what is there is whole, links lead somewhere, and the next run clears what was left."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)

    def run(limit: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, script, tmp_path / "out", str(limit)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )

    total = int(run(-1).stdout)
    assert total > 40
    for limit in range(3, total, max(1, total // 6)):
        assert run(limit).returncode == -signal.SIGKILL
        for path in (tmp_path / "out").glob("step_*"):
            assert (path / "weights").read_text() == "whole" and (path / "training").is_dir()
        for link in ("last", "best"):
            assert (tmp_path / "out" / link / "weights").is_file(), limit
    run(-1)
    left = [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".") and path.name != ".lock"]
    assert left == [] and len(list((tmp_path / "out").glob("step_*"))) == 1


TOGETHER = """
import sys
from pathlib import Path
from ki_edge.errors import KiEdgeError
from ki_edge.train.parallel.checkpoints import Keep, RunFolder
from ki_edge.train.parallel.processes import Processes

processes, out = Processes(), Path(sys.argv[1])
run = RunFolder(out, Keep(1, 0), processes)

def fill(partial, failing=None):
    with processes.together():
        if processes.main:
            (partial / "training").mkdir()
        if processes.rank == failing:
            raise ValueError("of process " + str(failing))
    processes.wait()
    (partial / f"part{processes.rank}").touch()
    processes.wait()  # the main process renames the folder next

def refused(step, failing):
    try:
        run.publish(step, lambda partial: fill(partial, failing))
    except (KiEdgeError, ValueError) as error:
        return str(error)
    raise AssertionError("it was published")

run.publish(100, fill)
assert {path.name for path in run.folder(100).iterdir()} == {"part0", "part1", "training"}
ours, theirs = "of process", "another process of this run failed"
for failing in (0, 1):
    assert (ours if processes.rank == failing else theirs) in refused(200, failing)
if processes.main:
    run.folder(300).mkdir()  # nobody's: it cannot be replaced
processes.wait()
assert ("is no checkpoint" if processes.main else theirs) in refused(300, None)
run.publish(400, fill)
processes.wait()
assert [*run.steps()] == [400] and run.folder(300).is_dir() and not list(out.glob(".*partial*")), list(out.iterdir())
run.close()
processes.close()
"""


def test_what_fails_in_one_process_ends_in_all_and_leaves_nothing(tmp_path):
    (tmp_path / "together.py").write_text(TOGETHER)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, tmp_path / "together.py", tmp_path / "out"], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
