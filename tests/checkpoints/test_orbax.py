"""The reader of JAX checkpoints against folders that the real orbax library wrote (tests/data/orbax/write_orbax.py)."""

import json
import shutil
import sys
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import tensorstore
from safetensors.numpy import load_file

from ki_edge.checkpoints.jax import zarr_arrays
from ki_edge.checkpoints.jax.orbax import OrbaxSource
from ki_edge.checkpoints.jax.tree import recipes
from ki_edge.checkpoints.jax.values import _indirect, database_values
from ki_edge.checkpoints.layout.keys import EMBEDDING, EXPERT_HEAD, LM_HEAD
from ki_edge.errors import CheckpointError

DATA = Path(__file__).parents[1] / "data" / "orbax"
Q = "paligemma_with_expert.paligemma.model.language_model.layers.1.self_attn.q_proj.weight"
FOLDERS = {  # folder -> the tensors it was written from
    "openpi_a": "../openpi_a/model",
    "sharded": "small",
    "bfloat16": "small",
    "files": "small",
    "zarr3": "small",
    "pi0": "pi0",
}


def expected(name: str) -> dict[str, np.ndarray]:
    tensors = load_file(DATA / f"{name}.safetensors")
    tensors.pop(EXPERT_HEAD, None)
    if LM_HEAD in tensors:
        tensors[EMBEDDING] = tensors.pop(LM_HEAD)
    return tensors


@pytest.fixture(params=["tensorstore", "streams"])
def reading(request, monkeypatch):
    """Small chunks are tensorstore's, large ones are streams: both ways over the same folders."""
    if request.param == "streams":
        monkeypatch.setattr(zarr_arrays, "STREAM", 0)


@pytest.fixture
def folder(tmp_path):
    """A copy of the folder of plain files, to break."""
    return shutil.copytree(DATA / "files", tmp_path / "checkpoint")


@pytest.mark.parametrize("name", FOLDERS)
def test_every_tensor_is_bit_equal_to_the_pytorch_one(name, reading):
    source, wanted = OrbaxSource.open(DATA / name), expected(FOLDERS[name])
    assert set(source.tensors) == set(wanted)
    for key, tensor in source.tensors.items():
        assert tensor.dtype == ("BF16" if name == "bfloat16" else "F32")
        assert tensor.shape == wanted[key].shape
        values = source.array(key)
        assert values.dtype == np.float32 and values.tobytes() == wanted[key].tobytes(), key


def test_lora_is_merged_as_openpi_computes_it(reading):
    source, wanted = OrbaxSource.open(DATA / "lora"), expected("lora")
    assert set(source.tensors) == set(wanted)
    for key, tensor in source.tensors.items():
        merged = key.endswith("_proj.weight") and "vision" not in key
        assert tensor.dtype == ("BF16" if "language_model" in key or "gemma_expert" in key else "F32") or merged
        np.testing.assert_allclose(source.array(key), wanted[key], rtol=0, atol=1e-6 if merged else 0)
    assert source.tensors[Q].dtype == "F32"


def test_rows_in_any_order(reading):
    source, wanted = OrbaxSource.open(DATA / "sharded"), expected("small")
    for key in reversed(source.tensors):
        middle = source.tensors[key].shape[0] // 2
        for start, stop in ((middle, source.tensors[key].shape[0]), (0, middle), (middle, middle + 1)):
            np.testing.assert_array_equal(source.rows(key, start, stop), wanted[key][start:stop])


def test_opening_reads_no_tensor(monkeypatch):
    monkeypatch.setattr(zarr_arrays.StoredArray, "read", None)
    source = OrbaxSource.open(DATA / "openpi_a" / "params")
    assert source.geometry["vision"] == {"num_attention_heads": 4}
    assert source.geometry["action_expert"] == {"head_dim": 16}
    assert {path.name for path in source.files} >= {"_METADATA", "manifest.ocdbt"}


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
@pytest.mark.parametrize("chunks", [(5, 7, 6), (2, 3, 4), (1, 7, 2), (4, 2, 6)])
def test_uneven_chunks(tmp_path, monkeypatch, driver, chunks):
    monkeypatch.setattr(zarr_arrays, "STREAM", 0)
    monkeypatch.setattr(zarr_arrays, "READ", 16)
    values = np.arange(5 * 7 * 6, dtype=np.float32).reshape(5, 7, 6)
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{tmp_path}/a/"}, "create": True}
    layout = {"chunks": chunks, "compressor": {"id": "zstd"}}
    if driver == "zarr3":
        codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd"}]
        grid = {"name": "regular", "configuration": {"chunk_shape": chunks}}
        layout = {"chunk_grid": grid, "codecs": codecs}
    spec["metadata"] = layout
    array = tensorstore.open(spec, dtype="float32", shape=values.shape).result()
    array.write(values).result()
    store = zarr_arrays.ArrayStore(tmp_path, ocdbt=False, zarr3=driver == "zarr3", complete=True)
    stored = store.open("a")
    assert stored.streamed
    for first in (3, 0, 4, 1):
        for start, stop in ((0, 7), (2, 5), (6, 7)):
            np.testing.assert_array_equal(stored.read((first,), start, stop), values[first, start:stop])
    np.testing.assert_array_equal(stored.read((), 1, 4), values[1:4])
    np.testing.assert_array_equal(stored.read((2, 3), 1, 6), values[2, 3, 1:6])


