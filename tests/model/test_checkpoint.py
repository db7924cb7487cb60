"""Checkpoint folders: both layouts, the tied embedding, dtypes, what is refused, and writing."""

import json
import shutil
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.keys import checkpoint_key
from ki_edge.config import PI05, TINY, GemmaConfig, Pi05Config, VisionConfig
from ki_edge.errors import CheckpointError
from ki_edge.files.safetensors_index import SafetensorsIndex
from ki_edge.model import load_model, save_checkpoint
from ki_edge.model.checkpoint import _variants

P = "paligemma_with_expert.paligemma."
EMBEDDING = P + "model.language_model.embed_tokens.weight"
LM_HEAD = P + "lm_head.weight"
NORM = P + "model.language_model.norm.weight"
GEOMETRY = {  # of the golden checkpoints "openpi_a" and "lerobot_a", as their makers describe it
    "vision": VisionConfig(width=64, depth=2, mlp_dim=112, num_heads=4, patch_size=14, image_size=224),
    "backbone": GemmaConfig(width=64, depth=3, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=16),
    "expert": GemmaConfig(width=32, depth=3, mlp_dim=64, num_heads=4, num_kv_heads=1, head_dim=16),
}


@pytest.fixture(scope="module")
def real(data):
    """Every key of the released π0.5 models: [shape, dtype as openpi deploys it]."""
    return json.loads((data / "pi05_state_dict.json").read_text())


@pytest.fixture
def folder(small_model, tmp_path):
    """A small checkpoint that the test may damage."""
    save_checkpoint(small_model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def edit(folder):
    """edit(function): rewrite the stored tensors, a dict, with function(tensors)."""

    def rewrite(change, at=folder, **options):
        tensors = load_file(at / "model.safetensors")
        change(tensors)
        save_file(tensors, at / "model.safetensors", **options)

    return rewrite


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


# ---------------------------------------------------------------------- what is read


@pytest.mark.parametrize("layout", ["openpi", "lerobot"])
def test_layout_and_geometry(data, layout):
    checkpoint = Checkpoint.open(data / f"{layout}_a")
    assert (checkpoint.format, checkpoint.time_convention) == (layout, layout)
    assert checkpoint.config == Pi05Config(**GEOMETRY, vocab_size=1024, action_dim=32, action_horizon=10)


def test_geometry_of_the_real_model(real, tmp_path):
    """From a file with all headers and no content."""
    header, end = {}, 0
    for key, (shape, _) in real.items():
        if key != EMBEDDING:
            begin, end = end, end + 2 * int(torch.tensor(shape).prod())
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    blob = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(blob)) + blob)
        file.truncate(8 + len(blob) + end)  # a hole
    (tmp_path / "config.json").write_text('{"action_horizon": 50}')
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == PI05
    assert set(checkpoint.source.tensors) == set(real)


def test_heads_of_openpis_debug_variant_need_no_geometry_block(data, tmp_path):
    shutil.copytree(data / "ki", tmp_path / "ki")
    (tmp_path / "ki" / "config.json").write_text('{"action_horizon": 12}')
    backbone = Checkpoint.open(tmp_path / "ki").config.backbone
    assert (backbone.num_heads, backbone.num_kv_heads, backbone.head_dim) == (8, 1, 16)


