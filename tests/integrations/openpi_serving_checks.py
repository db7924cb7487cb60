"""Run where the real openpi-client is installed, against servers of ours: its client, its broker, its runtime.

python openpi_serving_checks.py FOLDER < lines; FOLDER/servers.json has the addresses. It prints a line for each check,
and "restart" where the server of DROID is to be started anew, which a line on stdin says was done.
"""

import json
import sys
from pathlib import Path

import numpy as np
import websockets.exceptions
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.runtime.agents.policy_agent import PolicyAgent
from openpi_client.runtime.environment import Environment
from openpi_client.runtime.runtime import Runtime
from openpi_client.runtime.subscriber import Subscriber
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from openpi_observations import HORIZON, ROBOTS, WIDTH, observation


def say(line):
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def answers_of_every_robot(servers, folder):
    """Kept for the other side, which knows what the policy gives by itself."""
    found = {}
    for robot in ROBOTS:
        client = WebsocketClientPolicy(servers[robot])
        told = client.get_server_metadata()["ki_edge"]
        assert told["contract"]["robot"] == robot and told["horizon"] == HORIZON
        for number in range(2):
            answer = client.infer(observation(robot, number))
            found[f"{robot} {number}"] = answer["actions"]
            assert answer["actions"].shape == (HORIZON, WIDTH[robot])
            assert answer["policy_timing"]["infer_ms"] > 0 and answer["server_timing"]["infer_ms"] > 0
        assert answer["server_timing"]["prev_total_ms"] > 0 and len(answer["ki_edge"]["id"]) == 12
        client.reset()
        seeded = client.infer({**observation(robot), "ki_edge": {"id": "mine"}})
        np.testing.assert_array_equal(seeded["actions"], found[f"{robot} 0"])
        assert seeded["ki_edge"]["id"] == "mine"
    np.savez(folder / "answers.npz", **found)
    say("answers of DROID, LIBERO and ALOHA")


def broker(servers):
    client = WebsocketClientPolicy(servers["droid"])
    chunk = client.infer(observation("droid"))["actions"]
    one_by_one = ActionChunkBroker(client, action_horizon=8)
    rows = [one_by_one.infer(observation("droid")) for _ in range(8)]
    np.testing.assert_array_equal([row["actions"] for row in rows], chunk[:8])
    one_by_one.reset()
    np.testing.assert_array_equal(one_by_one.infer(observation("droid", 1))["actions"].shape, (8,))
    say("ActionChunkBroker")


class Arm(Environment):
    """An arm of ALOHA's kind that exists in memory."""

    def __init__(self):
        self.applied, self.episode = [], 0

    def reset(self):
        self.steps, self.episode = 0, self.episode + 1

    def is_episode_complete(self):
        return self.steps >= 12

    def get_observation(self):
        return observation("aloha", self.steps)

    def apply_action(self, action):
        assert action["actions"].shape == (14,)
        self.applied.append(action["actions"])
        self.steps += 1


class Counting(Subscriber):
    def __init__(self):
        self.events = []

    def on_episode_start(self):
        self.events.append("start")

    def on_step(self, observation, action):
        self.events.append("step")

    def on_episode_end(self):
        self.events.append("end")


def runtime(servers):
    arm, counting = Arm(), Counting()
    policy = ActionChunkBroker(WebsocketClientPolicy(servers["aloha"]), action_horizon=5)
    Runtime(arm, PolicyAgent(policy), [counting], max_hz=0, num_episodes=2).run()
    assert counting.events == 2 * ["start", *12 * ["step"], "end"]
    assert len(arm.applied) == 24 and np.isfinite(arm.applied).all()
    np.testing.assert_array_equal(arm.applied[:12], arm.applied[12:])  # the same observations, the same answers
    say("Runtime with an Environment")


def errors(servers):
    """The client raises what the server says, and may ask on."""
    client = WebsocketClientPolicy(servers["libero"])
    good = observation("libero")
    wrong = {
        "observation: ": {key: value for key, value in good.items() if key != "observation/wrist_image"},
        "observation: state": {**good, "observation/state": np.zeros(3)},
        "arguments: ki_edge: unknown": {**good, "ki_edge": {"sede": 3}},
    }
    for line, seen in wrong.items():
        try:
            client.infer(seen)
        except RuntimeError as error:
            first, second = str(error).split("\n")
            assert first == "Error in inference server:" and second.startswith(line.split("state")[0]), error
        else:
            raise AssertionError(line)
        assert client.infer(good)["actions"].shape == (HORIZON, 7)
    say("errors")


def keys(servers):
    for key in (None, "a wrong one"):
        try:
            WebsocketClientPolicy(servers["locked"], api_key=key)
        except websockets.exceptions.InvalidStatus as error:
            assert error.response.status_code == 401
        else:
            raise AssertionError("a wrong key came in")
    client = WebsocketClientPolicy(servers["locked"], api_key=servers["key"])
    assert client.infer(observation("droid"))["actions"].shape == (HORIZON, 8)
    say("keys")


def reconnecting(servers):
    client = WebsocketClientPolicy(servers["droid"])
    before = client.infer(observation("droid"))["actions"]
    say("restart")
    assert sys.stdin.readline() == "done\n"
    try:
        client.infer(observation("droid"))
    except websockets.exceptions.ConnectionClosed:
        pass
    else:
        raise AssertionError("its server was gone")
    again = WebsocketClientPolicy(servers["droid"]).infer(observation("droid"))["actions"]
    np.testing.assert_array_equal(again, before)
    say("reconnecting")


def main(folder):
    servers = json.loads((folder / "servers.json").read_text())
    answers_of_every_robot(servers, folder)
    broker(servers)
    runtime(servers)
    errors(servers)
    keys(servers)
    reconnecting(servers)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
