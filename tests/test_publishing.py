"""Publishing: at every moment the old folder or the new one is there, whole, and nobody else's is touched."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ki_edge.errors import BundleError
from ki_edge.files import publishing as module
from ki_edge.files.publishing import publishing, sync

ROOT = Path(__file__).parents[1]


def allow(target):
    """Any folder with our file in it may be replaced."""
    if not (target / "ours").is_file():
        raise BundleError(f"{target} is not ours")


def refuse(target):
    raise BundleError(f"{target} exists")


def put(folder, content, name="ours"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content)


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(params=["exchange", "renames"])
def way(request, monkeypatch):
    """The kernel's exchange, and what is done where a file system has none."""
    if request.param == "renames":
        monkeypatch.setattr(module, "_rename", lambda *_: False)
    return request.param


def test_new_and_replaced(tmp_path, way):
    target = tmp_path / "a" / "bundle"
    for content in ("first", "second"):
        with publishing(target, allow, BundleError) as folder:
            assert folder.parent == target.parent
            put(folder, content)
        assert (target / "ours").read_text() == content
        assert names(target.parent) == {"bundle"}


def test_the_exchange_is_available_here(tmp_path):
    """Else the tests above run one way twice. Linux has it since 3.15 on every local file system."""
    put(tmp_path / "a", "x")
    put(tmp_path / "b", "y")
    assert module._rename(tmp_path / "a", tmp_path / "b", module.EXCHANGE)
    assert (tmp_path / "a" / "ours").read_text() == "y"


@pytest.mark.parametrize("kind", ["empty folder", "folder", "file", "link"])
@pytest.mark.parametrize("check", [allow, refuse])
def test_what_is_made_at_the_target_meanwhile_is_not_replaced(tmp_path, way, kind, check):
    target = tmp_path / "bundle"
    with pytest.raises(BundleError, match=r"is not ours|exists"), publishing(target, check, BundleError) as folder:
        put(folder, "new")
        if kind == "file":
            target.write_text("precious")
        elif kind == "link":
            target.symlink_to(tmp_path / "nowhere")
        else:
            target.mkdir()
        if kind == "folder":
            put(target, "precious", "theirs")
    assert names(tmp_path) == {"bundle"}
    assert target.is_symlink() or target.is_file() or names(target) == ({"theirs"} if kind == "folder" else set())


@pytest.mark.parametrize("was", ["nothing", "ours"])
def test_a_folder_put_there_between_the_check_and_the_rename(tmp_path, way, monkeypatch, was):
    """The last moment: it is given its place back."""
    target, looked = tmp_path / "bundle", module.identity
    if was == "ours":
        put(target, "old")
    calls = []

    def identity(path):
        found = looked(path)
        if path == target and len(calls) < 2:  # after the first look, and after the one before the rename
            calls.append(path)
            if len(calls) == 2:
                if was == "ours":
                    target.rename(tmp_path / "moved")
                put(target, "precious", "theirs")
        return found

    monkeypatch.setattr(module, "identity", identity)
    with pytest.raises(BundleError), publishing(target, lambda path: None if was == "ours" and len(calls) < 2
                                                else allow(path), BundleError) as folder:  # fmt: skip
        put(folder, "new")
    assert (target / "theirs").read_text() == "precious"
    assert names(tmp_path) == ({"bundle", "moved"} if was == "ours" else {"bundle"})


def test_a_rename_that_fails_brings_the_old_one_back(tmp_path, monkeypatch):
    target = tmp_path / "bundle"
    put(target, "old")

    def fail(*_):
        raise OSError(5, "Input/output error", str(target))

    monkeypatch.setattr(module, "_rename", lambda *_: False)
    monkeypatch.setattr(module, "move_new", fail)
    with (
        pytest.raises(BundleError, match="could not be written: Input/output error"),
        publishing(target, allow, BundleError) as folder,
    ):
        put(folder, "new")
    assert (target / "ours").read_text() == "old" and names(tmp_path) == {"bundle"}


