"""A robot with two cameras whose pictures tell the time, and runs of it that are recorded."""

import numpy as np

from ki_edge.errors import BackendError
from ki_edge.policy.contract import generic
from ki_runtime.control.loop import ControlLoop
from ki_runtime.control.options import LoopOptions
from ki_runtime.control.recorder import Recorder
from ki_runtime.robots import EpisodeStatus

STEPS, HZ = 9, 20.0
CAMERAS = {"front": (32, 48), "wrist/left": (17, 33)}  # the second loses its odd row and column
NAMES = ("x", "grip")


def level(steps, seed):
    """Grey level of the pictures after so many commands."""
    return 20 * steps + 10 * (seed % 3)


class Filmed:
    """State and pictures count the commands."""

    name, control_hz, real_time, action_names = "filmed", HZ, False, NAMES

    def __init__(self):
        self.limits = {"x": {"position": [0.0, 6.0]}}

    def reset(self, seed=None):
        self.seed, self.steps = seed, 0

    def observe(self):
        images = {name: np.full((*size, 3), level(self.steps, self.seed), np.uint8) for name, size in CAMERAS.items()}
        return {"images": images, "state": np.array([self.steps, self.seed, 0.5], np.float32), "prompt": "count"}

    def act(self, action):
        self.steps += 1

    def status(self):
        return EpisodeStatus(self.steps >= STEPS, self.steps >= STEPS and self.seed % 2 == 0, self.steps)

    def frame(self):
        return None

    def close(self):
        pass


class Plan:
    """Row h of a chunk is [commands so far + h, -h]; 4 of 5 rows are executed."""

    contract = generic(
        list(CAMERAS), state_dim=3, action_dim=2, action_horizon=5, execute=4, control_hz=HZ, action_names=NAMES
    )

    def infer(self, observation, *, noise=None, num_steps=None):
        rows = np.arange(5)
        return {"actions": np.stack([observation["state"][0] + rows, -rows], axis=1), "timing": {"total_ms": 1.0}}


class Cut(Plan):
    """Fails at the second inference of the third episode."""

    def __init__(self):
        self.asked = 0

    def infer(self, observation, **given):
        self.asked += 1
        if self.asked == 8:
            raise BackendError("broken")
        return super().infer(observation, **given)


def record(folder, robot=None, policy=None, *, every_tick=False, **options):
    """The report of a run that was recorded into a folder."""
    recorder = Recorder(folder, every_tick=every_tick)
    robot, policy = robot or Filmed(), policy or Plan()
    return ControlLoop(policy, robot, LoopOptions(**options), [recorder], say=lambda _: None).run()
