"""The building blocks against other people's: torch's attention, transformers' SigLIP and Gemma; adaRMS in formulas."""

import logging
import math

import pytest
import torch
from torch.nn import functional

from ki_edge.model import layers

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

TOLERANCE = 1e-5


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)


def close(ours, reference, tolerance=TOLERANCE):
    torch.testing.assert_close(ours, reference, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(generator, kv_heads, masked):
    q = torch.randn(2, 4, 6, 8, generator=generator)
    k, v = torch.randn(2, 2, kv_heads, 9, 8, generator=generator)
    mask = torch.rand(2, 9, generator=generator) < 0.6 if masked else torch.ones(2, 9, dtype=torch.bool)
    mask[:, 4] = True
    expected = functional.scaled_dot_product_attention(q, k, v, mask[:, None, None], enable_gqa=True)
    ours = layers.attention(q.transpose(1, 2), k, v, layers.key_bias(mask) if masked else None)
    close(ours, expected.transpose(1, 2).flatten(2))


def test_hidden_keys_have_no_weight_at_all(generator):
    """Not a small one: infinite values in hidden rows of K must not even be rounding."""
    k, v = torch.randn(2, 1, 2, 5, 4, generator=generator)
    q = torch.randn(1, 5, 2, 4, generator=generator)
    mask = torch.tensor([[True, False, True, True, False]])
    shown = layers.attention(q, k, v, layers.key_bias(mask))
    k[:, :, ~mask[0]], v[:, :, ~mask[0]] = 1e4, 1e4
    assert torch.equal(layers.attention(q, k, v, layers.key_bias(mask)), shown)


def test_rotation_is_complex_multiplication(generator):
    x = torch.randn(2, 4, 3, 8, generator=generator, dtype=torch.float64)
    positions = torch.tensor([[-1, 0, 5, 967], [3, 3, 4, 1000]])
    frequencies = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turn = torch.polar(torch.ones(()).double(), positions[:, :, None, None] * frequencies)
    expected = torch.complex(x[..., :4], x[..., 4:]) * turn
    rotated = layers.rotate(x, layers.rope_angles(positions, 8))
    close(rotated, torch.cat([expected.real, expected.imag], dim=-1), 2e-4)  # float32 angles near 1000 rad


def siglip(config):
    settings = transformers.SiglipVisionConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        vision_use_head=False,
        attn_implementation="eager",
    )
    return transformers.SiglipVisionModel(settings).eval()


@torch.no_grad()
def test_vision_tower_is_transformers_siglip(small_model, generator):
    reference = siglip(small_model.config.vision)
    getattr(reference, "vision_model", reference).load_state_dict(small_model.vision.state_dict())
    pixels = torch.rand(3, 3, 14, 14, generator=generator) * 2 - 1
    close(small_model.vision(pixels), reference(pixels).last_hidden_state)


def gemma(config, vocab_size):
    settings = transformers.GemmaConfig(
        vocab_size=vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        attn_implementation="eager",
    )
    return transformers.GemmaModel(settings).eval()


@torch.no_grad()
@pytest.mark.parametrize("bidirectional", [True, False])
def test_backbone_is_transformers_gemma(small_model, generator, bidirectional):
    """Embedding with its scale, hidden states of every layer, K and V; with padding behind the second sample."""
    config = small_model.config
    reference = gemma(config.backbone, config.vocab_size)
    reference.load_state_dict(small_model.backbone.state_dict())
    ids = torch.randint(0, 96, (2, 7), generator=generator)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    positions = torch.arange(7).expand(2, -1)
    order = torch.ones(7, 7).tril() > 0 if not bidirectional else torch.ones(7, 7) > 0
    hidden_pairs = ~(order & mask[:, None, None, :])  # [B,1,S,S]
    out = reference(
        input_ids=ids,
        attention_mask=torch.zeros(2, 1, 7, 7).masked_fill(hidden_pairs, torch.finfo(torch.float32).min),
        position_ids=positions,
        use_cache=True,
        output_hidden_states=True,
    )
    bias = layers.key_bias(mask) + torch.where(order, 0.0, layers.MASKED)
    vectors = small_model.backbone.embed(ids)
    hidden, cache = small_model.backbone(vectors, small_model._rope(positions), bias)
    close(vectors, out.hidden_states[0], 1e-6)
    close(hidden[mask], out.last_hidden_state[mask])
    for (k, v), layer in zip(cache, out.past_key_values.layers, strict=True):
        for ours, theirs in ((k, layer.keys), (v, layer.values)):
            close(ours.transpose(1, 2)[mask], theirs.transpose(1, 2)[mask])
    if bidirectional:
        for (k, v), (also_k, also_v) in zip(
            cache, small_model.backbone.keys_values(vectors, small_model._rope(positions), bias), strict=True
        ):
            assert torch.equal(k, also_k)
            assert torch.equal(v, also_v)