def test_a_large_chunk_is_decompressed_once(monkeypatch):
    monkeypatch.setattr(zarr_arrays, "STREAM", 0)
    starts = []
    restart = zarr_arrays._Stream._restart
    monkeypatch.setattr(zarr_arrays._Stream, "_restart", lambda stream: starts.append(stream.key) or restart(stream))
    source = OrbaxSource.open(DATA / "zarr3")
    for key in source.tensors:
        list(source.pieces(key))
    assert len(starts) == len(set(starts)) == len(source.arrays)


def test_a_database_of_many_nodes_and_versions(tmp_path):
    small = {"max_decoded_node_bytes": 300, "max_inline_value_bytes": 10}
    base = {"driver": "file", "path": f"{tmp_path}/"}
    database = tensorstore.KvStore.open({"driver": "ocdbt", "base": base, "config": small}).result()
    wanted = {}
    for number in range(0, 200, 2):
        key, value = f"params.{'ab'[number % 4 // 2]}.{number}/0.0", bytes([number]) * (number % 30)
        database[key] = wanted[key] = value
    values = database_values(tensorstore, tmp_path)
    assert {key: value.read(0, 1000) for key, value in values.items()} == wanted
    assert values["params.a.28/0.0"].read(3, 5) == bytes([28]) * 2
    assert tensorstore.ocdbt.dump(database.base).result()["versions"][-1]["root_height"] >= 2


@pytest.mark.parametrize("name", ["../x", "/etc/hosts", "d/../../x"])
def test_a_database_that_points_outside(name):
    with pytest.raises(CheckpointError, match="points outside the folder"):
        _indirect(Path("folder"), f"value::{quote(name)}:0:1", {})


