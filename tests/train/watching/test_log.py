"""The log of a run: no step twice, no half line, no NaN, whatever ended the run before."""

import json
import math
import os

import numpy as np
import pytest

from ki_edge.errors import CheckpointError
from ki_edge.train.watching.log import EVALUATIONS, LOG, MOST_TASKS, RunLog, by_group, column, read_rows


def steps(rows):
    return [row["step"] for row in rows]


def test_rows_are_lines_of_valid_json_without_nan(tmp_path):
    log = RunLog(tmp_path)
    log.append({"step": 20, "flow": math.nan, "fast": np.float32(0.5), "by": {"a": [math.inf, 1]}})
    text = (tmp_path / LOG).read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the log"))
    assert row == {"step": 20, "flow": None, "fast": 0.5, "by": {"a": [None, 1]}}
    assert text.endswith("\n") and text.count("\n") == 1
    assert np.isnan(column(log.rows(), "flow")).all() and column(log.rows(), "fast").tolist() == [0.5]


def test_a_resumed_run_logs_no_step_twice(tmp_path):
    log = RunLog(tmp_path)
    for step in (20, 40, 60, 80):
        log.append({"step": step, "flow": step / 100})
    log.append_evaluation({"step": 50, "held_out_flow": 1.0})
    log.append_evaluation({"step": 75, "held_out_flow": 2.0})
    resumed = RunLog(tmp_path, 50)
    assert steps(resumed.rows()) == [20, 40] and steps(resumed.evaluations()) == [50] and resumed.dropped == 0
    for step in (60, 80, 100):
        resumed.append({"step": step, "flow": 0.0})
    written = [json.loads(line)["step"] for line in (tmp_path / LOG).read_text().splitlines()]
    assert written == [20, 40, 60, 80, 100]


def test_a_new_run_begins_with_an_empty_log(tmp_path):
    RunLog(tmp_path).append({"step": 20})
    assert RunLog(tmp_path).rows() == []


@pytest.mark.parametrize("torn", [b'{"step": 60, "fl', b'{"step": 60, "flow": 0.1}', b"\x00\x00\x00", b"[1]\n", b"\n"])
def test_what_a_kill_left_half_written_is_dropped(tmp_path, torn):
    """Also a whole last line without its end: the next row must not continue it."""
    RunLog(tmp_path).append({"step": 40, "flow": 0.5})
    with (tmp_path / LOG).open("ab") as file:
        file.write(torn)
    log = RunLog(tmp_path, 60)
    assert log.dropped == 1
    log.append({"step": 60, "flow": 0.25})
    assert [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()] == [
        {"step": 40, "flow": 0.5},
        {"step": 60, "flow": 0.25},
    ]


def test_a_full_disk_leaves_no_half_line(tmp_path, largest_file):
    log = RunLog(tmp_path)
    log.append({"step": 20, "flow": 0.5})
    before = (tmp_path / LOG).read_bytes()
    with (
        largest_file(len(before) + 10),
        pytest.raises(CheckpointError, match=r"cannot write .*log\.jsonl: File too large"),
    ):
        log.append({"step": 40, "flow": 0.25, "padding": "x" * 100})
    assert (tmp_path / LOG).read_bytes() == before
    log.append({"step": 40, "flow": 0.25})
    assert steps(log.rows()) == [20, 40]


def test_what_is_no_file_is_refused_in_one_line(tmp_path):
    os.mkfifo(tmp_path / EVALUATIONS)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        RunLog(tmp_path)
    assert read_rows(tmp_path / "none.jsonl") == []


def test_means_by_dataset_and_task():
    nan = math.nan
    found = by_group(
        [1.0, 3.0, nan, 5.0, nan], [2.0, nan, 4.0, nan, 7.0], [0, 0, 1, 1, 2], [0, 1, 2, 1, 2],
        [True, True, True, True, False],
        names=["lerobot/a", "b", "questions"], tasks=["lift", "fold <b>", "asked"],
    )  # fmt: skip
    assert found == {
        "flow/lerobot/a": 2.0, "fast/lerobot/a": 2.0, "flow/b": 5.0, "fast/b": 4.0, "text/questions": 7.0,
        "task/lift": 1.0, "task/fold <b>": 4.0,
    }  # fmt: skip


def test_one_dataset_of_one_task_adds_no_columns():
    assert by_group([1.0], [2.0], [0], [0], [True], names=["a"], tasks=["lift"]) == {}


def test_the_number_of_tasks_in_a_row_is_bounded():
    count = 500
    found = by_group(
        np.ones(count),
        np.ones(count),
        np.zeros(count),
        np.arange(count),
        np.ones(count),
        names=["a"],
        tasks=["x" * 200] * count,
    )
    assert len(found) == MOST_TASKS and all(len(name) <= 75 for name in found)
