"""What export and runtime share: errors, commands, configuration, graph signatures, the times of the flow.

Every folder of the project may import the files of this one; they import no folder.
"""

from typing import TYPE_CHECKING

from ki_edge.public_names import public_names

if TYPE_CHECKING:
    from ki_edge.bundle import Bundle
    from ki_edge.checkpoints import Checkpoint
    from ki_edge.config import Pi05Config
    from ki_edge.errors import (
        ArgumentError,
        BackendError,
        BundleError,
        CheckpointError,
        ContractError,
        DatasetError,
        ExportError,
        KiEdgeError,
        ObservationError,
        ParityError,
        PromptError,
        RobotError,
    )
    from ki_edge.model import load_model, save_checkpoint
    from ki_edge.policy.contract import PolicyContract
    from ki_edge.policy.fast import FastCodec
    from ki_edge.policy.normalize import NormStats, read_norm_stats
    from ki_edge.policy.prompt import PromptTokenizer
    from ki_edge.policy.transforms import InputPipeline, OutputPipeline

__getattr__, __dir__ = public_names(
    __name__,
    {
        "ki_edge.bundle": "Bundle",
        "ki_edge.checkpoints": "Checkpoint",
        "ki_edge.config": "Pi05Config",
        "ki_edge.errors": "ArgumentError BackendError BundleError CheckpointError ContractError DatasetError "
        "ExportError KiEdgeError ObservationError ParityError PromptError RobotError",
        "ki_edge.model": "load_model save_checkpoint",
        "ki_edge.policy.contract": "PolicyContract",
        "ki_edge.policy.fast": "FastCodec",
        "ki_edge.policy.normalize": "NormStats read_norm_stats",
        "ki_edge.policy.prompt": "PromptTokenizer",
        "ki_edge.policy.transforms": "InputPipeline OutputPipeline",
    },
)

__all__ = [
    "ArgumentError", "BackendError", "Bundle", "BundleError", "Checkpoint", "CheckpointError", "ContractError",
    "DatasetError", "ExportError", "FastCodec", "InputPipeline", "KiEdgeError", "NormStats", "ObservationError",
    "OutputPipeline", "ParityError", "Pi05Config", "PolicyContract", "PromptError", "PromptTokenizer",
    "RobotError", "load_model", "read_norm_stats", "save_checkpoint",
]  # fmt: skip
