"""benchmarks/gpu.py where there is no GPU: it plans, refuses, and rehearses its steps on the CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ki_edge.config import PI05
from ki_export.source.devices import DEVICES
from ki_runtime.backends import registry
from ki_runtime.backends.registry import connect

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(*arguments, script="gpu.py"):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=hidden)


@pytest.fixture
def modules(monkeypatch):
    """The scripts' own modules can be imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("script", ["gpu.py", "boards.py", "wheels.py"])
def test_help(script):
    result = run("--help", script=script)
    assert result.returncode == 0 and "usage" in result.stdout


def test_plan_needs_no_gpu():
    result = run("--plan", "--minutes", "7", "--precisions", "bf16,fp16", "--compile-mode", "none")
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and lines[0].startswith("within 7 minutes")
    names = [line[7:58].strip() for line in lines[1:]]
    assert names.index("parity small") < names.index("open bundle bf16, trt") < names.index("full bundle fp16")
    assert not [name for name in names if "compile" in name]
    recorded = names.index("open bundle bf16, ort-cuda, recorded")  # a second copy of the model: after the others
    assert recorded > names.index("open PyTorch bfloat16, eager")


def test_refuses_without_a_gpu(tmp_path):
    result = run("--output", tmp_path / "out")
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert result.stderr.startswith("gpu.py: error: GPU none: ") and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precisions", "fp8"], "'fp8', expected some of fp16,bf16,fp32"),
        (["--wheels", "/nowhere"], "no folder at /nowhere"),
        (["--minutes", "soon"], "invalid float value"),
    ],
)
def test_wrong_arguments(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1


def test_rehearsal(fetch_bundle, tmp_path):
    """Every step on the CPU: the float32 bundle equals the model, and each contender has its times."""
    for name in ("small-fp32", "full-fp32"):
        shutil.copytree(fetch_bundle, tmp_path / name)
    few = ("--precisions", "fp32", "--rounds", 2, "--observations", 2, "--compile-mode", "none")
    result = run("--rehearse", "--output", tmp_path, *few)
    assert result.returncode == 0, result.stderr
    recorded = json.loads((tmp_path / "gpu.json").read_text())
    states = {step["name"]: (step["state"], step["note"]) for step in recorded["steps"]}
    assert {state for state, _ in states.values()} == {"done"}, states
    small = recorded["results"]["parity small"]
    assert [row["contender"] for row in small] == ["bundle fp32, ort"]
    assert small[0]["max_abs"] < 2e-5 and small[0]["observations"] == 3  # the second case has two rows
    measured = recorded["results"]["latency, 2 cameras, 30 tokens"]["contenders"]
    assert set(measured) == {
        "bundle fp32, ort", "PyTorch bfloat16, eager", "PyTorch bfloat16, eager, padded as openpi does"
    }  # fmt: skip
    for times in measured.values():
        assert times["total"] == pytest.approx(times["prefix"] + 10 * times["step"]) and times["total"] > 0
    assert "these numbers mean nothing" in (tmp_path / "gpu.md").read_text()


# ---------------------------------------------------------------------- parts


def test_floors_are_the_rooflines(modules):
    """By hand, for the H200: the larger of operations / peak and bytes / bandwidth, stage by stage."""
    import boards

    h200 = next(device for device in DEVICES if device.name == "H200")
    tokens, heads = 2 * 256 + 30, 2048
    vision = 2 * (2 * 411e6 * 256 + 4 * 256**2 * 1152 * 27)
    backbone = 2 * 1.873e9 * tokens + 4 * tokens**2 * heads * 17
    compute = (vision + backbone) / 989e9  # ms
    found = boards.floor(h200, 2, 30)
    assert found["prefix"] == pytest.approx(compute, rel=0.01)
    assert found["step"] == pytest.approx(2 * 311e6 / 4800e6, rel=0.01)
    assert found["total"] == pytest.approx(found["prefix"] + 10 * found["step"])
    assert any("H200" in line and "3.8 = 2.5 + 10 x 0.13" in line for line in boards.floors())


@pytest.mark.parametrize(
    ("gpu", "device"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA Thor", "Jetson Thor"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 PCIe", None),
    ],
)
def test_known_devices(modules, gpu, device):
    import boards

    found = boards.device_of(gpu)
    assert (found.name if found else None) == device


