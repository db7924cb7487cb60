"""What a resumed run must be made of."""

import json
from dataclasses import replace

import pytest

from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.planning.settings import TrainSettings
from ki_edge.train.record import Origin, RunRecord, code_facts

SETTINGS = TrainSettings(freeze=("vision",), rates=(("expert", 2.0),), lora=(("backbone", 4),))
RECORD = RunRecord(
    SETTINGS, Origin(datasets=("/a", "/b:2"), horizon=8), {"model.vocab_size": 320, "first.numbers": "ab"}
)


def test_it_is_read_as_it_was_written(tmp_path):
    RECORD.write(tmp_path)
    assert RunRecord.read(tmp_path) == RECORD
    assert not RunRecord.read(tmp_path).differences(RECORD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": replace(SETTINGS, batch=8)}, "batch: the run has 32, now 8"),
        ({"settings": replace(SETTINGS, freeze=())}, "freeze: the run has ('vision',), now ()"),
        ({"origin": replace(RECORD.origin, horizon=4)}, "horizon: the run has 8, now 4"),
        ({"facts": {**RECORD.facts, "first.numbers": "cd"}}, "first.numbers: the run has ab, now cd"),
        ({"facts": {**RECORD.facts, "new": 1}}, "new: the run has None, now 1"),
    ],
)
def test_what_differs_is_named_and_may_be_accepted(tmp_path, change, message):
    now = replace(RECORD, **change)
    with pytest.raises(ArgumentError) as caught:
        RECORD.check(now, tmp_path, accept=False)
    assert message in str(caught.value) and "--accept-changes" in str(caught.value)
    assert RECORD.check(now, tmp_path, accept=True) == [message]


def test_how_often_a_run_is_saved_and_looked_at_is_free():
    often = replace(SETTINGS, save_every=1, log_every=1, eval_every=9, keep="last:1")
    assert not RECORD.differences(replace(RECORD, settings=often))


def test_many_differences_are_counted():
    other = replace(SETTINGS, batch=1, steps=1, warmup=1, clip=2.0, seed=3, ema=0.5)
    with pytest.raises(ArgumentError, match=r" and 2 more\. Resume with"):
        RECORD.check(replace(RECORD, settings=other), "out", accept=False)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.pop("settings"),
        lambda c: c["settings"].pop("batch"),
        lambda c: c["settings"].update(batch="many"),
        lambda c: c["settings"].update(batch=True),
        lambda c: c["settings"].update(rates=[1, 2]),
        lambda c: c["settings"].update(rates=[["vision", "fast"]]),
        lambda c: c["settings"].update(lora=[["vision"]]),
        lambda c: c["settings"].update(freeze=[["vision"]]),
        lambda c: c["origin"].update(datasets=[1]),
        lambda c: c["settings"].update(more=1),
        lambda c: c["origin"].update(datasets="x"),
        lambda c: c.update(facts=[]),
        lambda c: c.update(format=1),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, damage):
    RECORD.write(tmp_path)
    path = tmp_path / "training" / "run.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        RunRecord.read(tmp_path)
    assert str(path) in str(caught.value)


def test_without_a_run_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(ArgumentError, match="holds no training run to resume"):
        RunRecord.read(tmp_path)


def test_the_code_has_a_digest():
    found = code_facts()
    assert len(found["code"]) == 16 and found == code_facts()


def test_the_robot_of_evaluations_is_remembered_and_free(tmp_path):
    tried = replace(RECORD, origin=replace(RECORD.origin, eval_robot="gym:FetchReach-v4", eval_episodes=5))
    tried.write(tmp_path)
    assert RunRecord.read(tmp_path).origin.eval_robot == "gym:FetchReach-v4"
    assert not tried.differences(RECORD)
