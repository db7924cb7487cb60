"""Runs a bundle on the robot; numpy and one inference backend, no torch.

    from ki_runtime import Policy
    actions = Policy.load("bundle").infer(observation)["actions"]  # float64 [H, a], robot units

Names are imported when they are first used, so that `import ki_runtime` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ki_runtime.control.loop import ControlLoop, LoopOptions, episode_noise
    from ki_runtime.policy.policy import Policy
    from ki_runtime.policy.sampler import Sampler

_HOMES = {
    "ControlLoop": "control.loop",
    "LoopOptions": "control.loop",
    "Policy": "policy.policy",
    "Sampler": "policy.sampler",
    "episode_noise": "control.loop",
}

__all__ = ["ControlLoop", "LoopOptions", "Policy", "Sampler", "episode_noise"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
