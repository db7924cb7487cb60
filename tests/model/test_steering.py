"""Chunks that continue another one, in the PyTorch model, against float64 numpy written from the papers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ki_edge.errors import ArgumentError
from ki_edge.flow import denoise_times
from ki_edge.model import Observation, Pi0, sampling
from ki_edge.overlap import Overlap, prefix_weights
from tests import expert

BAR = 2e-5  # of float32 from float64, the project's for actions
STEPS = 6


@pytest.fixture
def scene(small_model, observe):
    """scene(way) -> (model, observation, noise, overlap of two rows, float64 reference of one row)."""
    observation = observe([[True, False, True], [True, True, False]], [5, 9])
    config, random = small_model.config, np.random.default_rng(3)
    shape = (2, config.action_horizon, config.action_dim)
    noise = random.standard_normal(shape, np.float32)
    previous = random.uniform(-1.0, 1.0, shape).astype(np.float32)
    weights = {name: value.double().numpy() for name, value in small_model.state_dict().items()}

    def make(way, delay=2, maximum=None, schedule="exponential"):
        pulled = np.zeros((2, config.action_horizon), np.float32)
        committed = np.zeros(pulled.shape, np.bool_)
        if way == "guided":
            pulled[:] = prefix_weights(delay, 4, config.action_horizon, schedule)
        else:
            committed[:, :delay] = True
        overlap = Overlap(previous, pulled, committed, maximum)
        keys, values, mask = (part.detach().double().numpy() for part in sampling.prefix(small_model, observation))

        def reference(row):
            seen = keys[:, row], values[:, row], mask[row].astype(bool)
            times, before = denoise_times(STEPS), previous[row].astype(np.float64)
            if way == "guided":

                def at(x, t):
                    return expert.velocity(weights, config, x, np.full(len(x), t), *seen)

                limit = STEPS if maximum is None else maximum
                return expert.guided(at, noise[row], times, before, pulled[row].astype(np.float64), limit)
            return expert.trained(
                lambda x, each: expert.velocity(weights, config, x, each, *seen), noise[row], times, before, delay
            )

        return small_model, observation, torch.from_numpy(noise), overlap, reference

    return make


def sample(model, observation, noise, overlap):
    return model.sample_actions(observation, noise=noise, num_steps=STEPS, overlap=overlap).numpy()


@pytest.mark.parametrize(
    ("way", "more"),
    [
        ("guided", {}),
        ("guided", {"maximum": 2.5, "delay": 1, "schedule": "linear"}),
        ("guided", {"maximum": 10.0, "delay": 4}),
        ("guided", {"delay": 0}),
        *(("trained", {"delay": delay}) for delay in (0, 1, 2, 4, 5)),
    ],
)
def test_float64_from_the_papers(scene, way, more):
    model, observation, noise, overlap, reference = scene(way, **more)
    found = sample(model, observation, noise, overlap)
    plain = sample(model, observation, noise, None)
    delay = more.get("delay", 2)
    for row in (0, 1):
        np.testing.assert_allclose(found[row], reference(row), rtol=0, atol=BAR)
    if way == "trained":
        np.testing.assert_array_equal(found[:, :delay], overlap.actions[:, :delay])  # as they were given, no rounding
    moved = np.abs(found - plain)[:, delay:].max(initial=0.0)
    assert moved > 1e-2 or (way, delay) in (("trained", 0), ("trained", 5))


def test_guided_chunks_come_closer(scene):
    """The error shrinks with the weight of an action, and most where it is 1."""
    model, observation, noise, overlap, _ = scene("guided")
    before, after = (np.abs(sample(model, observation, noise, one) - overlap.actions) for one in (None, overlap))
    shrunk = after.mean(axis=(0, 2)) / before.mean(axis=(0, 2))
    assert (shrunk[:2] < 0.25).all() and shrunk[4] > 0.5


@pytest.mark.parametrize("trained", [False, True])
@torch.no_grad()
def test_a_chunk_that_follows_none_is_the_same_bit_for_bit(small_model, observe, trained):
    """Whatever is in the inputs that count for nothing."""
    observation, config = observe([[True, True, False]], [7]), small_model.config
    prefix = sampling.prefix(small_model, observation)
    generator = torch.Generator().manual_seed(7)
    shape = (1, config.action_horizon, config.action_dim)
    for step in range(20):
        x, previous = (torch.randn(shape, generator=generator) * 3 for _ in range(2))
        time = torch.rand((), generator=generator)
        row, other = small_model.modulation(torch.stack([time, torch.tensor(0.0)]))
        more = [previous, torch.zeros(shape[:2]), torch.tensor(float(step)), time]
        more += [torch.zeros(shape[:2], dtype=torch.bool), other] if trained else []
        plain = small_model.denoise_step(x, row, torch.tensor(-0.1), *prefix)
        assert torch.equal(plain, small_model.denoise_step(x, row, torch.tensor(-0.1), *prefix, *more))


def test_a_pi0_is_guided_and_has_nothing_committed(small_model, observe):
    """Its plain velocity, steered by the formula; all of its actions have one time."""
    generator = torch.Generator().manual_seed(2)
    config = replace(small_model.config, variant="pi0")
    model = Pi0(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.normal_(0.0, scale, generator=generator)
    seen = observe([[True, True, False]], [7])
    observation = Observation(seen.images, seen.camera_mask, seen.prompt_tokens, seen.prompt_mask,
                              state=torch.randn(1, config.state_size, generator=generator))  # fmt: skip
    noise, previous = (torch.randn(1, 5, 6, generator=generator) for _ in range(2))
    weights = prefix_weights(2, 4, 5)
    overlap = Overlap(previous.numpy(), weights[None], np.zeros((1, 5), np.bool_))
    with torch.no_grad():
        keys, values, mask = sampling.prefix(model, observation)
    cache = list(zip(keys, values, strict=True))

    @torch.no_grad()
    def at(x, t):
        given = torch.from_numpy(x[None]).float()
        rows = model.modulation(torch.tensor([t], dtype=torch.float32))
        return model.velocity(given, rows, cache, mask, observation.state)[0].double().numpy()

    before, strength = previous[0].double().numpy(), weights.astype(np.float64)
    expected = expert.guided(at, noise[0].numpy(), denoise_times(STEPS), before, strength, STEPS)
    np.testing.assert_allclose(sample(model, observation, noise, overlap)[0], expected, rtol=0, atol=BAR)
    committed = Overlap(previous.numpy(), weights[None], np.ones((1, 5), np.bool_))
    with pytest.raises(ArgumentError, match="a π0 has one time for all actions of a chunk"):
        sample(model, observation, noise, committed)


def test_an_overlap_of_other_sizes(small_model, observe):
    one = Overlap(np.zeros((1, 4, 6), np.float32), np.zeros((1, 4), np.float32), np.zeros((1, 4), np.bool_))
    with pytest.raises(ArgumentError, match=r"its actions are \[1, 4, 6\], expected \[1, 5, 6\]"):
        sample(small_model, observe([[True]], [3]), None, one)


# ---------------------------------------------------------------- training


def test_loss_of_draws_with_settled_actions(small_model, observe):
    """Flow losses of tokens with times of their own, and means over what was left to learn."""
    config, random = small_model.config, np.random.default_rng(5)
    observation = observe([[True, False, True], [True, True, False]], [5, 9])
    actions = random.uniform(-1, 1, (2, 5, 6)).astype(np.float32)
    noise, time = random.standard_normal((4, 5, 6), np.float32), np.array([0.9, 0.5, 0.3, 0.7], np.float32)
    delay = np.array([0, 2, 4, 1])
    given = {name: torch.from_numpy(array) for name, array in (("noise", noise), ("time", time), ("delay", delay))}
    found = small_model.compute_loss(observation, torch.from_numpy(actions), **given)
    weights = {name: value.double().numpy() for name, value in small_model.state_dict().items()}
    keys, values, mask = (part.detach().double().numpy() for part in sampling.prefix(small_model, observation))
    expected = np.zeros((4, 5, 6))
    for draw in range(4):
        row, free = draw % 2, np.arange(5) >= delay[draw]
        each = np.where(free, time[draw], 0.0)
        x = each[:, None] * noise[draw] + (1 - each[:, None]) * actions[row]
        v = expert.velocity(weights, config, x, each, keys[:, row], values[:, row], mask[row].astype(bool))
        expected[draw, free] = ((v - (noise[draw] - actions[row])) ** 2)[free]
        assert (found.free[draw].numpy() == free).all()
    np.testing.assert_allclose(found.flow.detach(), expected, rtol=1e-4, atol=1e-4)
    counted = np.concatenate([expected[draw, delay[draw] :, :3].ravel() for draw in range(4)])
    np.testing.assert_allclose(found.mean_flow(3).item(), counted.mean(), rtol=1e-5)
    without = {**given, "delay": torch.zeros(4, dtype=torch.int64)}
    plain = {name: value for name, value in given.items() if name != "delay"}
    losses = [small_model.compute_loss(observation, torch.from_numpy(actions), **one) for one in (plain, without)]
    assert torch.equal(losses[0].flow, losses[1].flow) and bool(losses[0].free.all())
    assert losses[0].mean_flow(6).item() == pytest.approx(losses[0].flow.mean().item(), rel=1e-6)


def test_what_is_settled_teaches_nothing(small_model, observe):
    """The loss does not depend on the noise of settled actions, nor its gradient on their outputs."""
    observation, noise = observe([[True, True, True]], [4]), torch.randn(1, 5, 6)
    arguments = {"time": torch.tensor([0.6]), "delay": torch.tensor([3])}
    actions = torch.rand(1, 5, 6)
    first = small_model.compute_loss(observation, actions, noise=noise, **arguments)
    other = noise.clone()
    other[:, :3] = 100.0
    second = small_model.compute_loss(observation, actions, noise=other, **arguments)
    assert torch.equal(first.flow, second.flow) and not first.flow[:, :3].any() and bool(first.flow[:, 3:].all())


@pytest.mark.parametrize(
    ("delay", "message"),
    [
        (torch.tensor([1, 5]), "delay: 1 to 5, expected 0 to 4"),
        (torch.tensor([-1, 0]), "delay: -1 to 0"),
        (torch.tensor([1]), r"delay: torch.int64 \[1\], expected torch.int64 \[2\]"),
        (torch.tensor([1.0, 2.0]), r"delay: torch.float32 \[2\]"),
    ],
)
def test_delays_that_cannot_be(small_model, observe, delay, message):
    noise = torch.zeros(2, 5, 6)
    with pytest.raises(ArgumentError, match=message):
        small_model.compute_loss(
            observe([[True]], [3]), noise[:1], noise=noise, time=torch.tensor([0.5, 0.5]), delay=delay
        )
