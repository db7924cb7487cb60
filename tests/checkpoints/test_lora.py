"""LoRA adapters written and merged by the peft library against ki_edge's merge (tests/data/lora/make.py)."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ki_edge.checkpoints import Checkpoint, SafetensorsSource, TensorSource
from ki_edge.checkpoints.layout.keys import EMBEDDING, EXPERT, LM_HEAD
from ki_edge.checkpoints.peft.adapter import (
    AdapterConfig,
    find_base,
    find_base_revision,
    is_adapter,
    resolve_base,
)
from ki_edge.checkpoints.peft.lora import LoraSource, open_adapter
from ki_edge.errors import CheckpointError
from ki_edge.files.safetensors_index import SafetensorsIndex

ADAPTERS = ("lerobot", "rslora", "dora", "bias", "all_linear")
FULL_TRAINED = {"lerobot": {"action_out_proj.weight", "action_out_proj.bias"}}
Q_PROJ = "layers.0.self_attn.q_proj"
LAST = "base_model.model.model.time_mlp_in.lora_B.weight"


@pytest.fixture(scope="module")
def base(data: Path) -> TensorSource:
    return Checkpoint.open(data / "openpi_a").source


@pytest.fixture
def adapter(data: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of one of peft's folders with changed settings and tensors (None: removed)."""

    def change(name: str, settings: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None) -> Path:
        folder = Path(shutil.copytree(data / "lora" / name, tmp_path / name))
        config = folder / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | (settings or {})))
        stored = load_file(folder / "adapter_model.safetensors") | (tensors or {})
        save_file({k: v for k, v in stored.items() if v is not None}, folder / "adapter_model.safetensors")
        return folder

    return change


def whole(source: TensorSource, key: str) -> np.ndarray[Any, Any]:
    return np.concatenate(list(source.pieces(key))).reshape(source.tensors[key].shape)


@pytest.mark.parametrize("name", ADAPTERS)
def test_merge_equals_peft(name: str, data: Path, base: TensorSource) -> None:
    merged = load_file(data / "lora" / name / "merged.safetensors")
    source = open_adapter(data / "lora" / name, base)
    assert set(merged) <= set(source.tensors)
    for key in source.tensors:
        if key in merged:
            np.testing.assert_allclose(whole(source, key), merged[key], rtol=0, atol=1e-6, err_msg=key)
            assert not np.array_equal(merged[key], base.array(key))
            assert (source.tensors[key].place is None) != (key in FULL_TRAINED.get(name, ()) or "post_layer" in key)
        else:
            assert np.array_equal(whole(source, key), base.array(key)), key


def test_untouched_tensors_keep_their_place(data: Path, base: TensorSource) -> None:
    source = open_adapter(data / "lora" / "dora", base)
    assert source.tensors["action_in_proj.weight"] is base.tensors["action_in_proj.weight"]
    assert source.files[: len(base.files)] == base.files
    assert {path.name for path in source.files} == {
        "model.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
    }


def test_rows_of_any_piece_are_the_same(data: Path, base: TensorSource) -> None:
    for name, key in (("rslora", EMBEDDING), ("dora", f"{EXPERT}{Q_PROJ}.weight"), ("bias", "time_mlp_in.bias")):
        source = open_adapter(data / "lora" / name, base)
        parts = [source.rows(key, start, start + 1) for start in range(5)]
        np.testing.assert_allclose(np.concatenate(parts), source.array(key)[:5], rtol=0, atol=1e-6)


