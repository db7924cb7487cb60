"""The weights that a run starts from: any checkpoint, its numbers exactly, and its memory once."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ki_edge.checkpoints import Checkpoint
from ki_edge.config import GemmaConfig
from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.model import Pi05, load_model, save_checkpoint
from ki_edge.planning.settings import TrainSettings
from ki_edge.train.parallel.engine import Engine
from ki_edge.train.parallel.starting import open_start

sys.path.insert(0, str(Path(__file__).parent))
from parallel_parts import MICRO, random_model, train

ROOT = Path(__file__).parents[2]
SETTINGS = TrainSettings(batch=4, steps=4, warmup=1, bfloat16=False)
MIDDLE = replace(
    MICRO,
    backbone=GemmaConfig(width=512, depth=6, mlp_dim=2048, num_heads=4, num_kv_heads=2, head_dim=64),
    expert=GemmaConfig(width=256, depth=6, mlp_dim=1024, num_heads=4, num_kv_heads=2, head_dim=64),
    vocab_size=30_000,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(random_model(), folder)
    return folder


def opened(folder, config=MICRO, settings=SETTINGS):
    model, weights = open_start(folder, config)
    assert all(parameter.is_meta for parameter in model.parameters())
    return Engine(model, settings, weights=weights)


def test_every_weight_is_the_checkpoints(checkpoint):
    engine = opened(checkpoint)
    for name, value in load_model(checkpoint).state_dict().items():
        assert torch.equal(engine.model.get_parameter(name), value), name
    assert all(parameter.requires_grad for parameter in engine.model.parameters())


@pytest.mark.parametrize("name", ["openpi_a", "lerobot_a"])
def test_formats_of_others(data, name):
    found = Checkpoint.open(data / name)
    engine = opened(found, found.config)
    for key, value in load_model(found).state_dict().items():
        assert torch.equal(engine.model.get_parameter(key), value), key


def test_it_trains_as_the_model_itself_does(checkpoint):
    """Also where the horizon is another, on which no weight depends."""
    other = replace(MICRO, action_horizon=9, rtc="trained")
    model = Pi05(other)
    model.load_state_dict(random_model().state_dict())
    ours, theirs = opened(checkpoint, other), Engine(model, SETTINGS)
    assert train(ours, 0, 2, config=other) == train(theirs, 0, 2, config=other)


def test_adapters_begin_as_they_do_in_a_model_that_was_there(checkpoint):
    settings = replace(SETTINGS, lora=(("backbone", 3), ("embeddings", 2)))
    ours, theirs = opened(checkpoint, settings=settings), Engine(random_model(), settings)
    for name, value in theirs.model.named_parameters():
        assert torch.equal(ours.model.get_parameter(name), value), name
    assert train(ours, 0, 2) == train(theirs, 0, 2)


def test_other_geometries_are_refused(checkpoint, data):
    with pytest.raises(ArgumentError, match=r"cannot be the start of this run: its model has vocab_size 96, not 97"):
        open_start(checkpoint, replace(MICRO, vocab_size=97))
    with pytest.raises(ArgumentError, match=r"its model has action_dim 6, not 9"):
        open_start(checkpoint, replace(MICRO, action_dim=9))
    with pytest.raises(CheckpointError, match=r"pi0 holds a pi0: only π0\.5 is trained here"):
        open_start(data / "orbax" / "pi0", MICRO)


MEASURED = """
import json, re, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from test_starting import MIDDLE, SETTINGS, opened, replace
from ki_edge.model import save_checkpoint
from ki_edge.train.parallel.engine import Engine
def memory(name):  # a process' own: what getrusage tells begins with its parent's
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
def peak_above(run):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = memory("VmRSS")
    result = run()
    return result, memory("VmHWM") - before
settings = replace(SETTINGS, ema=0.0)
small = opened(sys.argv[2], settings=settings)  # everything is imported
engine, started = peak_above(lambda: opened(sys.argv[3], MIDDLE, settings))
_, saved = peak_above(lambda: engine.save_checkpoint(Path(sys.argv[4])))
size = sum(4 * p.numel() for p in engine.model.parameters())
print(json.dumps({"size": size, "started": started / size, "saved": saved / size}))
"""


def test_a_model_is_held_once(checkpoint, tmp_path):
    """Reading takes the memory of the weights and of a piece; writing a checkpoint, of its largest tensor at most."""
    torch.manual_seed(0)
    save_checkpoint(Pi05(MIDDLE), tmp_path / "middle")
    command = [sys.executable, "-c", MEASURED, Path(__file__).parent, checkpoint, tmp_path / "middle", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["size"] > 150e6
    assert 0.9 < measured["started"] < 1.25 and measured["saved"] < 0.25, measured
