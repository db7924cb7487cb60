"""The model that reads its weights while it runs is the model that is loaded whole, bit for bit."""

import numpy as np
import pytest
import torch

from ki_edge.checkpoints import Checkpoint
from ki_edge.model import save_checkpoint, streaming
from ki_edge.model.sampling import denoise_trace
from ki_edge.model.streaming import read_rows, streamed

GOLDEN = ("openpi_a", "lerobot_a")


def loaded(model):
    """Bytes of weights that a model holds."""
    return sum(4 * parameter.numel() for parameter in model.parameters() if parameter.device.type != "meta")


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("budget", [0, 200_000, streaming.BUDGET])
def test_actions_of_a_streamed_model_are_the_resident_models(golden, data, name, budget):
    """Each golden folder, with weights dropped after every use, some kept, and all kept."""
    case = golden(name)
    model = streamed(Checkpoint.open(data / name), budget=budget)
    noise = torch.from_numpy(case.inputs["noise"])
    expected = denoise_trace(case.model, case.observation, noise=noise)
    for ours, theirs in zip(denoise_trace(model, case.observation, noise=noise), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", GOLDEN)
def test_tokens_and_logits_of_a_streamed_model_are_the_resident_models(golden, data, name):
    case = golden(name)
    model = streamed(Checkpoint.open(data / name), budget=0)
    options = {"max_tokens": 4, "forced": (3, 5), "constrained": False}
    expected = case.model.sample_fast_tokens(case.observation, **options)
    assert torch.equal(model.sample_fast_tokens(case.observation, **options), expected)
    depth, head = case.model.config.backbone.depth, case.model.config.backbone
    cache = torch.zeros(depth, 1, head.num_kv_heads, 1, head.head_dim)
    inputs = (torch.tensor([[7, 9]]), torch.tensor([[0, 1]]), cache, cache, torch.tensor([[False]]))
    ids = torch.tensor([5, 6, 7, 100, 2])
    with torch.no_grad():
        rows = case.model.backbone.embed_tokens.weight[ids]
        for theirs, ours in (
            (case.model.fast_decode_step(*inputs), model.fast_decode_step(*inputs)),
            (
                case.model.fast_decode_step(*inputs, rows),
                model.fast_decode_step(*inputs, model.backbone.embed_tokens.weight[ids]),
            ),
        ):
            assert all(map(torch.equal, ours, theirs))


def test_an_unembedding_in_parts_is_the_whole(small_model, tmp_path, monkeypatch, observe):
    save_checkpoint(small_model, tmp_path)
    monkeypatch.setattr(streaming, "PART", 4 * small_model.config.backbone.width * 10)  # ten rows
    model = streamed(Checkpoint.open(tmp_path))
    rows = model.backbone.embed_tokens.weight
    table = small_model.backbone.embed_tokens.weight.detach()
    assert len(rows) == 10 and torch.equal(torch.cat(list(rows)), table)
    assert torch.equal(torch.cat(list(rows[torch.tensor([95, 3, 4, 5, 3])])), table[[95, 3, 4, 5, 3]])
    assert torch.equal(torch.cat(rows[-1:]), table[90:]) and torch.equal(rows[-1], table[90:])
    with pytest.raises(IndexError):
        rows[10]
    observation = observe([[True, True]], [4])
    options = {"max_tokens": 5, "constrained": False}
    assert torch.equal(
        model.sample_fast_tokens(observation, **options), small_model.sample_fast_tokens(observation, **options)
    )


def test_a_budget_is_kept(golden, data):
    """Never more weights than the budget allows, but for what is small and never dropped."""
    case, seen = golden("openpi_a"), []
    model = streamed(Checkpoint.open(data / "openpi_a"), budget=200_000)
    small = loaded(model)
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(loaded(model)))
    model.sample_actions(case.observation, noise=torch.from_numpy(case.inputs["noise"]), num_steps=2)
    assert small == 4 * case.model.vision.embeddings.position_embedding.weight.numel()
    assert 150_000 < max(seen) <= 200_000 + small


def test_weights_within_the_budget_are_read_once(golden, data, monkeypatch):
    case, read = golden("openpi_a"), []
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (read.append(name), original(self, name))[1])
    model = streamed(Checkpoint.open(data / "openpi_a"))
    model.sample_actions(case.observation, noise=torch.from_numpy(case.inputs["noise"]), num_steps=3)
    assert len(read) == len(set(read)) > 50
    assert "backbone.embed_tokens.weight" not in read


def test_layers_are_announced_in_order(golden, data):
    case, seen = golden("openpi_a"), []
    config = case.model.config
    model = streamed(Checkpoint.open(data / "openpi_a"), budget=0, on_layer=seen.append)
    model.sample_actions(case.observation, noise=torch.from_numpy(case.inputs["noise"]), num_steps=1)
    expected = [f"vision.encoder.layers.{i}" for i in range(config.vision.depth)]
    expected += [f"backbone.layers.{i}" for i in range(config.backbone.depth)]
    assert seen[: len(expected)] == expected
    assert {f"expert.layers.{i}" for i in range(config.expert.depth)} <= set(seen[len(expected) :])


def test_rows_are_read_in_any_order_and_repeated(data):
    checkpoint = Checkpoint.open(data / "lerobot_a")
    table = checkpoint.read("backbone.embed_tokens.weight")
    for ids in ([4, 5, 6, 2, 2, 1, 0], [0], [], list(range(len(table)))):
        rows = read_rows(checkpoint.source, np.array(ids, np.int64))
        assert rows.tobytes() == table[ids].tobytes() if ids else rows.shape == (0, table.shape[1])