def test_a_bfloat16_base_is_not_rounded_again(data: Path, tmp_path: Path) -> None:
    """An update smaller than half a step of bfloat16, 1/256 at 1, survives the merge."""
    name = "time_mlp_in.weight"
    ones = np.full(1024, 0x3F80, "<u2")
    header = json.dumps({name: {"dtype": "BF16", "shape": [32, 32], "data_offsets": [0, 2048]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + ones.tobytes())
    base = SafetensorsSource([SafetensorsIndex(path)], {name: (0, name)})
    folder = tmp_path / "adapter"
    shutil.copytree(data / "lora" / "all_linear", folder)
    factors = {"lora_A": np.full((1, 32), 1e-3, np.float32), "lora_B": np.full((32, 1), 1.0, np.float32)}
    save_file(
        {f"base_model.model.model.time_mlp_in.{part}.weight": value for part, value in factors.items()},
        folder / "adapter_model.safetensors",
    )
    merged = open_adapter(folder, base)
    assert merged.tensors[name].dtype == "F32"
    np.testing.assert_allclose(merged.array(name), 1.001, rtol=1e-6)


def test_a_checkpoint_with_an_adapter_opens(data: Path) -> None:
    checkpoint = Checkpoint.open(data / "openpi_a", adapter=data / "lora" / "rslora")
    assert isinstance(checkpoint.source, LoraSource)
    assert not np.array_equal(checkpoint.read("backbone.embed_tokens.weight"), checkpoint.source.base.array(EMBEDDING))
    assert LM_HEAD not in checkpoint.source.tensors  # it was the old embedding


def test_the_base_is_read_from_the_adapter(data: Path, adapter: Callable[..., Path]) -> None:
    assert is_adapter(data / "lora" / "lerobot") and not is_adapter(data / "openpi_a")
    assert find_base(data / "lora" / "lerobot") == "lerobot/pi05_base"
    assert find_base_revision(data / "lora" / "lerobot") is None
    folder = adapter("lerobot", {"base_model_name_or_path": None, "revision": "v1"})
    assert find_base_revision(folder) == "v1"
    with pytest.raises(CheckpointError, match=r"does not record 'base_model_name_or_path': give the base with --base"):
        find_base(folder)


def test_a_base_that_cannot_be_had(
    data: Path, tmp_path: Path, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter("lerobot", {"base_model_name_or_path": "/home/trainer/pi05", "revision": "v1"})
    message = rf"{folder} is a LoRA adapter of '/home/trainer/pi05', which cannot be had: .*; give it with --base"
    with pytest.raises(CheckpointError, match=message):
        resolve_base(folder)
    with pytest.raises(CheckpointError, match="LoRA adapter of 'nowhere', which cannot be had"):
        resolve_base(folder, "nowhere")
    assert resolve_base(folder, data / "openpi_a").folder == data / "openpi_a"
    with pytest.raises(CheckpointError, match=r"is an adapter too: merge that one with PEFT first"):
        resolve_base(folder, folder)
    monkeypatch.chdir(data)
    relative = adapter("dora", {"base_model_name_or_path": "openpi_a", "revision": "v1"})
    assert resolve_base(relative).folder == Path("openpi_a")


def test_patterns_name_whole_modules(adapter: Callable[..., Path]) -> None:
    """peft matches a pattern against a module's name or what follows a dot in it, the first pattern first."""
    config = AdapterConfig.read(adapter("lerobot", {"alpha_pattern": {"proj": 1, "a.q_proj": 2, "q_proj": 3}}))
    assert [config.scale(name) for name in ("x.a.q_proj", "xa.q_proj", "q_proj", "proj")] == [
        2 / 4,
        3 / 4,
        3 / 4,
        1 / 4,
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "method is 'LOHA', and only 'LORA'"),
        ({"peft_type": "IA3"}, "method is 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changed the base's weights"),
        ({"trainable_token_indices": [1]}, r"uses 'trainable_token_indices' \(it trains single rows"),
        ({"target_parameters": ["experts"]}, "uses 'target_parameters'"),
        ({"layer_replication": [[0, 2]]}, "uses 'layer_replication'"),
        ({"a_method_of_tomorrow": 1}, "uses 'a_method_of_tomorrow'"),
        ({"r": 0}, "'r' is 0, expected a positive number"),
        ({"r": True}, "'r' is True"),
        ({"lora_alpha": "8"}, "'lora_alpha' is '8'"),
        ({"lora_alpha": 1e999}, "Infinity is not a JSON number"),
        ({"rank_pattern": {"(": 2}}, r"'rank_pattern' has the pattern '\('"),
        ({"rank_pattern": {"x" * 2000: 2}}, "longer than 1000"),
        ({"alpha_pattern": [1]}, "'alpha_pattern' must be an object"),
        ({"r": 5}, r"lora_A.weight' has shape \[4, 32\], expected \[5, 32\] for rank 5"),
        ({"use_dora": True}, "has no lora_magnitude_vector"),
        ({"bias": "lora_only", "modules_to_save": None}, None),
    ],
)
def test_settings_that_cannot_be_merged(
    settings: dict[str, Any], message: str | None, adapter: Callable[..., Path], base: TensorSource
) -> None:
    folder = adapter("lerobot", settings)
    if message is None:  # the biases of a layer trained in full are biases
        open_adapter(folder, base)
        return
    with pytest.raises(CheckpointError, match=message) as caught:
        open_adapter(folder, base)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"base_model.model.model.nowhere.lora_A.weight": np.ones((1, 4))}, "expected weights in F32"),
        (
            {"base_model.model.model.nowhere.lora_A.weight": np.ones((1, 4), np.float32)},
            r"'model.nowhere' has no tensor in the base \('nowhere.weight' is not there\)",
        ),
        ({"base_model.model.model.nowhere.weight": np.ones(4, np.float32)}, "'nowhere.weight' is not there"),
        ({LAST: None}, "adapter of 'model.time_mlp_in' has no lora_B"),
        ({LAST: np.ones((31, 1), np.float32)}, r"has shape \[31, 1\], expected \[32, 1\] for rank 1"),
        ({LAST: np.ones((32, 2), np.float32)}, r"has shape \[32, 2\], expected \[32, 1\] for rank 1"),
        ({"base_model.model.time_mlp_in.lora_B.weight": np.ones((32, 1), np.float32)}, "are the same tensor"),
        ({"base_model.model.model.time_mlp_in.lora_magnitude_vector": np.ones(32, np.float32)}, "does not tell of"),
        ({"base_model.model.model.time_mlp_in.bias": np.ones(31, np.float32)}, r"has shape \[31\], the base \[32\]"),
        (
            {f"base_model.model.model.{LM_HEAD.removesuffix('.weight')}.lora_B.weight": np.ones((1024, 1), np.float32)},
            "which this model ties to the embedding",
        ),
        ({f"base_model.model.model.{LM_HEAD}": np.ones((1024, 64), np.float32)}, "ties to the embedding"),
    ],
)
def test_tensors_that_do_not_fit(
    tensors: dict[str, Any], message: str, adapter: Callable[..., Path], base: TensorSource
) -> None:
    folder = adapter("all_linear", tensors=tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_adapter(folder, base)
    assert "\n" not in str(caught.value) and "adapter_model.safetensors" in str(caught.value)


def test_a_head_saved_unchanged_is_no_change(adapter: Callable[..., Path], base: TensorSource) -> None:
    folder = adapter("all_linear", tensors={f"base_model.model.model.{LM_HEAD}": base.array(EMBEDDING)})
    assert open_adapter(folder, base).tensors[LM_HEAD] == base.tensors[LM_HEAD]


def test_biases_that_were_trained_but_not_saved(adapter: Callable[..., Path], base: TensorSource) -> None:
    with pytest.raises(CheckpointError, match=r"biases were trained \(bias: 'lora_only'\)"):
        open_adapter(adapter("all_linear", {"bias": "lora_only"}), base)


def test_values_that_are_not_finite(adapter: Callable[..., Path], base: TensorSource) -> None:
    source = open_adapter(adapter("all_linear", tensors={LAST: np.full((32, 1), np.nan, np.float32)}), base)
    with pytest.raises(CheckpointError, match=r"'time_mlp_in.weight' merged has values that are not finite"):
        source.array("time_mlp_in.weight")


def test_folders_that_are_no_adapter(tmp_path: Path, data: Path, base: TensorSource) -> None:
    with pytest.raises(CheckpointError, match=r"holds no adapter: expected adapter_config\.json"):
        open_adapter(tmp_path, base)
    shutil.copy(data / "lora" / "lerobot" / "adapter_config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors: copy it again"):
        open_adapter(tmp_path, base)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle, which is never opened"):
        open_adapter(tmp_path, base)
