"""Training runs end to end: learning, resuming, repeating, saving, and what is refused."""

import json
import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from ki_edge.errors import ArgumentError, DatasetError, DivergedError
from ki_edge.model import load_model
from ki_edge.train.centering import CenteredPatches
from ki_edge.train.parallel import engine as engines
from ki_edge.train.record import Origin
from ki_edge.train.run import Request, open_run
from ki_edge.train.step.training_data import Share

QUICK = {"steps": 6, "batch": 8, "warmup": 2, "save_every": 3, "log_every": 1, "flow_draws": 2, "bfloat16": False}


@pytest.fixture(scope="module")
def places(record_dataset, write_text_set, tmp_path_factory):
    """Two datasets and a text set, of the small model's picture size."""
    root = tmp_path_factory.mktemp("run")
    record_dataset(root / "first", size=8)
    record_dataset(root / "second", size=8, seed=1, lengths=(5, 6))
    write_text_set(root / "texts", size=8)
    return root


@pytest.fixture
def train(places, small_config, tmp_path):
    """train(name, settings, stop=None, datasets=("first",), **options) -> (Trainer, rows), closed."""

    def run(name, settings=None, *, stop=None, datasets=("first",), watch=lambda trainer: None, **options):
        given = {**QUICK, **(settings or {})} if not options.get("resume") else settings or {}
        origin = Origin(
            datasets=tuple(str(places / part) for part in datasets), horizon=4
        ) if datasets else Origin()  # fmt: skip
        request = Request(tmp_path / name, origin, given, config=small_config, workers=0, **options)
        trainer = open_run(request)
        try:
            watch(trainer)
            return trainer, list(islice(trainer.run(), stop))
        finally:
            trainer.close()

    return run


def state_of(trainer):
    """Everything that a run would go on with."""
    return {name: value.clone() for name, value in trainer.engine._tensors().items()}


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def losses(rows):
    return [{name: row[name] for name in ("step", "flow", "fast", "grad_norm", "rate")} for row in rows]


