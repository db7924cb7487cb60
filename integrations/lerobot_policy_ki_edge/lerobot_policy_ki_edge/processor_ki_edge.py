"""LeRobot's processors around the policy: they leave values as they are, since a bundle has its own.

They hold the steps whose settings LeRobot's commands change: names (`--rename_map`, empty here) and the device.
"""

from typing import Any

from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action

from .configuration_ki_edge import KiEdgeConfig

NAMES = ("policy_preprocessor", "policy_postprocessor")  # of the files that they are saved to


def make_ki_edge_pre_post_processors(
    config: KiEdgeConfig, dataset_stats: Any = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """(before, after). `dataset_stats` are not used: the policy was trained with those of the bundle."""
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device=config.device or "cpu"),
    ]
    return (
        PolicyProcessorPipeline(steps=before, name=NAMES[0]),
        PolicyProcessorPipeline(
            steps=[DeviceProcessorStep(device="cpu")],
            name=NAMES[1],
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        ),
    )
