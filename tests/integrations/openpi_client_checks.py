"""Run where the real openpi-client is installed: its frames, its client, its Environment, against this project's.

python openpi_client_checks.py BUNDLE
"""

import sys
import threading

import numpy as np
from openpi_client import msgpack_numpy
from openpi_client.runtime.environment import Environment
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.sync.server import serve

from ki_edge.errors import BackendError
from ki_runtime import ControlLoop, LoopOptions, Policy
from ki_runtime.remote.observation import outgoing
from ki_runtime.remote.packing import pack, unpack
from ki_runtime.remote.policy import RemotePolicy
from ki_runtime.robots import open_robot


class Cell(Environment):
    """An arm of openpi's kind that exists in memory; the demo policy fits it."""

    def __init__(self, steps=12):
        self.most, self.applied = steps, []

    def reset(self):
        self.state = np.array([1.34, 0.75, 0.53, 0.0, 0.0], np.float32)

    def is_episode_complete(self):
        return len(self.applied) >= self.most

    def get_observation(self):
        picture = np.full((3, 96, 96), 100 + len(self.applied), np.uint8)
        images = {"front_left": picture, "front_right": picture}
        return {"images": images, "state": self.state, "prompt": "reach the red target"}

    def apply_action(self, action):
        self.applied.append(np.array(action["actions"]))
        self.state[:3] += 0.2 * (self.applied[-1][:3] - self.state[:3])


def serve_policy(policy, frames):
    """A server on openpi's own codec, which keeps the raw frames that it got."""

    def handle(connection):
        connection.send(msgpack_numpy.packb({"policy": "openpi's"}))
        for number, frame in enumerate(connection):
            frames.append(frame)
            seen = msgpack_numpy.unpackb(frame)
            if seen.get("prompt") == "fail":
                connection.send("Traceback (most recent call last):\nRuntimeError: out of memory\n")
                connection.close(1011)
                return
            actions = policy.infer(seen, seed=number)["actions"].astype(np.float32)
            timing = {"infer_ms": np.float32(1e-3)}
            connection.send(msgpack_numpy.packb({"actions": actions, "state": seen["state"], "server_timing": timing}))

    server = serve(handle, "127.0.0.1", 0, compression=None, max_size=None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"ws://127.0.0.1:{server.socket.getsockname()[1]}"


def say(line):
    sys.stdout.write(line + "\n")


def main(bundle):
    values = {
        "images": {"a": np.arange(24, dtype=np.uint8).reshape(2, 4, 3)}, "state": np.linspace(0, 1, 5), "n": None,
        "half": np.float16(0.5), "flag": np.bool_(True), "words": ["x", 1, 2.5, True], "text": np.array(["ab", "c"]),
    }  # fmt: skip
    assert pack(values) == msgpack_numpy.packb(values)
    np.testing.assert_equal(unpack(msgpack_numpy.packb(values), "server"), msgpack_numpy.unpackb(pack(values)))
    say("frames equal")

    policy, frames = Policy.load(bundle), []
    server, uri = serve_policy(policy, frames)
    remote = RemotePolicy(uri, policy.contract)
    cell = Cell()
    cell.reset()
    seen = cell.get_observation()
    ours = remote.infer(seen)["actions"]
    theirs = WebsocketClientPolicy(uri).infer(outgoing(policy.contract, seen))["actions"]
    assert frames[0] == frames[1], "the question is openpi's client's own to the byte"
    np.testing.assert_array_equal(ours, theirs)
    say("questions and answers equal")

    robot = open_robot("openpi:openpi_client_checks:Cell", config={"steps": 12})
    report = ControlLoop(remote, robot, LoopOptions(mode="async", close_robot=False)).run()
    assert report.episodes[0].steps == 12 and len(robot._environment.applied) == 12
    say("an openpi environment was driven by a policy behind openpi's codec")

    try:
        remote.infer({**seen, "prompt": "fail"})
    except BackendError as error:
        assert str(error) == f"{uri} failed: RuntimeError: out of memory", error
    assert remote.infer(seen)["actions"].shape == ours.shape
    say("its errors are one line")
    remote.close()
    server.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
