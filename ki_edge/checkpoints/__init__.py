"""Checkpoints of every format as one: tensors under openpi's keys, without torch and without loading them."""

from .checkpoint import Checkpoint
from .source import SafetensorsSource, StoredTensor, TensorSource

__all__ = ["Checkpoint", "SafetensorsSource", "StoredTensor", "TensorSource"]
