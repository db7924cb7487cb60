"""What --rerun logs, asked of rerun's own reader."""

import os

import numpy as np
import pytest

from ki_edge.errors import RobotError
from ki_runtime.control import cli, rerun_viewer
from ki_runtime.control.loop import ControlLoop
from ki_runtime.control.options import LoopOptions
from ki_runtime.control.rerun_viewer import GAP, RerunViewer, check_rerun

from .recorded_runs import CAMERAS, STEPS, Filmed, Plan, level

HERE = "rerun-sdk is not installed (0.5 GB): pip install 'ki-edge[rerun]', or make test-integrations"


@pytest.fixture
def logged(tmp_path):
    """logged(path, component) -> [(command, value)] of an entity, of a run of two episodes that was logged."""
    chunk = pytest.importorskip("rerun.chunk", reason=HERE)
    path = tmp_path / "run.rrd"
    ControlLoop(Plan(), Filmed(), LoopOptions(episodes=2), [RerunViewer(str(path))]).run()
    chunks = list(chunk.RrdReader(path).store().stream())

    def values(entity, component):
        found = []
        for one in chunks:
            batch = one.to_record_batch()
            columns = [name for name in batch.schema.names if name.endswith(component)]
            if one.entity_path == entity and columns and not one.is_static:
                found += zip(batch["command"].to_pylist(), batch[columns[0]].to_pylist(), strict=True)
        return sorted(found, key=lambda pair: pair[0])

    return values


def test_what_is_in_the_file(logged):
    second = STEPS - 1 + GAP  # the command with which the second episode begins
    ticks = [*range(STEPS), *range(second, second + STEPS)]
    sent = logged("/action/x/sent", "Scalars:scalars")
    assert [at for at, _ in sent] == ticks
    assert [value for _, (value,) in sent] == [min(step, 6) for step in range(STEPS)] * 2  # 6 is the limit
    assert [value for _, (value,) in logged("/action/x/planned", "Scalars:scalars")] == [*range(STEPS)] * 2
    predicted = logged("/action/x/chunk_1", "Scalars:scalars")
    chunks = [pair for pair in predicted if not np.isnan(pair[1][0])]
    assert chunks == [(start + row, [4.0 + row]) for start in (4, second + 4) for row in range(5)]
    assert len(predicted) == len(chunks) + 2  # a gap behind each
    assert [value for _, (value,) in logged("/chunk/row", "Scalars:scalars")] == [step % 4 for step in range(STEPS)] * 2
    assert len(logged("/latency/total", "Scalars:scalars")) == 6
    states = logged("/state", "Scalars:scalars")
    assert [at for at, _ in states] == [0, 4, 8, second, second + 4, second + 8] and states[1][1] == [4, 0, 0.5]
    texts = [text for _, (text,) in logged("/events", "TextLog:text")]
    assert texts.count("guards: position") == 4 and texts.count("seam: chunk 1, row 0") == 2
    assert "episode 0 begins, seed 0, filmed" in texts and any(
        text.startswith("episode 1 ends: no success") for text in texts
    )


def test_pictures_can_be_seen(logged):
    import io

    from PIL import Image

    for name, size in CAMERAS.items():
        path = "/camera/" + name.replace("/", "\\/")
        pictures = logged(path, "EncodedImage:blob")
        assert len(pictures) == 6
        with Image.open(io.BytesIO(np.array(pictures[1][1], np.uint8).tobytes())) as image:
            assert (image.height, image.width) == size and abs(np.asarray(image).mean() - level(4, 0)) < 3


def test_what_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("rerun", reason=HERE)
    (tmp_path / "there.rrd").touch()
    for target, message in (
        (tmp_path / "run.mp4", r"expected a file ending in \.rrd"),
        (tmp_path / "there.rrd", "the file exists"),
        (tmp_path / "none" / "run.rrd", "no folder"),
    ):
        with pytest.raises(RobotError, match=message):
            check_rerun(str(target))
    check_rerun("rerun+http://127.0.0.1:9876/proxy")


def test_the_window_is_found_beside_the_interpreter(tmp_path, monkeypatch):
    pytest.importorskip("rerun", reason=HERE)
    for folder in ("bin", "elsewhere"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    with pytest.raises(RobotError, match="no program 'rerun' beside this Python or on PATH"):
        check_rerun(rerun_viewer.LIVE)
    (tmp_path / "bin" / "rerun").touch(0o755)
    check_rerun(rerun_viewer.LIVE)
    assert os.environ["PATH"] == str(tmp_path / "elsewhere")


def test_without_rerun_one_line_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(rerun_viewer, "find_spec", lambda name: None)
    monkeypatch.setattr("ki_runtime.policy.policy.Policy.load", lambda *_, **__: pytest.fail("loaded"))
    assert cli.main(["bundle", "--robot", "replay:x.npz", "--rerun"]) == 2
    error = capsys.readouterr().err
    assert "--rerun needs rerun-sdk (0.5 GB): pip install 'ki-edge[rerun]'" in error and error.count("\n") == 1
