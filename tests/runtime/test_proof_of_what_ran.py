"""A verdict is filed under the engines that ran, and says nothing of records that were never replayed."""

import json
from types import SimpleNamespace

import pytest

from ki_edge.errors import DeviceMemoryError
from ki_runtime.backends.backend import SessionOptions, Setting
from ki_runtime.gpu.cuda import Cuda
from ki_runtime.policy.proof import Prover

from .gpu_machine import Machine
from .witnesses import observations, proven_bundle


@pytest.fixture
def proving(make_bundle):
    """A machine with a proven bundle, its prover, and the lines that were said; the disk tells of other engines."""
    machine, lines = Machine(proven_bundle(make_bundle)), []
    on_disk = Setting({"engine prefix": "another", "driver": "560"}, machine.bundle.path / "elsewhere")
    backend = SimpleNamespace(name="trt", device="GPU", setting=lambda *_: on_disk)
    return SimpleNamespace(
        machine=machine, lines=lines, prover=Prover(machine.bundle, backend, SessionOptions(say=lines.append))
    )


def records(machine):
    return list(machine.bundle.path.rglob("proof-*.json"))


def test_it_is_of_the_engines_that_were_loaded(proving):
    sampler = proving.machine.sampler()
    assert proving.prover.require("actions", sampler).startswith("proven here on ")
    (path,) = records(proving.machine)
    environment = json.loads(path.read_text())["environment"]
    assert path.parent == proving.machine.bundle.path
    assert (environment["engine prefix"], environment["engine denoise"]) == ("hash of prefix", "hash of denoise")
    assert environment["driver"] == "560" and sampler.session("denoise").replays > 0


def test_without_a_replay_it_is_not_written_down_and_nothing_is_recorded_later(proving, monkeypatch):
    def full(*_):
        raise DeviceMemoryError("no room")

    sampler = proving.machine.sampler()
    with monkeypatch.context() as patch:
        patch.setattr(Cuda, "record", full)
        assert proving.prover.require("actions", sampler).startswith("proven here on ")
    assert records(proving.machine) == []
    assert any("proven without CUDA graphs" in line for line in proving.lines)
    seen = observations()
    for _ in range(3):  # there would be room now
        sampler.sample_actions(*seen.inputs(0), **seen.more(0))
    assert "cudaGraphLaunch" not in proving.machine.cuda.calls
