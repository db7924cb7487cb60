"""Training for a trained prefix: what is drawn, what the contract records, and runs from before there was one."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ki_edge.errors import ArgumentError
from ki_edge.model.checkpoint import write_safetensors
from ki_edge.policy.contract import PolicyContract
from ki_edge.train.loop import FACTS, STATE_FILE, read_facts
from ki_edge.train.run import open_trainer, recorded_settings
from ki_edge.train.step.settings import TrainSettings

MOST = 2
QUICK = TrainSettings(steps=3, batch=8, warmup=2, save_every=3, log_every=1, flow_draws=5)
GIVEN = replace(QUICK, rtc_max_delay=MOST)


@pytest.fixture
def train(demonstrations, small_config, tmp_path):
    """train(name, settings, stop=None, **options) -> (trainer, its records)."""

    def run(name, settings=GIVEN, *, stop=None, **options):
        trainer = open_trainer(demonstrations, tmp_path / name, small_config, settings, **options)
        records = [{**record, "samples_per_s": 0} for record in islice(trainer.run(), stop)]
        return trainer, records

    return run


def test_delays_are_drawn_from_0_to_the_most(train, monkeypatch):
    """Each as often as the others; of everything else the same numbers are drawn as without."""
    trainer, _ = train("given", stop=0)
    seen = {True: [], False: []}
    compute = trainer.model.compute_loss

    def watched(*arguments, delay, **more):
        seen[delay is not None].append((delay, more))
        return compute(*arguments, delay=delay, **more)

    monkeypatch.setattr(trainer.model, "compute_loss", watched)
    for step in range(60):
        trainer._losses(np.random.default_rng([0, step]))
    drawn = torch.cat([delay for delay, _ in seen[True]]).numpy()
    counts = np.bincount(drawn)
    assert len(counts) == MOST + 1 and drawn.size == 60 * 6 * 5
    assert np.abs(counts / drawn.size - 1 / 3).max() < 0.05  # 3.6 standard deviations
    trainer.settings = QUICK
    trainer._losses(np.random.default_rng([0, 0]))
    (_, without), (_, given) = seen[False][0], seen[True][0]
    assert all(torch.equal(without[name], given[name]) for name in ("noise", "time"))


def test_the_loss_of_a_step_is_a_mean_over_what_is_learned(train, monkeypatch):
    """Were what was given counted too, zeros would make it smaller."""
    trainer, _ = train("given", stop=0)
    compute, seen = trainer.model.compute_loss, []

    def watched(*arguments, **more):
        seen.append(compute(*arguments, **more))
        return seen[-1]

    monkeypatch.setattr(trainer.model, "compute_loss", watched)
    found = trainer._losses(np.random.default_rng(0))["flow"].item()
    (losses,) = seen
    learned = losses.flow.detach().numpy()[losses.free.numpy()][:, :3]  # the robot's numbers
    assert not losses.free.all() and found == pytest.approx(learned.mean(), rel=1e-5)


def test_the_checkpoint_says_what_it_was_trained_for(train, tmp_path):
    _, records = train("given")
    assert len(records) == 3 and all(np.isfinite(record["flow"]) for record in records)
    contract = PolicyContract.load(tmp_path / "given" / "contract.json")
    assert (contract.rtc_max_delay, contract.rtc_distribution) == (MOST, "uniform")
    train("plain", QUICK)
    assert "rtc" not in (tmp_path / "plain" / "contract.json").read_text()


def test_resumed_runs_take_the_same_steps(train, tmp_path):
    _, whole = train("whole")
    train("parts", replace(GIVEN, save_every=1), stop=2)
    _, rest = train("parts", resume=True)
    assert rest == whole[1:]  # the second step was not saved
    with pytest.raises(ArgumentError, match="rtc_max_delay: the run has 2, now 1"):
        train("whole", replace(GIVEN, rtc_max_delay=1), resume=True)
    with pytest.raises(ArgumentError, match="rtc_max_delay: the run has 2, now 0"):
        train("whole", QUICK, resume=True)


def test_a_run_from_before_there_was_one_goes_on(train, tmp_path):
    """Its recorded facts name neither the setting nor the geometry's way of continuing chunks."""
    train("run", QUICK)
    path = tmp_path / "run" / "training" / STATE_FILE
    step, facts = read_facts(path)
    assert [name for name in facts if "rtc" in name] == ["settings.rtc_max_delay", "settings.rtc_offset"]
    old = {name: value for name, value in facts.items() if "rtc" not in name}
    write_safetensors(load_file(path), path, {"step": str(step), FACTS: json.dumps(old)})
    assert recorded_settings(tmp_path / "run") == QUICK
    assert train("run", QUICK, resume=True)[0].step == 3
    with pytest.raises(ArgumentError, match="rtc_max_delay: the run has 0, now 2"):
        train("run", GIVEN, resume=True)
    train("given")
    assert recorded_settings(tmp_path / "given") == GIVEN


@pytest.mark.parametrize(
    ("most", "message"),
    [
        (-1, "rtc_max_delay -1: expected 0 or more"),
        (4, "rtc_max_delay 4: the demonstrations' chunks have 4 actions, at least one of which must be left to learn"),
        (10**9, "rtc_max_delay 1000000000: the demonstrations' chunks have 4"),
    ],
)
def test_delays_that_leave_nothing_to_learn(train, tmp_path, most, message):
    with pytest.raises(ArgumentError, match=message):
        train("run", replace(QUICK, rtc_max_delay=most))
    assert not (tmp_path / "run").exists()
