"""What the network and broken clients do to a server: nobody else notices, and nothing of it stays."""

import contextlib
import gc
import random
import socket
import struct
import threading
import weakref

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.server import ServerProtocol

from ki_edge.proc import sizes
from ki_runtime import Policy
from ki_runtime.policy.warming import blank_observation
from ki_runtime.remote.packing import pack
from ki_runtime.serving import question

from .serving_parts import HeldPolicy, Watching, ask, connected, seen, send, serving, take, wait_until
from .test_serving_doors import UPGRADE, ended, frame, opened_by_hand, raw

MUTATED, HEADERS = 10_000, 1_000
ROOM = 48 << 20  # bytes that this process may have grown: its allocator keeps some


def resident():
    """Bytes of this process."""
    return sizes("/proc/self/status")["VmRSS"]


def mutated(generator, content):
    """With bytes changed, cut out, doubled, or put in."""
    found = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        at, what = generator.randrange(len(found)), generator.randrange(4)
        if what == 0:
            found[at] = generator.randrange(256)
        elif what == 1:
            del found[at : at + generator.randint(1, 9)]
        elif what == 2:
            found[at:at] = found[at : at + generator.randint(1, 9)]
        else:
            found[at:at] = generator.choice([b"\xc6\x7f\xff\xff\xff", b"\xdd\x00\x0f\xff\xff", b"\xff", b"\x91" * 40])
        if not found:
            return b""
    return bytes(found)


def test_ten_thousand_mutated_frames(data):
    generator = random.Random(13)
    whole = [path.read_bytes() for path in sorted((data / "openpi_frames").iterdir())]
    whole += [pack(seen(1.0)), pack(seen(1.0, ki_edge={"seed": 1, "rtc": {"actions": np.ones((3, 2)), "delay": 1}}))]
    watching = Watching()
    with serving(HeldPolicy(), watching) as server, connected(server) as one, connected(server) as other:
        before = None
        for number in range(MUTATED):
            send(one, mutated(generator, generator.choice(whole)))
            answer = take(one)
            assert isinstance(answer, dict) or answer.split(":")[0] in ("frame", "observation", "arguments", "policy")
            if number == MUTATED // 10:
                gc.collect()
                before = resident()
                watching.requests.clear()
            if number % 1000 == 0:
                assert ask(other, seen(2.0))["actions"][0, 0] == 2
        watching.requests.clear()
        gc.collect()
        assert resident() - before < ROOM


def test_a_thousand_mutated_headers():
    generator = random.Random(17)
    with serving(HeldPolicy()) as server:
        whole = (UPGRADE + "Authorization: Api-Key x\r\n\r\n").encode()
        others = [
            whole,
            b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST /reload HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
        ]
        for number in range(HEADERS):
            with raw(server) as tcp, contextlib.suppress(OSError):
                tcp.sendall(mutated(generator, others[number % 3]))
                tcp.shutdown(socket.SHUT_WR)
                assert ended(tcp)
        wait_until(lambda: not server._listener.opened)
        with connected(server) as one:
            assert ask(one, seen(1.0))["actions"][0, 0] == 1


def test_clients_that_are_killed_in_the_middle_of_a_frame():
    watching = Watching()
    with serving(HeldPolicy(), watching) as server, connected(server) as other:
        for _ in range(20):
            with raw(server) as tcp:
                opened_by_hand(tcp)
                tcp.sendall(frame(pack(seen(1.0)))[:-100])
                tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, as of a crash
        wait_until(lambda: len(server.status().clients) == 1)
        assert ask(other, seen(2.0))["actions"][0, 0] == 2
    assert [request.outcome for request in watching.requests] == ["answered"]


