"""A real server with its monitor: what changes with requests, and all of ki-serve's options in one process."""

import json
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from websockets.sync.client import connect

from ki_edge.policy.contract import PolicyContract
from ki_edge.recordings.collection import open_recordings
from ki_runtime.monitoring.flags import open_monitor
from ki_runtime.monitoring.monitor import Monitor
from ki_runtime.monitoring.request_recorder import RequestRecorder
from ki_runtime.remote.packing import pack, unpack
from ki_runtime.serving import Server, ServerOptions
from ki_runtime.serving.cli import main
from ki_runtime.serving.flags import build_parser

from .monitored import get, status
from .serving_parts import HeldPolicy, ask, connected, seen, send, take, wait_until

parser = pytest.importorskip("prometheus_client.parser", reason="pip install 'ki-edge[serve]'")
ROOT = Path(__file__).parents[2]


@contextmanager
def watched(policy, options=None, **monitoring):
    """(the server, its address over HTTP)."""
    monitor = Monitor(**monitoring)
    server = Server(policy, ServerOptions(port=0, **(options or {})), watchers=[monitor], say=[].append)
    server.pages.update(monitor.pages(server.status))
    with server:
        yield server, server.uri.replace("ws", "http", 1)
    assert monitor.failure is None


def metrics(address):
    families = parser.text_string_to_metric_families(get(f"{address}/metrics")[2].decode())
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def facts(address, **headers):
    return json.loads(get(f"{address}/status.json", **headers)[2])


def test_metrics_and_page_follow_the_requests():
    with watched(HeldPolicy()) as (server, address):
        before = metrics(address)
        assert before["ki_serve_requests_total", "answered"] == before["ki_serve_clients",] == 0
        with connected(server) as socket:
            for number in range(3):
                ask(socket, seen(number, ki_edge={"reported": {"deadline_misses": 2, "guards.velocity": 1}}))
            assert ask(socket, {"images": {}}).startswith("observation: state is missing")
            send(socket, b"\xc1")
            assert take(socket).startswith("frame:")
            wait_until(lambda: facts(address)["counts"].get("requests.refused") == 2)
            found, shown = metrics(address), facts(address)
            (client,) = shown["clients"]
            assert client["address"] == f"127.0.0.1:{socket.local_address[1]}"
            assert client["answered"] == 3 and client["refused"] == 2 and client["last_ms"] > 0
            assert shown["policy"]["horizon"] == "5" and shown["latency"]["p50"] > 0 and shown["connected"] == 1
            image = get(f"{address}/picture?client={client['address']}&camera=cam")
            assert image[0] == 200 and image[2][:2] == b"\xff\xd8"
        assert found["ki_serve_clients",] == 1 and found["ki_serve_requests_total", "answered"] == 3
        assert found["ki_serve_errors_total", "observation"] == found["ki_serve_errors_total", "frame"] == 1
        assert found["ki_serve_client_deadline_misses_total",] == 6
        assert found["ki_serve_client_guards_total", "velocity"] == 3
        for stage in ("read", "wait", "preprocess", "denoise", "write"):
            assert found["ki_serve_stage_seconds_count", stage] >= 3, stage
        assert found["ki_serve_stage_seconds_count", "other"] == 0
        assert found["ki_serve_batch_size_count",] >= 3 and found["ki_serve_received_bytes_total",] > 3 * 1800
        wait_until(lambda: metrics(address)["ki_serve_clients",] == 0)
        assert get(f"{address}/picture?client={client['address']}&camera=cam")[0] == 404


def test_what_waits_and_runs_is_seen_while_the_policy_computes():
    policy = HeldPolicy(held=True)
    with watched(policy) as (server, address), connected(server) as one, connected(server) as two:
        send(one, seen(1.0))
        policy.wait()
        send(two, seen(2.0))
        wait_until(lambda: facts(address)["queue"] == {"waiting": 1, "running": 1})
        found = metrics(address)  # a scrape waits for nobody
        assert (found["ki_serve_queue_depth",], found["ki_serve_running",]) == (1, 1)
        send(two, seen(3.0))  # takes the place of the one before
        wait_until(lambda: metrics(address)["ki_serve_dropped_total", "replaced"] == 1)
        policy.go.set()
        assert isinstance(take(one), dict) and isinstance(take(two), str) and isinstance(take(two), dict)


def test_scrapes_while_clients_come_and_go():
    stop, found = threading.Event(), []
    with watched(HeldPolicy()) as (server, address):

        def scrape():
            while not stop.is_set():
                found.append((get(f"{address}/metrics")[0], get(f"{address}/status.json")[0]))

        thread = threading.Thread(target=scrape)
        thread.start()
        for number in range(25):
            with connected(server) as socket:
                ask(socket, seen(number))
        stop.set()
        thread.join()
        wait_until(lambda: metrics(address)["ki_serve_requests_total", "answered"] == 25)
    assert set(found) == {(200, 200)}


def test_requests_are_recorded_while_it_serves(tmp_path):
    pytest.importorskip("av", reason="pip install 'ki-edge[record]'")
    said = []
    recorder = RequestRecorder(tmp_path, reserve=0, say=said.append)
    with watched(HeldPolicy(), recorder=recorder) as (server, address):
        for client in range(2):
            with connected(server) as socket:
                for number in range(4):
                    ask(socket, seen(10 * client + number, ki_edge={"begins": number == 2}))
        wait_until(lambda: facts(address)["recording"].startswith("4 episodes, 8 requests"))
        assert metrics(address)["ki_serve_recording",] == 1 and metrics(address)["ki_serve_recording_bytes",] > 1000
    (folder,) = tmp_path.iterdir()
    recordings = open_recordings(folder)
    states = [recordings.episode(at).state[:, 0].tolist() for at in range(len(recordings))]
    assert sorted(states) == [[0, 1], [2, 3], [10, 11], [12, 13]] and not said
    np.testing.assert_array_equal(
        recordings.episode(0).actions, np.repeat(recordings.episode(0).state[:, :1], 2, axis=1)
    )


