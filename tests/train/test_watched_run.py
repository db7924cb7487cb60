"""A real run with everything that watches it: evaluation, page, TensorBoard; and the probe of its checkpoint."""

import json

import pytest

from ki_edge.train import probe
from ki_edge.train.record import Origin
from ki_edge.train.run import Request, open_run
from ki_edge.train.watching.log import read_rows

SETTINGS = {
    "steps": 4, "batch": 4, "warmup": 1, "save_every": 2, "log_every": 1, "eval_every": 2, "held_out": 0.3,
    "flow_draws": 2, "bfloat16": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(record_dataset, write_text_set, small_config, tmp_path_factory):
    """(folder of the run, its datasets, lines that it told)."""
    root, told = tmp_path_factory.mktemp("watched"), []
    lengths = (12,) * 8  # enough for a codec that spells the episodes that are held out
    places = [
        record_dataset(root / name, size=8, seed=seed, lengths=lengths) for seed, name in enumerate(("first", "second"))
    ]
    datasets = tuple(map(str, places))
    mixture = (*datasets, str(write_text_set(root / "texts", size=8)))
    origin = Origin(datasets=tuple(f"{one}:1" for one in mixture), horizon=4)
    request = Request(root / "out", origin, SETTINGS, config=small_config, workers=0, trackers=("tensorboard",))
    trainer = open_run(request, told.append)
    try:
        for _ in trainer.run():
            pass
    finally:
        trainer.close()
    return root / "out", datasets, told


def test_the_log_has_each_step_once_and_evaluations_of_their_own(run):
    rows = read_rows(run[0] / "training" / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all({"flow", "samples_per_s", "grad_norm", "rate"} <= row.keys() for row in rows)
    assert {"flow/first", "flow/second"} <= {name for row in rows for name in row}
    found = read_rows(run[0] / "training" / "evaluation.jsonl")
    assert [row["step"] for row in found] == [2, 4]
    names = {name for row in rows for name in row}
    assert "text/texts" in names and "fast/texts" not in names
    for name in ("text", "text_accuracy", "text/texts", "not_spelled"):
        assert f"held_out_{name}" in found[-1], name
    for name in ("flow", "fast", "fast_accuracy", "action_error_normalised", "action_error/first", "fast_undecodable"):
        assert f"held_out_{name}" in found[-1], name


def test_the_page_shows_it(run):
    html = (run[0] / "training" / "train.html").read_text(encoding="utf-8")
    for words in ("Step 4", "Losses by dataset", "Evaluation on held-out episodes", "Predictions", "data: first"):
        assert words in html, words
    assert list((run[0] / "training" / "tensorboard").iterdir())


def test_its_checkpoint_has_learnt_too_little_to_be_told(run, capsys):
    status = probe.main([str(run[0] / "last"), run[1][0], "--samples", "16", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == 3 and found["leaks"] is None and "has not learnt such data" in found["doubt"]
    assert 8 <= found["samples"] <= 16


@pytest.mark.parametrize("flags", [["--samples", "0"], ["--samples", "2", "--batch", "2"]])
def test_too_little_to_probe_is_one_line(run, flags, capsys):
    assert probe.main([str(run[0] / "last"), run[1][0], *flags]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("ki_edge.train.probe: error: ")


def test_what_is_no_checkpoint_is_one_line(tmp_path, capsys):
    assert probe.main([str(tmp_path), str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
