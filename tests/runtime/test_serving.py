"""A server over real websockets: the protocol, what clients may ask besides, and what they are told."""

import asyncio
import time
import urllib.request
from http.client import HTTPConnection

import numpy as np
import pytest
from websockets.asyncio.client import connect

from ki_edge.policy.chunking import Guiding, PreviousChunk
from ki_runtime.remote.packing import pack
from ki_runtime.serving import LocalEngine, ServerOptions

from .policy_server import CONTRACT
from .serving_parts import HeldPolicy, Watching, ask, connected, in_line, seen, send, serving, take, wait_until


def test_metadata_comes_first_and_one_answer_for_each_question():
    with serving(HeldPolicy()) as server, connected(server) as socket:
        told = socket.metadata["ki_edge"]
        assert told["contract"] == CONTRACT.to_json() and told["horizon"] == 5 and told["rtc"] == "guided"
        assert told["modes"] == ["sync", "async", "rtc"] and told["heads"] == ["flow"]
        for number in (1.0, 2.0):
            answer = ask(socket, seen(number))
            assert answer["actions"].dtype == np.float64
            np.testing.assert_array_equal(answer["actions"], np.full((5, 2), number))
        assert answer["policy_timing"] == {"infer_ms": 3.0, "preprocess_ms": 1.0, "denoise_ms": 2.0, "total_ms": 3.0}
        assert set(answer["server_timing"]) == {"infer_ms", "wait_ms", "prev_total_ms"}
        assert answer["ki_edge"]["batch"] == 1 and len(answer["ki_edge"]["id"]) == 12
        arrays = [name for name, value in answer.items() if isinstance(value, np.ndarray)]
        assert arrays == ["actions"]  # openpi's ActionChunkBroker takes a row of each


