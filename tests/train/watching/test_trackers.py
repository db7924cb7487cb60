"""Trackers: TensorBoard for real, the others' calls by their stand-ins, and failures that end no run."""

import math
import sys
import types

import pytest

from ki_edge.errors import ArgumentError
from ki_edge.train.watching.trackers import IDENTITY, Tracking

ROW = {"step": 20, "flow": 0.5, "fast": math.nan, "flow/my data": 0.25, "name": "text", "samples_per_s": 40}


@pytest.fixture
def told():
    return []


def events(folder):
    """(tag, step) -> value of all event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {(tag, event.step): event.value for tag in found.Tags()["scalars"] for event in found.Scalars(tag)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_what_was_logged_and_no_step_twice(tmp_path, told):
    folder = tmp_path / "run" / "training"
    folder.mkdir(parents=True)
    tracking = Tracking(("tensorboard",), folder, {"steps": 100}, tell=told.append)
    tracking.log(ROW)
    tracking.log({"step": 40, "flow": 0.4})
    tracking.close()
    resumed = Tracking(("tensorboard",), folder, {"steps": 100}, step=20, tell=told.append)
    resumed.log({"step": 40, "flow": 0.3})
    resumed.close()
    assert told == []
    assert events(folder) == pytest.approx(
        {("flow", 20): 0.5, ("flow/my data", 20): 0.25, ("samples_per_s", 20): 40.0, ("flow", 40): 0.3}
    )


def stand_in(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    for key, function in functions.items():
        setattr(module, key, function)
    monkeypatch.setitem(sys.modules, name, module)


def test_trackio_goes_on_with_the_same_run_after_a_resume(tmp_path, monkeypatch, told):
    calls = []
    stand_in(
        monkeypatch, "trackio",
        init=lambda **options: calls.append(("init", options)),
        log=lambda numbers, step: calls.append(("log", numbers, step)),
        finish=lambda: calls.append(("finish",)),
    )  # fmt: skip
    for step in (0, 20):
        tracking = Tracking(("trackio",), tmp_path, {"steps": 5}, step=step, tell=told.append)
        tracking.log(ROW)
        tracking.close()
    first, second = (call[1] for call in calls if call[0] == "init")
    assert first == second and first["resume"] == "allow" and first["config"] == {"steps": 5}
    assert first["name"] == (tmp_path / IDENTITY).read_text().strip()
    assert calls[1] == ("log", {"flow": 0.5, "flow/my data": 0.25, "samples_per_s": 40.0}, 20)
    assert calls[2] == ("finish",) and told == []


def test_a_tracker_that_fails_is_told_once_and_the_others_go_on(tmp_path, monkeypatch, told):
    logged = []

    def broken(numbers, step):
        raise OSError("no route to\nhost \x1b[31m")

    stand_in(monkeypatch, "trackio", init=lambda **_: None, log=broken, finish=lambda: None)
    run = types.SimpleNamespace(log=lambda numbers, step: logged.append(step), finish=lambda: logged.append("end"))
    stand_in(monkeypatch, "wandb", init=lambda **_: run)
    tracking = Tracking(("trackio", "wandb"), tmp_path, {}, tell=told.append)
    tracking.log(ROW)
    tracking.log({"step": 40})
    tracking.close()
    assert logged == [20, 40, "end"]
    assert told == ["trackio failed and gets nothing more (OSError: no route to\\x0ahost \\x1b[31m)"]


def test_an_unknown_tracker_is_refused_before_anything_is_written(tmp_path, told):
    with pytest.raises(ArgumentError, match="--track 'mlflow': expected one of tensorboard, trackio, wandb"):
        Tracking(("tensorboard", "mlflow"), tmp_path, {}, tell=told.append)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_one_line_with_the_command_that_mends_it(tmp_path, monkeypatch, told, name):
    for module in (name, "torch.utils.tensorboard", "torch.utils.tensorboard.writer"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ArgumentError) as caught:
        Tracking((name,), tmp_path, {}, tell=told.append)
    assert f"pip install --upgrade {name}" in str(caught.value) and "is not installed" in str(caught.value)


def test_a_package_that_does_not_start_is_one_line(tmp_path, monkeypatch, told):
    def broken(**_):
        raise RuntimeError("api key not configured\n(no-tty)")

    stand_in(monkeypatch, "wandb", init=broken)
    with pytest.raises(ArgumentError, match=r"--track wandb: it does not start \(RuntimeError: api key"):
        Tracking(("wandb",), tmp_path, {}, tell=told.append)


def test_without_names_nothing_happens(tmp_path, told):
    tracking = Tracking((), tmp_path, {}, tell=told.append)
    tracking.log(ROW)
    tracking.close()
    assert list(tmp_path.iterdir()) == [] and told == []
