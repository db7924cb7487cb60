"""Runs a bundle on the robot; numpy and one inference backend, no torch.

    from ki_runtime import Policy
    actions = Policy.load("bundle").infer(observation)["actions"]  # float64 [H, a], robot units

Names are imported when they are first used, so that `import ki_runtime` costs nothing.

Imports: nothing.
"""

from typing import TYPE_CHECKING

from ki_edge.public_names import public_names

if TYPE_CHECKING:
    from ki_edge.errors import KiEdgeError, RobotError
    from ki_runtime.control.loop import ControlLoop, episode_noise
    from ki_runtime.control.options import LoopOptions
    from ki_runtime.control.recorder import Recorder
    from ki_runtime.control.reporting import Step, Watcher
    from ki_runtime.policy.policy import Policy
    from ki_runtime.policy.sampler import Sampler
    from ki_runtime.robots import EpisodeStatus, Robot, open_robot
    from ki_runtime.trt.build import BuildOptions, build_bundle

__getattr__, __dir__ = public_names(
    __name__,
    {
        "ki_edge.errors": "KiEdgeError RobotError",
        "ki_runtime.control.loop": "ControlLoop episode_noise",
        "ki_runtime.control.options": "LoopOptions",
        "ki_runtime.control.recorder": "Recorder",
        "ki_runtime.control.reporting": "Step Watcher",
        "ki_runtime.policy.policy": "Policy",
        "ki_runtime.policy.sampler": "Sampler",
        "ki_runtime.robots": "EpisodeStatus Robot open_robot",
        "ki_runtime.trt.build": "BuildOptions build_bundle",
    },
)

__all__ = [
    "BuildOptions", "ControlLoop", "EpisodeStatus", "KiEdgeError", "LoopOptions", "Policy", "Recorder", "Robot",
    "RobotError", "Sampler", "Step", "Watcher", "build_bundle", "episode_noise", "open_robot",
]  # fmt: skip