def test_both_layouts_hold_the_same_model(data):
    first, second = (load_model(data / name).state_dict() for name in ("openpi_a", "lerobot_a"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["openpi_a", "lerobot_a"])
def test_the_stored_embedding_wins_over_the_head(data, tmp_path, edit, name):
    """LeRobot trains embed_tokens and leaves lm_head behind."""
    at = shutil.copytree(data / name, tmp_path / "both")
    prefix = "model." if name == "lerobot_a" else ""

    def untie(tensors):
        tensors[prefix + EMBEDDING] = tensors[prefix + LM_HEAD].clone()
        tensors[prefix + LM_HEAD] += 1.0

    edit(untie, at)
    embedding = load_model(at).state_dict()["backbone.embed_tokens.weight"]
    assert torch.equal(embedding, load_model(data / name).state_dict()["backbone.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["openpi_a", "lerobot_a"])
def test_the_head_alone_is_the_embedding(data, tmp_path, edit, name):
    at = shutil.copytree(data / name, tmp_path / "head")
    prefix = "model." if name == "lerobot_a" else ""
    edit(lambda tensors: tensors.pop(prefix + EMBEDDING, None), at)
    embedding = load_model(at).state_dict()["backbone.embed_tokens.weight"]
    assert torch.equal(embedding, load_file(at / "model.safetensors")[prefix + LM_HEAD])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_widened(folder, edit, small_model, stored):
    edit(lambda tensors: tensors.update({name: value.to(stored) for name, value in tensors.items()}))
    loaded = load_model(folder).state_dict()
    for name, value in small_model.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], value.to(stored).float()), name


def test_parameters_that_stay_float32_are_openpis(data, real):
    model = load_model(data / "openpi_a", dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        assert str(value.dtype) == f"torch.{real[checkpoint_key(name)][1]}", name


def test_a_loaded_model_is_in_evaluation_mode(folder):
    assert not load_model(str(folder)).training


def test_entry_tells_where_a_tensor_lies(data):
    for name in ("openpi_a", "lerobot_a"):
        checkpoint = Checkpoint.open(data / name)
        tensor = checkpoint.source.tensors[EMBEDDING]
        assert (tensor.dtype, tensor.shape) == ("F32", (1024, 64))
        with (data / name / "model.safetensors").open("rb") as file:
            file.seek(tensor.place.offset)
            content = torch.frombuffer(bytearray(file.read(tensor.nbytes)), dtype=torch.float32)
        assert torch.equal(content.view(1024, 64), load_model(checkpoint).backbone.embed_tokens.weight)


# ---------------------------------------------------------------------- what is refused


def test_no_folder(tmp_path):
    refused(tmp_path / "none", "no checkpoint folder at .*none")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "no checkpoint folder")


def test_no_file(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, r"holds no checkpoint: expected model\.safetensors or params/, found config\.json")


@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_truncated_file(folder, share):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: int(share * len(content))])
    refused(folder, "is truncated.*copy it again")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle in disguise", b"{}" * 50])
def test_foreign_file(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "is not a safetensors file")


def test_missing_key(folder, edit):
    edit(lambda tensors: tensors.pop(NORM))
    refused(folder, rf"key '{NORM}' is missing \(1 missing, 0 unexpected of \d+\)")


@pytest.mark.parametrize(
    "key",
    [
        "action_in_proj.weight",
        LM_HEAD,
        P + "model.language_model.layers.0.self_attn.k_proj.weight",
        P + "model.vision_tower.vision_model.embeddings.position_embedding.weight",
        "paligemma_with_expert.gemma_expert.model.layers.0.mlp.gate_proj.weight",
    ],
)
def test_missing_key_that_the_geometry_is_read_from(folder, edit, key):
    edit(lambda tensors: tensors.pop(key))
    refused(folder, f"key '{EMBEDDING if key == LM_HEAD else key}' is missing")


def test_unexpected_key(folder, edit):
    edit(lambda tensors: tensors.update({"memory.weight": torch.zeros(2)}))
    refused(folder, r"unexpected key 'memory\.weight' \(0 missing, 1 unexpected")


def test_a_lost_layer(folder, edit):
    """Of both transformers, or of one."""
    layer = P + "model.language_model.layers.1."
    edit(lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(layer)])
    refused(folder, "their depth is 2 and 3")
    edit(lambda tensors: [tensors.pop(name) for name in list(tensors) if "expert.model.layers.1." in name])
    refused(folder, rf"key '.*layers\.1\..*' is missing \({9 + 11} missing, {9 + 11} unexpected")


def test_a_layer_number_out_of_this_world(folder, edit):
    """It must not make the reader build a billion layers."""
    edit(
        lambda tensors: tensors.update({P + "model.language_model.layers.999999999.mlp.up_proj.weight": torch.ones(1)})
    )
    refused(folder, "their depth is 4 and 3")


def test_wrong_shape(folder, edit):
    edit(lambda tensors: tensors.update({NORM: torch.zeros(25)}))
    refused(folder, rf"'{NORM}' has shape \[25\], expected \[24\]")


def test_wrong_dtype(folder, edit):
    edit(lambda tensors: tensors.update({NORM: torch.zeros(24).long()}))
    refused(folder, rf"'{NORM}' has dtype I64, expected F32, BF16, F16")


