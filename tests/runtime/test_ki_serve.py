"""ki-serve as a user starts it: the shipped policy, its answers bit for bit, signals, and what it refuses."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ki_edge.errors import BackendError
from ki_runtime import Policy
from ki_runtime.policy.warming import blank_observation
from ki_runtime.remote.policy import RemotePolicy
from ki_runtime.serving import cli
from ki_runtime.serving.loading import ServedBundle, spare_cores

from .serving_parts import wait_until


class Started:
    """A running command. `lines`: what it printed on stderr."""

    def __init__(self, *words, program=("-m", "ki_runtime.serving.cli")):
        self.process = subprocess.Popen([sys.executable, *program, *map(str, words)], stderr=subprocess.PIPE, text=True)
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def line(self, words):
        """The first line with these words, once it is there."""
        wait_until(lambda: self.process.poll() is not None or any(words in line for line in self.lines))
        self._reader.join(0 if self.process.poll() is None else 60)
        return next(line for line in self.lines if words in line)

    @property
    def uri(self):
        return self.line("answers at").rpartition(" ")[2]

    def close(self):
        self.process.kill()
        self.process.wait(60)
        self._reader.join(60)
        self.process.stderr.close()

    def end(self, signum=signal.SIGTERM):
        self.process.send_signal(signum)
        status = self.process.wait(60)
        self._reader.join(60)
        return status


@pytest.fixture
def started(monkeypatch):
    monkeypatch.delenv("KI_API_KEY", raising=False)
    with contextlib.ExitStack() as running:

        def start(*words, **program):
            command = Started(*words, **program)
            running.callback(command.close)
            return command

        yield start


def test_answers_are_the_policys_own_and_sigterm_ends_it_well(started, fetch_bundle):
    command = started(fetch_bundle, "--port", 0, "--max-batch", 2)
    remote = RemotePolicy(command.uri)
    policy = Policy.load(fetch_bundle, threads=spare_cores())
    assert remote.contract == policy.contract
    random = np.random.default_rng(3)
    for number in range(3):
        pictures = {key: random.integers(0, 256, (48, 64, 3), np.uint8) for key in ("front_left", "front_right")}
        seen = {"images": pictures, "state": random.normal(size=5), "prompt": "reach the red target"}
        noise = random.standard_normal(remote_shape(policy), np.float32)
        np.testing.assert_array_equal(
            remote.infer(seen, noise=noise)["actions"], policy.infer(seen, noise=noise)["actions"]
        )
        np.testing.assert_array_equal(
            remote.infer(seen, seed=number)["actions"], policy.infer(seen, seed=number)["actions"]
        )
    assert "an inference takes" in command.line("warmed up in")
    begun = time.monotonic()
    assert command.end() == 0
    assert time.monotonic() - begun < 30  # one second, on a machine that has nothing else to do
    with pytest.raises(BackendError):
        remote.infer(seen)
    assert not any("Traceback" in line for line in command.lines)


def remote_shape(policy):
    return policy.contract.action_horizon, policy.contract.model_action_dim


def test_sighup_loads_the_folder_again_and_ctrl_c_ends_it(started, fetch_bundle, tmp_path):
    folder = tmp_path / "served"
    shutil.copytree(fetch_bundle, folder)
    command = started(folder, "--port", 0, "--max-batch", 1)
    remote = RemotePolicy(command.uri)
    seen = blank_observation(remote.contract)
    before = remote.infer(seen, seed=1)["actions"]
    weights = folder / json.loads((folder / "manifest.json").read_text())["weights"]["file"]
    whole = weights.read_bytes()
    replace(weights, whole[:-64] + bytes(64))
    command.process.send_signal(signal.SIGHUP)
    assert "not reloaded, the policy that was there goes on: " in command.line("not reloaded")
    np.testing.assert_array_equal(remote.infer(seen, seed=1)["actions"], before)
    replace(weights, whole)
    command.process.send_signal(signal.SIGHUP)
    assert command.line("reloaded: ").endswith("reloaded: served answers")
    np.testing.assert_array_equal(remote.infer(seen, seed=1)["actions"], before)
    remote.close()
    assert command.end(signal.SIGINT) == 130


ENDLESS = """
import sys
from ki_runtime.serving import cli, loading

def again(bundle):
    while True:
        bundle._load(False).warm_up()
        bundle._say("loaded once")

loading.ServedBundle.again = again
sys.exit(cli.main())
"""


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_ends_well_while_a_bundle_is_loaded(started, fetch_bundle, signum, status):
    """The engine's own threads are in the middle of something when Python ends."""
    command = started(fetch_bundle, "--port", 0, "--max-batch", 1, program=("-c", ENDLESS))
    assert command.uri
    command.process.send_signal(signal.SIGHUP)
    assert command.line("loaded once")
    assert command.end(signum) == status


def replace(path: Path, content: bytes):
    """As a copy does that is careful: the one that is open stays what it is."""
    other = path.with_suffix(".new")
    other.write_bytes(content)
    other.replace(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere"),
        (["BUNDLE", "--cert", "a"], "TLS needs --cert FILE and --key FILE, both"),
        (["BUNDLE", "--cert", "nowhere", "--key", "nowhere"], "nowhere cannot be read: No such file or directory"),
        (["BUNDLE", "--api-key-file", "nowhere"], "nowhere cannot be read: No such file or directory"),
        (["BUNDLE", "--port", "70000"], "port 70000: expected an integer from 0 to 65535"),
        (["BUNDLE", "--max-clients", "0"], "most_clients 0: expected an integer from 1"),
        (["BUNDLE", "--backend", "none"], "none"),
    ],
)
def test_what_it_refuses_is_one_line(fetch_bundle, capsys, words, said):
    assert cli.main([str(fetch_bundle) if word == "BUNDLE" else word for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err.splitlines()[-1] and "Traceback" not in captured.err


def test_an_address_that_is_taken_is_one_line(started, fetch_bundle):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        command = started(fetch_bundle, "--port", taken.getsockname()[1], "--max-batch", 1)
        assert command.process.wait(60) == 2
        assert "cannot listen on 127.0.0.1:" in command.line("error")


def test_other_machines_without_key_or_tls_are_warned_of(started, fetch_bundle):
    command = started(fetch_bundle, "--port", 0, "--host", "0.0.0.0", "--max-batch", 1)
    assert "there is no key (--api-key-file): anybody can ask it, and no TLS" in command.line("warning")
    assert command.end() == 0


def test_the_event_loop_has_a_core_of_its_own(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert spare_cores() == 5
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3}, raising=False)
    assert spare_cores() == 1
    assert ServedBundle("bundle")._threads == 1 and ServedBundle("bundle", threads=4)._threads == 4
