"""PyTorch checkpoints of every spelling, sharded ones, what is no checkpoint, and a file that changes meanwhile."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.keys import canonical, checkpoint_key, parameter_shapes
from ki_edge.config import PI05
from ki_edge.errors import CheckpointError
from ki_edge.model import Pi05, load_model

P = "paligemma_with_expert.paligemma."


@pytest.fixture
def folder(data, tmp_path):
    """The golden checkpoint, to be rewritten."""
    at = tmp_path / "checkpoint"
    at.mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(data / "openpi_a" / name, at)
    return at


def rewrite(folder, rename):
    file = folder / "model.safetensors"
    save_file({rename(key): value for key, value in load_file(file).items()}, file)


def same_as_golden(folder, data):
    expected = load_model(Checkpoint.open(data / "openpi_a")).state_dict()
    given = load_model(Checkpoint.open(folder)).state_dict()
    return expected.keys() == given.keys() and all(torch.equal(expected[name], given[name]) for name in expected)


def before_transformers_452(key):
    for new, old in (
        (P + "model.language_model.", P + "language_model.model."),
        (P + "model.vision_tower.", P + "vision_tower."),
        (P + "model.multi_modal_projector.", P + "multi_modal_projector."),
        (P + "lm_head.", P + "language_model.lm_head."),
    ):
        if key.startswith(new):
            return old + key[len(new) :]
    return key


@pytest.mark.parametrize(
    "rename",
    [
        before_transformers_452,
        lambda key: "_orig_mod." + key,
        lambda key: "model._orig_mod." + key,
        lambda key: "_orig_mod.model." + key,
        lambda key: "module." + key,
        lambda key: key.replace(".model.", "._orig_mod.model.") if "gemma_expert" in key else key,
        lambda key: "module._orig_mod." + before_transformers_452(key),
    ],
    ids=["old names", "compiled", "lerobot compiled inside", "compiled lerobot", "distributed", "compiled part", "all"],
)
def test_every_spelling_is_the_same_model(folder, data, rename):
    rewrite(folder, rename)
    assert same_as_golden(folder, data)


def test_canonical_names_are_left_alone(data):
    for key in json.loads((data / "pi05_state_dict.json").read_text()):
        assert canonical(key) == key
        assert canonical("model." + key) == key


def test_shapes_are_those_of_the_module():
    with torch.device("meta"):
        module = {checkpoint_key(name): tuple(t.shape) for name, t in Pi05(PI05).state_dict().items()}
    assert parameter_shapes(PI05) == module


def test_a_sharded_checkpoint(folder, data):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    places = {key: file for file, keys in halves.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()
    assert same_as_golden(folder, data)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"file 'model-00002-of-00002\.safetensors' of its 2 is missing"):
        Checkpoint.open(folder)
    places["x"] = "../model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        Checkpoint.open(folder)


def test_the_file_itself_can_be_given(folder):
    assert Checkpoint.open(folder / "model.safetensors").path == folder


def test_the_same_tensor_twice(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.action_in_proj.bias"] = tensors["action_in_proj.bias"].clone()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"are the same tensor 'action_in_proj\.bias'"):
        Checkpoint.open(folder)


def test_two_formats_in_one_folder(folder):
    (folder / "params").mkdir()
    with pytest.raises(CheckpointError, match=r"holds two formats, model\.safetensors and params/: give one of them"):
        Checkpoint.open(folder)
    assert Checkpoint.open(folder / "model.safetensors").format == "openpi"


@pytest.mark.parametrize("kind", ["act", "diffusion", "pi0_fast", 5])
def test_another_policy_of_lerobot_is_named(folder, kind):
    (folder / "config.json").write_text(json.dumps({"type": kind}))
    with pytest.raises(CheckpointError, match=f"LeRobot's policy {kind!r}: expected pi05 or pi0"):
        Checkpoint.open(folder)


def test_what_holds_no_checkpoint_says_what_to_try(folder, tmp_path):
    def refused(path, message):
        with pytest.raises(CheckpointError, match=message) as caught:
            Checkpoint.open(path)
        assert "\n" not in str(caught.value)

    refused(tmp_path, "folders that do: give one of them, such as .*checkpoint")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"expected model\.safetensors or params/, found nothing")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(tmp_path / "empty", r"only pytorch_model\.bin, a pickle, which is never opened")
    refused(tmp_path / "nowhere", "no checkpoint folder at .*nowhere")


def test_the_horizon_can_be_given_where_nothing_records_it(folder):
    (folder / "config.json").write_text(json.dumps({"tiny": json.loads((folder / "config.json").read_text())["tiny"]}))
    with pytest.raises(CheckpointError, match=r"action horizon is not recorded .*: give --contract, or --horizon"):
        Checkpoint.open(folder)
    assert Checkpoint.open(folder, horizon=7).config.action_horizon == 7


def test_a_horizon_that_contradicts_the_checkpoint(folder):
    with pytest.raises(CheckpointError, match="records an action horizon of 10, but 7 was asked for"):
        Checkpoint.open(folder, horizon=7)


def test_a_change_is_noticed(folder):
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_unchanged()
    status = (folder / "model.safetensors").stat()
    os.utime(folder / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint.check_unchanged()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        checkpoint.check_unchanged()


def test_a_file_that_shrinks_under_the_reader(folder):
    checkpoint = Checkpoint.open(folder)
    os.truncate(folder / "model.safetensors", 200_000)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        load_model(checkpoint)


def test_pieces_make_up_the_tensor(folder, monkeypatch):
    source = Checkpoint.open(folder).source
    monkeypatch.setattr("ki_edge.checkpoints.layout.source.PIECE", 100)
    for key in parameter_shapes(Checkpoint.open(folder).config):
        whole = source.array(key)
        pieces = list(source.pieces(key))
        assert all(piece.size <= max(100, whole[0].size) for piece in pieces)
        np.testing.assert_array_equal(np.concatenate(pieces).reshape(whole.shape), whole)
