"""A robot that counts and a policy that is a formula: what tests of the loop drive."""

import threading
import time
from types import SimpleNamespace

import numpy as np

from ki_edge.errors import BackendError
from ki_edge.policy.contract import generic
from ki_runtime.control.reporting import Watcher
from ki_runtime.robots import EpisodeStatus

HORIZON, DIM = 5, 2
ROWS, HZ = 8, 50.0  # of Counting


class CountingRobot:
    """Over after 7 steps; successful at step 3 in every episode, and at the end where the seed is even."""

    name, control_hz = "counting", 20.0
    real_time = False  # tests wait for nothing

    def __init__(self):
        self.log = []
        self.closed = 0  # how often

    def reset(self, seed=None):
        self.log.append(("reset", seed))
        self.seed, self.steps = seed, 0

    def observe(self):
        self.log.append(("observe", self.steps))
        return {"images": {}, "state": np.full(2, self.steps, np.float32), "prompt": "own prompt"}

    def act(self, action):
        assert action.dtype == np.float32
        self.log.append(("act", action.tolist()))
        self.steps += 1

    def status(self):
        success = self.steps == 3 or (self.steps >= 7 and self.seed % 2 == 0)
        return EpisodeStatus(self.steps >= 7, success, self.steps)

    def frame(self):
        return np.full((18, 33, 3), self.steps * 30, np.uint8)

    def close(self):
        self.closed += 1


class FormulaPolicy:
    """The h-th action is [state, h]; keeps what it was asked."""

    contract = generic(["cam"], state_dim=2, action_dim=DIM, action_horizon=HORIZON, execute=3, model_action_dim=4)

    def __init__(self):
        self.asked = []

    def warm_up(self, **given):
        self.warmed = given
        return SimpleNamespace(milliseconds=12.0, inference_ms=3.0)

    def infer(self, observation, *, noise=None, num_steps=None):
        self.asked.append(SimpleNamespace(observation=observation, noise=noise, num_steps=num_steps))
        actions = np.stack([np.full(HORIZON, observation["state"][0]), np.arange(HORIZON)], axis=1)
        return {"actions": actions, "timing": {"prefix_ms": 2.0, "denoise_ms": 1.0, "total_ms": 3.0}}


class Failing(FormulaPolicy):
    """Fails at its fourth inference."""

    error = BackendError("broken")

    def infer(self, observation, **options):
        if len(self.asked) == 3:
            raise self.error
        return super().infer(observation, **options)


class Line:
    """A robot whose state counts its commands, and which a policy should send just that count. Keeps what it got."""

    name, control_hz = "line", HZ

    def __init__(self, steps=40):
        self.limit, self.sent, self.ended = steps, [], []

    def reset(self, seed=None):
        self.steps = 0

    def observe(self):
        pixels = np.full((2, 2, 3), self.steps % 256, np.uint8)
        return {"images": {"cam": pixels}, "state": np.full(1, self.steps, np.float32), "prompt": "p"}

    def act(self, action):
        self.sent.append(float(action[0]))
        self.steps += 1

    def status(self):
        return EpisodeStatus(self.steps >= self.limit, None, self.steps)

    def frame(self):
        return None

    def safe_stop(self):
        self.ended.append("safe_stop")

    def close(self):
        self.ended.append("close")


class Counting:
    """Row h of a chunk is for h commands after the observation. `asked`: the previous chunks that it was told."""

    contract = generic(
        ["cam"], state_dim=1, action_dim=1, action_horizon=ROWS, execute=4, model_action_dim=2, control_hz=HZ
    )
    rtc, max_delay = "guided", None

    def __init__(self, seconds=0.0, fail_at=None, error=None):
        self.asked, self.seconds, self.fail_at, self.error = [], seconds, fail_at, error
        self.threads = set()

    def infer(self, observation, *, noise=None, num_steps=None, previous=None, way=None):
        self.asked.append(previous)
        self.threads.add(threading.current_thread())
        if len(self.asked) == self.fail_at:
            if isinstance(self.error, BaseException):
                raise self.error
            return {"actions": np.full((ROWS, 1), self.error)}
        time.sleep(self.seconds)
        return {"actions": observation["state"][0] + np.arange(ROWS, dtype=np.float64)[:, None]}


class Steps(Watcher):
    def __init__(self):
        self.steps, self.closed = [], 0

    def stepped(self, step):
        self.steps.append(step)

    def close(self):
        self.closed += 1
