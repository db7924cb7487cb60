"""π0 against two references: openpi's algorithm over transformers' SigLIP and Gemma, and a sampler that caches nothing.

The second works in numpy, float64, one sample at a time: pictures, prompt, state and action tokens go through both
transformers together in every step, under one mask made of blocks as openpi's pi0.py makes it.
"""

import copy
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from ki_edge.checkpoints import Checkpoint
from ki_edge.errors import ArgumentError, ObservationError
from ki_edge.flow import denoise_times
from ki_edge.model import Pi0, Pi05, build, load_model, save_checkpoint
from ki_edge.model.sampling import denoise_trace

from .conftest import SMALL

CONFIG = replace(SMALL, variant="pi0")
CAMERAS = [[True, True, True], [True, False, True], [False, True, False]]
PROMPTS = [5, 9, 2]
STEPS = 4
TOLERANCE = 1e-5


def random_pi0(seed=0):
    """Random values everywhere; the expert's MLP over actions and time has gain, so that time matters."""
    generator = torch.Generator().manual_seed(seed)
    model = build(CONFIG).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.normal_(0.0, 2 * scale if name.startswith("action_time") else scale, generator=generator)
    return model


@pytest.fixture(scope="module")
def model():
    """Tests must not change it."""
    return random_pi0()


@pytest.fixture
def observation(observe):
    state = torch.randn(3, 6, generator=torch.Generator().manual_seed(8))
    return replace(observe(CAMERAS, PROMPTS), state=state)


@pytest.fixture
def noise():
    return torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))


def close(ours, reference, tolerance=TOLERANCE):
    np.testing.assert_allclose(np.asarray(ours, np.float64), np.asarray(reference), rtol=0, atol=tolerance)


class Uncached:
    """All tokens of one sample together in every step, float64."""

    def __init__(self, model):
        self.config = model.config
        self.weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
        self.model = copy.deepcopy(model).double()

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + self.weights[f"{name}.weight"])

    def prefix(self, observation, row):
        pixels = observation.images[row].permute(0, 3, 1, 2).double() / 255 * 2 - 1
        with torch.no_grad():  # the tower is tested by itself; the float32 in its norms is all that is not float64
            pictures = self.model.projector(self.model.vision(pixels)).flatten(0, 1).numpy()
        words = self.weights["backbone.embed_tokens.weight"][observation.prompt_tokens[row].numpy()]
        seen = observation.camera_mask[row].numpy().repeat(self.config.vision.patches)
        valid = np.concatenate([seen, observation.prompt_mask[row].numpy()])
        return np.concatenate([pictures, words * np.sqrt(self.config.backbone.width)]), valid

    def suffix(self, state, x_t, time):
        half = self.config.expert.width // 2
        periods = 4e-3 * (4.0 / 4e-3) ** (np.arange(half) / (half - 1))
        angles = 2 * np.pi * float(time) / periods
        embedding = np.tile(np.concatenate([np.sin(angles), np.cos(angles)]), (len(x_t), 1))
        both = np.concatenate([self.linear(x_t, "action_in_proj"), embedding], axis=1)
        hidden = self.linear(both, "action_time_mlp_in")
        actions = self.linear(hidden / (1 + np.exp(-hidden)), "action_time_mlp_out")
        return np.concatenate([self.linear(state, "state_proj")[None], actions])

    def rotate(self, x, positions):
        half = x.shape[-1] // 2
        turn = np.exp(1j * positions[:, None, None] * 10_000.0 ** (-np.arange(half) / half))
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def velocity(self, prefix, valid, suffix):
        """Blocks: prefix 0, state 1, actions 2; a token sees valid tokens of its own and of earlier blocks."""
        config = self.config.backbone
        valid = np.concatenate([valid, np.ones(len(suffix), bool)])
        starts = np.zeros(len(valid), int)
        starts[[len(prefix), len(prefix) + 1]] = 1
        block = starts.cumsum()
        mask = (block[None, :] <= block[:, None]) & valid[None, :]
        positions = valid.cumsum() - 1
        streams = {"backbone": prefix, "expert": suffix}
        for i in range(config.depth):
            normed = {s: self.norm(x, f"{s}.layers.{i}.input_layernorm") for s, x in streams.items()}
            q, k, v = (
                np.concatenate([self.linear(x, f"{s}.layers.{i}.self_attn.{name}_proj") for s, x in normed.items()])
                .reshape(len(valid), -1, config.head_dim)
                for name in "qkv"
            )  # fmt: skip
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            heads = []
            for head in range(config.num_heads):
                shared = head * config.num_kv_heads // config.num_heads
                logits = np.where(mask, q[:, head] @ k[:, shared].T / np.sqrt(config.head_dim), -np.inf)
                weights = np.exp(logits - logits[mask].max())
                heads.append(weights / np.maximum(weights.sum(1, keepdims=True), 1e-300) @ v[:, shared])
            mixed = np.concatenate(heads, axis=1)
            parts = {"backbone": mixed[: len(prefix)], "expert": mixed[len(prefix) :]}
            for s, part in parts.items():
                x = streams[s] + self.linear(part, f"{s}.layers.{i}.self_attn.o_proj")
                y = self.norm(x, f"{s}.layers.{i}.post_attention_layernorm")
                gate, up = (self.linear(y, f"{s}.layers.{i}.mlp.{name}_proj") for name in ("gate", "up"))
                gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
                streams[s] = x + self.linear(gate * up, f"{s}.layers.{i}.mlp.down_proj")
        hidden = self.norm(streams["expert"], "expert.norm")
        return self.linear(hidden[-self.config.action_horizon :], "action_out_proj")

    def actions(self, observation, row, noise, times):
        prefix, valid = self.prefix(observation, row)
        x_t, state = noise.double().numpy(), observation.state[row].double().numpy()
        for time in times:
            x_t = x_t - 1 / len(times) * self.velocity(prefix, valid, self.suffix(state, x_t, time))
        return x_t


