"""The page, /status.json and /picture: what they show, and to whom."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from ki_edge.policy.contract import Camera, PolicyContract
from ki_runtime.monitoring import pages as pages_module
from ki_runtime.monitoring import pictures as pictures_module
from ki_runtime.monitoring.access import Access, same
from ki_runtime.monitoring.events import HEADERS
from ki_runtime.monitoring.monitor import Monitor
from ki_runtime.monitoring.recent import SECONDS, Recent

from .monitored import CONTRACT, POLICY, ROBOT, answered, get, hosted, level, refused, status

pytest.importorskip("prometheus_client", reason="pip install 'ki-edge[serve]'")
KEY = "correct horse battery"
HERE = {"host": "127.0.0.1:8000"}


def monitor(**options):
    made = Monitor(**options)
    made.loaded(CONTRACT, POLICY)
    made.connected(ROBOT)
    for number in range(4):
        made.handled(answered(number, reported={"deadline_misses": 2, "guards.velocity": 1}))
    made.handled(refused(error="state has shape (2,)"))
    made.handled(refused("replaced", None))
    return made


def facts(made, headers=HERE, now=lambda: status(ROBOT)):
    code, kind, body = made.pages(now)["/status.json"]({}, headers)
    assert (code, kind) == (200, "application/json")
    return json.loads(body)


def picture(made, headers=HERE, client=ROBOT, camera="front"):
    return made.pages(lambda: status(ROBOT))["/picture"]({"client": client, "camera": camera}, headers)


def test_status():
    found = facts(monitor())
    assert found["accepting"] and found["connected"] == 1 and found["queue"] == {"waiting": 3, "running": 2}
    assert found["uptime_s"] == pytest.approx(300, abs=5)
    (client,) = found["clients"]
    assert client.pop("connected_s") == pytest.approx(75, abs=5)
    assert client == {"address": ROBOT, "answered": 12, "refused": 1, "last_ms": 42.5}
    assert found["latency"] == {"p50": 43.5, "p99": pytest.approx(44.97, abs=0.01), "max": 45.0}
    assert found["wait"]["p50"] == 3.0 and found["batch"] == 2.0
    assert found["counts"] == {
        "requests.answered": 4, "requests.refused": 1, "requests.dropped": 1, "dropped.replaced": 1,
        "deadline_misses": 8, "guards.velocity": 4,
    }  # fmt: skip
    assert found["last_error"]["line"] == "state has shape (2,)"
    assert found["policy"] == {
        "name": "fetch", "backend": "ort", "horizon": "5", "rate": "20.0", "versions": "ki-edge 0.1.0",
    }  # fmt: skip
    assert found["cameras"] == ["front", "wrist/left"] and "recording" not in found


def test_nothing_has_happened_yet():
    found = facts(Monitor(), now=status)
    assert found["latency"] == {"p50": None, "p99": None, "max": None} and found["batch"] is None
    assert found["clients"] == found["cameras"] == [] and found["last_error"] is None


def test_history_is_by_the_second():
    clock = [1000.2]
    recent = Recent(lambda: clock[0])
    for second, totals in ((1000.2, (10, 20, 30)), (1002.0, (50,)), (1003.5, (70, 90))):
        clock[0] = second
        for total in totals:
            recent.handled(answered(total=float(total)))
    clock[0] = 1004.1
    history = recent.to_json()["history"]
    assert len(history["p50"]) == SECONDS
    assert history["p50"][-4:] == [20.0, None, 50.0, 80.0] and history["max"][-4:] == [30.0, None, 50.0, 90.0]
    assert history["answered"][-4:] == [3, 0, 1, 2] and recent.to_json()["per_second"] == 0.6
    clock[0] = 1004.1 + SECONDS + 1
    assert set(recent.to_json()["history"]["p50"]) == {None}
    for second in range(2000, 2400):  # as many seconds as it likes
        clock[0] = second
        for _ in range(3):
            recent.handled(answered())
    assert len(recent._seconds) == SECONDS


def test_pictures_are_those_that_came():
    made = monitor()
    code, kind, body = picture(made, camera="wrist/left")
    assert (code, kind) == (200, "image/jpeg")
    shown = np.asarray(Image.open(io.BytesIO(body)))
    assert shown.shape == (33, 40, 3) and abs(shown.mean() - level(3)) < 3
    for client, camera in ((ROBOT, "back"), ("10.0.0.1:1", "front"), (ROBOT, "../front"), ("", "")):
        assert picture(made, client=client, camera=camera)[0] == 404
    made.left(ROBOT, "closed")
    assert picture(made)[0] == 404


@pytest.mark.parametrize(
    "image",
    [
        np.full((3, 48, 64), 99, np.uint8),  # planes
        np.full((48, 64, 3), 99 / 255, np.float32),
        np.full((1200, 1600, 3), 99, np.uint8),  # shown smaller
    ],
)
def test_pictures_of_every_form(image):
    made = monitor()
    made.handled(answered(observation={"images": {"front": image}, "state": np.zeros(3), "prompt": "x"}))
    shown = np.asarray(Image.open(io.BytesIO(picture(made)[2])))
    assert abs(shown.mean() - 99) < 2 and max(shown.shape) <= 480


def test_an_observation_without_pictures_shows_none():
    made = monitor()
    for observation in ({}, {"images": 3}, {"images": {"front": "no picture"}}, {"images": {"front": np.zeros(4)}}):
        made.handled(answered(observation=observation))
        assert picture(made)[0] == 404
    assert made.failure is None


def test_pictures_that_are_kept_are_bounded(monkeypatch):
    monkeypatch.setattr(pictures_module, "MOST_BYTES", 100_000)
    made = monitor()
    for client in range(50):
        made.handled(answered(client, f"10.0.0.{client}:1", received=30_000))
    there = [client for client in range(50) if picture(made, client=f"10.0.0.{client}:1")[0] == 200]
    assert there == [47, 48, 49]
    assert not monitor(loopback=False)._pictures._seen  # nobody may see them
    made.handled(answered(0, "10.0.0.49:1", received=100_001))
    assert picture(made, client="10.0.0.49:1")[0] == 404


DENIED = {
    "no key on loopback, asked for under another name": ({}, {"host": "evil.example:8000"}),
    "no key on loopback, without a name": ({}, {}),
    "no key, open to the network": ({"loopback": False}, HERE),
    "a key, and none given": ({"key": KEY}, HERE),
    "another key": ({"key": KEY}, {**HERE, "authorization": "Api-Key correct horse"}),
    "a longer key": ({"key": KEY}, {**HERE, "authorization": f"Api-Key {KEY}x"}),
    "no scheme": ({"key": KEY}, {**HERE, "authorization": KEY}),
    "an empty key": ({"key": KEY}, {**HERE, "authorization": "Api-Key "}),
    "not ASCII": ({"key": KEY}, {**HERE, "authorization": "Api-Key \u00fc\udcff"}),
    "a key and shown to all": ({"key": KEY, "open_to_all": True}, HERE),
}
ALLOWED = {
    "loopback": ({}, HERE),
    "localhost": ({}, {"host": "localhost:8000"}),
    "loopback of version 6": ({}, {"host": "[::1]:8000"}),
    "without a port": ({}, {"host": "LOCALHOST"}),
    "the key": ({"key": KEY, "loopback": False}, {"host": "robot7:8000", "authorization": f"Api-Key {KEY}"}),
    "as bearer": ({"key": KEY}, {"authorization": f"bearer {KEY}"}),
    "shown to all": ({"loopback": False, "open_to_all": True}, {"host": "robot7:8000"}),
}


@pytest.mark.parametrize(("options", "headers"), DENIED.values(), ids=DENIED)
def test_what_clients_sent_is_not_shown_to_everybody(options, headers):
    made = monitor(**options)
    code, kind, body = picture(made, headers)
    assert code == (401 if "key" in options else 403) and kind == "text/plain" and len(body) < 200
    found = facts(made, headers)
    assert "clients" not in found and "cameras" not in found and found["last_error"] is None
    assert ROBOT not in json.dumps(found) and KEY not in json.dumps(found)
    assert found["connected"] == 1 and found["latency"]["p50"] == 43.5
    assert found["details"]["shown"] is False and found["details"]["needs_key"] == ("key" in options)


@pytest.mark.parametrize(("options", "headers"), ALLOWED.values(), ids=ALLOWED)
def test_who_may_see_it(options, headers):
    made = monitor(**options)
    assert picture(made, headers)[0] == 200
    assert facts(made, headers)["clients"][0]["address"] == ROBOT


def test_keys_are_compared_whole():
    assert same(KEY, KEY) and not same(KEY[:-1], KEY) and not same("", KEY)
    assert Access(KEY, loopback=True).needs_key and not Access(None, loopback=True).needs_key


def test_names_that_come_from_outside_stay_data():
    evil = "</script><img src=x onerror=alert(1)>"
    made = monitor()
    made.handled(refused(error=evil))
    found = facts(made, now=lambda: status(evil, policy={"name": evil, "x": {"y": object()}, "z": [1] * 1000}))
    assert found["clients"][0]["address"] == found["policy"]["name"] == found["last_error"]["line"] == evil
    assert set(found["policy"]) == {"name"}


def test_many_clients_and_long_names_are_cut():
    found = facts(monitor(), now=lambda: status(*map(str, range(1000)), policy={"name": "n" * 10_000}))
    assert len(found["clients"]) == pages_module.MOST_CLIENTS and found["connected"] == 1000
    assert len(found["policy"]["name"]) == pages_module.LONGEST


def test_files_over_http():
    with hosted(monitor().pages(lambda: status(ROBOT))) as address:
        kinds = {}
        for path in ("/", "/page.css", "/page.js", "/icon.svg", "/status.json", "/metrics"):
            code, headers, body = get(address + path)
            assert code == 200 and body
            kinds[path] = headers["Content-Type"].split(";")[0]
            assert all(headers[name] == value for name, value in HEADERS.items())
        assert list(kinds.values())[:4] == ["text/html", "text/css", "text/javascript", "image/svg+xml"]
        page = get(address + "/")[2].decode()
        script = get(address + "/page.js")[2].decode()
    assert not re.search(r"https?://|<script>|\sstyle=|\son\w+=", page)  # all its own, as its CSP demands
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy


def test_a_droid_policy_has_its_own_keys():
    contract = PolicyContract(
        robot="droid",
        cameras=(Camera("base_0_rgb", "observation/exterior_image_1_left"), Camera("left_wrist_0_rgb", None, False)),
        state_dim=8,
        action_dim=8,
        action_horizon=10,
        execute=8,
    )
    made = Monitor()
    made.loaded(contract, POLICY)
    made.handled(answered(observation={"observation/exterior_image_1_left": np.full((8, 8, 3), 7, np.uint8)}))
    assert facts(made)["cameras"] == ["observation/exterior_image_1_left"]
    assert picture(made, camera="observation/exterior_image_1_left")[0] == 200
