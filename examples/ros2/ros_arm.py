"""A robot whose state, pictures and commands are ROS 2 topics. Not tested with ROS 2: see README.md beside this file.

    python examples/ros2/ros_arm.py BUNDLE CONFIG.json

The executor's thread keeps the newest message of each topic, and nothing else. The loop calls `RosArm` from the main
thread; inference runs in the loop's worker. So a slow inference never keeps a message waiting, nor the other way round.
"""

import io
import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image as Pictures

from ki_runtime import ControlLoop, EpisodeStatus, LoopOptions, Policy, RobotError

FIRST = 10.0  # seconds to wait for the first message of every topic


def joints_by_name(names, values, wanted):
    """The values of the wanted joints, f32, from a message that has its joints in any order, and maybe others too."""
    place = {name: at for at, name in enumerate(names)}
    if missing := [name for name in wanted if name not in place]:
        raise RobotError(f"the joint state has no {', '.join(missing)}; it has {', '.join(names)}")
    if len(values) != len(names):
        raise RobotError(f"the joint state names {len(names)} joints and has {len(values)} positions")
    return np.array([values[place[name]] for name in wanted], np.float32)


def picture_of(message):
    """RGB u8 [h, w, 3] of a sensor_msgs/Image (rgb8 or bgr8) or a sensor_msgs/CompressedImage."""
    if hasattr(message, "format"):
        return np.asarray(Pictures.open(io.BytesIO(bytes(message.data))).convert("RGB"))
    if message.encoding not in ("rgb8", "bgr8"):
        raise RobotError(f"a picture has the encoding {message.encoding}, expected rgb8 or bgr8")
    rows = np.frombuffer(bytes(message.data), np.uint8).reshape(message.height, message.step)  # rows may be padded
    picture = rows[:, : 3 * message.width].reshape(message.height, message.width, 3)
    return picture if message.encoding == "rgb8" else picture[..., ::-1]


class Latest:
    """The newest message of each topic with the time at which it came. Written by the executor, read by the loop."""

    def __init__(self):
        self._found, self._came = {}, threading.Condition()

    def keep(self, name):
        """A callback for a topic."""

        def put(message):
            with self._came:
                self._found[name] = (message, time.monotonic())
                self._came.notify_all()

        return put

    def get(self, name):
        """(message, time); None before the first."""
        with self._came:
            return self._found.get(name)

    def wait(self, names, seconds):
        """The names of which nothing came within so many seconds."""
        with self._came:
            self._came.wait_for(lambda: all(name in self._found for name in names), seconds)
            return [name for name in names if name not in self._found]


class RosArm:
    """`publish(positions)` sends a command; `latest` has what came of "state", each camera and "task"."""

    def __init__(self, config, latest, publish):
        self.name, self.control_hz = config["name"], float(config["control_hz"])
        self.action_names = tuple(config["command"]["joints"])
        self._config, self._latest, self._publish = config, latest, publish
        self._needed = ["state", *config["cameras"]]
        self.steps = 0

    def reset(self, seed=None):
        if missing := self._latest.wait(self._needed, FIRST):
            raise RobotError(f"{self.name}: no message of {', '.join(missing)} within {FIRST:g} s")
        self.steps = 0

    def observe(self):
        images = {name: picture_of(self._latest.get(name)[0]) for name in self._config["cameras"]}
        task = self._latest.get("task")
        prompt = self._config["prompt"] if task is None else task[0].data
        return {"images": images, "state": self.measure(), "prompt": prompt}

    def measure(self):
        message = self._latest.get("state")[0]
        return joints_by_name(list(message.name), list(message.position), self._config["state"]["joints"])

    def timestamps(self):
        return {name: self._latest.get(name)[1] for name in self._needed}

    def act(self, action):
        self._publish(np.asarray(action, float))
        self.steps += 1

    def status(self):
        return EpisodeStatus(self.steps >= self._config["max_steps"], None, self.steps)

    def frame(self):
        found = self._latest.get(next(iter(self._config["cameras"])))
        return None if found is None else picture_of(found[0])

    def safe_stop(self):
        """Command the commanded joints, as far as their positions are told, to where they are."""
        state = self._latest.get("state")
        if state is not None and self.steps and set(self.action_names) <= set(state[0].name):
            self._publish(joints_by_name(list(state[0].name), list(state[0].position), self.action_names).astype(float))

    def close(self):
        pass


def main(bundle, config_file):
    import rclpy
    from builtin_interfaces.msg import Duration
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
    from sensor_msgs.msg import CompressedImage, Image, JointState
    from std_msgs.msg import String
    from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    policy = Policy.load(bundle)
    prepared = policy.warm_up(prompt=config["prompt"])
    rclpy.init()
    node, latest = rclpy.create_node("ki_edge"), Latest()
    newest = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    node.create_subscription(JointState, config["state"]["topic"], latest.keep("state"), qos_profile_sensor_data)
    for name, topic in config["cameras"].items():
        kind = CompressedImage if topic.endswith("/compressed") else Image
        node.create_subscription(kind, topic, latest.keep(name), newest)
    if config.get("task"):
        node.create_subscription(String, config["task"], latest.keep("task"), 1)
    publisher = node.create_publisher(JointTrajectory, config["command"]["topic"], 1)
    period = Duration(nanosec=int(1e9 / config["control_hz"]))

    def publish(positions):
        point = JointTrajectoryPoint(positions=positions.tolist(), time_from_start=period)
        publisher.publish(JointTrajectory(joint_names=config["command"]["joints"], points=[point]))

    executor = SingleThreadedExecutor()
    executor.add_node(node)
    spinning = threading.Thread(target=executor.spin, daemon=True)
    spinning.start()
    try:
        loop = ControlLoop(policy, RosArm(config, latest, publish), LoopOptions(mode="async"))
        loop.expect(prepared.inference_ms)
        print("\n".join(loop.run().lines()))
    finally:
        executor.shutdown()
        spinning.join(5.0)
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:3])