def test_a_bundle_of_another_checkpoint_is_not_taken_up(modules, tmp_path):
    """As a rehearsal leaves them, or an earlier run whose checkpoint has been replaced."""
    from gpu_steps import Benchmark

    benchmark = Benchmark(SimpleNamespace(output=tmp_path, wheels=None, minutes=1, checkpoint=None), "cuda")
    assert not benchmark._has("small", "fp16")
    manifest, weights = tmp_path / "small-fp16" / "manifest.json", tmp_path / "small-checkpoint" / "model.safetensors"
    for path, text in ((weights, ""), (manifest, json.dumps({"provenance": {"checkpoint": "small-checkpoint"}}))):
        path.parent.mkdir()
        path.write_text(text)
    assert benchmark._has("small", "fp16")
    os.utime(weights, (4e9, 4e9))
    assert not benchmark._has("small", "fp16")
    os.utime(weights, (1e9, 1e9))
    manifest.write_text(json.dumps({"provenance": {"checkpoint": "checkpoint"}}))
    assert not benchmark._has("small", "fp16")


def test_a_contender_that_is_asked_to_record(modules, fetch_bundle, monkeypatch):
    """Its backend is; and it gives the same actions, here, where nothing can be recorded, from the same engine."""
    from gpu_measure import Case, draw
    from gpu_worker import open_contender

    asked = []

    def connecting(bundle, name, options, first):
        asked.append((name, options.record))
        return connect(bundle, name, options, first)

    monkeypatch.setattr(registry, "connect", connecting)
    facts = {"kind": "bundle", "path": str(fetch_bundle), "backend": "ort"}
    sides = [open_contender({**facts, "record": record}) for record in (False, True)]
    seen = draw(sides[0].config, Case(2, 9, 3))
    one, other = (side.run(seen, 3)[0] for side in sides)
    np.testing.assert_array_equal(one, other)
    assert asked.count(("ort", True)) == 1  # the other one is opened as users do


def test_budget_skips_what_does_not_fit(modules, tmp_path):
    from gpu_process import Budget, Failed

    def fail():
        raise Failed("out of\nmemory")

    budget = Budget(100.0, tmp_path / "gpu.json")
    assert budget.step("quick", 1, lambda: 7) == 7
    assert budget.step("long", 200, lambda: 8) is None
    assert budget.step("after", 1, lambda: 9, ("long",)) is None
    assert budget.step("broken", 1, fail) is None
    states = [(record.name, record.state) for record in budget.records]
    assert states == [("quick", "done"), ("long", "skipped"), ("after", "skipped"), ("broken", "failed")]
    assert budget.records[1].note.startswith("needs 200 s") and budget.records[2].note == "without long"
    assert json.loads((tmp_path / "gpu.json").read_text())["results"] == {"quick": 7}
    assert budget.records[3].note == "out of memory"


def test_contender_that_dies_or_hangs(modules, tmp_path, monkeypatch):
    import gpu_process

    script = tmp_path / "worker.py"
    monkeypatch.setattr(gpu_process, "WORKER", script)
    script.write_text("import sys\nsys.stdin.readline()\nsys.exit('CUDA error: out of memory')\n")
    dead = gpu_process.Contender("dead", {}, tmp_path / "dead.log", None)
    with pytest.raises(gpu_process.Failed, match="its process ended: CUDA error: out of memory"):
        dead.open(60)
    dead.close()
    script.write_text("import time\ntime.sleep(600)\n")
    hanging = gpu_process.Contender("hanging", {}, tmp_path / "hanging.log", None)
    with pytest.raises(gpu_process.Failed, match="no answer within 1 s"):
        hanging.open(0.1)


