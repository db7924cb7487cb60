"""The samplers against slow, obvious ones that cache nothing, and what must not change their results.

The oracle works in float64 on one sample at a time. It runs the whole sequence (pictures, prompt, FAST tokens, action
tokens) through both transformers for every step, under a mask that `sees` spells out pair by pair.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from ki_edge.errors import ArgumentError
from ki_edge.model import Observation

CAMERAS = [[True, True, True], [True, False, True], [False, True, False]]
PROMPTS = [5, 9, 2]


@dataclass(frozen=True)
class Token:
    kind: str  # "prefix", "fast" or "action"
    valid: bool
    index: int  # among its kind


def sees(query, key):
    """Everyone looks at the prefix, actions at actions, FAST tokens at earlier FAST tokens; nobody at padding."""
    if not key.valid:
        return False
    if key.kind == "prefix":
        return True
    return query.kind == key.kind and (key.kind == "action" or key.index <= query.index)


def position(token, tokens):
    """How many valid tokens of the prefix and of its own kind come before it."""
    before = [other for other in tokens if other.valid and (other.kind == "prefix" or other.kind == token.kind)]
    if token.kind == "prefix":
        return sum(other.index <= token.index for other in before) - 1
    return sum(other.kind == "prefix" or other.index < token.index for other in before)


def norm(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotate(x, positions):
    """x [S,heads,D]: the pair (x_j, x_{j + D/2}) turns by position * 10000^(-2j/D)."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for j in range(half):
        angle = torch.tensor([p * 10000 ** (-2 * j / (2 * half)) for p in positions], dtype=x.dtype)[:, None]
        a, b = x[..., j], x[..., j + half]
        out[..., j], out[..., j + half] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


