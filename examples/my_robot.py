"""A robot of your own: the methods that the control loop calls, here for an arm that exists only in memory.

One command goes out every 40 ms, also while the policy thinks: mode async. Limits of the commands come from the
policy's training data; docs/safety.md says how to give your own. docs/robots.md has all that a robot may have.

    python examples/my_robot.py build/demo/bundle
    ki-run build/demo/bundle --robot my_robot:MyArm --mode async        in the folder of this file
"""

import sys

import numpy as np

from ki_runtime import ControlLoop, LoopOptions, Policy
from ki_runtime.robots import EpisodeStatus


class MyArm:
    name = "my-arm"
    control_hz = 25.0  # actions a second

    def reset(self, seed=None):  # move to the start of an episode
        self.state, self.steps = np.array([1.34, 0.75, 0.53, 0.0, 0.0], np.float32), 0

    def observe(self):  # what the policy's contract asks for, in the robot's units
        picture = np.full((96, 96, 3), 200 + self.steps, np.uint8)  # of your camera: RGB, height x width x 3
        images = {"front_left": picture, "front_right": picture}
        return {"images": images, "state": self.state.copy(), "prompt": "reach the red target"}

    def act(self, action):  # one action, float32 [4]: send it, and return at once
        self.state[:3] += 0.2 * (action[:3] - self.state[:3])
        self.steps += 1

    def status(self):  # when an episode is over; success is None where the robot cannot tell
        return EpisodeStatus(done=self.steps >= 25, success=None, steps=self.steps)

    def frame(self):  # a picture for the film of --record, or None
        return None

    def measure(self):  # the state alone, at every tick: what the guards compare a command with
        return self.state

    def safe_stop(self):  # called once before close, however the run ends: bring the arm to rest
        print(f"{self.name} stands still")

    def close(self):  # called once: release the arm
        print(f"{self.name} is closed after {self.steps} actions")


if __name__ == "__main__":
    policy = Policy.load(sys.argv[1])
    prepared = policy.warm_up()  # the first inference is as fast as the others
    loop = ControlLoop(policy, MyArm(), LoopOptions(mode="async"))
    loop.expect(prepared.inference_ms)
    print("\n".join(loop.run().lines()))
