"""Evaluations that a kill or a stop came before: they are made up when the run goes on."""

import json

import pytest

from ki_edge.errors import CheckpointError
from ki_edge.train.record import Origin
from ki_edge.train.run import Request, open_run

SETTINGS = {
    "steps": 6, "batch": 4, "warmup": 2, "save_every": 3, "log_every": 1, "flow_draws": 1, "bfloat16": False,
    "held_out": 0.3, "eval_every": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(record_dataset, tmp_path_factory):
    return record_dataset(tmp_path_factory.mktemp("made_up") / "dataset", size=8)


@pytest.fixture
def train(dataset, small_config, tmp_path):
    """train(name, watch=..., **options) -> Trainer, after it has run; closed."""

    def run(name, watch=lambda trainer: None, **options):
        given = {} if options.get("resume") else SETTINGS
        origin = Origin(datasets=(str(dataset),), horizon=4)
        trainer = open_run(Request(tmp_path / name, origin, given, config=small_config, workers=0, **options))
        try:
            watch(trainer)
            for _ in trainer.run():
                pass
        finally:
            trainer.close()
        return trainer

    return run


def evaluations(folder):
    path = folder / "training" / "evaluation.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Killed(BaseException):
    """As if the process ended here."""


@pytest.mark.parametrize("at", ["evaluate", "try_out"])
def test_a_kill_before_the_result_is_written(train, tmp_path, at):
    train("whole")

    def kill(trainer):
        judge = trainer.judge

        def ended(*_):
            if trainer.step == 4:
                raise Killed
            return plain(*_)

        plain = getattr(judge, at)
        setattr(judge, at, ended)

    with pytest.raises(Killed):
        train("cut", kill)
    assert [row["step"] for row in evaluations(tmp_path / "cut")] == [2]
    assert (tmp_path / "cut" / "step_000004").is_dir()  # what was learnt is saved before it is judged
    train("cut", resume=True)
    assert evaluations(tmp_path / "cut") == evaluations(tmp_path / "whole")
    assert [row["step"] for row in evaluations(tmp_path / "cut")] == [2, 4, 6]


def test_the_last_one_of_a_finished_run(train, tmp_path):
    train("run")
    out = tmp_path / "run"
    whole, best = evaluations(out), (out / "best").readlink()
    path = out / "training" / "evaluation.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    (out / "training" / "scores.json").write_text("{}")
    train("run", resume=True)
    assert evaluations(out) == whole
    assert (out / "best").exists() and best.name.startswith("step_")
    train("run", resume=True)
    assert evaluations(out) == whole  # and not twice


@pytest.mark.parametrize("when", ["save", "robot"])
def test_a_run_that_is_asked_to_stop_does_not_wait_for_an_evaluation(train, tmp_path, when):
    """SIGTERM comes while a checkpoint is saved, or while the robot is at work: saved it is already."""

    def stop(trainer):
        def saved(*arguments):
            if trainer.step == 4:
                trainer.stop()
            return None if when == "robot" and trainer.step == 4 else plain(*arguments)

        if when == "save":
            plain, trainer.folder.publish = trainer.folder.publish, saved
        else:
            plain, trainer.judge.try_out = trainer.judge.try_out, saved

    stopped = train("cut", stop)
    assert stopped.step == 4 and stopped.owes
    assert [row["step"] for row in evaluations(tmp_path / "cut")] == [2]
    assert not train("cut", resume=True).owes
    assert [row["step"] for row in evaluations(tmp_path / "cut")] == [2, 4, 6]


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(train, tmp_path, largest_file):
    """And once there is room the run ends as if nothing had happened."""

    def fill(trainer):
        def publish(*arguments):
            with largest_file(5_000 if trainer.step == 4 else 1 << 30):
                return plain(*arguments)

        plain, trainer.folder.publish = trainer.folder.publish, publish

    with pytest.raises(CheckpointError, match=r"cannot be written|cannot write"):
        train("cut", fill)
    out = tmp_path / "cut"
    assert (out / "last").readlink().name == "step_000003" and not (out / "step_000004").exists()
    assert [row["step"] for row in evaluations(out)] == [2]
    train("cut", resume=True)
    train("whole")
    assert evaluations(out) == evaluations(tmp_path / "whole")
    assert [path.name for path in out.glob(".step*")] == []
