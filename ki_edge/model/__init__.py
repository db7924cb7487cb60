"""The π0.5 and π0 models in PyTorch. Imports: checkpoints, checkpoints.layout, files."""

from .build import build
from .checkpoint import load_model, save_checkpoint
from .loss import Losses
from .observation import Observation
from .pi import PiModel
from .pi0 import Pi0
from .pi05 import Pi05

__all__ = ["Losses", "Observation", "Pi0", "Pi05", "PiModel", "build", "load_model", "save_checkpoint"]