def test_stage_times_come_from_two_step_counts(modules):
    """A contender whose stages overlap: only its totals are used."""
    import gpu_measure
    from gpu_process import Failed

    class Fake:
        facts, memory = {}, 12.0

        def __init__(self, name, prefix, step, lasts=100):
            self.name, self.prefix, self.per_step, self.lasts = name, prefix, step, lasts

        def ask(self, request, limit):
            self.lasts -= 1
            if self.lasts < 0:
                raise Failed("lost")
            return {"total": self.prefix + request["case"]["steps"] * self.per_step}

    found = gpu_measure.latency([Fake("a", 5.0, 0.5), Fake("b", 1.0, 1.0, lasts=3)], 2, 30, 4)
    assert found["contenders"]["a"] == pytest.approx({"total": 10.0, "p90": 10.0, "step": 0.5, "prefix": 5.0})
    assert found["failed"] == {"b": "lost"} and "b" not in found["contenders"]


def test_observations_are_the_same_everywhere(modules):
    from gpu_measure import Case, draw

    first, second = (draw(PI05, Case(2, 30, 10, seed=3)) for _ in range(2))
    for one, other in zip(first.arrays, second.arrays, strict=True):
        assert (one == other).all()
    kept = first.trimmed()
    assert kept.images.shape == (1, 2, 224, 224, 3) and kept.prompt_tokens.shape == (1, 30)
    assert kept.camera_mask.all() and kept.prompt_mask.all() and not first.images[:, 2].any()


def test_two_observations_at_once_have_other_cameras_and_prompts(modules):
    from gpu_measure import Case, draw

    found = draw(PI05, Case(2, 31, 10, seed=3, batch=2))
    assert found.camera_mask.tolist() == [[True, True, False], [False, True, True]]
    assert found.prompt_mask.sum(axis=1).tolist() == [31, 16] and found.prompt_mask[:, 0].all()
    assert not found.images[0, 2].any() and not found.images[1, 0].any() and found.images[1, 2].any()
    assert found.images.shape == (2, 3, 224, 224, 3) and found.noise.shape[0] == 2


@pytest.mark.parametrize(("batch", "rows"), [(1, 4), (2, 6)])
def test_parity_has_two_at_once_where_contenders_take_it(modules, tmp_path, batch, rows):
    import gpu_measure
    import numpy as np

    class Fake:
        name, facts = "fake", {"batch": batch}

        def ask(self, request, limit):
            np.save(request["save"], np.ones((request["case"]["batch"], 5, 4), np.float32))

    (row,) = gpu_measure.parity("small", Fake(), [Fake()], 4, tmp_path)
    assert row["observations"] == rows and row["max_abs"] == 0 and row["cosine"] == pytest.approx(1)


@pytest.mark.parametrize("padded", [True, False])
def test_torch_side_holds_nothing_on_the_host(modules, data, padded):
    """On the meta device any tensor that was made elsewhere raises, as it would on a GPU."""
    import torch
    from gpu_measure import Case, draw
    from gpu_worker import TorchSide

    side = TorchSide(data / "openpi_a", "bfloat16", "cpu", None, padded=padded)
    observation = draw(side.config, Case(2, 30, 10))
    given = observation if padded else observation.trimmed()
    side._model.to("meta")
    x, t, dt = (torch.zeros(shape, device="meta") for shape in (given.noise.shape, (1,), ()))
    with torch.no_grad():
        prefix = side._prefix(*(torch.from_numpy(array).to("meta") for array in given.arrays))
        assert side._step(x, t, dt, *prefix).shape == given.noise.shape
    assert prefix[0].shape[3] == given.images.shape[1] * side.config.vision.patches + given.prompt_tokens.shape[1]