def test_what_a_client_may_ask_besides_reaches_the_policy():
    policy = HeldPolicy()
    noise = np.ones((5, 4), np.float32)
    rtc = {"actions": np.ones((4, 2)), "valid": 3, "delay": 2, "way": "guided", "maximum": 5, "schedule": "exponential"}
    extra = {"id": "robot 7", "noise": noise, "num_steps": 3, "prompt": "lift", "rtc": rtc, "patience_ms": 60_000}
    with serving(policy) as server, connected(server) as socket:
        answer = ask(socket, seen(ki_edge={**extra, "begins": True, "reported": {"deadline_misses": 2}}))
        assert answer["ki_edge"]["id"] == "robot 7"
        ask(socket, seen(task="not this", ki_edge={"seed": 11, "prompt": "this"}))
    (observation, arguments), (second, seeded) = policy.calls
    assert observation["prompt"] == "lift" and "ki_edge" not in observation
    np.testing.assert_array_equal(arguments.pop("noise"), noise)
    previous = arguments.pop("previous")
    assert isinstance(previous, PreviousChunk) and previous.delay == 2
    np.testing.assert_array_equal(previous.actions, np.ones((3, 2)))
    assert arguments == {"num_steps": 3, "way": "guided", "guiding": Guiding(5.0, "exponential")}
    assert seeded == {"seed": 11} and second["prompt"] == "this" and "task" not in second


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ([1, 2], "observation: an observation is a map, got list"),
        ({"images": {}}, "observation: state is missing; expected {}"),
        (seen(prompt="break"), "policy: RuntimeError: an engine broke"),
        (b"\xc1", "frame: the client sent a frame that is not of openpi's form (ValueError: a value of kind 0xc1)"),
        ("a text", "frame: a text frame came, expected a binary one of msgpack"),
        (seen(ki_edge=1), "arguments: ki_edge: expected a map, got int"),
        (seen(ki_edge={"sed": 1}), "arguments: ki_edge: unknown sed of head flow; known are id, head, prompt"),
        (seen(ki_edge={"head": "arms"}), "arguments: ki_edge/head 'arms': expected one of flow, fast, text"),
        (seen(ki_edge={"head": ["flow"]}), "arguments: ki_edge/head ['flow']: expected one of"),
        (seen(ki_edge={"seed": -1}), "arguments: seed -1: expected an integer from 0"),
        (seen(ki_edge={"num_steps": 101}), "arguments: num_steps 101: expected an integer from 1 to 100"),
        (seen(ki_edge={"prompt": 3}), "arguments: ki_edge/prompt: expected text, got int"),
        (seen(ki_edge={"id": "a" * 65}), "arguments: ki_edge/id: expected a printable text of at most 64 characters"),
        (seen(ki_edge={"id": "a\nb"}), "arguments: ki_edge/id: expected a printable text"),
        (seen(ki_edge={"patience_ms": "soon"}), "arguments: patience_ms: expected a number, got str"),
        (seen(ki_edge={"patience_ms": float("nan")}), "arguments: patience_ms nan: expected a finite number"),
        (seen(ki_edge={"begins": 1}), "arguments: begins: expected true or false, got int"),
        (seen(ki_edge={"reported": {"x": "y"}}), "arguments: reported x: expected a number, got str"),
        (seen(ki_edge={"reported": {"x" * 65: 1}}), "arguments: reported: expected names"),
        (seen(ki_edge={"reported": {str(n): n for n in range(33)}}), "arguments: reported: expected a map of at most"),
        (seen(ki_edge={"rtc": []}), "arguments: ki_edge/rtc: expected a map, got list"),
        (seen(ki_edge={"rtc": {"delay": 1}}), "arguments: ki_edge/rtc: expected the actions and the delay"),
        (seen(ki_edge={"rtc": {"actions": "no", "delay": 1}}), "arguments: rtc actions: expected numbers"),
        (seen(ki_edge={"rtc": {"actions": np.ones((2, 2)), "delay": 3}}), "arguments: delay 3: expected an integer"),
        (seen(ki_edge={"rtc": {"actions": np.ones((2, 2)), "delay": 1, "valid": 3}}), "arguments: rtc valid 3"),
        (seen(ki_edge={"rtc": {"actions": np.ones((2, 2)), "delay": 1, "way": "my"}}), "arguments: rtc way 'my'"),
        (seen(ki_edge={"rtc": {"actions": np.ones((2, 2)), "delay": 1, "end": -1}}), "arguments: rtc end -1"),
        (seen(ki_edge={"rtc": {"actions": np.full((2, 2), np.nan), "delay": 1}}), "arguments: previous actions: row 0"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_and_the_connection_goes_on(content, line):
    with serving(HeldPolicy()) as server, connected(server) as socket:
        found = ask(socket, content)
        assert isinstance(found, str) and found.startswith(line) and "\n" not in found and len(found) < 1100
        assert ask(socket, seen(3.0))["actions"][0, 0] == 3.0


def test_a_traceback_goes_out_only_where_the_operator_wants_it():
    with serving(HeldPolicy(), debug=True) as server, connected(server) as socket:
        found = ask(socket, seen(prompt="break"))
        assert found.startswith("Traceback") and "in infer" in found
        assert found.splitlines()[-1] == "policy: RuntimeError: an engine broke"


def test_health_and_pings_are_answered_while_the_policy_computes():
    policy = HeldPolicy(held=True)
    with serving(policy) as server, connected(server) as socket:
        send(socket, seen())
        policy.wait()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/healthz", timeout=30) as response:
            assert (response.status, response.read()) == (200, b"OK\n")
        assert socket.ping().wait(30)
        assert server.status().running == 1 and server.status().waiting == 0
        policy.go.set()
        assert take(socket)["actions"].shape == (5, 2)


def test_answers_come_in_the_order_of_the_questions():
    """Also that of an older one whose place a newer one took, and of one that was refused at once."""
    policy, watching = HeldPolicy(held=True), Watching()
    with serving(policy, watching) as server, connected(server) as socket:
        send(socket, seen(1.0))
        policy.wait()
        for content in (seen(2.0), b"\xc1", seen(3.0)):
            send(socket, content)
        in_line(server, [3])
        policy.go.set()
        found = [take(socket) for _ in range(4)]
    assert found[0]["actions"][0, 0] == 1.0 and found[3]["actions"][0, 0] == 3.0
    assert found[1] == "replaced: a newer observation of this client took its place" and found[2].startswith("frame: ")
    assert [request.outcome for request in watching.requests] == ["answered", "replaced", "frame", "answered"]
    assert [len(policy.calls), policy.calls[1][0]["state"][0]] == [2, 3.0]


def test_watchers_are_told_of_every_request_client_and_policy():
    watching, asked = Watching(), seen(1.0, ki_edge={"id": "a", "begins": True, "reported": {"deadline_misses": 1}})
    with serving(HeldPolicy(), watching) as server:
        with connected(server) as socket:
            address = f"127.0.0.1:{socket.local_address[1]}"
            ask(socket, asked)
            ask(socket, seen(prompt="break"))
            wait_until(lambda: server.status().clients[0].refused == 1)
            (client,) = server.status().clients
            assert (client.address, client.answered) == (address, 1) and client.last_ms > 0
        wait_until(lambda: ("left", address) in watching.events)
        assert server.status().clients == ()
    assert watching.events == [("connected", address), ("left", address), ("closed", "")]
    ((contract, told),) = watching.policies
    assert contract == CONTRACT and told["horizon"] == 5
    first, second = watching.requests
    assert (first.id, first.client, first.outcome, first.batch, first.begins) == ("a", address, "answered", 1, True)
    assert set(first.stages) == {"read", "wait", "preprocess", "denoise", "write"} and first.total > 0
    assert first.reported == {"deadline_misses": 1.0} and first.error is None
    assert first.observation["state"][0] == 1.0 and first.answer["actions"].shape == (5, 2)
    assert first.received == len(pack(asked)) and first.sent > 0
    assert (second.outcome, second.error, second.answer) == ("policy", "RuntimeError: an engine broke", None)


def test_a_watcher_that_fails_ends_nothing_and_is_told_of_once():
    class Failing(Watching):
        def handled(self, request):
            raise OSError("disk full")

    with serving(HeldPolicy(), Failing()) as server, connected(server) as socket:
        for number in (1.0, 2.0):
            assert ask(socket, seen(number))["actions"][0, 0] == number
    assert server.said == ["ki-serve: Failing failed: OSError: disk full"]


def test_pages_are_served_beside_the_websocket():
    pages = {"/metrics": lambda query, headers: (200, "text/plain", f"{query} {headers['x-one']}".encode())}
    with serving(HeldPolicy()) as server:
        server.pages.update(pages)
        door = HTTPConnection("127.0.0.1", server.port, timeout=30)
        door.request("GET", "/metrics?a=1&b=", headers={"X-One": "two"})
        answer = door.getresponse()
        assert (answer.status, answer.read()) == (200, b"{'a': '1', 'b': ''} two")
        assert answer.getheader("X-Content-Type-Options") == "nosniff" and answer.getheader("Server") is None
        door.request("GET", "/other")
        assert door.getresponse().status == 404


def test_inside_a_loop_of_ones_own():
    """`open` and `ended` are for programs that have an event loop already."""
    from ki_runtime.serving import Server

    async def main():
        server = Server(LocalEngine(HeldPolicy(), name="mine"), ServerOptions(port=0))
        await server.open()
        async with connect(server.uri, proxy=None) as socket:
            await socket.recv()
            await socket.send(pack(seen(4.0)))
            assert isinstance(await socket.recv(), bytes)
            begun = time.monotonic()
            server.stop()
            await server.ended()
            return server.engine.metadata["name"], time.monotonic() - begun

    name, seconds = asyncio.run(main())
    assert name == "mine" and seconds < 30
