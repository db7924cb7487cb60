"""LoRA in training: the merged checkpoint is what ki-export merges from base and adapter, and what PEFT computes."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ki_edge.checkpoints import Checkpoint
from ki_edge.checkpoints.layout.keys import checkpoint_key
from ki_edge.model import load_model, save_checkpoint
from ki_edge.planning.settings import GROUPS, TrainSettings
from ki_edge.train.parallel.engine import Engine
from ki_edge.train.parallel.starting import open_start

sys.path.insert(0, str(Path(__file__).parent))
from parallel_parts import MICRO, random_batch, random_model, train

EVERYWHERE = tuple((group, rank) for rank, group in enumerate(GROUPS, start=2))
SETTINGS = TrainSettings(batch=4, steps=20, warmup=1, bfloat16=False, ema=0.5, learning_rate=0.01)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_checkpoint(random_model(), folder)
    return folder


@pytest.fixture(scope="module", params=[EVERYWHERE, (("backbone", 4),)], ids=["everywhere", "backbone"])
def trained(request, base, tmp_path_factory):
    """An engine with adapters after three steps, and the folder it saved."""
    model, weights = open_start(base, MICRO)
    engine = Engine(model, replace(SETTINGS, lora=request.param), weights=weights)
    engine.base = str(base)
    train(engine, 0, 3, texts=1)
    folder = tmp_path_factory.mktemp("trained")
    engine.save_checkpoint(folder)
    return engine, folder


def test_merged_is_base_and_adapter_as_export_reads_them(base, trained):
    _, folder = trained
    read, merged = Checkpoint.open(base, adapter=folder / "adapter"), Checkpoint.open(folder)
    moved = 0
    for name in random_model().state_dict():
        np.testing.assert_array_equal(merged.read(name), read.read(name), err_msg=name)
        moved += not np.array_equal(merged.read(name), Checkpoint.open(base).read(name))
    assert moved > 20


def test_merged_computes_what_the_adapters_do(trained):
    """Also the embedding's adapter, which works on tokens and on logits; sampled tokens are the same ones."""
    engine, folder = trained
    batch, merged = random_batch(50, 4), load_model(folder)
    arguments = (batch.observation, batch.actions)
    with engine.averaged() as model:
        ours = model.compute_loss(*arguments, noise=batch.noise, time=batch.time)
        tokens = model.sample_fast_tokens(batch.observation, max_tokens=5, constrained=False)
    with torch.no_grad():
        theirs = merged.compute_loss(*arguments, noise=batch.noise, time=batch.time)
    torch.testing.assert_close(ours.flow, theirs.flow, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.fast, theirs.fast, rtol=1e-4, atol=1e-5)
    assert torch.equal(tokens, merged.sample_fast_tokens(batch.observation, max_tokens=5, constrained=False))


def test_only_adapters_learn_in_their_groups(trained):
    engine, _ = trained
    groups = dict(engine.settings.lora)
    for name, parameter in engine.model.named_parameters():
        inside = name.startswith("backbone.layers.") or (len(groups) > 1 and name.startswith(("vision.", "expert.")))
        if inside:
            assert parameter.requires_grad == ("lora_" in name), name
    assert engine.learning["action_in_proj.weight"].requires_grad  # small ones learn in full


def test_the_folder_is_one_of_peft(base, trained):
    """PEFT reads it back: names, ranks and scales; and its own merge of a layer is ours."""
    from peft import LoraConfig, get_peft_model, load_peft_weights

    engine, folder = trained
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config = LoraConfig.from_pretrained(str(folder / "adapter"))
    assert config.base_model_name_or_path == str(base) and settings["peft_type"] == "LORA"
    stored = load_peft_weights(str(folder / "adapter"), device="cpu")
    module = "backbone.layers.1.self_attn.q_proj"
    key = checkpoint_key(module + ".weight").removesuffix(".weight")
    before = Checkpoint.open(base).read(module + ".weight")
    layer = torch.nn.Linear(before.shape[1], before.shape[0], bias=False)
    layer.weight.data = torch.from_numpy(before)
    rank = dict(engine.settings.lora)["backbone"]
    holder = get_peft_model(
        torch.nn.ModuleDict({"layer": layer}), LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
    )
    adapted = holder.base_model.model["layer"]
    with torch.no_grad():
        adapted.lora_A["default"].weight.copy_(stored[f"base_model.model.{key}.lora_A.weight"])
        adapted.lora_B["default"].weight.copy_(stored[f"base_model.model.{key}.lora_B.weight"])
    merged = holder.merge_and_unload()["layer"].weight.detach().numpy()
    assert config.rank_pattern.get(key, config.r) == config.alpha_pattern.get(key, config.lora_alpha) == rank
    np.testing.assert_allclose(Checkpoint.open(folder).read(module + ".weight"), merged, rtol=1e-6, atol=1e-7)


def test_what_learns_in_full_is_in_the_folder_too(base, trained):
    engine, folder = trained
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    full = {name for name in engine.learning if "lora_" not in name}
    assert full and all("base_model.model." + checkpoint_key(name) in stored for name in full)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert {"action_in_proj", "time_mlp_in"} <= set(config["modules_to_save"])


def test_the_first_step_starts_from_the_base(base):
    model, weights = open_start(base, MICRO)
    engine = Engine(model, replace(SETTINGS, lora=EVERYWHERE), weights=weights)
    plain = Engine(random_model(), SETTINGS)
    ours, theirs = train(engine, 0, 1)[0], train(plain, 0, 1)[0]
    for term in ("flow", "fast", "total"):
        assert ours[term] == pytest.approx(theirs[term], rel=1e-6)
