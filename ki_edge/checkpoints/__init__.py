"""Checkpoints of every format as one: tensors under openpi's keys, without torch and without loading them.

Imports: checkpoints.jax, checkpoints.layout, checkpoints.peft, files.
"""

from ki_edge.checkpoints.layout.source import SafetensorsSource, StoredTensor, TensorSource

from .checkpoint import Checkpoint

__all__ = ["Checkpoint", "SafetensorsSource", "StoredTensor", "TensorSource"]
