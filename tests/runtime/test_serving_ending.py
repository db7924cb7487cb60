"""How a server ends, and how it changes its policy: nobody who asked is left without a word."""

import asyncio
import threading
import time
from contextlib import closing
from http.client import HTTPConnection, HTTPException

import pytest
from websockets.exceptions import ConnectionClosedOK

from ki_edge.errors import BundleError
from ki_runtime.serving import LocalEngine

from .serving_parts import HeldPolicy, Watching, ask, connected, seen, send, serving, take, wait_until

KEY = "a-key-of-some-length"


def test_what_runs_is_answered_and_what_waits_is_told():
    policy, watching = HeldPolicy(held=True), Watching()
    with serving(policy, watching) as server:
        with connected(server) as running, connected(server) as waiting:
            send(running, seen(1))
            policy.wait()
            send(waiting, seen(2))
            wait_until(lambda: server.status().waiting == 1)
            server.stop()
            assert take(waiting) == "ending: the server ends: connect again later, or to another one"
            assert not server.status().accepting
            policy.go.set()
            assert take(running)["actions"][0, 0] == 1
            for socket in (running, waiting):
                with pytest.raises(ConnectionClosedOK):
                    socket.recv(timeout=30)
        assert watching.wait(2)[0].outcome == "ending"
    assert watching.events[-1] == ("closed", "") and len(policy.calls) == 1


def test_nobody_is_waited_for_that_was_answered():
    policy = HeldPolicy()
    with serving(policy) as server, connected(server) as socket:
        ask(socket, seen(1))

        async def finished():
            await asyncio.wait_for(asyncio.gather(*(client.finish() for client in server._clients)), 30)

        asyncio.run_coroutine_threadsafe(finished(), server._loop).result(60)


def test_an_abort_waits_for_no_inference():
    policy = HeldPolicy(held=True)
    with serving(policy) as server, connected(server) as socket:
        send(socket, seen(1))
        policy.wait()
        server.stop()
        wait_until(lambda: not server.status().accepting)
        server.abort()
        assert take(socket) == "ending: the server ends: connect again later, or to another one"
        server._thread.join(60)
        assert not server._thread.is_alive()
        policy.go.set()


def test_a_server_that_ends_waits_for_no_client_that_hangs():
    """One that neither reads nor says goodbye."""
    policy = HeldPolicy()
    policy.infer = lambda observation, **_: {"actions": b"x" * (32 << 20)}
    with serving(policy) as server, connected(server) as socket:
        socket.socket.setblocking(True)
        send(socket, seen(1))
        wait_until(lambda: server.status().running == 0)
        begun = time.monotonic()
        server.close()
        assert time.monotonic() - begun < 30  # of itself it takes one second


class Bundles:
    """`load` of a server: each time the next policy, or error."""

    def __init__(self, *found):
        self.found, self.go = list(found), threading.Event()
        self.go.set()

    def __call__(self):
        assert self.go.wait(60)
        found = self.found.pop(0)
        if isinstance(found, Exception):
            raise found
        return LocalEngine(found, name="next")


class Doubling(HeldPolicy):
    def infer(self, observation, **arguments):
        found = super().infer(observation, **arguments)
        return {**found, "actions": 2 * found["actions"]}


def post(server, method="POST", key=KEY, body=None):
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=60)) as door:
        door.request(method, "/reload", body, headers={} if key is None else {"Authorization": f"Api-Key {key}"})
        answer = door.getresponse()
        return answer.status, answer.read().decode()


def test_another_bundle_takes_over_between_two_requests():
    policy, watching = HeldPolicy(held=True), Watching()
    loading = Bundles(Doubling())
    loading.go.clear()
    with serving(policy, watching, loading, api_key=KEY) as server:
        with connected(server, Authorization=f"Api-Key {KEY}") as socket:
            found = []
            poster = threading.Thread(target=lambda: found.append(post(server)))
            poster.start()
            send(socket, seen(1))
            policy.wait()
            loading.go.set()
            wait_until(lambda: server.engine.metadata["name"] == "next")
            policy.go.set()
            assert take(socket)["actions"][0, 0] == 1  # by the one that it was asked of
            assert ask(socket, seen(1))["actions"][0, 0] == 2
            poster.join(60)
        assert not poster.is_alive()
        assert found == [(200, "reloaded: next answers\n")]
    assert [told["name"] for _, told in watching.policies] == ["policy", "next"]


@pytest.mark.parametrize("wrong", ["damaged", "contract", "rtc", "error"])
def test_a_bad_bundle_is_refused_and_the_old_one_stays(wrong):
    other = HeldPolicy()
    other.contract = type(other.contract).from_json({**other.contract.to_json(), "state_dim": 3})
    plain = HeldPolicy()
    plain.rtc = None
    found, line = {
        "damaged": (BundleError("weights.bin has 3 bytes"), "weights.bin has 3 bytes"),
        "contract": (other, "it has another contract (state_dim), and clients know the old one: start a server for it"),
        "rtc": (plain, "it has another rtc, and clients know the old one: start a server for it"),
        "error": (RuntimeError("two\nlines"), "RuntimeError: two lines"),
    }[wrong]
    loading = Bundles(found, Doubling())
    with (
        serving(HeldPolicy(), None, loading, api_key=KEY) as server,
        connected(server, Authorization=f"Api-Key {KEY}") as socket,
    ):
        assert post(server) == (409, f"not reloaded, the policy that was there goes on: {line}\n")
        assert ask(socket, seen(1))["actions"][0, 0] == 1
        assert post(server)[0] == 200
        assert ask(socket, seen(1))["actions"][0, 0] == 2


def test_reloads_come_one_at_a_time():
    loading = Bundles(Doubling())
    loading.go.clear()
    with serving(HeldPolicy(), None, loading, api_key=KEY) as server:
        found = []
        first = threading.Thread(target=lambda: found.append(post(server)))
        first.start()
        wait_until(lambda: server._reloading)
        assert post(server) == (409, "not reloaded: it is being loaded already\n")
        loading.go.set()
        first.join(60)
        assert found[0][0] == 200


@pytest.mark.parametrize(
    ("options", "asked", "status"),
    [
        ({"api_key": KEY}, {"method": "GET"}, 405),
        ({"api_key": KEY}, {"key": None}, 401),
        ({"api_key": KEY}, {"key": "another-key"}, 401),
        ({}, {}, 403),
    ],
)
def test_who_may_not_reload(options, asked, status):
    with serving(HeldPolicy(), None, Bundles(), **options) as server:
        assert post(server, **asked)[0] == status
    with serving(HeldPolicy(), api_key=KEY) as server:
        assert post(server)[0] == 404


def asked(server):
    """Its connection is cut."""
    with pytest.raises((OSError, HTTPException)):
        post(server)


def test_a_server_ends_while_a_bundle_is_loaded():
    loading = Bundles(Doubling())
    loading.go.clear()
    with serving(HeldPolicy(), None, loading, api_key=KEY) as server:
        poster = threading.Thread(target=lambda: asked(server))
        poster.start()
        wait_until(lambda: server._reloading)
        server.close()
        loading.go.set()
        poster.join(60)
        assert not poster.is_alive()