@torch.no_grad()
@pytest.mark.parametrize("convention", ["openpi", "lerobot"])
def test_actions_equal_the_uncached_sampler(model, observation, noise, convention):
    ours = model.sample_actions(observation, noise=noise, num_steps=STEPS, time_convention=convention)
    reference, times = Uncached(model), denoise_times(STEPS, convention)
    for row in range(3):
        close(ours[row], reference.actions(observation, row, noise[row], times))


class WithTransformers:
    """openpi's PI0Pytorch over other people's transformers: cached prefix, masks from blocks, cumulated positions."""

    def __init__(self, model, transformers):
        self.model, config = model, model.config
        vision = transformers.SiglipVisionConfig(
            hidden_size=config.vision.width,
            intermediate_size=config.vision.mlp_dim,
            num_hidden_layers=config.vision.depth,
            num_attention_heads=config.vision.num_heads,
            image_size=config.vision.image_size,
            patch_size=config.vision.patch_size,
            vision_use_head=False,
        )
        self.vision = transformers.SiglipVisionModel(vision).eval()
        tower = getattr(self.vision, "vision_model", self.vision)
        tower.load_state_dict(model.vision.state_dict())
        self.backbone, self.expert = (
            transformers.GemmaModel(
                transformers.GemmaConfig(
                    vocab_size=config.vocab_size,
                    hidden_size=gemma.width,
                    intermediate_size=gemma.mlp_dim,
                    num_hidden_layers=gemma.depth,
                    num_attention_heads=gemma.num_heads,
                    num_key_value_heads=gemma.num_kv_heads,
                    head_dim=gemma.head_dim,
                    attn_implementation="eager",
                )
            ).eval()
            for gemma in (config.backbone, config.expert)
        )
        self.backbone.load_state_dict(model.backbone.state_dict())
        missing, unexpected = self.expert.load_state_dict(model.expert.state_dict(), strict=False)
        assert (missing, unexpected) == (["embed_tokens.weight"], [])

    def sample(self, observation, noise, num_steps):
        patches, (batch, horizon, _) = self.model.config.vision.patches, noise.shape
        pixels = observation.images.flatten(0, 1).permute(0, 3, 1, 2).float() / 255 * 2 - 1
        pictures = self.model.projector(self.vision(pixels).last_hidden_state).unflatten(0, (batch, -1)).flatten(1, 2)
        words = self.backbone.embed_tokens(observation.prompt_tokens)
        valid = torch.cat([observation.camera_mask.repeat_interleave(patches, 1), observation.prompt_mask], 1)
        out = self.backbone(
            inputs_embeds=torch.cat([pictures, words], 1),
            attention_mask=additive(valid[:, None, :] & valid[:, :, None]),
            position_ids=valid.cumsum(1) - 1,
            use_cache=True,
        )
        blocks = torch.tensor([1, 1] + [0] * (horizon - 1)).cumsum(0)
        among = (blocks[None, :] <= blocks[:, None]).expand(batch, -1, -1)
        mask = torch.cat([valid[:, None, :].expand(-1, 1 + horizon, -1), among], 2)
        positions = valid.sum(1, keepdim=True) + torch.arange(1 + horizon)
        x_t, time, dt = noise, torch.tensor(1.0), torch.tensor(-1.0 / num_steps)
        while time >= -dt / 2:
            hidden = self.expert(
                inputs_embeds=self.embed(observation.state, x_t, time),
                attention_mask=additive(mask),
                position_ids=positions,
                past_key_values=copy.deepcopy(out.past_key_values),
                use_cache=True,
            ).last_hidden_state
            x_t = x_t + dt * self.model.action_out_proj(hidden[:, -horizon:])
            time = time + dt
        return x_t

    def embed(self, state, x_t, time):
        model, half = self.model, self.model.config.expert.width // 2
        period = 4e-3 * (4.0 / 4e-3) ** torch.linspace(0.0, 1.0, half, dtype=torch.float64)
        angles = time.double() * (1.0 / period * 2 * torch.pi)
        embedding = torch.cat([angles.sin(), angles.cos()]).float()
        actions = model.action_in_proj(x_t)
        both = torch.cat([actions, embedding.expand_as(actions)], 2)
        mixed = model.action_time_mlp_out(torch.nn.functional.silu(model.action_time_mlp_in(both)))
        return torch.cat([model.state_proj(state)[:, None], mixed], 1)


