"""Two processes, however they share the work, train what one does: gloo, in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.keys import checkpoint_key

sys.path.insert(0, str(Path(__file__).parent))
from parallel_worker import golden as train_golden
from parallel_worker import run as train_here

WORKER = Path(__file__).with_name("parallel_worker.py")
KI = Path(__file__).parents[1] / "data" / "ki"
# Adding one vector to all keys changes no softmax, so these biases have no gradient but rounding, which Adam divides by
# its own size: they walk at random, and nothing depends on them.
INVARIANT = "self_attn.k_proj.bias"
MIXED = {"texts": 2, "delays": True}
THRIFTY = {"checkpointing": True, "accumulate": 2}
ADAPTED = {"lora": [["backbone", 4], ["embeddings", 3], ["expert", 4], ["vision", 2], ["projector", 2]]}
ALL = [
    {"name": "ddp", "strategy": "ddp", "settings": THRIFTY, "steps": [0, 20], "composition": MIXED, "probe": 7},
    {"name": "fsdp2", "strategy": "fsdp2", "settings": THRIFTY, "steps": [0, 20], "composition": MIXED, "probe": 7},
    {"name": "half", "strategy": "fsdp2", "settings": {}, "steps": [0, 10], "composition": MIXED, "save": "state"},
    {"name": "rest", "strategy": "ddp", "settings": {}, "steps": [10, 20], "composition": MIXED, "load": "state"},
    {
        "name": "lora", "strategy": "fsdp2", "settings": {**ADAPTED, **THRIFTY}, "steps": [0, 3], "probe": 1,
        "composition": MIXED, "checkpoint": "merged",
    },
    {"name": "lora_ddp", "strategy": "ddp", "settings": {**ADAPTED, **THRIFTY}, "steps": [0, 3], "probe": 1},
    {"name": "expert", "strategy": "fsdp2", "settings": {"expert_only": True, **THRIFTY}, "steps": [0, 3]},
    {"name": "evaluated", "strategy": "fsdp2", "settings": {"ema": 0.9}, "steps": [0, 2], "evaluate": True},
    {
        "name": "evaluated_ddp", "strategy": "ddp", "settings": {"ema": 0.9, **ADAPTED}, "steps": [0, 2],
        "evaluate": True,
    },
    {
        "name": "plain", "strategy": "ddp", "settings": {"knowledge_insulation": False, "fast_loss": False},
        "steps": [0, 3],
    },
    {"name": "joint", "strategy": "fsdp2", "settings": {"knowledge_insulation": False}, "steps": [0, 2], "probe": 1},
    {"name": "bf16", "strategy": "fsdp2", "settings": {"bfloat16": True, **THRIFTY}, "steps": [0, 3], "probe": 1},
    {"name": "bf16_ddp", "strategy": "ddp", "settings": {"bfloat16": True}, "steps": [0, 3], "probe": 1},
    {
        "name": "eight", "strategy": "fsdp2", "settings": {"optimizer": "adamw8bit"}, "steps": [0, 2],
        "vocabulary": 1024, "save": "eight_state",
    },
    {
        "name": "eight_rest", "strategy": "fsdp2", "settings": {"optimizer": "adamw8bit"}, "steps": [2, 4],
        "vocabulary": 1024, "load": "eight_state",
    },
    {
        "name": "eight_whole", "strategy": "fsdp2", "settings": {"optimizer": "adamw8bit"}, "steps": [0, 4],
        "vocabulary": 1024,
    },
    {"name": "golden_ddp", "strategy": "ddp", "settings": {}, "golden": str(KI)},
    {"name": "golden_fsdp2", "strategy": "fsdp2", "settings": {"checkpointing": True}, "golden": str(KI)},
]  # fmt: skip
BY_NAME = {scenario["name"]: scenario for scenario in ALL}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes left what came of every scenario."""
    out = tmp_path_factory.mktemp("two")
    (out / "scenarios.json").write_text(json.dumps(ALL))
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, WORKER, out], capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """one(which, **changes) -> the folder in which this process left what came of a scenario."""
    out = tmp_path_factory.mktemp("one")

    def make(which, **changes):
        scenario = {**BY_NAME[which], **changes}
        scenario["settings"] = {**scenario["settings"], "accumulate": 1, "checkpointing": False}
        if not (out / f"{scenario['name']}.json").exists():
            train_here(scenario, out)
        return out

    return make


