"""Who comes in: keys, TLS, browsers, too many; and what a connection costs that says nothing, or never ends."""

import contextlib
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from http.client import HTTPConnection

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from ki_edge.errors import ArgumentError
from ki_runtime.remote.packing import pack
from ki_runtime.serving import Server, ServerOptions, client, listening
from ki_runtime.serving.listening import read_key

from .serving_parts import HeldPolicy, Watching, ask, connected, seen, serving, take, wait_until

KEY = "a-key-of-some-length"
UPGRADE = (
    "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)


def raw(server):
    """A TCP connection that says nothing by itself."""
    return contextlib.closing(socket.create_connection(("127.0.0.1", server.port), timeout=60))


def ended(tcp):
    """Whether the server ended it, once it did: all that it had to say is read."""
    with contextlib.suppress(ConnectionResetError):
        while tcp.recv(1 << 16):
            pass
    return True


def status_of(server, **headers):
    with pytest.raises(InvalidStatus) as error, connected(server, **headers):
        pass
    return error.value.response.status_code, error.value.response.body.decode()


@pytest.mark.parametrize("sent", [None, "", "Api-Key", "Api-Key ", f"Api-Key {KEY}x", f"Api-Key {KEY[:-1]}", KEY, "é"])
def test_a_wrong_key_does_not_come_in(sent):
    with serving(HeldPolicy(), api_key=KEY) as server:
        headers = {} if sent is None else {"Authorization": sent}
        status, line = status_of(server, **headers)
        assert status == 401 and line == "this server wants its key: Authorization: Api-Key KEY\n"
        with connected(server, Authorization=f"Api-Key {KEY}") as socket_:
            assert ask(socket_, seen(1.0))["actions"][0, 0] == 1
        assert get(server, "/healthz") == (b"OK\n", 200)  # for load balancers


def get(server, path, method="GET", **headers):
    with contextlib.closing(HTTPConnection("127.0.0.1", server.port, timeout=60)) as door:
        door.request(method, path, headers=headers)
        answer = door.getresponse()
        return answer.read(), answer.status


@pytest.mark.parametrize(
    ("content", "fine"),
    [
        (f"{KEY}\n", True),
        (f"  {KEY} \r\n", True),
        ("short\n", False),
        ("", False),
        ("two words of it\n", False),
        ("ä" * 20, False),
        ("two\nlines-of-it", False),
        ("x" * 2000, False),
    ],
)
def test_a_key_is_one_line_of_a_file(tmp_path, content, fine):
    (tmp_path / "key").write_text(content, encoding="utf-8")
    if fine:
        assert read_key(tmp_path / "key") == KEY
        return
    with pytest.raises(ArgumentError, match="key"):
        read_key(tmp_path / "key")


def test_a_browser_does_not_come_in():
    """Any page that is open on this machine could ask a server on it."""
    with serving(HeldPolicy()) as server:
        assert status_of(server, Origin="https://some.page")[0] == 403


def test_more_clients_than_may_are_told():
    with serving(HeldPolicy(), most_clients=2) as server:
        with connected(server) as first, connected(server):
            assert status_of(server) == (503, "as many clients are connected as may be (--max-clients)\n")
            assert ask(first, seen(1.0))["actions"][0, 0] == 1
        wait_until(lambda: not server.status().clients)
        with connected(server) as again:
            assert ask(again, seen(2.0))["actions"][0, 0] == 2


def test_connections_that_say_nothing_are_few(monkeypatch):
    monkeypatch.setattr(listening, "OPENING", 600.0)
    with serving(HeldPolicy(), most_clients=1) as server, contextlib.ExitStack() as opened:
        silent = [opened.enter_context(raw(server)) for _ in range(100)]
        assert all(ended(tcp) for tcp in silent[65:])  # the bound: 64 beside the clients
        wait_until(lambda: len(server._listener.opened) == 65)
        for tcp in silent:
            tcp.close()
        wait_until(lambda: not server._listener.opened)
        with connected(server) as socket_:
            assert ask(socket_, seen(1.0))["actions"][0, 0] == 1


def test_connections_that_say_nothing_end(monkeypatch):
    monkeypatch.setattr(listening, "OPENING", 0.3)
    with serving(HeldPolicy(), most_clients=1) as server, contextlib.ExitStack() as opened:
        silent = [opened.enter_context(raw(server)) for _ in range(150)]
        slow = opened.enter_context(raw(server))
        slow.sendall(b"GET / HT")  # and then nothing
        assert all(ended(tcp) for tcp in [*silent, slow])
        with connected(server) as socket_:
            assert ask(socket_, seen(1.0))["actions"][0, 0] == 1


def test_a_thousand_connections_that_are_left_leave_nothing_behind():
    with serving(HeldPolicy()) as server:
        for _ in range(1000):
            with raw(server):
                pass
        wait_until(lambda: not server._listener.opened)
        with connected(server) as socket_:
            assert ask(socket_, seen(1.0))["actions"][0, 0] == 1


def opened_by_hand(tcp):
    """Through the handshake, and past the metadata."""
    tcp.sendall((UPGRADE + "\r\n").encode())
    found = b""
    while b"contract" not in found:
        found += tcp.recv(1 << 16)


def frame(payload, opcode=2, fin=True, length=None):
    """A masked frame, the mask being zeros; `length`: what it claims."""
    claimed = len(payload) if length is None else length
    return struct.pack(">BBQI", (0x80 if fin else 0) | opcode, 0x80 | 127, claimed, 0) + payload


def test_a_frame_of_many_parts_is_one_and_one_that_does_not_end_is_cut(monkeypatch):
    monkeypatch.setattr(client, "FRAME_SECONDS", 0.5)
    monkeypatch.setattr(listening, "PING", 600.0)
    watching, whole = Watching(), pack(seen(3.0))
    with serving(HeldPolicy(), watching) as server:
        with connected(server) as socket_:
            socket_.send([whole[:10], whole[10:20], whole[20:]])
            assert take(socket_)["actions"][0, 0] == 3
        with raw(server) as tcp:
            opened_by_hand(tcp)
            tcp.sendall(frame(whole[:10], fin=False) + frame(b"", 0, fin=False))
            assert ended(tcp)
        wait_until(lambda: not server.status().clients)


def test_half_a_frame_of_a_client_that_answers_no_ping_is_cut(monkeypatch):
    monkeypatch.setattr(listening, "PING", 0.2)
    monkeypatch.setattr(listening, "PONG", 0.2)
    with serving(HeldPolicy()) as server, raw(server) as tcp:
        opened_by_hand(tcp)
        tcp.sendall(frame(b"\x81", length=1000))  # the rest never comes
        assert ended(tcp)
        wait_until(lambda: not server.status().clients)


def test_half_a_frame_is_cut_whatever_pings_say(monkeypatch):
    monkeypatch.setattr(listening, "FRAME_SECONDS", 0.5)
    monkeypatch.setattr(listening, "PING", 600.0)
    for sent in (
        frame(b"\x81", length=1000),
        frame(b"", length=1000),
        frame(b"", 9) + frame(b"\x81", length=9),
        b"\x82",
    ):
        with serving(HeldPolicy()) as server, raw(server) as tcp:
            opened_by_hand(tcp)
            tcp.sendall(sent)  # the rest never comes
            assert ended(tcp)


def test_a_frame_that_the_server_does_not_read_is_not_late(monkeypatch):
    """Its client waits for answers; it sent too much meanwhile."""
    monkeypatch.setattr(listening, "FRAME_SECONDS", 0.3)
    monkeypatch.setattr(client, "UNANSWERED", 2)
    policy = HeldPolicy(held=True)
    with serving(policy) as server, connected(server) as one:
        big = pack(seen(1.0, padding=np.zeros(4 << 20, np.uint8)))
        sender = threading.Thread(target=lambda: [one.send(big) for _ in range(8)])
        sender.start()
        policy.wait()
        time.sleep(1.0)
        policy.go.set()
        assert [type(take(one)) for _ in range(8)].count(dict) >= 2
        sender.join(60)


def test_a_frame_that_is_too_large_ends_its_connection_before_it_is_read():
    with serving(HeldPolicy(), most_frame_mib=1) as server:
        with raw(server) as tcp:
            opened_by_hand(tcp)
            tcp.sendall(frame(b"", length=1 << 40))
            assert ended(tcp)
        with connected(server) as socket_, pytest.raises(ConnectionClosed) as error:
            assert socket_.metadata["ki_edge"]["most_frame_bytes"] == 1 << 20
            for _ in range(3):  # parts of half a MiB each
                socket_.send([b"x" * (1 << 19)] * 3)
                socket_.recv(timeout=60)
        assert error.value.rcvd.code == 1009


def test_a_client_that_takes_no_answer_is_cut(monkeypatch):
    monkeypatch.setattr(client, "WRITE_SECONDS", 0.3)
    monkeypatch.setattr(listening, "PING", 600.0)
    policy = HeldPolicy()
    policy.infer = lambda observation, **_: {"actions": b"x" * (32 << 20)}
    with serving(policy) as server, raw(server) as tcp:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        opened_by_hand(tcp)
        tcp.sendall(frame(pack(seen(1.0))))
        wait_until(lambda: not server.status().clients)


@pytest.mark.parametrize(
    "sent",
    [b"\0" * 100, b"POST /reload", b"HELLO\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"\x16\x03\x01" + b"x" * 600,
     b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 500 + b"\r\n",
     b"GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", (UPGRADE + "Upgrade: x\r\n\r\n").encode(),
     UPGRADE.replace("13", "12").encode() + b"\r\n", b"GET //[ HTTP/1.1\r\n\r\n", b"GET ?a=1 HTTP/1.1\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_request_ends_its_connection(sent):
    with serving(HeldPolicy()) as server:
        with raw(server) as tcp:
            tcp.sendall(sent)
            tcp.shutdown(socket.SHUT_WR)
            assert ended(tcp)
        assert get(server, "/healthz") == (b"OK\n", 200)


@pytest.mark.parametrize("sent", [b"GET //[ HTTP/1.1\r\n\r\n", (UPGRADE + "Upgrade: x\r\n\r\n").encode()])
def test_what_cannot_be_read_is_a_bad_request(sent):
    with serving(HeldPolicy()) as server, raw(server) as tcp:
        tcp.sendall(sent)
        assert tcp.recv(1 << 16).startswith(b"HTTP/1.1 400 ")


def test_over_tls(tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True,
    )  # fmt: skip
    trusted = ssl.create_default_context(cafile=certificate)
    monkeypatch.setattr(listening, "OPENING", 1.0)
    with serving(HeldPolicy(), certificate=certificate, private_key=key) as server:
        assert server.uri.startswith("wss://")
        with connect(server.uri, ssl=trusted, compression=None, proxy=None) as socket_:
            socket_.recv(timeout=60)
            assert ask(socket_, seen(2.0))["actions"][0, 0] == 2
        with raw(server) as tcp:
            tcp.sendall(b"\x16\x03\x01")
            assert ended(tcp)
    (tmp_path / "other").write_text("no key")
    with (
        pytest.raises(ArgumentError, match=r"are no PEM certificate with its key"),
        serving(HeldPolicy(), certificate=certificate, private_key=tmp_path / "other"),
    ):
        pass


def test_what_cannot_be_listened_on_is_said():
    with serving(HeldPolicy()) as server:
        for options in (ServerOptions(port=server.port), ServerOptions(host="no.such.host.invalid")):
            with pytest.raises(ArgumentError, match=f"cannot listen on {options.host}:{options.port}"):
                Server(HeldPolicy(), options).start()


@pytest.mark.parametrize(
    "wrong",
    [{"port": 65536}, {"port": "8000"}, {"most_clients": 0}, {"longest_wait": 0}, {"longest_wait": float("nan")},
     {"largest_batch": 0}, {"most_frame_mib": 2000}, {"certificate": "a"}, {"most_waiting": True}],
)  # fmt: skip
def test_options_out_of_range(wrong):
    with pytest.raises(ArgumentError):
        ServerOptions(**wrong)
