"""What a resumed run must be made of, and files that are whole whenever a run is killed."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.train.run import open_trainer, recorded_settings
from ki_edge.train.step.settings import TrainSettings

QUICK = TrainSettings(steps=4, batch=8, warmup=2, save_every=2, log_every=1, flow_draws=1)


@pytest.fixture
def run(record, small_config, tmp_path):
    """run(settings=QUICK, **options) -> the trainer after its run; over demonstrations of its own."""
    demonstrations = record(tmp_path / "demonstrations")

    def run(settings=QUICK, config=small_config, **options):
        trainer = open_trainer(demonstrations, tmp_path / "run", config, settings, **options)
        list(trainer.run())
        return trainer

    return run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 5}, "run cannot be resumed: steps: the run has 4, now 5. Resume with what it was started with"),
        (
            {"learning_rate": 1e-4, "batch": 4},
            "batch: the run has 8, now 4; learning_rate: the run has 0.001, now",
        ),
        ({"knowledge_insulation": False}, "knowledge_insulation: the run has True, now False"),
        ({"seed": 7, "ema": 0.5, "clip": 2.0, "pointing": 0.5, "warmup": 1}, " and 1 more"),
    ],
)
def test_other_settings_are_refused_by_name(run, tmp_path, changes, message):
    run()
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(ArgumentError) as caught:
        run(replace(QUICK, **changes), resume=True)
    assert message in str(caught.value)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_how_often_a_run_is_saved_may_change(run):
    run()
    assert run(replace(QUICK, save_every=1, log_every=3), resume=True).step == 4


def test_other_demonstrations_are_refused_by_name(run, tmp_path):
    run()
    folder = tmp_path / "demonstrations"
    state = np.load(folder / "state.npy")
    np.save(folder / "state.npy", state[::-1].copy())  # the same statistics, other pairs
    with pytest.raises(ArgumentError, match=r"state\.npy of the demonstrations has other contents"):
        run(resume=True)
    np.save(folder / "state.npy", state)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "control_hz": 30}))
    with pytest.raises(ArgumentError, match="control_hz of the demonstrations: the run has 25, now 30"):
        run(resume=True)
    (folder / "meta.json").write_text(json.dumps(meta))
    assert run(resume=True).step == 4


def test_another_model_is_refused_by_name(run, small_config):
    run()
    deeper = replace(small_config, vision=replace(small_config.vision, mlp_dim=20))
    with pytest.raises(ArgumentError, match=r"vision\.mlp_dim of the model: the run has 16, now 20"):
        run(config=deeper, resume=True)


def test_other_starting_weights_are_refused(run, tmp_path):
    run()
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    with pytest.raises(ArgumentError, match="--init: the run started from other weights"):
        run(resume=True, init=tmp_path / "other")


def test_a_finished_run_writes_its_missing_checkpoint(run, tmp_path):
    run()
    weights = tmp_path / "run" / "model.safetensors"
    before = load_file(weights)  # its metadata come in any order
    for name in ("model.safetensors", "config.json", "contract.json", "assets/norm_stats.json"):
        (tmp_path / "run" / name).unlink()
    run(resume=True)
    after = load_file(weights)
    assert after.keys() == before.keys() and all(np.array_equal(after[name], before[name]) for name in before)
    assert (tmp_path / "run" / "config.json").is_file() and (tmp_path / "run" / "assets/norm_stats.json").is_file()


def test_a_damaged_state_is_not_resumed(run, tmp_path):
    run()
    state = tmp_path / "run" / "training" / "state.safetensors"
    good = state.read_bytes()
    state.write_bytes(good[:-10])
    with pytest.raises(CheckpointError, match="is truncated"):
        run(resume=True)
    state.write_bytes(good)
    with safe_open(state, "numpy") as file:
        metadata = file.metadata()
    arrays = load_file(state)
    for change in ({"step": "-1"}, {"step": "9" * 5000}, {"run": "[]"}, {"run": "{"}):
        save_file(arrays, state, metadata={**metadata, **change})
        with pytest.raises(CheckpointError):
            run(resume=True)
    save_file(arrays, state, metadata={"step": "4"})
    with pytest.raises(CheckpointError, match="does not say what its run was made of: start over with --fresh"):
        run(resume=True)
    name = next(name for name in arrays if name.startswith("average."))
    save_file({key: value for key, value in arrays.items() if key != name}, state, metadata=metadata)
    with pytest.raises(CheckpointError, match="does not fit this model: the file was changed"):
        run(resume=True)


def test_settings_of_a_run_are_read_back(run, tmp_path):
    run()
    assert recorded_settings(tmp_path / "run") == QUICK
    with pytest.raises(ArgumentError, match="holds no training run to resume"):
        recorded_settings(tmp_path / "none")


def test_a_state_that_cannot_be_written_leaves_the_good_one(run, tmp_path, monkeypatch):
    trainer = run()
    state = tmp_path / "run" / "training" / "state.safetensors"
    before = state.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("ki_edge.model.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*state\.safetensors: No space left"):
        trainer.save()
    assert state.read_bytes() == before
    assert sorted(path.name for path in state.parent.iterdir()) == ["log.jsonl", "state.safetensors"]


def test_weights_are_never_beside_the_statistics_of_another_run(run, tmp_path, monkeypatch):
    """Killed between assets and weights: no weights at all, instead of those of the run before."""
    run()
    folder = tmp_path / "demonstrations"
    np.save(folder / "state.npy", np.load(folder / "state.npy") * 2)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ki_edge.train.loop.save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run(fresh=True)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    monkeypatch.undo()
    run(fresh=True)
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not list((tmp_path / "run").glob(".assets-*"))


SAVER = """
import sys
from pathlib import Path
from ki_edge.train.demonstrations import Demonstrations
from ki_edge.train.recipe import Recipe
from ki_edge.config import TINY
one, two = (Recipe.fit(Demonstrations.open(folder), TINY) for folder in sys.argv[1:3])
print("ready", flush=True)
while True:
    one.save_assets(Path(sys.argv[3]))
    two.save_assets(Path(sys.argv[3]))
"""


def test_assets_are_whole_whenever_a_process_is_killed(record, tmp_path):
    for seed in (0, 1):
        record(tmp_path / str(seed), size=96, seed=seed)
    whole = set()
    out = tmp_path / "out"
    for _ in range(3):
        command = [sys.executable, "-c", SAVER, str(tmp_path / "0"), str(tmp_path / "1"), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            while not (out / "contract.json").exists():  # the last of them
                assert process.poll() is None
            process.kill()
        whole.add((out / "assets" / "norm_stats.json").read_text())
        for path in (*out.glob("assets/*.json"), *out.glob("assets/fast/*.json"), out / "contract.json"):
            json.loads(path.read_text())
    assert whole
