"""The judge and the watchers that the loop calls."""

import pytest

from ki_edge.train.watching.log import RunLog
from ki_edge.train.watching.page import PAGE
from ki_edge.train.watching.robot import Trial
from ki_edge.train.watching.trackers import Tracking
from ki_edge.train.watching.watchers import Examiner, PageWatcher, TrackingWatcher


@pytest.fixture
def told():
    return []


def test_an_evaluation_leaves_its_predictions_for_the_page(toy, toy_data, tmp_path, told):
    log = RunLog(tmp_path)
    log.append({"step": 5, "flow": 1.0})
    examiner = Examiner(tmp_path, tell=told.append, num_steps=2)
    values = examiner.evaluate(toy.ToyEngine(toy.toy_model()), toy_data)
    assert values["held_out_flow"] > 0
    assert examiner.try_out(tmp_path / "step_5", 5) == {}
    watcher = PageWatcher(tmp_path, tell=told.append)
    watcher.logged({"step": 5})
    watcher.saved(5, tmp_path)
    html = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "Held-out chunks under the moving average of step 5" in html and "two, episode 1: fold the" in html
    assert "fold the &lt;b&gt;towel&lt;/b&gt;" in html and told == []


def test_a_robot_that_fails_is_told_and_scores_nothing(tmp_path, told):
    examiner = Examiner(tmp_path, Trial("gym:FetchReach-v4", seconds=0.1), tell=told.append)
    row = examiner.try_out(tmp_path / "none", 500)
    assert len(told) == 2 and told[0].startswith("step 500: exporting it for 20 episodes on gym:FetchReach-v4")
    assert told[1].startswith("step 500: no success was measured: ki_export.cli took longer")
    assert examiner.score({"step": 500, "held_out_flow": 0.1, **row}) is None


def test_a_folder_that_cannot_be_written_is_told(tmp_path, told):
    (tmp_path / "training").write_text("a file")
    examiner = Examiner(tmp_path / "training", Trial("gym:FetchReach-v4"), tell=told.append)
    assert "cannot write" in examiner.try_out(tmp_path, 500)["robot_error"] and len(told) == 2
    PageWatcher(tmp_path / "training", tell=told.append).saved(500, tmp_path)
    assert len(told) == 3 and "cannot write" in told[2]


def test_a_robots_evaluation_that_is_stopped_has_no_result(tmp_path, told):
    examiner = Examiner(tmp_path, Trial("gym:FetchReach-v4"), tell=told.append)
    examiner.stop()
    assert examiner.try_out(tmp_path / "none", 500) is None and "--resume makes it up" in told[-1]


def test_success_decides_and_the_held_out_error_among_equals(tmp_path, told):
    def row(success, error):
        return {"robot_success": success, "held_out_action_error_normalised": error}

    examiner = Examiner(tmp_path, Trial("gym:FetchReach-v4"), tell=told.append)
    scores = [examiner.score(row(*values)) for values in ((0.9, 0.01), (0.95, 0.5), (0.95, 0.1), (1.0, 9.0))]
    assert scores == sorted(scores) and len(set(scores)) == 4
    assert examiner.score({"robot_success": 0.5}) == 0.5


def test_without_a_robot_the_held_out_error_decides(tmp_path, told):
    examiner = Examiner(tmp_path, tell=told.append)
    assert examiner.score({"held_out_action_error_normalised": 0.2, "held_out_flow": 9.0}) == -0.2
    assert examiner.score({"held_out_flow": 0.3}) == -0.3 and examiner.score({"step": 5}) is None


def test_trackers_get_rows_and_evaluations(tmp_path, told):
    rows = []
    tracking = Tracking((), tmp_path, {}, tell=told.append)
    tracking.log = rows.append
    watcher = TrackingWatcher(tracking)
    watcher.logged({"step": 20})
    watcher.evaluated({"step": 500})
    watcher.saved(500, tmp_path)
    assert rows == [{"step": 20}, {"step": 500}]