def logged(folder):
    return [json.loads(line) for line in (folder / "training" / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- learning


def test_training_then_inference(train, tmp_path):
    """All three losses fall, and the checkpoint on disk acts like the model in memory."""
    settings = {"steps": 80, "save_every": 80, "learning_rate": 5e-3, "ema": 0.0}
    trainer, rows = train("run", settings, datasets=("first:3", "texts:1"))
    for term in ("flow", "fast", "text"):
        first, last = (np.mean([row[term] for row in part if term in row]) for part in (rows[:8], rows[-8:]))
        assert last < 0.8 * first, term
    batch = next(trainer.data.steps(0, Share()))[0]
    observation = replace(batch.observation, fast_tokens=None, fast_mask=None)
    noise = torch.randn(8, 4, 4, generator=torch.Generator().manual_seed(0))
    loaded = load_model(tmp_path / "run" / "last")
    actions = loaded.sample_actions(observation, noise=noise)
    assert torch.isfinite(actions).all()
    # ema 0: the saved average is the model; its centred patches were folded into an ordinary embedding
    expected = trainer.engine.model.eval().sample_actions(observation, noise=noise)
    torch.testing.assert_close(expected, actions, rtol=0, atol=1e-4)


def test_a_run_repeats_itself(train):
    first, second = (train(name) for name in ("one", "two"))
    assert losses(first[1]) == losses(second[1])
    assert same(state_of(first[0]), state_of(second[0]))
    other = train("three", {"seed": 1})
    assert losses(other[1]) != losses(first[1])


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_a_resumed_run_takes_the_same_steps(train, tmp_path, stop):
    """Stopped anywhere and gone on with from the last save: log and state bit for bit."""
    whole, rows = train("whole")
    train("cut", stop=stop, watch=lambda trainer: None)
    resumed, _ = train("cut", resume=stop > 3, fresh=stop <= 3, settings={} if stop > 3 else None)
    assert same(state_of(whole), state_of(resumed))
    assert losses(logged(tmp_path / "cut")) == losses(rows)
    average, again = (load_model(tmp_path / name / "last").state_dict() for name in ("whole", "cut"))
    assert same(average, again)


def test_a_run_that_is_asked_to_stop_saves_and_is_gone_on_with(train, tmp_path):
    whole, rows = train("whole")

    def stop_at_two(trainer):
        step = trainer.engine.train_step

        def taken(*arguments):
            result = step(*arguments)
            if trainer.step == 2:
                trainer.stop()
            return result

        trainer.engine.train_step = taken

    stopped, _ = train("stopped", watch=stop_at_two)
    assert stopped.step == 2 and (tmp_path / "stopped" / "step_000002").is_dir()
    resumed, _ = train("stopped", {}, resume=True)
    assert same(state_of(whole), state_of(resumed))
    assert losses(logged(tmp_path / "stopped")) == losses(rows)


def test_rows_tell_of_each_dataset_and_task(train):
    _, rows = train("run", {"batch": 16}, datasets=("first:1", "second:1"))
    row = rows[0]
    assert {"flow/first", "flow/second", "task/Reach the red target", "samples_per_s", "waited"} <= row.keys()
    assert min(row["flow/first"], row["flow/second"]) <= row["flow"] <= max(row["flow/first"], row["flow/second"])


def test_evaluation_chooses_the_best(train, tmp_path):
    settings = {"steps": 6, "held_out": 0.3, "eval_every": 2, "save_every": 100, "keep": "last:1,best:1"}
    trainer, rows = train("run", settings)
    found = [row for row in rows if "held_out_flow" in row]
    assert [row["step"] for row in found] == [2, 4, 6]
    best = min(found, key=lambda row: row["held_out_action_error_normalised"])["step"]
    assert trainer.folder.best.name == f"step_{best:06d}"
    kept = {path.name for path in (tmp_path / "run").glob("step_*")}
    assert kept == {f"step_{best:06d}", "step_000006"}
    assert "held_out_flow" not in (tmp_path / "run" / "training" / "log.jsonl").read_text()
    assert (tmp_path / "run" / "training" / "train.html").stat().st_size > 10_000


def test_average_and_rate(train):
    """The checkpoint lags behind the weights; the rate warms up and falls."""
    _, rows = train("run", {"steps": 20, "warmup": 5, "save_every": 20, "log_every": 1})
    rates = [row["rate"] for row in rows]
    assert rates[:5] == pytest.approx([1e-3 * (i + 1) / 5 for i in range(5)])
    assert all(np.diff(rates[5:]) < 0)


# ---------------------------------------------------------------------- what is wrong


def test_a_loss_that_is_not_finite_names_its_samples_and_keeps_what_was_learnt(train, tmp_path, monkeypatch):
    """Weights of the step before are those of the last checkpoint; the message has dataset, episode and frame."""
    seen = {}

    def poison(trainer):
        step = trainer.engine.train_step

        def taken(batches, rate):
            if trainer.step == 4:
                bad = batches[0].actions.clone()
                bad[2] = math.nan
                batches = [replace(batches[0], actions=bad)]
                seen["state"], seen["row"] = state_of(trainer), int(batches[0].row[2])
            try:
                return step(batches, rate)
            finally:
                seen["after"] = state_of(trainer)

        trainer.engine.train_step = taken

    with pytest.raises(DivergedError) as caught:
        train("run", watch=poison)
    message = str(caught.value)
    assert "training diverged at step 4: the loss is not finite" in message
    assert f"{tmp_path.parent}" in message or "first, episode " in message
    assert "frame " in message and "step_000003" in message and "\n" not in message
    assert same(seen["state"], seen["after"])
    assert (tmp_path / "run" / "last" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "options", "error", "message"),
    [
        ({"batch": 0}, {}, ArgumentError, "batch 0: expected at least 1"),
        ({"rtc_max_delay": 4}, {}, ArgumentError, "rtc_max_delay 4: chunks have 4 actions"),
        ({"accumulate": 3}, {}, ArgumentError, "batch 8"),
        ({"freeze": ("wheels",)}, {}, ArgumentError, "wheels: no such group"),
        ({}, {"datasets": ()}, ArgumentError, "no dataset"),
        ({}, {"datasets": ("nothing",)}, DatasetError, "nothing: no such file or folder"),
        ({}, {"datasets": ("texts",)}, ArgumentError, "no dataset of actions"),
        ({}, {"resume": True}, ArgumentError, "holds no training run to resume"),
        ({}, {"trackers": ("paper",)}, ArgumentError, "paper"),
        ({}, {"strategy": "magic"}, ArgumentError, "strategy magic"),
    ],
)
def test_what_no_run_can_have(train, tmp_path, settings, options, error, message):
    with pytest.raises(error) as caught:
        train("run", settings, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("step_*")) if (tmp_path / "run").exists() else True


def test_a_folder_with_a_run_is_not_overwritten(train, tmp_path):
    train("run")
    before = (tmp_path / "run" / "last" / "model.safetensors").read_bytes()
    with pytest.raises(ArgumentError, match="go on with --resume, or start over with --fresh"):
        train("run")
    with pytest.raises(ArgumentError, match="batch 0"):  # known to be wrong before anything is removed
        train("run", {"batch": 0}, fresh=True)
    assert (tmp_path / "run" / "last" / "model.safetensors").read_bytes() == before
    train("run", {"seed": 5}, fresh=True)
    assert (tmp_path / "run" / "last" / "model.safetensors").read_bytes() != before


def test_two_processes_on_one_output(train, tmp_path):
    def again(trainer):
        with pytest.raises(ArgumentError, match="another process"):
            train("run")

    train("run", watch=again)
    assert engines  # the first run was not disturbed


def test_precision_is_what_the_device_has(places, small_config, tmp_path, monkeypatch):
    """A CPU without instructions for bfloat16 takes forty times as long in it; what is asked for is done."""
    for number, (has, given, found) in enumerate(
        [(True, {}, True), (False, {}, False), (False, {"bfloat16": True}, True)]
    ):
        monkeypatch.setattr("ki_edge.train.run.has_bfloat16", lambda device, has=has: has)
        settings = {**{name: value for name, value in QUICK.items() if name != "bfloat16"}, **given}
        origin = Origin(datasets=(str(places / "first"),), horizon=4)
        trainer = open_run(Request(tmp_path / str(number), origin, settings, config=small_config, workers=0))
        trainer.close()
        assert trainer.settings.bfloat16 is found


def test_other_data_leave_the_model_as_it_was(train):
    """The mean picture belongs to the weights: it is that of the first data, also where a run goes on with others."""
    first, _ = train("run", {"steps": 3})
    assert CenteredPatches.center_of(first.engine.model).abs().sum() > 0
    again, _ = train("run", {"steps": 3}, datasets=("second",), resume=True, accept_changes=True)
    assert torch.equal(CenteredPatches.center_of(again.engine.model), CenteredPatches.center_of(first.engine.model))
    saved = dict(first.engine.averaged_tensors())
    assert same(saved, dict(again.engine.averaged_tensors()))