def test_time_layers_under_the_name_that_pi0_gave_them(folder, edit, small_model):
    """LeRobot's early π0.5 files: adaRMS in the expert, but π0's names and its unused state projection."""

    def older(tensors):
        for name in list(tensors):
            if name.startswith("time_mlp_"):
                tensors["action_" + name] = tensors.pop(name)
        tensors["state_proj.weight"] = torch.zeros(16, 6)

    edit(older)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config.variant == "pi05"
    assert torch.equal(load_model(checkpoint).time_mlp_in.weight, small_model.time_mlp_in.weight)


def test_another_model_is_named_by_its_keys(folder):
    save_file({"encoder.weight": torch.zeros(1)}, folder / "model.safetensors")
    refused(folder, r"keys such as \['encoder\.weight'\]")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b" " * 16_000_001, "more than such a file can have"),
        (b"{}", "has neither 'action_horizon' nor 'chunk_size'"),
    ],
)
def test_bad_config(folder, content, message):
    (folder / "config.json").write_bytes(content)
    refused(folder, message)


def test_no_config_at_all(folder):
    (folder / "config.json").unlink()
    refused(folder, r"config\.json has neither 'action_horizon' nor 'chunk_size'")


@pytest.mark.parametrize("horizon", [0, -3, 2.5, "10", True, [10]])
def test_bad_horizon(folder, horizon):
    configure(folder, action_horizon=horizon)
    refused(folder, r"config\.json: 'action_horizon' is .*, expected a positive integer")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("vision", None, "no geometry in its tensors and config.json"),
        ("vision", {"num_attention_heads": "x"}, "no geometry in its tensors and config.json"),
        ("vision", {"num_attention_heads": 0}, "width 16 cannot be split into 0 heads"),
        ("vision", {"num_attention_heads": 3}, "width 16 cannot be split into 3 heads"),
        ("paligemma", 5, "no geometry in its tensors and config.json"),
        ("paligemma", {"head_dim": 0}, "no geometry in its tensors and config.json"),
        ("paligemma", {"head_dim": 1000}, "0 query heads cannot share 0 K/V heads"),
        ("paligemma", {"head_dim": 4}, "their num_heads is 8 and 4"),
    ],
)
def test_bad_geometry_block(folder, part, value, message):
    block = json.loads((folder / "config.json").read_text())["head_sizes"]
    configure(folder, head_sizes={**block, part: value})
    refused(folder, message)


# ---------------------------------------------------------------------- what is written


def test_round_trip(small_model, folder):
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config == small_model.config
    assert checkpoint.format == "openpi"
    loaded = load_model(checkpoint).state_dict()
    assert loaded.keys() == small_model.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in small_model.state_dict().items())


def test_written_keys_are_openpis(folder, real):
    """Every key of the small model exists in the real one, and the tie is recorded the same way."""
    stored = load_file(folder / "model.safetensors")
    assert set(stored) <= set(real)
    assert EMBEDDING not in stored
    assert SafetensorsIndex(folder / "model.safetensors").metadata[EMBEDDING] == LM_HEAD
    layers = {name for name in real if "layers." not in name or "layers.0." in name or "layers.1." in name}
    assert layers - {EMBEDDING} <= set(stored)
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["action_dim"], settings["action_horizon"], settings["max_token_len"]) == (6, 5, 200)


def test_saving_again_replaces_the_files(small_model, folder):
    with torch.no_grad():
        small_model.action_out_proj.bias += 1.0
    small_model.half()
    save_checkpoint(small_model, str(folder), max_token_len=64)
    bias = load_model(folder).action_out_proj.bias
    assert torch.equal(bias, small_model.action_out_proj.bias.float())
    assert json.loads((folder / "config.json").read_text())["max_token_len"] == 64
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_openpi_knows_the_variants_that_are_written():
    """Both names or none: openpi's own reader fails for a name that it does not know."""
    assert _variants(PI05) == {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
    assert _variants(TINY) == {}
    assert _variants(replace(TINY, backbone=PI05.backbone, expert=PI05.expert)) == _variants(PI05)
    small = GemmaConfig(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16)
    both = replace(TINY, backbone=small, expert=small)
    assert _variants(both) == {"paligemma_variant": "dummy", "action_expert_variant": "dummy"}
    assert _variants(replace(both, expert=replace(small, width=32))) == {}
