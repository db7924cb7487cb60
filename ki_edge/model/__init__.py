"""The π0.5 and π0 models in PyTorch."""

from ..checkpoints import Checkpoint
from .build import build
from .checkpoint import save_checkpoint
from .loss import Losses
from .observation import Observation
from .pi import PiModel
from .pi0 import Pi0
from .pi05 import Pi05

__all__ = ["Checkpoint", "Losses", "Observation", "Pi0", "Pi05", "PiModel", "build", "save_checkpoint"]
