"""A run that goes on with something else: what its weights allow, and one line for what they do not."""

import json
from dataclasses import replace

import pytest

from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.train.record import Origin
from ki_edge.train.run import Request, open_run

SETTINGS = {"steps": 2, "batch": 4, "warmup": 1, "save_every": 2, "log_every": 1, "flow_draws": 1, "bfloat16": False}
OTHER_TASKS = ("Something quite different with many new words", "another sentence altogether")


@pytest.fixture(scope="module")
def places(record_dataset, tmp_path_factory):
    root = tmp_path_factory.mktemp("changes")
    record_dataset(root / "first", size=8)
    record_dataset(root / "other", size=8, tasks=OTHER_TASKS)
    return root


@pytest.fixture
def run(places, small_config, tmp_path):
    def train(name="first", horizon=4, **options):
        origin = Origin(datasets=(str(places / name),), horizon=horizon)
        given = {"steps": 3} if options else SETTINGS
        trainer = open_run(Request(tmp_path / "out", origin, given, config=small_config, workers=0, **options))
        try:
            return [row["step"] for row in trainer.run()]
        finally:
            trainer.close()

    return train


def test_another_horizon(run, tmp_path):
    """No weight knows it."""
    run()
    with pytest.raises(ArgumentError, match="horizon: the run has 4, now 6"):
        run(horizon=6, resume=True)
    assert run(horizon=6, resume=True, accept_changes=True) == [3]
    assert json.loads((tmp_path / "out" / "last" / "contract.json").read_text())["action_horizon"] == 6


def test_another_vocabulary_does_not_fit(run, tmp_path):
    """Its embedding has other rows: one line, which says what to do, and the run is as it was."""
    run()
    before = (tmp_path / "out" / "training" / "run.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"model.vocab_size: .*start another run from its weights, with --init"):
        run("other", resume=True, accept_changes=True)
    assert (tmp_path / "out" / "training" / "run.json").read_bytes() == before
    assert (tmp_path / "out" / "last").readlink().name == "step_000002"


def test_settings_that_have_another_state_do_not_fit(run, places, small_config, tmp_path):
    run()
    origin = Origin(datasets=(str(places / "first"),), horizon=4)
    request = Request(tmp_path / "out", origin, {"lora": (("backbone", 2),)}, config=small_config, workers=0)
    with pytest.raises(CheckpointError, match=r"lora: the run has .* with --init"):
        open_run(replace(request, resume=True, accept_changes=True))