def test_a_target_that_never_keeps_still(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "move_new", lambda *_: False)
    with (
        pytest.raises(BundleError, match="made and removed by others all the time"),
        publishing(tmp_path / "bundle", allow, BundleError) as folder,
    ):
        put(folder, "new")
    assert names(tmp_path) == set()


def test_everything_is_on_the_disk_before_it_is_published(tmp_path, monkeypatch):
    """A power cut finds no published folder with empty files."""
    events, fsync, rename = [], os.fsync, module._rename

    def noted(descriptor):
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(module, "_rename", lambda *given: events.append("rename") or rename(*given))
    with publishing(tmp_path / "bundle", allow, BundleError) as folder:
        put(folder, "new")
        (folder / "assets").mkdir()
        (folder / "assets" / "file").write_text("x")
        (folder / "link").symlink_to("nowhere")
        events.clear()
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert before == ["file", "assets", "ours", folder.name] and tmp_path.name in after


def test_an_error_of_the_disk_names_the_file(tmp_path):
    with (
        pytest.raises(BundleError, match=r"bundle could not be written: No space left on device \(.*/weights\)"),
        publishing(tmp_path / "bundle", allow, BundleError) as folder,
    ):
        raise OSError(28, "No space left on device", str(folder / "weights"))
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(BundleError, match=r"could not be written: .*/file"),
        publishing(tmp_path / "file" / "bundle", allow, BundleError),
    ):
        pass


def test_many_at_once_publish_one_whole_folder(tmp_path, way):
    """The last one wins; nothing is mixed, nothing is left."""
    failed = []

    def work(number):
        try:
            for _ in range(5):
                with publishing(tmp_path / "bundle", allow, BundleError) as folder:
                    for name in ("ours", "other"):
                        put(folder, str(number), name)
        except BundleError as error:  # nine others were faster each time
            failed.append(str(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not [text for text in failed if "all the time" not in text and "not ours" not in text]
    kept = {name for name in names(tmp_path) if name.startswith("bundle.old-")}  # two at once in the gap of two renames
    assert names(tmp_path) - kept == {"bundle"} and not (kept and way == "exchange")
    assert (tmp_path / "bundle" / "ours").read_text() == (tmp_path / "bundle" / "other").read_text()


def test_syncing_a_folder_that_is_gone(tmp_path):
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "gone")


CONTAINER = """
import os, sys
from pathlib import Path
from ki_edge.errors import BundleError
from ki_edge.files.publishing import publishing
if sys.argv[2] != "own":
    os.getpid = lambda: 7
target, me = Path(sys.argv[1]), sys.argv[3]
print(os.getpid(), flush=True)
with publishing(target, lambda path: None, BundleError) as folder:
    for name in ("one", "two"):
        (folder / name).write_text(me)
        print("wrote", name, flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize("kind", ["pretended ids", "pid namespaces"])
def test_two_containers_with_one_volume(tmp_path, kind):
    """Both have the same process id. Each writes half, then the other half; what is published is of one of them."""
    own = ["unshare", "--pid", "--fork"] if kind == "pid namespaces" else []
    if own:
        tried = subprocess.run([*own, "true"], capture_output=True, text=True, check=False)
        if tried.returncode:
            pytest.skip(f"no process id namespaces for this user here: {tried.stderr.strip()}")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    command = [*own, sys.executable, "-c", CONTAINER, str(tmp_path / "bundle"), "own" if own else "pretended"]
    both = [subprocess.Popen([*command, me], **pipes) for me in ("first", "second")]
    assert [process.stdout.readline() for process in both] == (["1\n"] * 2 if own else ["7\n"] * 2)
    for line in ("wrote one\n", "wrote two\n"):
        for process in both:
            assert process.stdout.readline() == line
        if line == "wrote one\n":
            for process in both:
                process.stdin.write("\n")
                process.stdin.flush()
    for process, me in zip(both, ("first", "second"), strict=True):
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
        assert {path.read_text() for path in (tmp_path / "bundle").iterdir()} == {me}
    assert names(tmp_path) == {"bundle"}
