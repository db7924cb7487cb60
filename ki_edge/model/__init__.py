"""The π0.5 model in PyTorch."""

from .checkpoint import Checkpoint, save_checkpoint
from .loss import Losses
from .observation import Observation
from .pi05 import Pi05

__all__ = ["Checkpoint", "Losses", "Observation", "Pi05", "save_checkpoint"]
