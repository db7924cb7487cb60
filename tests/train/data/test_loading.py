"""Worker processes: the same batches as without them, errors as they are, and nobody is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import psutil
import pytest
import torch

from ki_edge.errors import DatasetError
from ki_edge.train.data import loading
from ki_edge.train.step.training_data import Share

pytest.importorskip("av", reason="pip install 'ki-edge[record]'")
SECONDS = 60  # until a process must be gone: far more than it takes


def tensors(batch):
    for part in (batch, batch.observation):
        for field in fields(part):
            value = getattr(part, field.name)
            if isinstance(value, torch.Tensor):
                yield field.name, value


def same(one, other):
    for (name, a), (_, b) in zip(tensors(one), tensors(other), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


@pytest.fixture
def many(data):
    return data / "lerobot_dataset" / "many_h264"


def test_workers_make_what_is_made_without_them(many, opened):
    settings = {"rtc_max_delay": 2, "rtc_offset": 0.2, "augment": True}
    alone, helped = (opened(many, workers=count, settings=settings) for count in (0, 2))
    for one, other in zip(alone.steps(1, Share()), helped.steps(1, Share()), strict=True):
        same(one[0], other[0])
    assert helped.loader_samples_per_s > 0 and alone.loader_samples_per_s > 0


def workers_of(process):
    """Those that the fork server started: grandchildren."""
    own = {child.pid for child in process.children()}
    return [child for child in process.children(recursive=True) if child.pid not in own]


def test_ending_early_ends_the_workers(many, opened):
    data = opened(many, workers=2)
    before = {child.pid for child in workers_of(psutil.Process())}
    steps = data.steps(0, Share())
    next(steps)
    own = [child for child in workers_of(psutil.Process()) if child.pid not in before]
    assert len(own) == 2
    data.close()
    assert not gone(own)


def test_a_worker_that_is_killed_is_one_line(many, opened):
    data = opened(many, workers=1, settings={"steps": 10_000})
    steps = data.steps(0, Share())
    next(steps)
    (running,) = data._running
    worker = running.gi_frame.f_locals["running"]._workers[0]
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DatasetError, match="a worker that prepares batches was killed") as caught:
        for _ in steps:
            pass
    assert "\n" not in str(caught.value) and "Fewer --workers" in str(caught.value)


def test_other_errors_stay_what_they_are():
    fault = RuntimeError("Caught ZeroDivisionError in DataLoader worker process 0.\nTraceback ...")
    assert loading._told(fault) is fault
    memory = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible ... shared memory")
    assert "no shared memory left" in str(loading._told(memory))


def test_workers_by_the_cores(monkeypatch):
    for cores, processes, wanted in ((1, 1, 1), (2, 1, 1), (8, 1, 7), (64, 1, 16), (16, 4, 3), (4, 8, 1)):
        monkeypatch.setattr(loading.os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert loading.default_workers() == wanted


@pytest.fixture
def training(many, tmp_path):
    """training(*arguments) -> a process of loading_parts.py that has its first batch, and all of its processes."""
    told = tmp_path / "map.json"
    told.write_text(json.dumps({"state": ["observation.joints", "observation.gripper"]}))
    made = []

    def start(*arguments):
        script = Path(__file__).with_name("loading_parts.py")
        command = [sys.executable, str(script), str(many), str(told), *arguments]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        made.append(process)
        assert process.stdout.readline() == "go\n", process.stderr.read()
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3  # two workers, and who started them
        return process, family

    yield start
    for process in made:
        process.kill()
        process.communicate()


def gone(family):
    _, alive = psutil.wait_procs(family, SECONDS)
    return [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_nobody_outlives_a_training_that_is_stopped(training, name):
    process, family = training()
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches all of them
    else:
        process.send_signal(getattr(signal, name))
    out, error = process.communicate(timeout=SECONDS)
    assert not gone(family)
    if name == "SIGINT":
        assert "interrupted" in out and "Traceback" not in error


def test_a_preemption_leaves_the_workers_to_the_training(training):
    """SIGTERM to every process of the job: batches come until the training ends by itself."""
    process, family = training("heeds")
    os.killpg(process.pid, signal.SIGTERM)
    time.sleep(0.1)
    out, error = process.communicate(timeout=SECONDS)
    assert process.returncode == 0 and "21 after" in out, error
    assert not gone(family)