class Oracle:
    """Both transformers in float64, from the model's weights by name."""

    def __init__(self, model):
        self.config = model.config
        self.weights = {name: value.double() for name, value in model.state_dict().items()}
        self.model = model

    def linear(self, x, name):
        bias = self.weights.get(f"{name}.bias", 0.0)
        return x @ self.weights[f"{name}.weight"].T + bias

    def prefix(self, observation, row):
        """Vectors and tokens of pictures and prompt."""
        pixels = observation.images[row].permute(0, 3, 1, 2).float() / 255 * 2 - 1
        pictures = self.model.projector(self.model.vision(pixels)).double().flatten(0, 1)
        text = self.embed(observation.prompt_tokens[row].tolist())
        patches = self.config.vision.patches
        valid = [seen for seen in observation.camera_mask[row].tolist() for _ in range(patches)]
        valid += observation.prompt_mask[row].tolist()
        return torch.cat([pictures, text]), [Token("prefix", ok, i) for i, ok in enumerate(valid)]

    def embed(self, ids):
        return self.weights["backbone.embed_tokens.weight"][ids] * math.sqrt(self.config.backbone.width)

    def condition(self, time):
        half, angles = self.config.expert.width // 2, []
        for k in range(half):
            period = 4e-3 * (4.0 / 4e-3) ** (k / (half - 1))
            angles.append(2 * math.pi * time / period)
        x = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)
        for layer in ("time_mlp_in", "time_mlp_out"):
            x = self.linear(x, layer)
            x = x / (1 + torch.exp(-x))
        return x

    def normed(self, x, stream, name, condition):
        """Normalised tokens and the gate of their branch."""
        if stream == "backbone":
            return norm(x) * (1 + self.weights[f"{name}.weight"]), 1.0
        scale, shift, gate = self.linear(condition, f"{name}.dense").chunk(3)
        return norm(x) * (1 + scale) + shift, gate

    def run(self, streams, tokens, condition=None):
        """Final normed hidden states of each stream; streams: {"backbone": [S,W], "expert": [H,W] or absent}."""
        config = self.config.backbone
        heads, dim = config.num_heads, config.head_dim
        group = heads // config.num_kv_heads
        positions = [position(token, tokens) for token in tokens]
        mask = torch.tensor([[sees(query, key) for key in tokens] for query in tokens])
        for i in range(config.depth):
            before = {s: self.normed(x, s, f"{s}.layers.{i}.input_layernorm", condition) for s, x in streams.items()}
            q, k, v = (
                torch.cat([self.linear(x, f"{s}.layers.{i}.self_attn.{name}_proj") for s, (x, _) in before.items()])
                for name in "qkv"
            )
            q, k = (rotate(x.view(len(tokens), -1, dim), positions) for x in (q, k))
            v = v.view(len(tokens), -1, dim)
            mixed = []
            for head in range(heads):
                logits = q[:, head] @ k[:, head // group].T / math.sqrt(dim)
                mixed.append(torch.softmax(logits.masked_fill(~mask, -math.inf), dim=-1) @ v[:, head // group])
            parts = torch.cat(mixed, dim=-1).split([len(x) for x in streams.values()])
            for (s, x), part in zip(list(streams.items()), parts, strict=True):
                x = x + self.linear(part, f"{s}.layers.{i}.self_attn.o_proj") * before[s][1]
                y, gate = self.normed(x, s, f"{s}.layers.{i}.post_attention_layernorm", condition)
                mlp = f"{s}.layers.{i}.mlp."
                y = gelu_tanh(self.linear(y, mlp + "gate_proj")) * self.linear(y, mlp + "up_proj")
                streams[s] = x + self.linear(y, mlp + "down_proj") * gate
        return {s: self.normed(x, s, f"{s}.norm", condition)[0] for s, x in streams.items()}

    def actions(self, observation, row, noise, num_steps):
        vectors, tokens = self.prefix(observation, row)
        tokens = tokens + [Token("action", True, i) for i in range(len(noise))]
        x_t, dt, time = noise.double(), np.float32(-1 / num_steps), np.float32(1)
        for _ in range(num_steps):
            streams = {"backbone": vectors, "expert": self.linear(x_t, "action_in_proj")}
            hidden = self.run(streams, tokens, self.condition(float(time)))["expert"]
            x_t = x_t + float(dt) * self.linear(hidden, "action_out_proj")
            time = time + dt
        return x_t

    def logits(self, observation, row, postfix):
        """Of all tokens, after the prompt and `postfix`: [1 + len(postfix), V]."""
        vectors, tokens = self.prefix(observation, row)
        tokens = tokens + [Token("fast", True, i) for i in range(len(postfix))]
        hidden = self.run({"backbone": torch.cat([vectors, self.embed(postfix)])}, tokens)["backbone"]
        last = max(i for i, token in enumerate(tokens) if token.kind == "prefix" and token.valid)
        return hidden[[last, *range(len(vectors), len(tokens))]] @ self.weights["backbone.embed_tokens.weight"].T

    def fast_tokens(self, observation, row, allowed, forced, count):
        found = []
        while len(found) < count and self.model.eos_id not in found:
            logits = self.logits(observation, row, [*forced, *found])[-1]
            found.append(max(allowed, key=lambda token: logits[token]))
        return found + [self.model.eos_id] * (count - len(found))


@pytest.fixture
def observation(observe):
    return observe(CAMERAS, PROMPTS)


def pick(observation, row):
    """One sample of a batch."""
    fields = (getattr(observation, name) for name in Observation.__dataclass_fields__)
    return Observation(*(None if field is None else field[row : row + 1] for field in fields))


def only_what_exists(observation, row):
    """One sample without its absent cameras and its padding."""
    camera, token = observation.camera_mask[row], observation.prompt_mask[row]
    one = pick(observation, row)
    return Observation(one.images[:, camera], one.camera_mask[:, camera], one.prompt_tokens[:, token],
                       one.prompt_mask[:, token])  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("num_steps", [1, 4])
def test_actions_equal_the_uncached_oracle(small_model, observation, num_steps):
    noise = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))
    actions = small_model.sample_actions(observation, noise=noise, num_steps=num_steps)
    oracle = Oracle(small_model)
    for row in range(3):
        expected = oracle.actions(observation, row, noise[row], num_steps)
        torch.testing.assert_close(actions[row].double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("forced", [(), (17, 40)])
@pytest.mark.parametrize(("constrained", "seed"), [(False, 1), (True, 2)])
def test_fast_tokens_equal_the_uncached_oracle(small_model, observe, constrained, forced, seed, monkeypatch):
    observation = observe(CAMERAS, PROMPTS, seed=seed)
    allowed = list(range(30, 70)) if constrained else list(range(96))
    monkeypatch.setattr(small_model, "decode_ids", tuple(allowed) if constrained else ())
    arguments = {"max_tokens": 6, "forced": forced, "constrained": constrained}
    free = small_model.sample_fast_tokens(observation, **arguments)
    late = next(token for row in free.tolist() for token in row if token not in free[:, 0])
    monkeypatch.setattr(small_model, "eos_id", late)  # so that some samples end before the others
    tokens = small_model.sample_fast_tokens(observation, **arguments)
    oracle = Oracle(small_model)
    expected = [oracle.fast_tokens(observation, row, allowed, forced, tokens.shape[1]) for row in range(3)]
    assert tokens.tolist() == expected
    assert len({row.index(late) if late in row else None for row in expected}) > 1


@torch.no_grad()
def test_training_logits_equal_the_uncached_oracle(small_model, observe):
    observation = observe(CAMERAS, PROMPTS, [4, 1, 6])
    logits = small_model.fast_logits(observation)
    oracle = Oracle(small_model)
    for row, count in enumerate([4, 1, 6]):
        postfix = observation.fast_tokens[row, :count].tolist()
        expected = oracle.logits(observation, row, postfix)[:-1]
        torch.testing.assert_close(logits[row, :count].double(), expected, rtol=0, atol=1e-5)


def test_decoding_stops_when_all_have_ended(small_model, observation, monkeypatch):
    first = small_model.sample_fast_tokens(pick(observation, 0), max_tokens=3, constrained=False)
    monkeypatch.setattr(small_model, "eos_id", int(first[0, 1]))
    tokens = small_model.sample_fast_tokens(pick(observation, 0), max_tokens=30, constrained=False)
    assert tokens.tolist() == first[:, :2].tolist()


@torch.no_grad()
@pytest.mark.parametrize("row", range(3))
def test_what_is_masked_never_matters(small_model, observation, row):
    """Leaving out absent cameras and padding, or filling them with anything, changes nothing."""
    noise = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(row))
    sample, dropped = pick(observation, row), only_what_exists(observation, row)
    black = replace(
        sample,
        images=sample.images * sample.camera_mask[:, :, None, None, None],
        prompt_tokens=sample.prompt_tokens * sample.prompt_mask,
    )
    actions, *others = (small_model.sample_actions(each, noise=noise) for each in (sample, dropped, black))
    tokens, *other_tokens = (
        small_model.sample_fast_tokens(each, max_tokens=5, constrained=False) for each in (sample, dropped, black)
    )
    for other, also in zip(others, other_tokens, strict=True):
        torch.testing.assert_close(other, actions, rtol=0, atol=1e-5)
        assert also.tolist() == tokens.tolist()


@torch.no_grad()
def test_samples_of_a_batch_are_independent(small_model, observation):
    noise = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(3))
    actions = small_model.sample_actions(observation, noise=noise)
    tokens = small_model.sample_fast_tokens(observation, max_tokens=5, constrained=False)
    for row in range(3):
        alone = small_model.sample_actions(pick(observation, row), noise=noise[row : row + 1])
        torch.testing.assert_close(actions[row : row + 1], alone, rtol=0, atol=1e-5)
        alone = small_model.sample_fast_tokens(pick(observation, row), max_tokens=5, constrained=False)
        assert tokens[row].tolist() == alone[0].tolist()


