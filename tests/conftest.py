"""Fixtures that several test files share."""

import io
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sentencepiece

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # of the tests that use the engine by themselves


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


@pytest.fixture(scope="session")
def fetch_bundle(fetch_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped policy, exported and verified by the command that users run."""
    bundle = tmp_path_factory.mktemp("fetch") / "bundle"
    command = [sys.executable, "-m", "ki_export.cli", str(fetch_checkpoint), "-o", str(bundle), "--target", "ort"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return bundle


@pytest.fixture(scope="session")
def fetch_replay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One episode of the scripted expert, recorded from the simulator."""
    folder = tmp_path_factory.mktemp("replay")
    script = Path(__file__).parents[1] / "examples" / "fetch" / "demonstrations.py"
    command = [sys.executable, str(script), str(folder / "data"), "--scenes", "1", "--workers", "1"]
    command += ["--replay", str(folder / "expert.npz")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return folder / "expert.npz"


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
