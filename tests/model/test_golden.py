"""The model against recorded runs of openpi and LeRobot: same weights, same inputs, every stage."""

import numpy as np
import pytest
import torch

from ki_edge import flow
from ki_edge.model import load_model, sampling

TOLERANCE = 2e-5  # the project's bar for float32 under the same time convention
BFLOAT16 = 0.046  # openpi's own distance between bfloat16 and float32 on these actions (asserted below)


@pytest.fixture(scope="module", params=["openpi_a", "lerobot_a"])
def case(request, golden):
    return golden(request.param)


def close(ours, reference, tolerance=TOLERANCE):
    ours = ours.float().numpy() if isinstance(ours, torch.Tensor) else ours
    assert ours.shape == reference.shape
    np.testing.assert_allclose(ours, reference, rtol=0, atol=tolerance)


@torch.no_grad()
def test_prefix(case):
    observation, reference = case.observation, case.outputs
    vectors, mask = case.model.embed_prefix(
        observation.images, observation.camera_mask, observation.prompt_tokens, observation.prompt_mask
    )
    keys, values, also_mask = sampling.prefix(case.model, observation)
    assert torch.equal(mask, also_mask)
    assert mask.sum() == 2 * 256 + 29
    close(vectors[:, mask[0]], reference["prefix_embs"][:, mask[0]])
    close(keys[..., mask[0], :], reference["kv_k"][..., mask[0], :])
    close(values[..., mask[0], :], reference["kv_v"][..., mask[0], :])


@torch.no_grad()
def test_vision_of_every_camera(golden):
    case = golden("openpi_a")
    pixels = case.observation.images[0].permute(0, 3, 1, 2).float() / 255 * 2 - 1
    features = case.model.vision(pixels)
    close(features, case.outputs["siglip_features"][:, 0])
    close(case.model.projector(features), case.outputs["image_embs"][:, 0])


@torch.no_grad()
def test_hidden_states_of_the_backbone(golden):
    """The last layer and the final norm too, which only FAST logits need."""
    case = golden("openpi_a")
    model, observation = case.model, case.observation
    x, mask = model.embed_prefix(
        observation.images, observation.camera_mask, observation.prompt_tokens, observation.prompt_mask
    )
    bias = torch.where(torch.from_numpy(case.outputs["prefix_att_mask"]), 0.0, -1e9)[:, None, None]
    rope = model._rope(torch.from_numpy(case.outputs["prefix_position_ids"]))
    hidden, _ = model.backbone(x, rope, bias)
    close(hidden[:, mask[0]], case.outputs["prefix_out"][:, mask[0]])


@torch.no_grad()
def test_time_condition(golden):
    case = golden("openpi_a")
    condition = case.model.time_condition(torch.from_numpy(case.outputs["times"]))
    close(condition, case.outputs["adarms_cond_steps"][:, 0])


@torch.no_grad()
def test_times(case):
    convention = "openpi" if "x_steps" in case.outputs else "lerobot"
    np.testing.assert_array_equal(flow.denoise_times(10, convention), case.outputs["times"])


@torch.no_grad()
def test_velocity_of_recorded_steps(golden):
    """Each step by itself, from the recorded noisy actions."""
    case = golden("openpi_a")
    keys, values, mask = sampling.prefix(case.model, case.observation)
    cache = list(zip(keys, values, strict=True))
    x = torch.from_numpy(case.outputs["x_steps"])
    close(case.model.embed_suffix(x[0]), case.outputs["suffix_embs_first"])
    modulations = case.model.modulation(torch.from_numpy(case.outputs["times"]))
    steps = zip(x, modulations, case.outputs["v_steps"], strict=True)
    for x_t, rows, reference in steps:
        close(case.model.velocity(x_t, rows[None], cache, mask), reference)


def test_actions(case):
    convention = "openpi" if "x_steps" in case.outputs else "lerobot"
    noise = torch.from_numpy(case.inputs["noise"])
    trace = sampling.denoise_trace(case.model, case.observation, noise=noise, num_steps=10, time_convention=convention)
    close(trace[-1], case.outputs["actions"])
    if convention == "openpi":
        close(torch.stack(trace[:-1]), case.outputs["x_steps"])
        close(trace[-1], case.outputs["actions_f64"])
    velocities = (torch.stack(trace[1:]) - torch.stack(trace[:-1])) / -0.1
    close(velocities, case.outputs["v_steps"], 1e-4)  # differences of x over 0.1: ten times the rounding


def test_time_conventions_are_told_apart(golden):
    """The same weights and inputs, so what differs is the rounding of the times alone."""
    openpi, lerobot = golden("openpi_a"), golden("lerobot_a")
    recorded = np.abs(openpi.outputs["actions"] - lerobot.outputs["actions"]).max()
    assert recorded > 2 * TOLERANCE
    noise = torch.from_numpy(openpi.inputs["noise"])
    ours = [openpi.model.sample_actions(openpi.observation, noise=noise, time_convention=convention).numpy()
            for convention in ("openpi", "lerobot")]  # fmt: skip
    assert abs(np.abs(ours[0] - ours[1]).max() - recorded) <= TOLERANCE


def test_bfloat16(data, golden):
    case = golden("openpi_a")
    reference = case.outputs["actions"]
    openpi = np.abs(np.load(data / "openpi_a" / "actions_bf16.npy") - reference).max()
    assert openpi <= BFLOAT16
    model = load_model(data / "openpi_a", dtype=torch.bfloat16)
    actions = model.sample_actions(case.observation, noise=torch.from_numpy(case.inputs["noise"]))
    assert actions.dtype == torch.float32
    close(actions, reference, BFLOAT16)
