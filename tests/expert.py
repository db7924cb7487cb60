"""Real-time chunking in numpy float64, written from its papers, with an action expert written out token by token.

Every token has a flow time of its own here, which is how the papers speak of it; tau = 1 - t is theirs. Nothing of the
model's code is called: only its weights are read, and the K/V that it made of a prefix.
"""

import math

import numpy as np


def velocity(weights, config, x, times, keys, values, mask):
    """v [H,A] of noisy actions x [H,A] whose tokens have the flow times [H]; keys, values [L,K,S,D], mask [S]."""
    expert, heads = config.expert, config.expert.num_heads
    rows = [modulation(weights, config, t) for t in times]  # of each token, its norms' scale, shift, gate
    positions = int(mask.sum()) + np.arange(len(x))
    hidden = linear(weights, "action_in_proj", x)
    for layer in range(expert.depth):
        name = f"expert.layers.{layer}"
        normed, gate = adarms(hidden, [row[2 * layer] for row in rows])
        q, k, v = (
            linear(weights, f"{name}.self_attn.{part}_proj", normed).reshape(len(x), -1, expert.head_dim)
            for part in "qkv"
        )
        q, k = rotated(q, positions), rotated(k, positions)
        mixed = np.zeros((len(x), heads, expert.head_dim))
        for head in range(heads):
            shared = head * expert.num_kv_heads // heads
            seen = np.concatenate([keys[layer, shared][mask], k[:, shared]])
            told = np.concatenate([values[layer, shared][mask], v[:, shared]])
            logits = q[:, head] @ seen.T / math.sqrt(expert.head_dim)
            weight = np.exp(logits - logits.max(axis=1, keepdims=True))
            mixed[:, head] = weight / weight.sum(axis=1, keepdims=True) @ told
        hidden = hidden + gate * linear(weights, f"{name}.self_attn.o_proj", mixed.reshape(len(x), -1))
        normed, gate = adarms(hidden, [row[2 * layer + 1] for row in rows])
        up = gelu(linear(weights, f"{name}.mlp.gate_proj", normed)) * linear(weights, f"{name}.mlp.up_proj", normed)
        hidden = hidden + gate * linear(weights, f"{name}.mlp.down_proj", up)
    return linear(weights, "action_out_proj", adarms(hidden, [row[-1] for row in rows])[0])


def modulation(weights, config, t):
    """Scale, shift, gate [3W] of every norm at one time."""
    width = config.expert.width
    periods = 4e-3 * 1000.0 ** np.linspace(0.0, 1.0, width // 2)
    embedding = np.concatenate([np.sin(2 * np.pi * t / periods), np.cos(2 * np.pi * t / periods)])
    condition = embedding
    for name in ("time_mlp_in", "time_mlp_out"):
        out = linear(weights, name, condition)
        condition = out / (1 + np.exp(-out))
    norms = [
        f"expert.layers.{layer}.{norm}_layernorm.dense"
        for layer in range(config.expert.depth)
        for norm in ("input", "post_attention")
    ]
    return [linear(weights, name, condition) for name in (*norms, "expert.norm.dense")]


def adarms(x, rows):
    """Normalised, scaled and shifted x [H,W], and the gate [H,W]; a row of modulation for each token."""
    scale, shift, gate = (np.stack(part) for part in zip(*(np.split(row, 3) for row in rows), strict=True))
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) * (1 + scale) + shift, gate


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotated(x, positions):
    """x [H,heads,D]: the pair (x_j, x_{j + D/2}) turns by position * 10000^(-2j/D)."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def guided(velocity_at, noise, times, previous, weights, maximum):
    """Actions [H,A] of arXiv 2506.07339 with the plain error: `velocity_at(x, t)` [H,A], `previous` [H,A]."""
    x = np.array(noise, np.float64)
    for t in times:
        tau = 1.0 - float(t)
        towards_data = -velocity_at(x, t)
        expected = x + (1 - tau) * towards_data
        error = (previous - expected) * weights[:, None]
        ratio = math.inf if tau == 0 else (1 - tau) / tau
        spread = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        x = x + (towards_data + min(ratio / spread, maximum) * error) / len(times)
    return x


def trained(velocity_at, noise, times, previous, delay):
    """Actions [H,A] of arXiv 2512.05964: `velocity_at(x, times [H])` [H,A]; the first `delay` ones are settled."""
    x = np.array(noise, np.float64)
    for t in times:
        x[:delay] = previous[:delay]
        each = np.where(np.arange(len(x)) < delay, 0.0, float(t))
        x = x - velocity_at(x, each) / len(times)
    x[:delay] = previous[:delay]
    return x