def test_every_input_matters(small_model, observation):
    """The opposite: a pixel of a live camera, a prompt token, the order of cameras and the noise change the actions."""
    sample = pick(observation, 0)
    noise = torch.zeros(1, 5, 6)
    pixel, word = sample.images.clone(), sample.prompt_tokens.clone()
    pixel[0, 2, 3, 4, 1] ^= 128
    word[0, 2] = (word[0, 2] + 1) % 96
    actions = small_model.sample_actions(sample, noise=noise)
    for change in ({"images": pixel}, {"prompt_tokens": word}, {"images": sample.images.flip(1)}):
        other = small_model.sample_actions(replace(sample, **change), noise=noise)
        assert (other - actions).abs().max() > 1e-3
    assert (small_model.sample_actions(sample, noise=noise + 0.1) - actions).abs().max() > 1e-3


def test_noise_is_drawn_when_none_is_given(small_model, observation):
    torch.manual_seed(0)
    first, second = (small_model.sample_actions(observation, num_steps=2) for _ in range(2))
    torch.manual_seed(0)
    again = small_model.sample_actions(observation, num_steps=2)
    assert torch.equal(first, again)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": torch.zeros(3, 5, 7)}, r"noise: shape \[3, 5, 7\], expected \[3, 5, 6\]"),
        ({"noise": torch.zeros(1, 5, 6)}, r"noise: shape \[1, 5, 6\]"),
        ({"num_steps": 0}, "num_steps 0: expected an integer from 1"),
        ({"num_steps": 2.0}, "num_steps 2.0"),
        ({"time_convention": "paper"}, "time convention 'paper': expected one of openpi, lerobot"),
    ],
)
def test_wrong_arguments_of_sample_actions(small_model, observation, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        small_model.sample_actions(observation, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"max_tokens": 0}, "max_tokens 0: expected at least 1"), ({"max_tokens": 1}, "pass constrained=False")],
)
def test_wrong_arguments_of_sample_fast_tokens(small_model, observation, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        small_model.sample_fast_tokens(observation, **arguments)