def test_a_disk_that_fills_up_costs_the_recording_only(tmp_path, largest_file):
    pytest.importorskip("av", reason="pip install 'ki-edge[record]'")
    said = []
    recorder = RequestRecorder(tmp_path, reserve=0, say=said.append)
    with watched(HeldPolicy(), recorder=recorder) as (server, address), connected(server) as socket:
        ask(socket, seen(1.0))
        wait_until(lambda: metrics(address)["ki_serve_recorded_total",] == 1)
        ask(socket, seen(2.0, ki_edge={"begins": True}))
        wait_until(lambda: metrics(address)["ki_serve_recorded_episodes_total",] == 1)
        with largest_file(100):
            ask(socket, seen(3.0, ki_edge={"begins": True}))
            wait_until(lambda: said)
        answer = ask(socket, seen(4.0))
        assert answer["actions"][0, 0] == 4.0 and "stopped: cannot write" in facts(address)["recording"]
        assert metrics(address)["ki_serve_recording",] == 0
    assert len(said) == 1 and len(open_recordings(next(tmp_path.iterdir()))) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--record", "{file}"], "cannot write {file}: "),
        (["--record", "{file}/below"], "cannot write {file}/below: "),
        (["--record-limit", "0"], "--record-limit 0: expected GB"),
        (["--record-limit", "nan"], "--record-limit nan: expected GB"),
        (["--record-limit", "-3"], "--record-limit -3: expected GB"),
    ],
)
def test_what_cannot_be_recorded_is_said_before_anything_is_loaded(tmp_path, capsys, words, line):
    file = tmp_path / "file"
    file.write_text("x")
    assert main(["no_such_bundle", *(word.format(file=file) for word in words)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"ki-serve: error: {line.format(file=file)}") and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        ([], {"/metrics", "/", "/page.css", "/page.js", "/icon.svg", "/status.json", "/picture"}),
        (["--no-page"], {"/metrics"}),
        (["--no-page", "--no-metrics"], set()),
        (["--log-json", "--show-clients", "--no-page"], {"/metrics"}),
    ],
)
def test_options_choose_the_pages(words, paths):
    options = build_parser().parse_args(["bundle", *words])
    monitor = open_monitor(options, key=None, loopback=False, say=[].append)
    assert set(monitor.pages(status)) == paths
    monitor.close()


KEY = "a-key-of-some-length"


def test_the_command_with_everything_on(fetch_bundle, tmp_path):
    """ki-serve in a process of its own: pages, log, recording, and what is left after SIGTERM."""
    pytest.importorskip("av", reason="pip install 'ki-edge[record]'")
    (tmp_path / "key").write_text(KEY)
    command = [sys.executable, "-m", "ki_runtime.serving.cli", fetch_bundle, "--port", "0", "--log-json"]
    command += ["--api-key-file", tmp_path / "key", "--record", tmp_path / "run", "--record-limit", "2"]
    log = (tmp_path / "log.jsonl").open("w")
    with log, subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        said = []
        while " answers at " not in (line := run.stderr.readline()):
            assert line, said
            said.append(line)
        uri = line.split(" answers at ")[1].strip()
        address, header = uri.replace("ws", "http", 1), {"Authorization": f"Api-Key {KEY}"}
        with connect(uri, compression=None, max_size=None, additional_headers=header, proxy=None) as socket:
            told = unpack(socket.recv(timeout=60), "server")["ki_edge"]
            contract = PolicyContract.from_json(told["contract"])
            images = {camera.key: np.full((64, 64, 3), 128, np.uint8) for camera in contract.cameras if camera.key}
            question = {"images": images, "state": np.zeros(contract.state_dim), "prompt": "move"}
            answers = []
            for number in range(3):
                socket.send(pack({**question, "ki_edge": {"id": f"q{number}", "seed": number}}))
                answers.append(unpack(socket.recv(timeout=60), "server"))
            assert get(f"{address}/picture?client=x&camera=y")[0] == 401 and "clients" not in facts(address)
            (client,) = facts(address, **header)["clients"]
            shown = get(f"{address}/picture?client={client['address']}&camera={next(iter(images))}", **header)
            assert shown[0] == 200 and get(f"{address}/")[0] == 200
            assert metrics(address)["ki_serve_requests_total", "answered"] == 3
        run.send_signal(signal.SIGTERM)
        _, rest = run.communicate(timeout=60)
        assert run.returncode == 0, rest
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["loaded", "connected", *["request"] * 3, "left"]
    assert [event["id"] for event in events if event["event"] == "request"] == ["q0", "q1", "q2"]
    (folder,) = (tmp_path / "run").iterdir()
    episode = open_recordings(folder).episode(0)
    np.testing.assert_array_equal(
        episode.actions, np.stack([answer["actions"][0] for answer in answers]).astype(np.float32)
    )
    assert len(open_recordings(folder)) == 1
    replay = [sys.executable, "-m", "ki_runtime.control.cli", fetch_bundle, "--robot", f"replay:{folder}"]
    done = subprocess.run(replay, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