def additive(mask):
    return torch.where(mask[:, None], 0.0, -2.3819763e38)


@torch.no_grad()
def test_actions_equal_those_over_transformers(model, observation, noise):
    transformers = pytest.importorskip("transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    close(
        model.sample_actions(observation, noise=noise, num_steps=STEPS),
        WithTransformers(model, transformers).sample(observation, noise, STEPS),
    )


@torch.no_grad()
def test_the_state_token_does_not_see_the_actions(model, observation, noise):
    """With nothing but noise changed, what the actions read of the state token stays the same in every layer."""
    caches = []
    for layer in model.expert.stack:
        layer.self_attn.k_proj.register_forward_hook(lambda module, inputs, output: caches.append(output))
    try:
        for x in (noise, noise + 1):
            model.sample_actions(observation, noise=x, num_steps=1)
    finally:
        for layer in model.expert.stack:
            layer.self_attn.k_proj._forward_hooks.clear()
    first, second = caches[: len(caches) // 2], caches[len(caches) // 2 :]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[:, 0], other[:, 0])
        assert (one[:, 1:] - other[:, 1:]).abs().amax() > 1e-3


@torch.no_grad()
def test_every_input_matters(model, observation, noise):
    actions = model.sample_actions(observation, noise=noise)
    state, word, pixels = observation.state.clone(), observation.prompt_tokens.clone(), observation.images.clone()
    state[:, 5] += 0.1
    word[:, 0] = (word[:, 0] + 1) % 96
    pixels[:, :, 3] ^= 128
    for change in ({"state": state}, {"prompt_tokens": word}, {"images": pixels}):
        other = model.sample_actions(replace(observation, **change), noise=noise)
        assert (other - actions).abs().amax(dim=(1, 2)).min() > 1e-5
    one, two = (denoise_trace(model, observation, noise=noise, num_steps=n)[1] for n in (1, 2))
    trace = denoise_trace(model, observation, noise=noise, num_steps=2)
    late = model.denoise_step(noise, model.modulation(torch.tensor([0.5]))[0], torch.tensor(-0.5),
                              *prefix_of(model, observation), observation.state)  # fmt: skip
    assert (late - trace[1]).abs().max() > 1e-3  # the time
    close((one - noise) / 2, two - noise)  # the same velocity at t = 1


def prefix_of(model, observation):
    return model.prefix_forward(
        observation.images, observation.camera_mask, observation.prompt_tokens, observation.prompt_mask
    )


def test_fast_tokens_do_not_need_the_expert(model, observation):
    """The graph exists for a π0 too; it decodes what a π0.5 with the same backbone decodes."""
    other = Pi05(SMALL).eval()
    state = {name: value for name, value in model.state_dict().items() if name.startswith(("vision", "proj", "back"))}
    other.load_state_dict({**other.state_dict(), **state})
    arguments = {"max_tokens": 4, "constrained": False}
    theirs = other.sample_fast_tokens(replace(observation, state=None), **arguments)
    assert torch.equal(model.sample_fast_tokens(observation, **arguments), theirs)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, r"state: missing, expected torch.float32 \[3, 6\]: a π0 takes it as a tensor"),
        (torch.zeros(3, 7), r"state: torch.float32 \[3, 7\], expected torch.float32 \[3, 6\]"),
        (torch.zeros(1, 6), r"state: torch.float32 \[1, 6\]"),
        (torch.zeros(3, 6).double(), r"state: torch.float64 \[3, 6\]"),
    ],
)
def test_wrong_states(model, observation, state, message):
    with pytest.raises(ObservationError, match=message):
        model.sample_actions(replace(observation, state=state))