def fails(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        source = OrbaxSource.open(folder)
        for key in source.tensors:
            source.array(key)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    for word in (str(folder), *words):
        assert word in message


def test_missing_and_truncated_files_of_a_database(tmp_path):
    """Opening finds them; only the tree that the writing process left behind is not needed."""
    copy = shutil.copytree(DATA / "openpi_a", tmp_path / "checkpoint")
    files = [path for path in copy.rglob("*") if path.parent.name == "d" and path.stat().st_size > 2000]
    files.append(copy / "params" / "manifest.ocdbt")
    assert len(files) >= 3
    for path in files:
        content = path.read_bytes()
        for damaged in (None, content[: len(content) // 2], b""):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"copy the folder again") as caught:
                OrbaxSource.open(copy)
            assert str(copy) in str(caught.value)
            path.write_bytes(content)
    OrbaxSource.open(copy)


def test_missing_chunk(folder):
    (folder / "params" / "params.PaliGemma.llm.layers.mlp.linear" / "0.0.0").unlink()
    fails(folder, "params.PaliGemma.llm.layers.mlp.linear", "copy the folder again")


def test_old_orbax_leaves_out_chunks_of_zeros(folder, reading):
    metadata = folder / "params" / "_METADATA"
    content = json.loads(metadata.read_text())
    metadata.write_text(json.dumps({k: v for k, v in content.items() if not k.startswith("store_")}))
    (folder / "params" / "params.time_mlp_in.bias" / "0").unlink()
    source = OrbaxSource.open(folder)
    assert not source.array("time_mlp_in.bias").any() and source.array("time_mlp_out.bias").any()


def test_damaged_chunk(folder, reading):
    path = folder / "params" / "params.PaliGemma.llm.layers.mlp.linear" / "0.0.0"
    path.write_bytes(b"damaged" + path.read_bytes()[7:])
    fails(folder, "params.PaliGemma.llm.layers.mlp.linear", "copy the folder again")


def test_no_metadata(folder):
    (folder / "params" / "_METADATA").unlink()
    fails(folder, "_METADATA", "copy")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"tree_metadata": {"a": 3}}', '{"tree_metadata": {}}'])
def test_metadata_that_is_none(folder, content):
    (folder / "params" / "_METADATA").write_text(content)
    fails(folder, "_METADATA")


def test_manifest_is_missing(tmp_path):
    copy = shutil.copytree(DATA / "zarr3", tmp_path / "checkpoint")
    (copy / "params" / "manifest.ocdbt").unlink()
    fails(copy, "manifest.ocdbt", "copy the folder again")


def rename(folder: Path, old: str, new: str | None) -> None:
    """Another name for a leaf, in the tree and on the disk; without one it is dropped."""
    metadata = folder / "params" / "_METADATA"
    content = json.loads(metadata.read_text())
    path = ("params", *old.split("/"))
    leaf = content["tree_metadata"].pop(str(path))
    if new is not None:
        leaf["key_metadata"] = [{"key": part, "key_type": 2} for part in ("params", *new.split("/"))]
        content["tree_metadata"][new] = leaf
        (folder / "params" / ".".join(path)).rename(folder / "params" / f"params.{new.replace('/', '.')}")
    metadata.write_text(json.dumps(content))


def test_parameter_is_missing(folder):
    rename(folder, "PaliGemma/llm/layers/mlp_1/linear", None)
    fails(folder, "'PaliGemma/llm/layers/mlp_1/linear' is missing")


@pytest.mark.parametrize("spare", ["PaliGemma/llm/layers/attn/q_einsum/lora_a", "PaliGemma/llm/final_norm_2/scale"])
def test_parameter_that_the_policy_does_not_have(folder, spare):
    params = folder / "params"
    shutil.copytree(params / "params.time_mlp_in.bias", params / f"params.{spare.replace('/', '.')}")
    content = json.loads((params / "_METADATA").read_text())
    content["tree_metadata"]["spare"] = {"key_metadata": [{"key": key} for key in ("params", *spare.split("/"))]}
    (params / "_METADATA").write_text(json.dumps(content))
    fails(folder, f"unexpected parameter '{spare}'")


def test_other_modules_are_left_alone(folder):
    content = json.loads((folder / "params" / "_METADATA").read_text())
    content["tree_metadata"]["x"] = {"key_metadata": [{"key": "params"}, {"key": "value_head"}, {"key": "kernel"}]}
    (folder / "params" / "_METADATA").write_text(json.dumps(content))
    assert OrbaxSource.open(folder).ignored == ("value_head/kernel",)


def test_dtype(folder):
    path = folder / "params" / "params.action_in_proj.bias" / ".zarray"
    path.write_text(path.read_text().replace("<f4", "<i4"))
    fails(folder, "'params.action_in_proj.bias' has dtype int32, expected one of float32, bfloat16, float16")


@pytest.mark.parametrize("library", ["tensorstore", "zstandard"])
def test_library_is_not_installed(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(CheckpointError, match=rf"{library}, which is not installed: pip install 'ki-edge\[jax\]'"):
        OrbaxSource.open(DATA / "pi0")


def small_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {leaf: array.shape for leaf, array in OrbaxSource.open(DATA / name).arrays.items()}


@pytest.mark.parametrize(
    ("leaf", "shape", "message"),
    [
        ("attn/q_einsum/w", (), "expected 4 axes"),
        ("attn/q_einsum/w", (5, 4, 12, 4), "stacks 3 layers, but"),
        ("mlp/linear", (2, 20, 12), "stacks 2 layers, but"),
        ("mlp_1/gating_einsum", (3, 3, 8, 12), "expected 4 axes of which the second has 2 entries"),
        ("attn/q_einsum_1/lora_a", (3, 4, 8, 8), "do not fit"),
        ("mlp_1/linear_lora_b", (3, 32, 9), "do not fit"),
    ],
)
def test_shapes(leaf, shape, message):
    shapes = small_shapes("lora") | {f"PaliGemma/llm/layers/{leaf}": shape}
    with pytest.raises(CheckpointError, match=message):
        recipes(shapes, "folder")


def test_adapter_of_unknown_scale():
    shapes = small_shapes("lora")
    node = "PaliGemma/llm/layers/attn/q_einsum/"
    shapes |= {node + "lora_a": (3, 4, 12, 8), node + "lora_b": (3, 4, 8, 4)}
    with pytest.raises(CheckpointError, match="has rank 8, openpi's variant has 16: its scale"):
        recipes(shapes, "folder")


def test_fast_checkpoint_is_named():
    shapes = {leaf: shape for leaf, shape in small_shapes("pi0").items() if "_1" not in leaf and "proj" not in leaf}
    with pytest.raises(CheckpointError, match="may be a π0-FAST checkpoint"):
        recipes(shapes, "folder")