def records(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def assert_same(one, two, name, other=None, atol=1e-6):
    """Losses relative to their size, weights and average absolutely."""
    for ours, theirs in zip(records(one, name), records(two, other or name), strict=True):
        for term in ("flow", "fast", "text", "total", "grad_norm"):
            assert (term in ours) == (term in theirs)
            if term in ours:
                assert theirs[term] == pytest.approx(ours[term], rel=1e-6), term
    ours, theirs = load_file(one / f"{name}.safetensors"), load_file(two / f"{other or name}.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if not key.endswith(INVARIANT):
            np.testing.assert_allclose(theirs[key], value, rtol=0, atol=atol, err_msg=key)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_twenty_steps_are_those_of_one_process(one, two, name):
    """With accumulation and layers computed again in two, without either in one; text samples and delays among them."""
    assert_same(one("ddp", strategy="auto"), two, "ddp", name)


@pytest.mark.parametrize("name", ["evaluated", "evaluated_ddp"])
def test_evaluation_before_and_between_steps(one, two, name):
    """The average in the weights' place, gathered where it is called, and steps afterwards as if nothing had been."""
    assert_same(one(name), two, name, atol=1e-5)  # logits and samples are among what is compared


@pytest.mark.parametrize("name", ["lora", "lora_ddp", "expert", "plain", "joint"])
def test_so_are_other_kinds_of_training(one, two, name):
    assert_same(one(name), two, name)


def test_a_checkpoint_of_shards_with_adapters_is_that_of_one_process(one, two):
    ours, theirs = (Checkpoint.open(folder / "merged") for folder in (one("lora"), two))
    for key in ours.source.tensors:
        np.testing.assert_allclose(theirs.source.array(key), ours.source.array(key), rtol=0, atol=1e-6, err_msg=key)
    assert (two / "merged" / "adapter" / "adapter_config.json").is_file()


def test_accelerate_launches_it_too(two, tmp_path):
    """The launcher that people know, which starts one process on a CPU; its precision and strategy are not taken."""
    (tmp_path / "scenarios.json").write_text(json.dumps([{**BY_NAME["plain"], "name": "launched"}]))
    options = [
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "bf16",
        "--dynamo_backend",
        "no",
    ]
    command = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", *options, "--main_process_port", "0"]
    done = subprocess.run([*command, WORKER, tmp_path], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    for ours, theirs in zip(records(tmp_path, "launched"), records(two, "plain"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)  # it may choose another number of threads
        assert ours.keys() == {"flow", "total", "grad_norm"}  # there is no token loss


def test_a_state_is_read_by_another_number_of_processes(one, two):
    """Two sharded processes stopped; two replicas went on, and so does one process."""
    whole = one("ddp", strategy="auto")
    for name, folder in (("rest", two), ("alone", one("rest", name="alone", load=str(two / "state")))):
        ours, theirs = load_file(whole / "ddp.safetensors"), load_file(folder / f"{name}.safetensors")
        for key, value in ours.items():
            if not key.endswith(INVARIANT):
                np.testing.assert_allclose(theirs[key], value, rtol=0, atol=1e-6, err_msg=f"{name} {key}")


def test_moments_in_eight_bits_go_on_bit_for_bit(two):
    ours, theirs = (load_file(two / f"{name}.safetensors") for name in ("eight_whole", "eight_rest"))
    for key, value in ours.items():
        np.testing.assert_array_equal(theirs[key], value, err_msg=key)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "lora", "lora_ddp", "bf16", "bf16_ddp"])
def test_the_flow_loss_never_reaches_the_backbone(two, name):
    probed = [record for record in records(two, name) if "leak" in record]
    assert len(probed) >= 3
    for record in probed:
        assert record["leak"] == 0.0 and record["reached"] > 1e-4


def test_without_insulation_it_does(two):
    assert all(record["leak"] > 1e-4 for record in records(two, "joint"))


@pytest.mark.parametrize("name", ["bf16", "bf16_ddp"])
def test_bfloat16_stays_close(one, two, name):
    for ours, theirs in zip(records(one(name), name), records(two, name), strict=True):
        for term in ("flow", "fast"):
            assert theirs[term] == pytest.approx(ours[term], rel=0.02)  # rounding is 0.4 %


@pytest.mark.parametrize("name", ["golden_ddp", "golden_fsdp2", "golden_alone"])
def test_gradients_are_the_recorded_ones(two, name, tmp_path):
    if name == "golden_alone":
        settings = {"accumulate": 2, "checkpointing": True}
        train_golden({"name": name, "settings": settings, "golden": str(KI)}, tmp_path)
    ours = records(tmp_path if name == "golden_alone" else two, name)
    recorded = json.loads((KI / "grad_norms.json").read_text())
    expected = {key: recorded[checkpoint_key(key)]["total_alpha1_with_stopgrad"] for key in ours}
    assert len(ours) > 50
    for key, value in ours.items():
        if key.endswith(INVARIANT):
            assert max(value, expected[key]) < 1e-6
        else:
            assert value == pytest.approx(expected[key], rel=2e-5), key
