"""The ki-train command: a small run, the plot, exit codes, and one line for everything that is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ki_edge.checkpoints import Checkpoint
from ki_edge.train import cli
from ki_edge.train.plot import plot_losses, read_log

SHORT = ["--steps", "2", "--batch", "4", "--flow-draws", "1", "--log-every", "1"]


@pytest.fixture(scope="module")
def pictures(record, tmp_path_factory):
    """Demonstrations of the size that the preset takes."""
    return record(tmp_path_factory.mktemp("cli") / "demonstrations", size=96)


def ki_train(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_a_run_and_its_continuation(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert ki_train(pictures, "-o", out, *SHORT) == 0
    assert f"checkpoint {out} after 2 steps" in capsys.readouterr().out
    assert Checkpoint.open(out).config.vision.image_size == 96
    with Image.open(out / "training" / "losses.png") as plot:
        assert plot.size == (960, 540)
    assert ki_train(pictures, "-o", out, *SHORT) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert ki_train(pictures, "-o", out, "--steps", "3", "--batch", "8", "--resume") == 2
    assert "steps: the run has 2, now 3; batch: the run has 4, now 8. Resume with what" in capsys.readouterr().err
    (out / "model.safetensors").unlink()  # killed before its last checkpoint
    assert ki_train(pictures, "-o", out, "--resume", "--log-every", "7") == 0  # with the settings of the run
    assert Checkpoint.open(out).config.vision.image_size == 96
    log = [json.loads(line)["step"] for line in (out / "training" / "log.jsonl").read_text().splitlines()]
    assert log == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "holds no training run to resume"),
        (["--steps", "0"], "steps 0: expected at least 1"),
        (["--batch", "100"], "choose another batch size or record more"),
        (["--threads", "-2"], "threads -2"),
        (["--init", "nowhere"], "no checkpoint folder at nowhere"),
    ],
)
def test_wrong_arguments(pictures, tmp_path, capsys, arguments, message):
    assert ki_train(pictures, "-o", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("ki-train: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_wrong_demonstrations(demonstrations, tmp_path, capsys):
    assert ki_train(tmp_path / "none", "-o", tmp_path / "out") == 2
    assert "none: no such file or folder; expected an episode (.npz)" in capsys.readouterr().err
    assert ki_train(demonstrations, "-o", tmp_path / "out") == 2
    assert "pictures of (8, 8), the model takes 96 x 96" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(pictures, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert ki_train(pictures, "-o", tmp_path / "file" / "out", *SHORT) == 2
    assert capsys.readouterr().err.startswith("ki-train: error: ")


def test_interruption(pictures, tmp_path, capsys, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train", interrupt)
    assert ki_train(pictures, "-o", tmp_path / "out") == 130
    assert capsys.readouterr().err == "ki-train: interrupted; --resume goes on from the last save\n"


@pytest.mark.parametrize(
    "arguments", [[], ["x"], ["x", "-o", "y", "--steps", "many"], ["x", "-o", "y", "--preset", "huge"]]
)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        ki_train(*arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("ki-train: error: ") and error.count("\n") == 1


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        ki_train("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name, text in cli.HELP.items():
        assert "--" + name.replace("_", "-") in shown
        assert text.split()[0] in shown


def test_the_command_itself(tmp_path):
    """As a process: exit status 2 and one line, no traceback."""
    command = [sys.executable, "-m", "ki_edge.train.cli", str(tmp_path / "none"), "-o", str(tmp_path / "out")]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"ki-train: error: {tmp_path}")
    assert result.stderr.count("\n") == 1


def test_log_of_a_resumed_run(tmp_path):
    """The later record of a step wins, and terms may be missing."""
    records = [{"step": 1, "flow": 3.0}, {"step": 2, "flow": 2.0}, {"step": 2, "flow": 1.5, "fast": 4.0}]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, records)) + "\n")
    columns = read_log(log)
    assert columns["step"] == [1, 2]
    assert columns["flow"] == [3.0, 1.5]
    assert columns["fast"][1] == 4.0
    plot_losses(log, tmp_path / "losses.png")  # without a warning
