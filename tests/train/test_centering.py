"""Removing the mean picture changes nothing that a checkpoint computes."""

import pytest
import torch

from ki_edge.model import Pi05
from ki_edge.train.centering import CenteredPatches, Folding, mean_picture
from ki_edge.train.initialization import from_scratch


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pixels(images):
    return images.flatten(0, 1).permute(0, 3, 1, 2).float() / 255 * 2 - 1


def test_mean_picture_is_the_mean_of_the_pixels(images, pixels):
    center = mean_picture(images.flatten(0, 1))
    assert center.shape == (1, 3, 8, 8)
    torch.testing.assert_close(center, pixels.mean(dim=0, keepdim=True), rtol=0, atol=1e-6)


@torch.no_grad()
def test_installing_subtracts_the_center(small_config, images, pixels):
    model = from_scratch(small_config, seed=1)
    patches = model.vision.embeddings.patch_embedding
    expected = patches(pixels - mean_picture(images.flatten(0, 1)))
    assert CenteredPatches.center_of(model) is None
    CenteredPatches.install(model, mean_picture(images.flatten(0, 1)))
    installed = model.vision.embeddings.patch_embedding
    assert installed.weight is patches.weight
    assert installed.bias is patches.bias
    assert torch.equal(CenteredPatches.center_of(model), mean_picture(images.flatten(0, 1)))
    torch.testing.assert_close(installed(pixels), expected, rtol=0, atol=1e-6)
    assert "center" not in "".join(model.state_dict())


@torch.no_grad()
def test_folding_is_exact(small_config, images, pixels):
    """An ordinary model with the folded state sees the same."""
    model, center = from_scratch(small_config, seed=1), mean_picture(images.flatten(0, 1))
    model.vision.embeddings.patch_embedding.bias.normal_()
    CenteredPatches.install(model, center)
    state, fold = {name: value.clone() for name, value in model.state_dict().items()}, Folding(center)
    plain = Pi05(small_config)
    plain.load_state_dict({name: fold(name, value) for name, value in model.named_parameters()})
    torch.testing.assert_close(plain.vision(pixels), model.vision(pixels), rtol=0, atol=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
