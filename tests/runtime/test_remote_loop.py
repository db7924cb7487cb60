"""The loop with its model behind a real websocket server that fails: it holds, then the robot comes to rest."""

import threading

import numpy as np
import pytest

from ki_edge.errors import BackendError, RobotError
from ki_runtime import ControlLoop, LoopOptions
from ki_runtime.remote.policy import RemotePolicy

from .fake_robot import CountingRobot
from .policy_server import CONTRACT, ROWS, SEEN, PolicyServer, rows


@pytest.fixture
def served():
    """served(answers, ...) -> (policy, its server); both are closed."""
    opened = []

    def serve(answers, **options):
        server = PolicyServer(answers)
        opened.append(server.stop)
        policy = RemotePolicy(server.uri, CONTRACT, say=lambda line: None, **options)
        opened.append(policy.close)
        return policy, server

    yield serve
    for close in reversed(opened):
        close()


class Camera(CountingRobot):
    """Has a picture, so that an observation is whole; its clock is the real one."""

    real_time = True
    control_hz = 50.0
    stops = 0

    def observe(self):
        return {**SEEN, "state": np.full(2, self.steps, np.float32)}

    def safe_stop(self):
        self.stops += 1


def test_the_loop_holds_and_then_stops_the_robot_when_the_server_is_gone(served):
    """Its last chunk is played, the last command is repeated, then comes the safe stop: long before the patience with
    a server that is gone is over.
    """

    def answers(number, observation):
        if number == 1:
            threading.Thread(target=server.stop).start()  # which waits for this very handler
            return None
        return rows(number, observation)

    policy, server = served(answers, absence=300.0)
    robot = Camera()
    robot.status = lambda: CountingRobot.status(robot).__class__(False, None, robot.steps)
    loop = ControlLoop(policy, robot, LoopOptions(mode="async", starve_limit=10))
    closer = threading.Timer(8.0, policy.close)  # as ki-run does once the loop is over
    closer.start()
    with pytest.raises(RobotError, match="no fresh action for 10 ticks: counting is stopped"):
        loop.run()
    closer.cancel()
    commands = [what for kind, what in robot.log if kind == "act"]
    assert commands[:5] == ROWS.tolist() and commands[5:] == [ROWS[-1].tolist()] * (len(commands) - 5)
    assert len(commands) == 5 + 10 and robot.stops == 1 and robot.closed == 1


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("answer", [{"actions": ROWS[:3]}, "out of memory"], ids=["wrong shape", "error"])
def test_a_wrong_answer_stops_the_robot_after_the_last_good_chunk(served, mode, answer):
    policy, _ = served(lambda number, observation: rows(number, observation) if number == 0 else answer)
    robot = Camera()
    robot.status = lambda: CountingRobot.status(robot).__class__(False, None, robot.steps)
    with pytest.raises(BackendError, match=r"answered actions float32 \[3, 2\]|failed: out of memory"):
        ControlLoop(policy, robot, LoopOptions(mode=mode)).run()
    assert [what for kind, what in robot.log if kind == "act"] == ROWS[: 3 if mode == "sync" else 5].tolist()
    assert robot.stops == 1 and robot.closed == 1


def test_a_robot_that_waits_is_not_sent_what_was_computed_from_before_the_server_was_away(served):
    """The first answer after the server's return is of the question that it was asked before: it is asked anew."""
    asked = []

    def answers(number, observation):
        asked.append(int(observation["state"][0]))
        if number == 1:
            connection_lost.set()
            return None  # hangs up
        return rows(number, observation)

    connection_lost = threading.Event()
    policy, _ = served(answers)
    robot = Camera()
    robot.status = lambda: CountingRobot.status(robot).__class__(robot.steps >= 9, None, robot.steps)
    report = ControlLoop(policy, robot, LoopOptions(mode="sync", execute=3)).run()
    assert connection_lost.is_set()
    assert asked[:4] == [0, 3, 3, 4]  # lost, asked again and dropped, a tick of holding, asked anew
    assert report.rate["late_chunks"] == 1
