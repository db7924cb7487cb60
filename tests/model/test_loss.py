"""Losses, logits, gradients and greedy tokens against a recorded run of the knowledge-insulation equations."""

import json

import numpy as np
import pytest
import torch

from ki_edge.checkpoints.layout.keys import checkpoint_key
from ki_edge.errors import ArgumentError
from ki_edge.model import Observation

# Adding one vector to all keys changes no softmax, so this bias has no gradient but rounding: nothing to compare.
INVARIANT = "vision.encoder.layers.0.self_attn.k_proj.bias"
UNUSED = "paligemma_with_expert.gemma_expert.lm_head.weight"
OF_TRAINING = [name for name in Observation.__dataclass_fields__ if name != "state"]  # which only a π0 has


@pytest.fixture(scope="module")
def case(golden):
    return golden("ki")


@pytest.fixture(scope="module")
def grad_norms(data):
    return json.loads((data / "ki" / "grad_norms.json").read_text())


def losses(case, **changes):
    arguments = {name: torch.from_numpy(case.inputs[name]) for name in ("actions", "noise", "time")} | changes
    return case.model.compute_loss(arguments.pop("observation", case.observation), **arguments)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    found = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def without_postfix(observation):
    fields = (observation.images, observation.camera_mask, observation.prompt_tokens, observation.prompt_mask)
    return Observation(*fields)


def test_flow_loss(case):
    flow = losses(case).flow.detach().numpy()
    np.testing.assert_allclose(flow, case.outputs["flow_loss"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(flow, case.outputs["openpi_forward_loss_without_fast_tokens"], rtol=1e-4, atol=1e-4)
    alone = losses(case, observation=without_postfix(case.observation))
    assert alone.fast is None
    np.testing.assert_allclose(alone.flow.detach(), case.outputs["flow_loss"], rtol=1e-4, atol=1e-4)


def test_fast_loss(case):
    expected = case.outputs["fast_ce_per_example"]
    np.testing.assert_allclose(losses(case).fast.detach(), expected, rtol=1e-5)
    np.testing.assert_allclose(case.model.token_loss(case.observation).detach(), expected, rtol=1e-5)


@torch.no_grad()
def test_logits(case):
    logits = case.model.fast_logits(case.observation).numpy()
    for row in range(2):
        prompt, count = case.inputs["prompt_only_mask"][row].sum(), case.inputs["token_loss_mask"][row].sum()
        reference = case.outputs["text_logits"][row, prompt - 1 : prompt - 1 + count]  # they predict what follows
        error = np.abs(logits[row, :count] - reference) / np.maximum(1.0, np.abs(reference))
        assert error.max() <= 1e-4


def test_greedy_tokens(case):
    tokens = case.model.sample_fast_tokens(case.observation, max_tokens=12, constrained=False)
    np.testing.assert_array_equal(tokens, case.outputs["greedy_tokens"])


def test_flow_loss_reaches_no_backbone_parameter(case):
    grads = gradients(case.model, losses(case).flow.mean())
    for name, _ in case.model.backbone_parameters():
        assert not grads[name].any(), name
    for name, _ in case.model.expert_parameters():
        assert grads[name].any(), name


def test_fast_loss_reaches_no_expert_parameter(case):
    grads = gradients(case.model, losses(case).fast.mean())
    for name, _ in case.model.expert_parameters():
        assert not grads[name].any(), name
    for name, _ in case.model.backbone_parameters():
        assert grads[name].any(), name


def test_both_sides_are_all_parameters(case):
    sides = [{name for name, _ in side} for side in (case.model.backbone_parameters(), case.model.expert_parameters())]
    assert sides[0].isdisjoint(sides[1])
    assert sides[0] | sides[1] == {name for name, _ in case.model.named_parameters()}


@pytest.mark.parametrize("which", ["flow_with_stopgrad", "flow_without_stopgrad", "total_alpha1_with_stopgrad"])
def test_gradient_norms(case, grad_norms, which, monkeypatch):
    monkeypatch.setattr(case.model, "knowledge_insulation", which != "flow_without_stopgrad")
    terms = losses(case)
    loss = terms.flow.mean() + terms.fast.mean() if which.startswith("total") else terms.flow.mean()
    ours = {name: grad.norm().item() for name, grad in gradients(case.model, loss).items()}
    assert {checkpoint_key(name) for name in ours} == set(grad_norms) - {UNUSED}
    if which != "flow_with_stopgrad":
        assert max(ours.pop(INVARIANT), grad_norms[checkpoint_key(INVARIANT)][which]) < 1e-6
    expected = {name: grad_norms[checkpoint_key(name)][which] for name in ours}
    assert ours == pytest.approx(expected, rel=2e-5, abs=0.0)  # rounding gives 2e-6


def test_tokens_are_learnt_with_and_without_insulation(case, monkeypatch):
    """π0.5's joint training: the same two losses, and the flow loss reaches the backbone."""
    insulated = losses(case)
    monkeypatch.setattr(case.model, "knowledge_insulation", False)
    joint = losses(case)
    assert torch.equal(joint.fast, insulated.fast) and torch.equal(joint.flow, insulated.flow)
    assert gradients(case.model, joint.flow.mean())["backbone.embed_tokens.weight"].any()


def test_without_tokens_an_insulated_backbone_keeps_nothing_for_a_backward_pass(case, monkeypatch):
    alone = without_postfix(case.observation)
    grads = gradients(case.model, losses(case, observation=alone).flow.mean())
    assert not any(grads[name].any() for name, _ in case.model.backbone_parameters())
    monkeypatch.setattr(case.model, "knowledge_insulation", False)
    grads = gradients(case.model, losses(case, observation=alone).flow.mean())
    assert grads["backbone.embed_tokens.weight"].any() and not grads["backbone.norm.weight"].any()


def test_losses_stay_apart_per_sample(small_model, observe):
    """A batch of two gives what its samples give alone."""
    observation = observe([[True, True], [False, True]], [6, 3], [4, 7])
    actions, noise, time = torch.randn(2, 5, 6), torch.randn(2, 5, 6), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        both = small_model.compute_loss(observation, actions, noise=noise, time=time)
        for row in range(2):
            fields = (getattr(observation, name)[row : row + 1] for name in OF_TRAINING)
            pick = slice(row, row + 1)
            alone = small_model.compute_loss(Observation(*fields), actions[pick], noise=noise[pick], time=time[pick])
            torch.testing.assert_close(both.flow[pick], alone.flow, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(both.fast[pick], alone.fast, rtol=0, atol=1e-5)


def test_several_draws_share_a_prefix(case):
    """R * B rows of noise equal R separate calls, in value and in gradient."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, *case.inputs["noise"].shape[1:], generator=generator)
    time = torch.rand(6, generator=generator)
    together = losses(case, noise=noise, time=time)
    apart = [losses(case, noise=noise[i : i + 2], time=time[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(together.flow, torch.cat([part.flow for part in apart]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.fast, apart[0].fast)
    mean = sum(part.flow.mean() for part in apart) / 3
    ours, reference = (gradients(case.model, loss) for loss in (together.flow.mean(), mean))
    for name, _ in case.model.expert_parameters():
        torch.testing.assert_close(ours[name], reference[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": torch.zeros(2, 12, 31)}, r"actions: shape \[2, 12, 31\], expected \[2, 12, 32\]"),
        ({"actions": torch.zeros(1, 12, 32)}, r"actions: shape \[1, 12, 32\]"),
        ({"noise": torch.zeros(3, 12, 32)}, r"noise: 3 rows, expected a multiple of the batch of 2"),
        ({"noise": torch.zeros(0, 12, 32)}, r"noise: 0 rows"),
        ({"noise": torch.zeros(2, 11, 32)}, r"noise: shape \[2, 11, 32\]"),
        ({"noise": torch.zeros(4, 12, 32)}, r"time: shape \[2\], expected \[4\]"),
        ({"time": torch.zeros(2, 1)}, r"time: shape \[2, 1\]"),
    ],
)
def test_wrong_shapes(case, changes, message):
    with pytest.raises(ArgumentError, match=message):
        losses(case, **changes)


def test_logits_need_a_postfix(case):
    with pytest.raises(ArgumentError, match="no fast_tokens"):
        case.model.fast_logits(without_postfix(case.observation))
