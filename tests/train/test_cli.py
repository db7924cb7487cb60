"""The ki-train command: a small run, what it says, exit codes, and one line for everything that is wrong."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ki_edge.checkpoints import Checkpoint
from ki_edge.planning.settings import TrainSettings
from ki_edge.train import cli, flags

ROOT = Path(__file__).parents[2]
SHORT = ["--steps", "2", "--batch", "4", "--flow-draws", "1", "--log-every", "1", "--workers", "0", "--float32"]


@pytest.fixture(scope="module")
def episodes(record_dataset, tmp_path_factory):
    return record_dataset(tmp_path_factory.mktemp("cli") / "episodes", size=32)


def ki_train(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_a_run_and_its_continuation(episodes, tmp_path, capsys):
    out = tmp_path / "out"
    assert ki_train(episodes, "-o", out, *SHORT) == 0
    said = capsys.readouterr()
    assert f"checkpoint {out}/step_000002 after 2 of 2 steps" in said.out and "train.html" in said.out
    assert "cameras" in said.err and "guessed, --map FILE tells otherwise" in said.err
    assert Checkpoint.open(out / "last").config.vision.image_size == 96
    assert ki_train(episodes, "-o", out, *SHORT) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert ki_train("-o", out, "--steps", "3", "--batch", "8", "--resume") == 2
    assert "steps: the run has 2, now 3; batch: the run has 4, now 8. Resume with what" in capsys.readouterr().err
    assert ki_train("-o", out, "--resume", "--log-every", "7", "--workers", "0") == 0  # its own settings and data
    log = [json.loads(line)["step"] for line in (out / "training" / "log.jsonl").read_text().splitlines()]
    assert log == [1, 2]
    assert ki_train("-o", out, "--resume", "--steps", "3", "--accept-changes", "--workers", "0") == 0
    said = capsys.readouterr()
    assert "changed: steps: the run has 2, now 3" in said.err and "after 3 of 3 steps" in said.out


def test_from_a_checkpoint(episodes, tmp_path, capsys):
    assert ki_train(episodes, "-o", tmp_path / "first", *SHORT) == 0
    start = tmp_path / "first" / "last"
    assert ki_train(episodes, "-o", tmp_path / "second", "--init", start, "--horizon", "5", *SHORT) == 0
    assert Checkpoint.open(tmp_path / "second" / "last").config.action_horizon == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "holds no training run to resume"),
        (["--resume", "--fresh"], "say one of them"),
        (["--steps", "0"], "steps 0: expected at least 1"),
        (["--threads", "-2"], "threads -2"),
        (["--threads", "9" * 30], "expected 1 to 4096"),
        (["--workers", "-1"], "workers -1"),
        (["--seed", "9" * 30], "expected at least 0, at most 2147483647"),
        (["--batch", "9" * 30], "expected at least 1, at most"),
        (["--eval-every", "-1"], "eval_every -1: expected at least 0"),
        (["--eval-episodes", "-4"], "--eval-episodes -4: expected at least 1"),
        (["--flow-weight", "nan"], "flow_weight nan: expected 0 or more"),
        (["--fast-weight", "-1"], "fast_weight -1.0: expected 0 or more"),
        (["--text-weight", "inf"], "text_weight inf"),
        (["--final-rate", "nan"], "final_rate nan"),
        (["--learning-rate", "inf"], "must be positive, and the first one finite"),
        (["--cache", "kept", "--cache-gb", "inf"], "--cache-gb inf"),
        (["--horizon", "0"], "--horizon 0: expected at least 1"),
        (["--init", "nowhere"], "nowhere"),
        (["--init", "no\0where"], "no path has a NUL character"),
        (["--init", "x", "--preset", "tiny"], "leave --preset out"),
        (["--rate", "vision=1", "--rate", "expert=3,vision=2"], "rate vision: it is given twice"),
        (["--lora", "vision=4,vision=4"], "lora vision: it is given twice"),
        (["--rate", "vision"], "--rate vision: expected GROUP=FACTOR"),
        (["--lora", "vision=x"], "--lora vision=x: expected GROUP=RANK"),
        (["--freeze", "wheels"], "wheels: no such group"),
        (["--keep", "all"], "keep"),
        (["--eval-robot", "gym:FetchReach-v4"], "say how often with --eval-every"),
        (["--eval-robot", "mine:Robot"], "training moves no real robot"),
        (["--map", "nothing.json"], "nothing.json"),
        (["--track", "paper"], "paper"),
        (["--preset", "pi05"], "--tokenizer"),
    ],
)
def test_wrong_arguments(episodes, tmp_path, capsys, arguments, message):
    assert ki_train(episodes, "-o", tmp_path / "out", *arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ki-train: error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out").exists()  # what is refused leaves nothing behind


def test_an_output_that_cannot_be_written(episodes, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert ki_train(episodes, "-o", out, *SHORT) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("ki-train: error: ")


def test_interruption(episodes, tmp_path, capsys, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train", interrupt)
    assert ki_train(episodes, "-o", tmp_path / "out") == 130
    assert capsys.readouterr().err == "ki-train: interrupted; --resume goes on from the last save\n"


@pytest.mark.parametrize(
    "arguments", [[], ["x"], ["x", "-o", "y", "--steps", "many"], ["x", "-o", "y", "--preset", "huge"]]
)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        code = ki_train(*arguments)
        raise SystemExit(code)  # what argparse lets pass is refused by the run
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("ki-train: error: ") and error.count("\n") == 1


def test_every_setting_has_a_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        ki_train("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    other = {
        "knowledge_insulation": "--no-insulation", "fast_loss": "--no-fast-loss", "bfloat16": "--float32",
        "rates": "--rate",
    }  # fmt: skip
    for name in TrainSettings.__dataclass_fields__:
        assert other.get(name, "--" + name.replace("_", "-")) in shown, name
    arguments = cli.build_parser().parse_args(
        ["x", "-o", "y", "--freeze", "vision,projector", "--rate", "expert=2", "--lora", "backbone=4", "--float32"]
    )
    assert flags.given_settings(arguments) == {
        "freeze": ("vision", "projector"), "rates": (("expert", 2.0),), "lora": (("backbone", 4),), "bfloat16": False,
    }  # fmt: skip


def command(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "ki_edge.train", *map(str, arguments)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_the_command_itself(tmp_path):
    """As a process: exit status 2 and one line, no traceback."""
    with command(tmp_path / "none", "-o", tmp_path / "out") as process:
        out, errors = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert errors.startswith("ki-train: error: ") and str(tmp_path / "none") in errors and errors.count("\n") == 1


def test_sigterm_saves_and_ends_well(episodes, tmp_path):
    """A machine that is taken away: what was learnt is saved, the exit status is 0, and it says how to go on."""
    out = tmp_path / "out"
    arguments = [*SHORT, "--steps", "100000"]
    with command(episodes, "-o", out, *arguments) as process:
        log = out / "training" / "log.jsonl"
        while not (log.exists() and log.read_text().count("\n") >= 2):
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"stopped; go on with: ki-train --resume -o {out}" in said
    step = int((out / "last").resolve().name.removeprefix("step_"))
    assert f"after {step} of 100000 steps" in said
    rows = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert rows[-1] == step


def test_sigterm_before_the_first_step_leaves_nothing(episodes, tmp_path):
    out = tmp_path / "out"
    with command(episodes, "-o", out, *SHORT) as process:
        while not (out / ".lock").exists():
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode in (143, 0), errors  # a machine that is slow to be told may have taken its two steps
    assert process.returncode == 0 or (not out.exists() and "interrupted" in errors)
