"""Checkpoints trained with FAST tokens in view of the expert are told from those trained right, by training both."""

import json

import numpy as np
import pytest
import torch

from ki_edge.errors import DatasetError
from ki_edge.train.watching.old_ki import RETRAIN, Probe, _standard_errors, flow_with_tokens, probe, told_by_config

STEPS = 120


@pytest.fixture(scope="module")
def blind_data(toy, tokenizer_model):
    """Sixteen samples whose pictures say nothing of the actions: only the tokens do."""
    data = toy.ToyData(tokenizer_model, count=16, texts=0, batch=16)
    data.images[:] = 128
    data.actions[:] = np.sign(np.random.default_rng(0).standard_normal((16, 1, 1))) * data.dims[:, None] * 0.8
    return data


def trained(toy, data, loss):
    """The toy model after some steps of a loss."""
    model = toy.toy_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _, (batch,) in zip(range(STEPS), data.steps(0, None), strict=False):
        total = loss(model, batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return model


def test_a_model_that_saw_the_tokens_is_found(toy, blind_data):
    def leaky(model, batch):
        tokens = model.token_loss(batch.observation).mean()
        return flow_with_tokens(model, batch)[:, :, :2].mean() + tokens

    found = probe(trained(toy, blind_data, leaky), blind_data.held_out(toy.Share()))
    assert found.leaks and found.seeing < 0.5 * found.without and found.samples == 16
    assert RETRAIN in found.line() and found.to_json()["leaks"] is True


def test_a_model_that_was_trained_right_is_not(toy, blind_data):
    def insulated(model, batch):
        found = model.compute_loss(
            batch.observation, batch.actions, noise=batch.noise, time=batch.time, real=batch.real
        )
        return found.mean_flow(2) + found.fast.mean()

    found = probe(trained(toy, blind_data, insulated), blind_data.held_out(toy.Share()))
    assert not found.leaks and found.seeing > 0.9 * found.without
    assert found.doubt is None and "was not trained with them in view" in found.line()


def test_an_untrained_model_is_no_suspect(toy, toy_data):
    found = probe(toy.toy_model(), toy_data.held_out(toy.Share()))
    assert not found.leaks and found.to_json()["leaks"] is None
    assert "cannot tell: the policy has not learnt such data" in found.line()


def test_a_frame_that_comes_again_counts_once(toy, toy_data):
    """More draws of the same frames are no more frames."""
    batches = [toy_data.rows(list(range(8)), seed) for seed in range(5)]
    assert probe(toy.toy_model(), batches).samples == 8


def test_what_rounding_makes_is_no_difference():
    assert _standard_errors(torch.tensor([1e-8, 2e-8, 1e-8], dtype=torch.float64), 1.0) == 0.0
    assert _standard_errors(torch.tensor([0.1, 0.2, 0.1], dtype=torch.float64), 1.0) == pytest.approx(4.0)


def test_without_tokens_in_view_both_losses_are_the_same_where_there_is_no_postfix(toy, blind_data):
    """Masked tokens are invisible and take no position: then the expert sees what it sees when it acts."""
    model, batch = toy.toy_model().eval(), next(blind_data.held_out(toy.Share()))
    batch.observation.fast_mask[:] = False
    with torch.no_grad():
        ours = model.compute_loss(batch.observation, batch.actions, noise=batch.noise, time=batch.time).flow
        torch.testing.assert_close(flow_with_tokens(model, batch), ours, rtol=1e-4, atol=1e-5)


def test_too_few_samples_say_nothing(toy, tokenizer_model):
    data = toy.ToyData(tokenizer_model, count=4, texts=8)
    with pytest.raises(DatasetError, match="4 samples with FAST tokens, at least 8"):
        probe(toy.toy_model(), data.held_out(toy.Share()))


def test_a_small_or_unsure_difference_is_no_finding():
    assert Probe(1.0, 0.5, 100, 10.0).leaks
    assert not Probe(1.0, 0.9, 100, 10.0).leaks and Probe(1.0, 0.9, 100, 10.0).doubt is None
    unsure = Probe(1.0, 0.5, 100, 2.0)
    assert not unsure.leaks and "2.0 standard errors, 3 are needed" in unsure.line()


@pytest.mark.parametrize(
    ("config", "suspicious"),
    [
        ({"pi05": True, "ki_fast_token_loss_weight": 1.0}, True), ({"model_type": "ModelType.PI05_KI"}, True),
        ({"type": "pi052", "knowledge_insulation": True}, False), ({"pi05": True}, False), (None, False), ([], False),
    ],
)  # fmt: skip
def test_what_a_config_tells(tmp_path, config, suspicious):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    told = told_by_config(tmp_path)
    assert (told is not None) == suspicious and (told is None or "probe it" in told)
