"""Fixtures that several test files share, also those that run in another process at the same time."""

import fcntl
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sentencepiece

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # of the tests that use the engine by themselves
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: each process has a core for itself

# Started by nohup or in the background, this process ignores them, and so would whatever a test starts: a program that
# is started has the default for every signal that its parent handles.
for ignored, handler in ((signal.SIGHUP, lambda *_: None), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, handler)


LONGEST = ("test_real_widths.py", "test_trt_build.py", "test_parity.py", "test_fetch.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: else the last of them runs alone while the other processes have nothing left."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: as many processes as cores that this one may use and as the memory has room for."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // (4 << 30)))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """made_once(name, make) -> what make(path) made, once for all processes that run the tests. Do not change it."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made_once"
    root.mkdir(exist_ok=True)

    def find(name: str, make: Callable[[Path], object]) -> Path:
        place = root / name
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait for it; a process that dies lets it go
            if not (place / "done").exists():
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                make(place / name)
                (place / "done").touch()
        return place / name

    return find


@pytest.fixture(scope="session")
def data() -> Path:
    """The golden data that the tests read."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def tokenizer_model() -> bytes:
    """A small SentencePiece model with PaliGemma's special ids (pad 0, eos 1, bos 2, unk 3) and conventions."""
    tasks = ("pick up the red cube", "open the drawer", "fold the towel", "move the arm left", "Put it in the Bin")
    lines = [
        f"Task: {task}, State: {' '.join(str((7 * i + 31 * j) % 257 - 1) for j in range(8))};\nAction: "
        for i, task in enumerate(tasks * 12)
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, "Action: |", "a|b_c"]),
        model_writer=model,
        vocab_size=400,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["\n", "|"],
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def fetch_checkpoint() -> Path:
    """The trained policy that the project ships."""
    return Path(__file__).parents[1] / "examples" / "fetch" / "checkpoint"


def succeed(*command: object) -> None:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=550, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def fetch_bundle(fetch_checkpoint: Path, made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The shipped policy, exported and verified by the command that users run."""
    export = (sys.executable, "-m", "ki_export.cli", fetch_checkpoint, "--target", "ort", "-o")
    return made_once("fetch_bundle", lambda path: succeed(*export, path))


@pytest.fixture(scope="session")
def words_bundle(fetch_checkpoint: Path, made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The shipped policy with all its tokens: it answers in words."""
    export = (sys.executable, "-m", "ki_export.cli", fetch_checkpoint, "--target", "ort", "--full-vocabulary", "-o")
    return made_once("words_bundle", lambda path: succeed(*export, path))


@pytest.fixture(scope="session")
def fetch_replay(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """One episode of the scripted expert, recorded from the simulator."""
    script = Path(__file__).parents[1] / "examples" / "fetch" / "demonstrations.py"

    def record(folder: Path) -> None:
        folder.mkdir()
        replay = ("--replay", folder / "expert.npz")
        succeed(sys.executable, script, folder / "data", "--scenes", 1, "--frames", 1, "--workers", 1, *replay)

    return made_once("fetch_replay", record) / "expert.npz"


@pytest.fixture
def largest_file():
    """largest_file(size): a block in which no file may grow beyond `size` bytes, as on a disk that is full."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit
