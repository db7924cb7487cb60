"""The forms of the loss that benchmarks/train.py compares: equal losses, and who learns from them."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from ki_edge.model import Pi05

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_forms.py"


@pytest.fixture(scope="module")
def forms():
    spec = importlib.util.spec_from_file_location("train_forms", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_forms"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_forms"]


@pytest.fixture
def models(small_config):
    """The same weights, insulated and not."""
    torch.manual_seed(0)
    model, plain = Pi05(small_config), Pi05(small_config, knowledge_insulation=False)
    plain.load_state_dict(model.state_dict())
    return model, plain


@pytest.fixture
def sample(forms, small_config):
    return forms.random_sample(small_config, batch=2, cameras=2, prompt=5, postfix=4)


def test_one_pass_and_two_have_the_same_loss(forms, models, sample):
    one, two, insulated = (
        form(models[0], sample) for form in (forms.one_pass, forms.two_passes, forms.two_passes_insulated)
    )
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(insulated, one, rtol=1e-5, atol=1e-6)


def test_openpis_joint_pass_has_the_flow_loss_and_its_gradients(forms, models, sample):
    losses, gradients = [], []
    for form in (forms.flow_alone, forms.joint_pass):
        models[1].zero_grad()
        loss = form(models[1], sample)
        loss.backward()
        losses.append(loss)
        gradients.append({name: p.grad.clone() for name, p in models[1].named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_of_the_two_passes_only_the_seeds_lets_the_flow_train_the_backbone(forms, models, sample):
    """Its gradient is another one than that of the two insulated forms, which are equal."""
    model, found = models[0], []
    for form in (forms.one_pass, forms.two_passes_insulated, forms.two_passes):
        model.zero_grad()
        form(model, sample).backward()
        found.append(model.backbone.stack[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(found[2], found[0], rtol=1e-2)
