"""SigLIP: pictures to tokens, PaliGemma's tower without a pooling head (as transformers' SiglipVisionModel)."""

from __future__ import annotations

from torch import Tensor, nn

from ki_edge.config import VisionConfig

from .layers import Layer, LayerNorm, attention


class VisionEmbeddings(nn.Module):
    """Patches to vectors, plus learned positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.patches, config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels f32 [B,3,h,w] in [-1,1] -> [B,P,width], patches row by row."""
        patches: Tensor = self.patch_embedding(pixels)
        return patches.reshape(*patches.shape[:2], -1).transpose(1, 2) + self.position_embedding.weight


class VisionAttention(nn.Module):
    """Multi-head self-attention with biases."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            project(x).view(batch, length, self.num_heads, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: Tensor = self.out_proj(attention(q, k.transpose(1, 2), v.transpose(1, 2), None))
        return out


class VisionMLP(nn.Module):
    """fc2(gelu_tanh(fc1(x)))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))
        return out


class VisionLayer(Layer):
    """Pre-norm transformer layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.width, eps=1e-6)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = LayerNorm(config.width, eps=1e-6)
        self.mlp = VisionMLP(config)

    def compute(self, x: Tensor) -> Tensor:
        """x [B,P,width] -> the layer's output."""
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class VisionEncoder(nn.Module):
    """The stack of layers (its name is part of the checkpoint's keys)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.depth))


class VisionTower(nn.Module):
    """Pictures to patch features."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = LayerNorm(config.width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels f32 [B,3,h,w] in [-1,1] -> features [B,P,width]; embedded in float32, then the layers' type."""
        x = self.embeddings(pixels).to(self.post_layernorm.weight.dtype)
        for layer in self.encoder.layers:
            x = layer(x)
        out: Tensor = self.post_layernorm(x)
        return out
