"""A few hundred of the cases of `tests/fuzz.py`, always the same ones: damaged folders of every kind that is opened."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ki_edge import flow, graphs
from ki_edge.bundle import Manifest, write_bundle
from ki_edge.config import GemmaConfig, Pi05Config, VisionConfig
from ki_edge.policy.contract import FastContract, generic

from .fuzz import run_case

CASES = {"bundle": 100, "openpi": 60, "lerobot": 60, "jax": 16, "recording": 100}  # a JAX folder takes longest to open
GEMMA = GemmaConfig(width=8, depth=1, mlp_dim=8, num_heads=2, num_kv_heads=1, head_dim=4)
CONFIG = Pi05Config(
    vision=VisionConfig(width=8, depth=1, mlp_dim=8, num_heads=2, patch_size=2, image_size=4),
    backbone=GEMMA, expert=GEMMA, vocab_size=1000, action_dim=6, action_horizon=5,
)  # fmt: skip
GRAPH = bytes([0x42, 4, 0x0A, 0, 0x10, 20, 0x3A, 0])  # opset 20, and an empty graph


@pytest.fixture
def folders(tmp_path: Path, data: Path, tokenizer_model: bytes) -> dict[str, Path]:
    """One of each: a whole bundle with its policy, checkpoints in openpi's layouts and in LeRobot's, a dataset."""
    return {
        "bundle": bundle(tmp_path / "bundle", data, tokenizer_model),
        "openpi": data / "openpi_a",
        "lerobot": data / "lerobot_a",
        "jax": data / "orbax" / "files",
        "recording": data / "lerobot_dataset" / "v3",
    }


def bundle(target: Path, data: Path, tokenizer: bytes) -> Path:
    fast = FastContract(id_offset=900, size=512, max_tokens=40)
    contract = generic(
        ["front"], state_dim=2, action_dim=3, action_horizon=5, image_size=(4, 4), model_action_dim=6, fast=fast
    )
    tensors = {name: np.zeros(shape, np.float32) for name, shape in flow.modulation_weights(CONFIG).items()}
    stats = {"q01": [-1.0] * 3, "q99": [1.0] * 3, "mean": [0.0] * 3, "std": [1.0] * 3}
    with write_bundle(target) as writer:
        shutil.copytree(data / "fast", writer.folder / "assets" / "fast")
        (writer.folder / "assets" / "tokenizer.model").write_bytes(tokenizer)
        norm_stats = json.dumps({"norm_stats": {"state": stats, "actions": stats}})
        (writer.folder / "assets" / "norm_stats.json").write_text(norm_stats, encoding="utf-8")
        save_file(tensors, writer.folder / "weights.safetensors")
        for spec in graphs.GRAPHS:
            (writer.folder / f"{spec.name}.onnx").write_bytes(GRAPH)
        writer.seal(
            Manifest(
                model=CONFIG.to_dict(),
                contract=contract.to_json(),
                sampling={"time_convention": "openpi", "num_steps": 10},
                precision="float32",
                graphs={spec.name: {"file": f"{spec.name}.onnx"} for spec in graphs.GRAPHS},
                weights={"file": "weights.safetensors", "runtime": {name: name for name in tensors}},
                decode_vocabulary={"first": 389, "count": 512, "extra": [1]},
                tools={},
                provenance={},
                parity={"verified": False},
            )
        )
    return target


@pytest.mark.parametrize("kind", ["bundle", "openpi", "lerobot", "jax", "recording"])
def test_damaged_folders(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """No other exception than a KiEdgeError of one line, and nothing that waits: FIFOs and devices are among them."""
    results = [run_case(folders[kind], seed, tmp_path)[1] for seed in range(CASES[kind])]
    assert results.count("opened") < CASES[kind]  # some are damaged so that it shows,
    assert "opened" in results  # and some so that it does not


def test_the_alarm_of_a_case_rings(tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What hangs fails: the fuzz test could not notice it otherwise."""
    monkeypatch.setitem(run_case.__globals__, "LIMIT", 1)
    monkeypatch.setitem(run_case.__globals__, "open_everything", lambda folder: signal.pause())
    with pytest.raises(AssertionError, match="still busy after 1 s"):
        run_case(folders["openpi"], 0, tmp_path)