def test_a_pi05_takes_no_state(small_model, observation):
    with pytest.raises(ObservationError, match=r"this π0\.5 reads the state in its prompt: leave it out"):
        small_model.sample_actions(observation)


def test_one_geometry_one_model(model):
    assert isinstance(model, Pi0)
    assert isinstance(build(SMALL), Pi05)
    for kind, config in ((Pi0, SMALL), (Pi05, CONFIG)):
        with pytest.raises(ArgumentError, match=f"a {kind.__name__} cannot have the geometry of a '{config.variant}'"):
            kind(config)


def test_training_is_refused(model, observation, noise):
    with pytest.raises(ArgumentError, match="a π0 cannot be trained here"):
        model.compute_loss(observation, noise, noise=noise, time=torch.ones(3))


def test_parameters_fall_on_two_sides(model):
    backbone, expert = (dict(side()) for side in (model.backbone_parameters, model.expert_parameters))
    assert not set(backbone) & set(expert)
    assert set(backbone) | set(expert) == set(dict(model.named_parameters()))
    assert {"state_proj.bias", "action_time_mlp_in.weight", "expert.norm.weight"} <= set(expert)


@torch.no_grad()
def test_from_a_checkpoint(model, observation, noise, tmp_path):
    """openpi's keys; recognised as a π0 by them, and never taken for a π0.5."""
    save_checkpoint(model, tmp_path / "pi0")
    checkpoint = Checkpoint.open(tmp_path / "pi0")
    assert checkpoint.config == CONFIG
    assert {
        "state_proj.weight",
        "action_time_mlp_in.weight",
        "action_time_mlp_out.bias",
        "paligemma_with_expert.gemma_expert.model.layers.2.post_attention_layernorm.weight",
        "paligemma_with_expert.gemma_expert.model.norm.weight",
    } <= set(checkpoint.source.tensors)
    loaded = load_model(tmp_path / "pi0")
    assert isinstance(loaded, Pi0)
    assert torch.equal(loaded.sample_actions(observation, noise=noise), model.sample_actions(observation, noise=noise))


@torch.no_grad()
def test_bfloat16(model, observation, noise, tmp_path):
    """Projections of state, actions and time stay in float32, as openpi keeps them."""
    save_checkpoint(model, tmp_path)
    low = load_model(tmp_path, dtype=torch.bfloat16)
    assert low.expert.stack[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert {low.state_proj.weight.dtype, low.action_time_mlp_in.weight.dtype} == {torch.float32}
    actions = low.sample_actions(observation, noise=noise)
    assert actions.dtype == torch.float32
    close(actions, model.sample_actions(observation, noise=noise), 0.1)