@torch.no_grad()
def test_expert_layer_is_its_formula(small_model, generator):
    """m = dense(cond); scale, shift, gate = its thirds; y = norm(x) (1 + scale) + shift; x + branch(y) gate."""
    layer, config = small_model.expert.stack[1], small_model.config.expert
    x, condition = torch.randn(2, 5, 16, generator=generator), torch.randn(2, 16, generator=generator)
    prefix = torch.randn(2, 2, 2, 7, 8, generator=generator)
    mask = torch.rand(2, 12, generator=generator) < 0.7
    positions = torch.tensor([[3, 4, 5, 6, 7], [6, 7, 8, 9, 10]])
    rope = layers.rope_angles(positions, config.head_dim)

    def modulated(x, dense):
        scale, shift, gate = (m[:, None] for m in (condition @ dense.weight.T + dense.bias).split(16, dim=-1))
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift, gate

    def heads(x, projection):
        return (x @ projection.weight.T).view(2, 5, -1, 8)

    attention, mlp = layer.self_attn, layer.mlp
    y, gate = modulated(x, layer.input_layernorm.dense)
    q, k = (layers.rotate(heads(y, projection), rope) for projection in (attention.q_proj, attention.k_proj))
    q, k, v = (x.transpose(1, 2) for x in (q, k, heads(y, attention.v_proj)))
    k, v = torch.cat([prefix[0], k], 2), torch.cat([prefix[1], v], 2)
    mixed = functional.scaled_dot_product_attention(q, k, v, mask[:, None, None], enable_gqa=True)
    expected = x + mixed.transpose(1, 2).flatten(2) @ attention.o_proj.weight.T * gate
    y, gate = modulated(expected, layer.post_attention_layernorm.dense)
    hidden = y @ mlp.gate_proj.weight.T
    hidden = hidden * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    expected = expected + (hidden * (y @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T * gate

    rows = (layer.input_layernorm(condition)[:, None], layer.post_attention_layernorm(condition)[:, None])
    close(layer(x, rows, rope, (prefix[0], prefix[1]), layers.key_bias(mask)), expected)


@torch.no_grad()
def test_modulation_rows_are_in_order_of_use(small_model, generator):
    condition = torch.randn(3, 16, generator=generator)
    rows = small_model.expert.modulation(condition)
    assert rows.shape == (3, 7, 48)
    norms = [getattr(layer, name) for layer in small_model.expert.stack
             for name in ("input_layernorm", "post_attention_layernorm")]  # fmt: skip
    for index, norm in enumerate([*norms, small_model.expert.norm]):
        close(rows[:, index], condition @ norm.dense.weight.T + norm.dense.bias)


def test_wanted_tokens_are_those_of_all(small_model):
    """The last layer computes Q, attention and MLP of the wanted tokens alone: the same outputs, K/V and gradients."""
    random = torch.Generator().manual_seed(4)
    vectors = torch.randn(2, 7, small_model.config.backbone.width, generator=random)
    rope = small_model._rope(torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 2, 3, 4, 5]]))
    order = torch.where(torch.ones(7, 7).tril().bool(), 0.0, -1e30)
    hidden = torch.tensor([[0.0] * 7, [-1e30] + [0.0] * 6])  # keys
    wanted = torch.tensor([[6, 2, 3], [1, 5, 4]])
    for bias in (hidden[:, None, None, None] + order, hidden[:, None, None, None]):
        found = []
        for some in (wanted, None):
            small_model.zero_grad(set_to_none=True)
            out, cache = small_model.backbone(vectors, rope, bias, wanted=some)
            out = out if some is not None else out.take_along_dim(wanted[:, :, None], dim=1)
            weight = torch.linspace(0.5, 1.5, out.numel()).view_as(out)
            ((out * weight).sum() + sum(k.square().sum() + v.square().sum() for k, v in cache)).backward()
            gradients = [p.grad.clone() for p in small_model.backbone.layers.parameters()]
            found.append((out.detach(), *(part.detach() for layer in cache for part in layer), *gradients))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    small_model.zero_grad(set_to_none=True)