def test_fifty_clients_at_once_are_answered_alike():
    watching = Watching()
    counts, failures = [0] * 50, []

    def work(server, number):
        try:
            with connected(server) as one:
                for _ in range(5):
                    assert ask(one, seen(float(number)))["actions"][0, 0] == number
                    counts[number] += 1
        except Exception as error:
            failures.append(error)

    with serving(HeldPolicy(), watching) as server:
        threads = [threading.Thread(target=work, args=(server, number)) for number in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not failures and counts == [5] * 50
        wait_until(lambda: not server.status().clients)
    assert len(watching.requests) == 250


def test_endless_parts_and_frames_of_control_end_their_own_connection():
    with serving(HeldPolicy(), most_frame_mib=1) as server, connected(server) as other:
        with raw(server) as tcp, contextlib.suppress(OSError):
            opened_by_hand(tcp)
            tcp.sendall(frame(b"x" * (1 << 19), fin=False))
            for _ in range(8):  # more than one MiB, without an end
                tcp.sendall(frame(b"x" * (1 << 19), 0, fin=False))
            assert ended(tcp)
        for wrong in (frame(b"", 0), frame(b"x" * 200, 9), frame(b"", 3), frame(b"\xff\xfe", 1)):
            with raw(server) as tcp:
                opened_by_hand(tcp)
                tcp.sendall(wrong)
                assert ended(tcp)
        assert ask(other, seen(2.0))["actions"][0, 0] == 2


@pytest.mark.parametrize("light", [frame(b"", 9), frame(b"", 10), frame(b"", 0, fin=False)])
def test_a_flood_of_frames_that_ask_nothing_ends_its_connection(light):
    with serving(HeldPolicy()) as server, connected(server) as other:
        with raw(server) as tcp, contextlib.suppress(OSError):
            opened_by_hand(tcp)
            tcp.sendall(frame(b"", 2, fin=False) + light * 5_000)
            tcp.sendall(frame(b"", 0) + frame(b"last", 9))
            came = b""
            while b"last" not in came and (more := tcp.recv(1 << 16)):
                came += more
            assert b"last" not in came
        assert ask(other, seen(2.0))["actions"][0, 0] == 2


def test_others_have_their_turn_between_two_pieces_of_what_one_sends(monkeypatch):
    sizes_, receive = [], ServerProtocol.receive_data
    monkeypatch.setattr(
        ServerProtocol, "receive_data", lambda self, data: sizes_.append(len(data)) or receive(self, data)
    )
    with serving(HeldPolicy()) as server, connected(server) as one:
        answer = ask(one, seen(3.0, padding=np.zeros(3 << 20, np.uint8)))
        assert answer["actions"][0, 0] == 3
    assert max(sizes_) <= 1 << 13 and sum(sizes_) > 3 << 20


@pytest.mark.parametrize(
    "bad", [None, 5, [1], "text", {"timing": "x"}, {"timing": {"total_ms": "x"}}, {"timing": {"batch": "x"}},
            {"actions": object()}, {"actions": np.full((5, 2), np.nan)}],
)  # fmt: skip
def test_an_answer_that_is_none_is_one_line_and_the_next_question_is_answered(bad):
    policy = HeldPolicy()
    infer = policy.infer
    policy.infer = lambda observation, **more: bad if observation["state"][0] == 9 else infer(observation, **more)
    with serving(policy) as server, connected(server) as one:
        line = ask(one, seen(9.0))
        assert isinstance(line, str) and line.startswith("policy: ") and "\n" not in line
        assert ask(one, seen(2.0))["actions"][0, 0] == 2


def test_a_queue_that_fails_ends_the_server(monkeypatch):
    with serving(HeldPolicy()) as server, connected(server) as one:
        monkeypatch.setattr(server._room, "_next", lambda largest: 1 / 0)
        with contextlib.suppress(ConnectionClosed):
            ask(one, seen(1.0))
        server._thread.join(60)
        assert not server._thread.is_alive() and "ZeroDivisionError" in str(server.failure)


def test_an_idle_server_keeps_no_picture():
    kept = []
    policy = HeldPolicy()
    policy.infer = lambda observation, **more: (
        kept.append(weakref.ref(observation["big"])) or {"actions": np.ones((5, 2))}
    )
    with serving(policy) as server, connected(server) as one:
        for _ in range(3):
            ask(one, seen(1.0, big=np.zeros(1 << 20)))
        wait_until(lambda: gc.collect() is not None and not any(ref() is not None for ref in kept))


OWN_FIELDS = ["head", "id", "seed", "noise", "num_steps", "prompt", "rtc", "patience_ms", "begins", "reported"]


def test_wrong_types_in_every_own_field_are_one_line():
    chunk = {"actions": np.zeros((5, 2)), "delay": 1}
    values = [
        np.array("flow"),
        np.array(["flow", "x"]),
        np.zeros(3),
        np.zeros((2, 2)),
        np.bool_(1),
        b"x",
        [[]],
        {},
        1e400,
    ]
    with serving(HeldPolicy()) as server, connected(server) as one:
        for value in values:
            asked = [{name: value} for name in OWN_FIELDS] + [{"reported": {"a": value}}]
            asked += [{"head": "text", name: value} for name in ("max_tokens", "temperature", "allow_loc")]
            asked += [{"rtc": {**chunk, name: value}} for name in question.OF_RTC]
            for own in asked:
                answer = ask(one, seen(1.0, ki_edge=own))
                assert isinstance(answer, dict) or answer.startswith(("arguments: ", "policy: ")), (own, answer)
                assert isinstance(answer, dict) or "ValueError" not in answer, (own, answer)


WRONG = [None, True, -1, 1.5, float("nan"), "text", b"bytes", [], {}, [[]], {"a": 1}, 1 << 63, "x" * 100_000, "\x00",
         np.zeros(0), np.zeros((2, 2, 2, 2)), np.array("text"), np.array([b"x"]), np.full(5, np.inf), np.full(5, 1e38),
         np.zeros((1, 1, 3), np.uint8), np.zeros((0, 0, 3), np.uint8), np.zeros(5, ">f8"),
         np.zeros((4, 4, 4), np.uint8)]  # fmt: skip


@pytest.fixture(scope="module")
def real(fetch_bundle):
    return Policy.load(fetch_bundle, say=lambda line: None)


def test_wrong_types_in_every_field_are_one_line(real):
    """Of the real policy: each is told, and the next question of the same client is answered."""
    good = blank_observation(real.contract, "reach the red target")
    fields = [("state",), ("prompt",), ("images",), *(("images", key) for key in good["images"])]
    told = 0
    with serving(real) as server, connected(server) as one:
        for field in fields:
            for value in WRONG:
                content = {**good, "images": dict(good["images"])}
                place = content if len(field) == 1 else content["images"]
                place[field[-1]] = value
                answer = ask(one, content)
                told += isinstance(answer, str)
                assert isinstance(answer, dict) or answer.startswith("observation: "), (field, value, answer)
                assert isinstance(answer, dict) or ("\n" not in answer and len(answer) < 1100)
        for key in ("state", "images"):
            assert ask(one, {name: value for name, value in good.items() if name != key}).startswith("observation: ")
        assert ask(one, good)["actions"].shape == (real.contract.action_horizon, real.contract.action_dim)
    assert told > len(fields) * len(WRONG) // 2


def test_a_connection_that_is_closed_by_the_client_without_a_word():
    with serving(HeldPolicy()) as server:
        for _ in range(50):
            with connected(server) as one:
                send(one, seen(1.0))
        wait_until(lambda: not server.status().clients and not server._listener.opened)
        with connected(server) as one, pytest.raises(ConnectionClosed):
            one.close()
            ask(one, seen(1.0))
